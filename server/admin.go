package server

import (
	"context"
	"errors"
	"strings"
	"time"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	outboxv1 "github.com/outbox-platform/outbox/gen/go/outbox/v1"
	"github.com/outbox-platform/outbox/store"
)

const (
	// operationPoll is how often a waiting OperateAggregate looks whether the holder has done it.
	operationPoll = 50 * time.Millisecond
	// operationMargin is what is kept of the deadline to answer "not done yet" in time.
	operationMargin = 200 * time.Millisecond
)

// adminService is outbox.v1.AdminService.
type adminService struct {
	outboxv1.UnimplementedAdminServiceServer
	*Server
}

// ListSources implements outbox.v1.AdminService.
func (s adminService) ListSources(ctx context.Context, req *outboxv1.ListSourcesRequest) (*outboxv1.ListSourcesResponse, error) {
	after, e := s.page(req, "sources", "", req.GetPageToken())
	if e != nil {
		return nil, e
	}
	limit := pageSize(req.GetPageSize())
	found, err := s.store.Sources(ctx, after, limit+1)
	if err != nil {
		return nil, sourceError(err, "sources", "")
	}
	resp := &outboxv1.ListSourcesResponse{}
	if len(found) > limit {
		found = found[:limit]
		resp.NextPageToken = pageToken("sources", "", found[limit-1].Name)
	}
	for i := range found {
		resp.Sources = append(resp.Sources, sourceProto(&found[i]))
	}
	return resp, nil
}

// page validates a list request and reads its token.
func (s adminService) page(req proto.Message, list, filter, token string) (string, *apiError) {
	if e := s.validator.adminMessage(req); e != nil {
		return "", e
	}
	return readPageToken(token, list, filter)
}

// GetSource implements outbox.v1.AdminService.
func (s adminService) GetSource(ctx context.Context, req *outboxv1.GetSourceRequest) (*outboxv1.GetSourceResponse, error) {
	if e := s.validator.adminMessage(req); e != nil {
		return nil, e
	}
	src, err := s.store.Source(ctx, req.GetName())
	if err != nil {
		return nil, sourceError(err, "source", req.GetName())
	}
	return &outboxv1.GetSourceResponse{Source: sourceProto(src)}, nil
}

// ApplySource implements outbox.v1.AdminService.
func (s adminService) ApplySource(ctx context.Context, req *outboxv1.ApplySourceRequest) (*outboxv1.ApplySourceResponse, error) {
	if e := s.validator.adminMessage(req); e != nil {
		return nil, e
	}
	wanted, e := sourceFromProto(req.GetSource())
	if e != nil {
		return nil, e
	}
	if req.GetValidateOnly() {
		return s.previewSource(ctx, wanted)
	}
	now, before, err := s.store.ApplySource(ctx, *wanted, principalOf(ctx).name, req.GetReason())
	if err != nil {
		return nil, sourceError(err, "source", wanted.Name)
	}
	// The change is stored; if it cannot be read back now, this server follows within a second like all others.
	if err := s.sources.refresh(ctx); err != nil {
		s.log.Warn("reading sources after a change", "source", wanted.Name, "error", err)
	}
	resp := &outboxv1.ApplySourceResponse{Source: sourceProto(now)}
	if before != nil {
		resp.Previous = sourceProto(before)
	}
	return resp, nil
}

// previewSource answers what ApplySource would, and changes nothing.
func (s adminService) previewSource(ctx context.Context, wanted *store.Source) (*outboxv1.ApplySourceResponse, error) {
	before, err := s.store.Source(ctx, wanted.Name)
	switch {
	case errors.Is(err, store.ErrUnknown):
		if wanted.Revision != 0 {
			return nil, sourceError(store.ErrRevision, "source", wanted.Name)
		}
		wanted.Revision = 1
		return &outboxv1.ApplySourceResponse{Source: sourceProto(wanted)}, nil
	case err != nil:
		return nil, sourceError(err, "source", wanted.Name)
	case wanted.Revision != 0 && wanted.Revision != before.Revision:
		return nil, sourceError(store.ErrRevision, "source", wanted.Name)
	}
	wanted.Revision = before.Revision + 1
	wanted.CreatedAt, wanted.UpdatedAt = before.CreatedAt, before.UpdatedAt
	return &outboxv1.ApplySourceResponse{Source: sourceProto(wanted), Previous: sourceProto(before)}, nil
}

// DeleteSource implements outbox.v1.AdminService.
func (s adminService) DeleteSource(ctx context.Context, req *outboxv1.DeleteSourceRequest) (*outboxv1.DeleteSourceResponse, error) {
	if e := s.validator.adminMessage(req); e != nil {
		return nil, e
	}
	if err := s.store.DeleteSource(ctx, req.GetName(), principalOf(ctx).name, req.GetReason()); err != nil {
		return nil, sourceError(err, "source", req.GetName())
	}
	if err := s.sources.refresh(ctx); err != nil {
		s.log.Warn("reading sources after a change", "source", req.GetName(), "error", err)
	}
	return &outboxv1.DeleteSourceResponse{}, nil
}

// ListShards implements outbox.v1.AdminService.
func (s adminService) ListShards(ctx context.Context, _ *outboxv1.ListShardsRequest) (*outboxv1.ListShardsResponse, error) {
	shards, err := s.store.Shards(ctx)
	if err != nil {
		return nil, sourceError(err, "shards", "")
	}
	resp := &outboxv1.ListShardsResponse{}
	for i := range shards {
		sh := &shards[i]
		p := &outboxv1.Shard{
			Shard:            int32(sh.Shard),
			Holder:           sh.Holder,
			Epoch:            sh.Epoch,
			Checkpoint:       sh.Position.String(),
			OldestAgeSeconds: sh.OldestAge.Seconds(),
			LagSegments:      sh.LagSegments,
			Parked:           sh.Parked,
		}
		if sh.Holder != "" {
			p.LeaseUntil = timestamppb.New(sh.LeaseUntil)
		}
		resp.Shards = append(resp.Shards, p)
	}
	return resp, nil
}

// ListBlockedAggregates implements outbox.v1.AdminService.
func (s adminService) ListBlockedAggregates(ctx context.Context, req *outboxv1.ListBlockedAggregatesRequest) (*outboxv1.ListBlockedAggregatesResponse, error) {
	page, e := s.page(req, "blocked", req.GetSource(), req.GetPageToken())
	if e != nil {
		return nil, e
	}
	found, next, err := s.store.BlockedAggregates(ctx, req.GetSource(), page, pageSize(req.GetPageSize()))
	if err != nil {
		return nil, listError(err, req.GetSource())
	}
	resp := &outboxv1.ListBlockedAggregatesResponse{NextPageToken: pageToken("blocked", req.GetSource(), next)}
	for i := range found {
		b := &found[i]
		cause, explanation := explain(&b.Head)
		resp.Aggregates = append(resp.Aggregates, &outboxv1.BlockedAggregate{
			Source:        b.Source,
			AggregateType: b.Aggregate.Type,
			AggregateId:   b.Aggregate.ID,
			Shard:         int32(b.Shard),
			Cause:         cause,
			Explanation:   explanation,
			Since:         timestamppb.New(b.Head.Since),
			Waiting:       b.Waiting,
			Topic:         b.Topic,
			Attempts:      b.Head.Attempts,
			TransactionId: b.Head.Key.Transaction[:],
		})
	}
	return resp, nil
}

// listError translates an error of a paged list. The store refuses a page that is not one of its own.
func listError(err error, source string) *apiError {
	if errors.Is(err, store.ErrInvalid) {
		return errPageToken
	}
	return sourceError(err, "source", source)
}

// explain says why a head cannot be published now, as a word and in words.
func explain(head *store.Parked) (cause, explanation string) {
	switch head.Cause {
	case store.CauseInDoubt:
		return "in-doubt", "its transaction is undecided; the source is being asked"
	case store.CauseRecord:
		return "record", "Kafka refused it for good: " + head.Error
	case store.CauseTopic:
		return "topic", "its topic is unknown or not authorised: " + head.Error
	case store.CauseRedriven:
		return "redriven", "put back by an operator, waits for its turn"
	case store.CauseFollower:
		return "follower", "waits behind an earlier event of its aggregate"
	}
	return "unknown", head.Error
}

// ListDeadLetters implements outbox.v1.AdminService.
func (s adminService) ListDeadLetters(ctx context.Context, req *outboxv1.ListDeadLettersRequest) (*outboxv1.ListDeadLettersResponse, error) {
	page, e := s.page(req, "dead-letters", req.GetSource(), req.GetPageToken())
	if e != nil {
		return nil, e
	}
	found, next, err := s.store.DeadLetters(ctx, req.GetSource(), page, pageSize(req.GetPageSize()))
	if err != nil {
		return nil, listError(err, req.GetSource())
	}
	resp := &outboxv1.ListDeadLettersResponse{NextPageToken: pageToken("dead-letters", req.GetSource(), next)}
	for i := range found {
		d := &found[i]
		rec, err := store.DecodeEvent(d.Body)
		if err != nil {
			return nil, otherError(err)
		}
		resp.DeadLetters = append(resp.DeadLetters, &outboxv1.DeadLetter{
			Source:        s.sourceName(d.Key.Source),
			TransactionId: d.Key.Transaction[:],
			EventId:       rec.Event.ID[:],
			Topic:         rec.Event.Topic,
			AggregateType: rec.Event.AggregateType,
			AggregateId:   rec.Event.AggregateID,
			EventType:     rec.Event.Type,
			Shard:         int32(d.Shard),
			Error:         d.Error,
			Attempts:      d.Attempts,
			Since:         timestamppb.New(d.Since),
			PayloadBytes:  int64(len(rec.Event.Payload)),
		})
	}
	return resp, nil
}

// maxDeadLetterError is how much is kept of an error that a caller gives.
const maxDeadLetterError = 1024

// AddDeadLetter implements outbox.v1.AdminService.
func (s adminService) AddDeadLetter(ctx context.Context, req *outboxv1.AddDeadLetterRequest) (*outboxv1.AddDeadLetterResponse, error) {
	if e := s.validator.adminMessage(req); e != nil {
		return nil, e
	}
	if size := int64(proto.Size(req)); size > s.cfg.MaxTransactionBytes {
		return nil, tooLargeError("payload", size, s.cfg.MaxTransactionBytes)
	}
	src, err := s.store.Source(ctx, req.GetSource())
	if err != nil {
		return nil, sourceError(err, "source", req.GetSource())
	}
	event := &store.Event{
		ID: [16]byte(req.GetEventId()), Topic: req.GetTopic(), AggregateType: req.GetAggregateType(), AggregateID: req.GetAggregateId(),
		Type: req.GetEventType(), ContentType: req.GetContentType(), Key: req.GetKey(), HasKey: req.Key != nil, Payload: req.GetPayload(),
	}
	for _, h := range req.GetHeaders() {
		event.Headers = append(event.Headers, store.Header{Name: h.GetName(), Value: h.GetValue()})
	}
	reason := req.GetError()
	if len(reason) > maxDeadLetterError {
		reason = strings.ToValidUTF8(reason[:maxDeadLetterError], "") + "…"
	}
	key := store.Key{Source: src.ID, Transaction: store.TransactionID(req.GetTransactionId())}
	if err := s.store.AddDeadLetter(ctx, key, event, reason, req.GetAttempts(), principalOf(ctx).name); err != nil {
		return nil, refusal(err, key.Transaction)
	}
	return &outboxv1.AddDeadLetterResponse{}, nil
}

// sourceName is the name of a source by its id; "" for one that was deleted.
func (s *Server) sourceName(id int32) string {
	if src := s.sources.byID(id); src != nil {
		return src.Name
	}
	return ""
}

// OperateAggregate implements outbox.v1.AdminService.
func (s adminService) OperateAggregate(ctx context.Context, req *outboxv1.OperateAggregateRequest) (*outboxv1.OperateAggregateResponse, error) {
	if e := s.validator.adminMessage(req); e != nil {
		return nil, e
	}
	src, err := s.store.Source(ctx, req.GetSource())
	if err != nil {
		return nil, sourceError(err, "source", req.GetSource())
	}
	aggregate := store.Aggregate{Source: src.ID, Type: req.GetAggregateType(), ID: req.GetAggregateId()}
	op, err := s.store.RequestOperation(ctx, aggregate, store.Action(req.GetAction()), principalOf(ctx).name, req.GetReason()) //nolint:gosec // a defined value
	if err != nil {
		return nil, sourceError(err, "aggregate", req.GetAggregateType()+"/"+req.GetAggregateId())
	}
	op, err = s.awaitOperation(ctx, op)
	if err != nil {
		return nil, err
	}
	return &outboxv1.OperateAggregateResponse{OperationId: op.ID, Done: op.Done, Outcome: op.Outcome, Events: op.Events}, nil
}

// awaitOperation waits until the holder has done it, or until it is time to answer that it has not. Errors while looking
// are tried again: the request is stored, and the caller should learn its number.
func (s *Server) awaitOperation(ctx context.Context, op *store.Operation) (*store.Operation, error) {
	deadline, _ := ctx.Deadline() // the guard gives every call one
	wait := time.NewTimer(max(0, time.Until(deadline)-operationMargin))
	defer wait.Stop()
	poll := time.NewTicker(operationPoll)
	defer poll.Stop()
	for !op.Done {
		select {
		case <-poll.C:
			if now, err := s.store.OperationByID(ctx, op.ID); err == nil {
				op = now
			} else if !errors.Is(err, store.ErrUnavailable) {
				return nil, otherError(err)
			}
		case <-wait.C:
			return op, nil
		case <-ctx.Done():
			return nil, otherError(ctx.Err())
		}
	}
	return op, nil
}

func sourceProto(src *store.Source) *outboxv1.Source {
	p := &outboxv1.Source{
		Name:              src.Name,
		Topics:            src.Topics,
		RecordProfile:     outboxv1.RecordProfile(src.RecordProfile),
		FailurePolicy:     outboxv1.FailurePolicy(src.FailurePolicy),
		CloudeventsSource: src.CloudEventsSource,
		Revision:          src.Revision,
	}
	for _, d := range src.Databases {
		p.Databases = append(p.Databases, &outboxv1.SourceDatabase{Name: d.Name, Mode: outboxv1.DatabaseMode(d.Mode), DsnRef: d.DSNRef})
	}
	if !src.CreatedAt.IsZero() {
		p.CreateTime = timestamppb.New(src.CreatedAt)
		p.UpdateTime = timestamppb.New(src.UpdatedAt)
	}
	return p
}

// sourceFromProto fills in what is not stated.
func sourceFromProto(p *outboxv1.Source) (*store.Source, *apiError) {
	src := &store.Source{
		Name:              p.GetName(),
		Topics:            p.GetTopics(),
		RecordProfile:     int16(p.GetRecordProfile()), //nolint:gosec // a defined value
		FailurePolicy:     int16(p.GetFailurePolicy()), //nolint:gosec // a defined value
		CloudEventsSource: p.GetCloudeventsSource(),
		Revision:          p.GetRevision(),
	}
	if src.Topics == nil {
		src.Topics = []string{}
	}
	for i, t := range src.Topics {
		if t == "" || t == "." || t == ".." || len(t) > 1 && t[:2] == "__" {
			return nil, fieldError("source.topics["+itoa(i)+"]", "%q is not a topic that a source may use", t)
		}
	}
	if src.RecordProfile == 0 {
		src.RecordProfile = int16(outboxv1.RecordProfile_RECORD_PROFILE_CLOUDEVENTS)
	}
	if src.FailurePolicy == 0 {
		src.FailurePolicy = int16(outboxv1.FailurePolicy_FAILURE_POLICY_BLOCK)
	}
	if src.CloudEventsSource == "" {
		src.CloudEventsSource = "/outbox/" + src.Name
	}
	seen := make(map[string]bool)
	for i, d := range p.GetDatabases() {
		db := store.SourceDatabase{Name: d.GetName(), Mode: store.Mode(d.GetMode()), DSNRef: d.GetDsnRef()} //nolint:gosec // a defined value
		if db.Name == "" {
			db.Name = defaultDatabase
		}
		if db.Mode == 0 {
			db.Mode = store.ModeMarker
		}
		if seen[db.Name] {
			return nil, fieldError("source.databases["+itoa(i)+"].name", "%q is there twice", db.Name)
		}
		seen[db.Name] = true
		src.Databases = append(src.Databases, db)
	}
	if len(src.Databases) == 0 {
		src.Databases = []store.SourceDatabase{{Name: defaultDatabase, Mode: store.ModeMarker}}
	}
	return src, nil
}
