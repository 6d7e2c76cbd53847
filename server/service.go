package server

import (
	"context"
	"time"

	"google.golang.org/protobuf/types/known/timestamppb"

	outboxv1 "github.com/outbox-platform/outbox/gen/go/outbox/v1"
	"github.com/outbox-platform/outbox/store"
)

// outboxService is outbox.v1.OutboxService.
type outboxService struct {
	outboxv1.UnimplementedOutboxServiceServer
	*Server
}

// Prepare implements outbox.v1.OutboxService.
func (s outboxService) Prepare(ctx context.Context, req *outboxv1.PrepareRequest) (*outboxv1.PrepareResponse, error) {
	c, a, err := s.unary(ctx, req.GetSource(), func(c *call) *apiError {
		return s.validator.prepare(c, req, c.source, s.sources.topics())
	})
	if err != nil {
		return nil, err
	}
	return &outboxv1.PrepareResponse{Token: appendToken(nil, a.Shards, c.request.Key)}, nil
}

// Publish implements outbox.v1.OutboxService.
func (s outboxService) Publish(ctx context.Context, req *outboxv1.PublishRequest) (*outboxv1.PublishResponse, error) {
	_, _, err := s.unary(ctx, req.GetSource(), func(c *call) *apiError {
		return s.validator.publish(c, req, c.source, s.sources.topics())
	})
	if err != nil {
		return nil, err
	}
	return &outboxv1.PublishResponse{}, nil
}

// Commit implements outbox.v1.OutboxService.
func (s outboxService) Commit(ctx context.Context, req *outboxv1.CommitRequest) (*outboxv1.CommitResponse, error) {
	if err := s.decide(ctx, store.KindCommit, req); err != nil {
		return nil, err
	}
	return &outboxv1.CommitResponse{}, nil
}

// Abort implements outbox.v1.OutboxService.
func (s outboxService) Abort(ctx context.Context, req *outboxv1.AbortRequest) (*outboxv1.AbortResponse, error) {
	if err := s.decide(ctx, store.KindAbort, req); err != nil {
		return nil, err
	}
	return &outboxv1.AbortResponse{}, nil
}

func (s outboxService) decide(ctx context.Context, kind store.Kind, req decisionRequest) error {
	_, _, err := s.unary(ctx, req.GetSource(), func(c *call) *apiError {
		return s.validator.decision(c, kind, req, c.source, s.shards)
	})
	return err
}

// unary is the path of every unary data call: fill is the validation that fills the request.
func (s outboxService) unary(ctx context.Context, name string, fill func(*call) *apiError) (*call, store.Answer, error) {
	src, err := s.findSource(ctx, name)
	if err != nil {
		return nil, store.Answer{}, err
	}
	c := &call{server: s.Server, source: src, started: time.Now(), wait: make(chan store.Answer, 1)}
	if e := fill(c); e != nil {
		s.metrics.refuse(e)
		return nil, store.Answer{}, e
	}
	if e := c.submit(); e != nil {
		s.metrics.refuse(e)
		return nil, store.Answer{}, e
	}
	a, e := c.await(ctx)
	if e != nil {
		return nil, a, e
	}
	return c, a, nil
}

// findSource returns the source of a call that was authorised for its name.
func (s *Server) findSource(ctx context.Context, name string) (*source, error) {
	src, err := s.sources.find(ctx, name)
	switch {
	case err != nil && ctx.Err() != nil:
		return nil, otherError(ctx.Err())
	case err != nil:
		s.log.Warn("looking a source up", "source", name, "error", err)
		return nil, errStoreUnavailable
	case src == nil:
		return nil, sourceDenied(name)
	}
	return src, nil
}

// GetTransaction implements outbox.v1.OutboxService.
func (s outboxService) GetTransaction(ctx context.Context, req *outboxv1.GetTransactionRequest) (*outboxv1.GetTransactionResponse, error) {
	if e := s.validator.message(req); e != nil {
		return nil, e
	}
	src, err := s.findSource(ctx, req.GetSource())
	if err != nil {
		return nil, err
	}
	key := store.Key{Source: src.ID, Transaction: store.TransactionID(req.GetTransactionId())}
	tx, err := s.store.Transaction(ctx, key)
	if err != nil {
		e := transactionError(err, key.Transaction)
		if e.reason == outboxv1.ErrorReason_ERROR_REASON_TRANSACTION_UNKNOWN {
			return nil, s.withHorizon(ctx, e)
		}
		return nil, e
	}
	return &outboxv1.GetTransactionResponse{Transaction: transactionProto(tx, src.Name)}, nil
}

// withHorizon tells in an "unknown" error from which time on the transaction would be known. Janitors of markers rely on
// it, so an error without it is worse than no answer.
func (s *Server) withHorizon(ctx context.Context, e *apiError) error {
	horizon, err := s.store.RetentionHorizon(ctx)
	if err != nil {
		return sourceError(err, "retention", "horizon")
	}
	told := *e
	told.metadata = map[string]string{
		"transaction_id":    e.metadata["transaction_id"],
		"retention_horizon": horizon.UTC().Format(time.RFC3339Nano),
	}
	return &told
}

func transactionProto(tx *store.Transaction, source string) *outboxv1.Transaction {
	p := &outboxv1.Transaction{
		Source:              source,
		TransactionId:       tx.Key.Transaction[:],
		State:               stateProto(tx.State),
		PrepareTime:         timestamppb.New(tx.PreparedAt),
		DecidedBy:           tx.DecidedBy,
		Evidence:            string(tx.Evidence),
		DatabaseTransaction: databaseTransactionProto(tx.Database),
		Events:              make([]*outboxv1.EventStatus, len(tx.Events)),
	}
	if !tx.DecidedAt.IsZero() {
		p.DecideTime = timestamppb.New(tx.DecidedAt)
	}
	for i := range tx.Events {
		e := &tx.Events[i]
		p.Events[i] = &outboxv1.EventStatus{
			EventId:       e.Event.ID[:],
			Topic:         e.Event.Topic,
			AggregateType: e.Event.AggregateType,
			AggregateId:   e.Event.AggregateID,
			Shard:         int32(e.Shard),
			Place:         outboxv1.EventStatus_Place(e.Place),
			Explanation:   e.Explanation,
		}
	}
	return p
}

func stateProto(s store.State) outboxv1.Transaction_State {
	switch s {
	case store.Prepared:
		return outboxv1.Transaction_STATE_PREPARED
	case store.Committed:
		return outboxv1.Transaction_STATE_COMMITTED
	case store.Aborted:
		return outboxv1.Transaction_STATE_ABORTED
	}
	return outboxv1.Transaction_STATE_UNSPECIFIED
}

func databaseTransactionProto(d *store.DatabaseTransaction) *outboxv1.DatabaseTransaction {
	if d == nil {
		return nil
	}
	return &outboxv1.DatabaseTransaction{
		Database:         d.Database,
		Xid:              d.XID,
		SystemIdentifier: d.SystemIdentifier,
		Timeline:         d.Timeline,
		DatabaseOid:      d.DatabaseOID,
		MarkerOid:        d.MarkerOID,
		Mode:             outboxv1.DatabaseMode(d.Mode),
	}
}
