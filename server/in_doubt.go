package server

import (
	"context"
	"encoding/json"
	"errors"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/types/known/timestamppb"

	outboxv1 "github.com/outbox-platform/outbox/gen/go/outbox/v1"
	"github.com/outbox-platform/outbox/store"
)

// Resolver finds out what became of in-doubt transactions; server/resolver implements it.
type Resolver interface {
	SessionWatcher
	// Check asks about one transaction now, decides it if the answer is conclusive, and returns the answer. It does not
	// fill in the state.
	Check(ctx context.Context, transaction store.Parked) (*outboxv1.CheckTransactionResponse, error)
	// ConfirmFailover decides the in-doubt transactions of a timeline whose primary is fenced; with only it just counts.
	ConfirmFailover(ctx context.Context, src *store.Source, database string, timeline uint32, actor, reason string, only bool) (*outboxv1.ConfirmFailoverResponse, error)
}

// ListInDoubtTransactions implements outbox.v1.AdminService.
func (s adminService) ListInDoubtTransactions(ctx context.Context, req *outboxv1.ListInDoubtTransactionsRequest) (*outboxv1.ListInDoubtTransactionsResponse, error) {
	page, e := s.page(req, "in-doubt", req.GetSource(), req.GetPageToken())
	if e != nil {
		return nil, e
	}
	found, next, err := s.store.InDoubtTransactions(ctx, req.GetSource(), page, pageSize(req.GetPageSize()))
	if err != nil {
		return nil, listError(err, req.GetSource())
	}
	resp := &outboxv1.ListInDoubtTransactionsResponse{NextPageToken: pageToken("in-doubt", req.GetSource(), next)}
	for i := range found {
		d := &found[i]
		resp.Transactions = append(resp.Transactions, &outboxv1.InDoubtTransaction{
			Source:              d.Source,
			TransactionId:       d.Head.Key.Transaction[:],
			DatabaseTransaction: databaseTransactionProto(d.Head.Database),
			AggregateType:       d.Head.Aggregate.Type,
			AggregateId:         d.Head.Aggregate.ID,
			Since:               timestamppb.New(d.Head.Since),
			Checks:              d.Head.Checks,
			LastAnswer:          d.Head.LastAnswer,
			NextCheckTime:       timestamppb.New(d.NextCheck),
			Events:              d.Events,
			Waiting:             d.Waiting,
		})
	}
	return resp, nil
}

// transactionOf looks up the transaction that an operator names.
func (s adminService) transactionOf(ctx context.Context, source string, id []byte) (*store.Source, *store.Transaction, error) {
	src, err := s.store.Source(ctx, source)
	if err != nil {
		return nil, nil, sourceError(err, "source", source)
	}
	key := store.Key{Source: src.ID, Transaction: store.TransactionID(id)}
	tx, err := s.store.Transaction(ctx, key)
	if err != nil {
		return nil, nil, transactionError(err, key.Transaction)
	}
	return src, tx, nil
}

// DecideTransaction implements outbox.v1.AdminService.
func (s adminService) DecideTransaction(ctx context.Context, req *outboxv1.DecideTransactionRequest) (*outboxv1.DecideTransactionResponse, error) {
	if e := s.validator.adminMessage(req); e != nil {
		return nil, e
	}
	src, tx, err := s.transactionOf(ctx, req.GetSource(), req.GetTransactionId())
	if err != nil {
		return nil, err
	}
	kind, state := store.KindAbort, store.Aborted
	if req.GetDecision() == outboxv1.Transaction_STATE_COMMITTED {
		kind, state = store.KindCommit, store.Committed
	}
	if tx.State != store.Prepared {
		if tx.State == state {
			return &outboxv1.DecideTransactionResponse{State: req.GetDecision()}, nil
		}
		return nil, transactionError(&store.DecidedError{State: tx.State}, tx.Key.Transaction)
	}
	evidence, err := json.Marshal(map[string]string{"reason": req.GetReason()})
	if err != nil {
		return nil, otherError(err)
	}
	actor := principalOf(ctx).name
	// First the record of what was wanted: a decision of an operator without one must not exist.
	err = s.store.Audit(ctx, actor, "transaction.decide", src.Name+"/"+tx.Key.Transaction.String(), req.GetReason(), map[string]any{"decision": state.String()})
	if err != nil {
		return nil, sourceError(err, "transaction", tx.Key.Transaction.String())
	}
	hot := prepareSource(*src)
	c := &call{server: s.Server, source: hot, started: time.Now(), wait: make(chan store.Answer, 1)}
	c.key(kind, hot, req.GetTransactionId())
	c.request.Resolution = &store.Resolution{Method: "operator", Evidence: evidence, Actor: actor}
	if e := c.submit(); e != nil {
		return nil, e
	}
	select {
	case a := <-c.wait:
		if e := transactionError(a.Err, tx.Key.Transaction); e != nil {
			return nil, e
		}
	case <-ctx.Done():
		return nil, otherError(ctx.Err())
	}
	s.metrics.byOperators[kind].Inc()
	s.log.Warn("an operator decided a transaction", "source", src.Name, "transaction_id", tx.Key.Transaction.String(), "state", state.String(), "actor", actor)
	return &outboxv1.DecideTransactionResponse{State: req.GetDecision()}, nil
}

// CheckTransaction implements outbox.v1.AdminService.
func (s adminService) CheckTransaction(ctx context.Context, req *outboxv1.CheckTransactionRequest) (*outboxv1.CheckTransactionResponse, error) {
	if e := s.validator.adminMessage(req); e != nil {
		return nil, e
	}
	src, tx, err := s.transactionOf(ctx, req.GetSource(), req.GetTransactionId())
	if err != nil {
		return nil, err
	}
	switch {
	case tx.State != store.Prepared:
		return nil, &apiError{
			code: codes.FailedPrecondition, reason: outboxv1.ErrorReason_ERROR_REASON_NOT_IN_DOUBT,
			message:  "the transaction is " + tx.State.String() + " already",
			metadata: map[string]string{"transaction_id": tx.Key.Transaction.String(), "state": tx.State.String()},
		}
	case tx.Database == nil || s.resolver == nil:
		return nil, databaseUnfit(src.Name, "", "this server cannot ask about it")
	}
	resp, err := s.resolver.Check(ctx, store.Parked{Key: tx.Key, Database: tx.Database})
	if err != nil {
		return nil, resolverError(err, src.Name, tx.Database.Database)
	}
	now, err := s.store.Transaction(ctx, tx.Key)
	if err != nil {
		return nil, transactionError(err, tx.Key.Transaction)
	}
	resp.State = stateProto(now.State)
	return resp, nil
}

// ConfirmFailover implements outbox.v1.AdminService.
func (s adminService) ConfirmFailover(ctx context.Context, req *outboxv1.ConfirmFailoverRequest) (*outboxv1.ConfirmFailoverResponse, error) {
	if e := s.validator.adminMessage(req); e != nil {
		return nil, e
	}
	src, err := s.store.Source(ctx, req.GetSource())
	if err != nil {
		return nil, sourceError(err, "source", req.GetSource())
	}
	database := req.GetDatabase()
	if database == "" {
		database = defaultDatabase
	}
	if s.resolver == nil {
		return nil, databaseUnfit(src.Name, database, "this server has no resolver")
	}
	actor := principalOf(ctx).name
	if !req.GetValidateOnly() {
		err := s.store.Audit(ctx, actor, "source.failover", src.Name+"/"+database, req.GetReason(), map[string]any{"timeline": req.GetTimeline()})
		if err != nil {
			return nil, sourceError(err, "source", src.Name)
		}
	}
	resp, err := s.resolver.ConfirmFailover(ctx, src, database, req.GetTimeline(), actor, req.GetReason(), req.GetValidateOnly())
	if err != nil {
		return nil, resolverError(err, src.Name, database)
	}
	return resp, nil
}

// resolverError translates what the resolver says.
func resolverError(err error, source, database string) *apiError {
	var unfit interface{ FailedPrecondition() bool }
	if errors.As(err, &unfit) && unfit.FailedPrecondition() {
		return databaseUnfit(source, database, err.Error())
	}
	return sourceError(err, "source", source)
}

func databaseUnfit(source, database, why string) *apiError {
	return &apiError{
		code: codes.FailedPrecondition, reason: outboxv1.ErrorReason_ERROR_REASON_SOURCE_DATABASE_UNFIT,
		message:  why,
		metadata: map[string]string{"source": source, "database": database},
	}
}
