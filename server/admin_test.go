package server

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc/codes"

	outboxv1 "github.com/outbox-platform/outbox/gen/go/outbox/v1"
	"github.com/outbox-platform/outbox/store"
	"github.com/outbox-platform/outbox/store/storetest"
)

func TestSourcesLifecycle(t *testing.T) {
	r := start(t)
	ctx := t.Context()
	wanted := &outboxv1.Source{Name: "orders", Topics: []string{"orders"}}
	preview, err := r.admin.ApplySource(ctx, &outboxv1.ApplySourceRequest{Source: wanted, ValidateOnly: true})
	if err != nil || preview.GetSource().GetRevision() != 1 || preview.GetPrevious() != nil {
		t.Fatalf("preview: %v, %v", preview, err)
	}
	_, err = r.admin.GetSource(ctx, &outboxv1.GetSourceRequest{Name: "orders"})
	wantError(t, err, codes.NotFound, outboxv1.ErrorReason_ERROR_REASON_NOT_FOUND)

	made, err := r.admin.ApplySource(ctx, &outboxv1.ApplySourceRequest{Source: wanted, Reason: "new"})
	if err != nil || made.GetPrevious() != nil {
		t.Fatalf("%v, %v", made, err)
	}
	src := made.GetSource()
	if src.GetRecordProfile() != outboxv1.RecordProfile_RECORD_PROFILE_CLOUDEVENTS || src.GetFailurePolicy() != outboxv1.FailurePolicy_FAILURE_POLICY_BLOCK ||
		src.GetCloudeventsSource() != "/outbox/orders" || len(src.GetDatabases()) != 1 || src.GetDatabases()[0].GetName() != "default" ||
		src.GetDatabases()[0].GetMode() != outboxv1.DatabaseMode_DATABASE_MODE_MARKER || src.GetCreateTime() == nil {
		t.Fatalf("defaults: %v", src)
	}
	// At once, without waiting for the next refresh: its topics hold.
	req := newPrepare("orders")
	req.Events[0].Topic = "orders"
	if _, err := r.client.Prepare(ctx, req); err != nil {
		t.Fatal(err)
	}
	changed := &outboxv1.Source{Name: "orders", Topics: []string{"orders", "more-*"}, Revision: src.GetRevision(), Databases: []*outboxv1.SourceDatabase{
		{Name: "", DsnRef: "env:ORDERS_DSN"}, {Name: "second", Mode: outboxv1.DatabaseMode_DATABASE_MODE_CLIENT_ONLY},
	}}
	preview, err = r.admin.ApplySource(ctx, &outboxv1.ApplySourceRequest{Source: changed, ValidateOnly: true})
	if err != nil || preview.GetSource().GetRevision() != src.GetRevision()+1 || preview.GetPrevious().GetRevision() != src.GetRevision() {
		t.Fatalf("preview of a change: %v, %v", preview, err)
	}
	after, err := r.admin.ApplySource(ctx, &outboxv1.ApplySourceRequest{Source: changed})
	if err != nil || after.GetPrevious().GetRevision() != src.GetRevision() || len(after.GetSource().GetDatabases()) != 2 {
		t.Fatalf("%v, %v", after, err)
	}
	for _, only := range []bool{true, false} { // the revision is old now
		_, err = r.admin.ApplySource(ctx, &outboxv1.ApplySourceRequest{Source: changed, ValidateOnly: only})
		wantError(t, err, codes.FailedPrecondition, outboxv1.ErrorReason_ERROR_REASON_SOURCE_IN_USE)
	}
	_, err = r.admin.ApplySource(ctx, &outboxv1.ApplySourceRequest{Source: &outboxv1.Source{Name: "fresh", Revision: 7}, ValidateOnly: true})
	wantError(t, err, codes.FailedPrecondition, outboxv1.ErrorReason_ERROR_REASON_SOURCE_IN_USE)

	_, err = r.admin.DeleteSource(ctx, &outboxv1.DeleteSourceRequest{Name: "orders", Reason: "gone"})
	wantError(t, err, codes.FailedPrecondition, outboxv1.ErrorReason_ERROR_REASON_SOURCE_IN_USE)
	_, err = r.admin.DeleteSource(ctx, &outboxv1.DeleteSourceRequest{Name: "nobody"})
	wantError(t, err, codes.NotFound, outboxv1.ErrorReason_ERROR_REASON_NOT_FOUND)
	r.register(t, "empty")
	if _, err := r.admin.DeleteSource(ctx, &outboxv1.DeleteSourceRequest{Name: "empty", Reason: "gone"}); err != nil {
		t.Fatal(err)
	}
	_, err = r.client.Prepare(ctx, newPrepare("empty"))
	wantError(t, err, codes.PermissionDenied, outboxv1.ErrorReason_ERROR_REASON_SOURCE_DENIED)
}

func TestApplySourceRules(t *testing.T) {
	r := start(t)
	for field, src := range map[string]*outboxv1.Source{
		"source.name":              {Name: "Upper"},
		"source.topics[0]":         {Name: "a", Topics: []string{"a b"}},
		"source.topics[1]":         {Name: "a", Topics: []string{"fine", "__consumer_offsets"}},
		"source.failure_policy":    {Name: "a", FailurePolicy: 77},
		"source.databases[0].mode": {Name: "a", Databases: []*outboxv1.SourceDatabase{{Mode: 77}}},
		"source.databases[1].name": {Name: "a", Databases: []*outboxv1.SourceDatabase{{Name: "x"}, {Name: "x"}}},
		"source.databases[0].dsn_ref": {Name: "a", Databases: []*outboxv1.SourceDatabase{{
			DsnRef: "postgres://user:secret@db/x",
		}}},
	} {
		_, err := r.admin.ApplySource(t.Context(), &outboxv1.ApplySourceRequest{Source: src})
		_, st := wantError(t, err, codes.InvalidArgument, outboxv1.ErrorReason_ERROR_REASON_FIELD_INVALID)
		if !slices.Contains(badFields(st), field) {
			t.Errorf("fields %v, want %s", badFields(st), field)
		}
	}
	_, err := r.admin.ApplySource(t.Context(), &outboxv1.ApplySourceRequest{})
	wantError(t, err, codes.InvalidArgument, outboxv1.ErrorReason_ERROR_REASON_FIELD_INVALID)
}

func TestListSourcesPages(t *testing.T) {
	r := start(t)
	var want []string
	for i := range 7 {
		name := fmt.Sprintf("s-%d", i)
		r.register(t, name)
		want = append(want, name)
	}
	var got []string
	token := ""
	for pages := 0; ; pages++ {
		resp, err := r.admin.ListSources(t.Context(), &outboxv1.ListSourcesRequest{PageSize: 3, PageToken: token})
		if err != nil {
			t.Fatal(err)
		}
		for _, s := range resp.GetSources() {
			got = append(got, s.GetName())
		}
		if token = resp.GetNextPageToken(); token == "" {
			if pages != 2 {
				t.Errorf("%d pages, want 3", pages+1)
			}
			break
		}
	}
	if !slices.Equal(got, want) {
		t.Errorf("listed %v", got)
	}
	_, err := r.admin.ListSources(t.Context(), &outboxv1.ListSourcesRequest{PageSize: -1})
	wantError(t, err, codes.InvalidArgument, outboxv1.ErrorReason_ERROR_REASON_FIELD_INVALID)
	// A token of another list.
	first, err := r.admin.ListSources(t.Context(), &outboxv1.ListSourcesRequest{PageSize: 1})
	if err != nil {
		t.Fatal(err)
	}
	_, err = r.admin.ListDeadLetters(t.Context(), &outboxv1.ListDeadLettersRequest{PageToken: first.GetNextPageToken()})
	wantError(t, err, codes.InvalidArgument, outboxv1.ErrorReason_ERROR_REASON_FIELD_INVALID)
	_, err = r.admin.ListBlockedAggregates(t.Context(), &outboxv1.ListBlockedAggregatesRequest{PageToken: pageToken("blocked", "", "nonsense")})
	wantError(t, err, codes.InvalidArgument, outboxv1.ErrorReason_ERROR_REASON_FIELD_INVALID)
}

// blockOne leaves one aggregate blocked by a record and one dead letter, as a relay would.
func blockOne(t *testing.T, r *running) (shard int16, epoch int64) {
	t.Helper()
	ctx := t.Context()
	req := newPrepare("orders")
	dead := newEvent("a-2")
	req.Events = append(req.Events, dead)
	if _, err := r.client.Publish(ctx, &outboxv1.PublishRequest{Source: "orders", TransactionId: req.GetTransactionId(), Events: req.Events}); err != nil {
		t.Fatal(err)
	}
	src, err := r.db.Store.Source(ctx, "orders")
	if err != nil {
		t.Fatal(err)
	}
	leases, err := r.db.Store.AcquireShards(ctx, "relay-1", time.Minute, 64)
	if err != nil {
		t.Fatal(err)
	}
	reader, err := r.db.Store.OpenReader(ctx)
	if err != nil {
		t.Fatal(err)
	}
	defer reader.Close(ctx) //nolint:errcheck // the test ends
	for _, l := range leases {
		segments, err := reader.Read(ctx, []store.Cursor{{Shard: l.Shard, Position: l.Position}}, 100)
		if err != nil {
			t.Fatal(err)
		}
		step := store.Step{Shard: l.Shard, Epoch: l.Epoch, Checkpoint: l.Checkpoint}
		for i := range segments {
			step.Checkpoint.Position = segments[i].Position
			step.Checkpoint.Oldest = segments[i].XID
			err := segments[i].Records(func(rec *store.Record) bool {
				a := store.Aggregate{Source: src.ID, Type: rec.Event.AggregateType, ID: rec.Event.AggregateID}
				at := store.EventPosition{Position: segments[i].Position, Record: rec.Number}
				body := store.EncodeEvent(nil, rec)
				if rec.Event.AggregateID == "a-1" {
					shard, epoch = l.Shard, l.Epoch
					step.Park = append(step.Park, store.Parked{EventPosition: at, Key: rec.Key, Aggregate: a, State: store.Committed, Body: body,
						Cause: store.CauseRecord, Attempts: 3, Error: "MSG_SIZE_TOO_LARGE"})
				} else {
					step.Bury = append(step.Bury, store.DeadLetter{EventPosition: at, Shard: l.Shard, Key: rec.Key, Aggregate: a, Body: body,
						Error: "INVALID_RECORD", Attempts: 1})
				}
				return true
			})
			if err != nil {
				t.Fatal(err)
			}
		}
		if len(segments) == 0 {
			continue
		}
		if fenced, err := r.db.Store.Steps(ctx, time.Minute, []store.Step{step}); err != nil || len(fenced) != 0 {
			t.Fatalf("step: %v, %v", fenced, err)
		}
	}
	return shard, epoch
}

func TestBlockedAndDeadLetters(t *testing.T) {
	r := start(t)
	r.register(t, "orders")
	shard, epoch := blockOne(t, r)
	blocked, err := r.admin.ListBlockedAggregates(t.Context(), &outboxv1.ListBlockedAggregatesRequest{Source: "orders"})
	if err != nil || len(blocked.GetAggregates()) != 1 {
		t.Fatalf("%v, %v", blocked, err)
	}
	b := blocked.GetAggregates()[0]
	if b.GetAggregateId() != "a-1" || b.GetCause() != "record" || !strings.Contains(b.GetExplanation(), "MSG_SIZE_TOO_LARGE") ||
		b.GetSource() != "orders" || b.GetAttempts() != 3 || b.GetTopic() != "t-orders" || b.GetShard() != int32(shard) {
		t.Errorf("blocked: %v", b)
	}
	dead, err := r.admin.ListDeadLetters(t.Context(), &outboxv1.ListDeadLettersRequest{})
	if err != nil || len(dead.GetDeadLetters()) != 1 {
		t.Fatalf("%v, %v", dead, err)
	}
	if d := dead.GetDeadLetters()[0]; d.GetSource() != "orders" || d.GetAggregateId() != "a-2" || d.GetPayloadBytes() != 7 || d.GetError() != "INVALID_RECORD" {
		t.Errorf("dead letter: %v", d)
	}
	shards, err := r.admin.ListShards(t.Context(), &outboxv1.ListShardsRequest{})
	if err != nil || len(shards.GetShards()) != r.db.Store.ShardCount() {
		t.Fatalf("%v, %v", shards, err)
	}
	if s := shards.GetShards()[shard]; s.GetHolder() != "relay-1" || s.GetEpoch() != epoch || s.GetParked() != 1 || s.GetLeaseUntil() == nil {
		t.Errorf("shard: %v", s)
	}
	operate(t, r, shard, epoch)
}

// operate asks for an operation that the holder does, one that nobody does in time, and some that cannot be.
func operate(t *testing.T, r *running, shard int16, epoch int64) {
	t.Helper()
	op := &outboxv1.OperateAggregateRequest{Source: "orders", AggregateType: "order", AggregateId: "a-1", Action: outboxv1.AggregateAction_AGGREGATE_ACTION_REDRIVE, Reason: "topic was raised"}
	ctx, cancel := context.WithTimeout(t.Context(), 600*time.Millisecond)
	defer cancel()
	resp, err := r.admin.OperateAggregate(ctx, op)
	if err != nil || resp.GetDone() || resp.GetOperationId() == 0 {
		t.Fatalf("nobody did it: %v, %v", resp, err)
	}
	type answer struct {
		resp *outboxv1.OperateAggregateResponse
		err  error
	}
	waiting := make(chan answer, 1)
	go func() {
		resp, err := r.admin.OperateAggregate(t.Context(), op)
		waiting <- answer{resp, err}
	}()
	var pending []store.Operation
	storetest.Eventually(t, 5*time.Second, func() bool {
		pending, err = r.db.Store.PendingOperations(t.Context(), []int16{shard})
		return err == nil && len(pending) == 2
	})
	step := store.Step{Shard: shard, Epoch: epoch}
	shards, err := r.db.Store.Shards(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	step.Checkpoint.Position = shards[shard].Position
	for _, p := range pending {
		step.Operations = append(step.Operations, store.OperationOutcome{ID: p.ID, Outcome: "the head is tried again", Events: 1})
	}
	if fenced, err := r.db.Store.Steps(t.Context(), time.Minute, []store.Step{step}); err != nil || len(fenced) != 0 {
		t.Fatalf("step: %v, %v", fenced, err)
	}
	if a := <-waiting; a.err != nil || !a.resp.GetDone() || a.resp.GetOutcome() != "the head is tried again" || a.resp.GetEvents() != 1 {
		t.Fatalf("%v, %v", a.resp, a.err)
	}
	other := &outboxv1.OperateAggregateRequest{Source: "orders", AggregateType: "order", AggregateId: "fine", Action: outboxv1.AggregateAction_AGGREGATE_ACTION_SKIP, Reason: "r"}
	_, err = r.admin.OperateAggregate(t.Context(), other)
	wantError(t, err, codes.NotFound, outboxv1.ErrorReason_ERROR_REASON_NOT_FOUND)
	other.Source = "nobody"
	_, err = r.admin.OperateAggregate(t.Context(), other)
	wantError(t, err, codes.NotFound, outboxv1.ErrorReason_ERROR_REASON_NOT_FOUND)
	other.Reason = ""
	_, err = r.admin.OperateAggregate(t.Context(), other)
	wantError(t, err, codes.InvalidArgument, outboxv1.ErrorReason_ERROR_REASON_FIELD_INVALID)
}

func TestExplain(t *testing.T) {
	for cause, want := range map[store.Cause]string{
		store.CauseInDoubt: "in-doubt", store.CauseFollower: "follower", store.CauseRecord: "record",
		store.CauseTopic: "topic", store.CauseRedriven: "redriven", 99: "unknown",
	} {
		if got, _ := explain(&store.Parked{Cause: cause}); got != want {
			t.Errorf("%d: %s, want %s", cause, got, want)
		}
	}
}

// The one table, row by row.
func TestErrorTable(t *testing.T) {
	id := store.TransactionID(newID())
	for _, c := range []struct {
		err    error
		code   codes.Code
		reason outboxv1.ErrorReason
	}{
		{store.ErrUnknown, codes.NotFound, outboxv1.ErrorReason_ERROR_REASON_TRANSACTION_UNKNOWN},
		{store.ErrReused, codes.AlreadyExists, outboxv1.ErrorReason_ERROR_REASON_TRANSACTION_ID_REUSED},
		{store.ErrBacklogFull, codes.ResourceExhausted, outboxv1.ErrorReason_ERROR_REASON_BACKLOG_FULL},
		{store.ErrUnavailable, codes.Unavailable, outboxv1.ErrorReason_ERROR_REASON_STORE_UNAVAILABLE},
		{store.ErrContention, codes.Aborted, outboxv1.ErrorReason_ERROR_REASON_CONTENTION},
		{store.ErrInvalid, codes.InvalidArgument, outboxv1.ErrorReason_ERROR_REASON_FIELD_INVALID},
		{&store.DecidedError{State: store.Aborted}, codes.FailedPrecondition, outboxv1.ErrorReason_ERROR_REASON_TRANSACTION_ALREADY_DECIDED},
		{context.Canceled, codes.Canceled, outboxv1.ErrorReason_ERROR_REASON_STORE_UNAVAILABLE},
		{context.DeadlineExceeded, codes.DeadlineExceeded, outboxv1.ErrorReason_ERROR_REASON_STORE_UNAVAILABLE},
		{errors.New("boom"), codes.Internal, outboxv1.ErrorReason_ERROR_REASON_INTERNAL},
	} {
		e := transactionError(fmt.Errorf("doing something: %w", c.err), id)
		wantError(t, e, c.code, c.reason)
		if strings.Contains(e.GRPCStatus().Message(), "boom") {
			t.Error("an internal cause is told to the caller")
		}
	}
	if transactionError(nil, id) != nil || sourceError(nil, "source", "x") != nil {
		t.Error("nil must stay nil")
	}
	for _, c := range []struct {
		err  error
		code codes.Code
	}{
		{store.ErrUnknown, codes.NotFound}, {store.ErrInUse, codes.FailedPrecondition}, {store.ErrRevision, codes.FailedPrecondition},
		{store.ErrUnavailable, codes.Unavailable}, {store.ErrContention, codes.Aborted}, {errors.New("boom"), codes.Internal},
	} {
		if e := sourceError(c.err, "source", "x"); e.code != c.code {
			t.Errorf("%v: %s, want %s", c.err, e.code, c.code)
		}
	}
	if e := otherError(fmt.Errorf("wrapped: %w", errContention)); e != errContention {
		t.Errorf("%v", e)
	}
	if !errors.Is(&apiError{cause: store.ErrInvalid}, store.ErrInvalid) {
		t.Error("the cause cannot be found")
	}
}
