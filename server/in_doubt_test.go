package server

import (
	"context"
	"errors"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc/codes"

	outboxv1 "github.com/outbox-platform/outbox/gen/go/outbox/v1"
	"github.com/outbox-platform/outbox/store"
	"github.com/outbox-platform/outbox/store/storetest"
)

// unfit is an error of a resolver that cannot do it as things are.
type unfit struct{}

func (unfit) Error() string            { return "no dsn_ref" }
func (unfit) FailedPrecondition() bool { return true }

// decider is a resolver that knows one answer. The real one cannot be imported here; its own tests use real databases.
type decider struct {
	*watcher
	writer  *store.Writer
	outcome outboxv1.SessionRequest_CheckAnswer_Outcome
	err     error
}

func (d *decider) Check(ctx context.Context, tx store.Parked) (*outboxv1.CheckTransactionResponse, error) {
	if d.err != nil {
		return nil, d.err
	}
	if d.outcome == saysCommitted {
		_, err := d.writer.Do(ctx, &store.Request{Kind: store.KindCommit, Key: tx.Key, Resolution: &store.Resolution{Method: "direct", Evidence: []byte("{}"), Actor: "test"}})
		if err != nil {
			return nil, err
		}
	}
	return &outboxv1.CheckTransactionResponse{Outcome: d.outcome, Method: "direct"}, nil
}

func (d *decider) ConfirmFailover(_ context.Context, src *store.Source, database string, timeline uint32, actor, reason string, only bool) (*outboxv1.ConfirmFailoverResponse, error) {
	if d.err != nil {
		return nil, d.err
	}
	if src.Name != "orders" || database != "default" || timeline != 3 || actor != "anonymous" || reason != "fenced" {
		return nil, errors.New("wrong arguments")
	}
	if only {
		return &outboxv1.ConfirmFailoverResponse{Aborted: 1}, nil
	}
	return &outboxv1.ConfirmFailoverResponse{Aborted: 2}, nil
}

// startDeciding runs a server with a resolver that says one thing.
func startDeciding(t *testing.T) (*running, *decider) {
	t.Helper()
	db := storetest.New(t)
	w := db.Writer(t, store.WriterConfig{})
	d := &decider{watcher: newWatcher(), writer: w}
	s, err := New(testConfig(t), db.Store, w, discard(), newRegistry())
	if err != nil {
		t.Fatal(err)
	}
	s.UseResolver(d)
	r := run(t, &running{Server: s, db: db})
	r.register(t, "orders")
	return r, d
}

func TestDecideTransaction(t *testing.T) {
	r, _ := startDeciding(t)
	req := newPrepare("orders")
	if _, err := r.client.Prepare(t.Context(), req); err != nil {
		t.Fatal(err)
	}
	decide := func(id []byte, decision outboxv1.Transaction_State, reason string) error {
		resp, err := r.admin.DecideTransaction(t.Context(), &outboxv1.DecideTransactionRequest{Source: "orders", TransactionId: id, Decision: decision, Reason: reason})
		if err == nil && resp.GetState() != decision {
			t.Errorf("state %s, want %s", resp.GetState(), decision)
		}
		return err
	}
	const commit, abort = outboxv1.Transaction_STATE_COMMITTED, outboxv1.Transaction_STATE_ABORTED
	wantError(t, decide(req.GetTransactionId(), outboxv1.Transaction_STATE_PREPARED, "r"), codes.InvalidArgument, outboxv1.ErrorReason_ERROR_REASON_FIELD_INVALID)
	wantError(t, decide(req.GetTransactionId(), commit, ""), codes.InvalidArgument, outboxv1.ErrorReason_ERROR_REASON_FIELD_INVALID)
	wantError(t, decide(newID(), commit, "r"), codes.NotFound, outboxv1.ErrorReason_ERROR_REASON_TRANSACTION_UNKNOWN)
	for range 2 {
		if err := decide(req.GetTransactionId(), commit, "row 7 is there"); err != nil {
			t.Fatal(err)
		}
	}
	wantError(t, decide(req.GetTransactionId(), abort, "r"), codes.FailedPrecondition, outboxv1.ErrorReason_ERROR_REASON_TRANSACTION_ALREADY_DECIDED)
	get, err := r.client.GetTransaction(t.Context(), &outboxv1.GetTransactionRequest{Source: "orders", TransactionId: req.GetTransactionId()})
	if tx := get.GetTransaction(); err != nil || tx.GetDecidedBy() != "operator" || !strings.Contains(tx.GetEvidence(), "row 7 is there") {
		t.Fatalf("%v, %v", get, err)
	}
	if n := storetest.Query[int64](t, r.db, `SELECT count(*) FROM outbox.audit WHERE action = 'transaction.decide' AND actor = 'anonymous' AND reason = 'row 7 is there'`); n[0] != 1 {
		t.Errorf("%d audit rows", n[0])
	}
	_, err = r.admin.DecideTransaction(t.Context(), &outboxv1.DecideTransactionRequest{Source: "nobody", TransactionId: newID(), Decision: abort, Reason: "r"})
	wantError(t, err, codes.NotFound, outboxv1.ErrorReason_ERROR_REASON_NOT_FOUND)
}

func TestCheckTransaction(t *testing.T) {
	r, d := startDeciding(t)
	req := newPrepare("orders")
	if _, err := r.client.Prepare(t.Context(), req); err != nil {
		t.Fatal(err)
	}
	check := func(id []byte) (*outboxv1.CheckTransactionResponse, error) {
		return r.admin.CheckTransaction(t.Context(), &outboxv1.CheckTransactionRequest{Source: "orders", TransactionId: id})
	}
	d.outcome = saysRunning
	if resp, err := check(req.GetTransactionId()); err != nil || resp.GetOutcome() != saysRunning || resp.GetState() != outboxv1.Transaction_STATE_PREPARED {
		t.Fatalf("%v, %v", resp, err)
	}
	d.err = store.ErrUnavailable
	_, err := check(req.GetTransactionId())
	wantError(t, err, codes.Unavailable, outboxv1.ErrorReason_ERROR_REASON_STORE_UNAVAILABLE)
	d.err, d.outcome = nil, saysCommitted
	if resp, err := check(req.GetTransactionId()); err != nil || resp.GetState() != outboxv1.Transaction_STATE_COMMITTED || resp.GetMethod() != "direct" {
		t.Fatalf("%v, %v", resp, err)
	}
	_, err = check(req.GetTransactionId())
	md, _ := wantError(t, err, codes.FailedPrecondition, outboxv1.ErrorReason_ERROR_REASON_NOT_IN_DOUBT)
	if md["state"] != "COMMITTED" {
		t.Errorf("metadata %v", md)
	}
	_, err = check(newID())
	wantError(t, err, codes.NotFound, outboxv1.ErrorReason_ERROR_REASON_TRANSACTION_UNKNOWN)
	_, err = check([]byte("x"))
	wantError(t, err, codes.InvalidArgument, outboxv1.ErrorReason_ERROR_REASON_FIELD_INVALID)
	// A server without a resolver says so.
	r.resolver = nil
	other := newPrepare("orders")
	if _, err := r.client.Prepare(t.Context(), other); err != nil {
		t.Fatal(err)
	}
	_, err = check(other.GetTransactionId())
	wantError(t, err, codes.FailedPrecondition, outboxv1.ErrorReason_ERROR_REASON_SOURCE_DATABASE_UNFIT)
	_, err = r.admin.ConfirmFailover(t.Context(), &outboxv1.ConfirmFailoverRequest{Source: "orders", Timeline: 3, Reason: "fenced"})
	wantError(t, err, codes.FailedPrecondition, outboxv1.ErrorReason_ERROR_REASON_SOURCE_DATABASE_UNFIT)
}

func TestConfirmFailoverRequest(t *testing.T) {
	r, d := startDeciding(t)
	req := &outboxv1.ConfirmFailoverRequest{Source: "orders", Timeline: 3, Reason: "fenced", ValidateOnly: true}
	audited := func() int64 {
		return storetest.Query[int64](t, r.db, `SELECT count(*) FROM outbox.audit WHERE action = 'source.failover' AND subject = 'orders/default'`)[0]
	}
	if resp, err := r.admin.ConfirmFailover(t.Context(), req); err != nil || resp.GetAborted() != 1 || audited() != 0 {
		t.Fatalf("%v, %v, %d audit rows", resp, err, audited())
	}
	req.ValidateOnly = false
	if resp, err := r.admin.ConfirmFailover(t.Context(), req); err != nil || resp.GetAborted() != 2 || audited() != 1 {
		t.Fatalf("%v, %v, %d audit rows", resp, err, audited())
	}
	d.err = unfit{}
	_, err := r.admin.ConfirmFailover(t.Context(), req)
	md, _ := wantError(t, err, codes.FailedPrecondition, outboxv1.ErrorReason_ERROR_REASON_SOURCE_DATABASE_UNFIT)
	if md["database"] != "default" {
		t.Errorf("metadata %v", md)
	}
	req.Timeline = 0
	_, err = r.admin.ConfirmFailover(t.Context(), req)
	wantError(t, err, codes.InvalidArgument, outboxv1.ErrorReason_ERROR_REASON_FIELD_INVALID)
	req.Timeline, req.Source = 3, "nobody"
	_, err = r.admin.ConfirmFailover(t.Context(), req)
	wantError(t, err, codes.NotFound, outboxv1.ErrorReason_ERROR_REASON_NOT_FOUND)
}

// A server tells its resolver of sessions.
func TestResolverHearsOfSessions(t *testing.T) {
	r, d := startDeciding(t)
	ctx, cancel := context.WithCancel(t.Context())
	s := openSession(t, ctx, r.client, hello("orders", "default"))
	if got := <-d.opened; got != "orders" {
		t.Errorf("opened %q", got)
	}
	sendCalls(t, s, callPrepareOf(1, newPrepare("orders")))
	receiveResults(t, s, 1)
	cancel()
	if b := <-d.broke; len(b.undecided) != 1 {
		t.Errorf("broke %+v", b)
	}
}

func TestListInDoubtTransactions(t *testing.T) {
	r := start(t)
	r.register(t, "orders")
	var ids []string
	for range 3 {
		req := newPrepare("orders")
		if _, err := r.client.Prepare(t.Context(), req); err != nil {
			t.Fatal(err)
		}
		ids = append(ids, string(req.GetTransactionId()))
	}
	parkAll(t, r)
	seen := map[string]bool{}
	token := ""
	for range ids {
		resp, err := r.admin.ListInDoubtTransactions(t.Context(), &outboxv1.ListInDoubtTransactionsRequest{Source: "orders", PageSize: 1, PageToken: token})
		if err != nil || len(resp.GetTransactions()) != 1 {
			t.Fatalf("%v, %v", resp, err)
		}
		d := resp.GetTransactions()[0]
		if d.GetSource() != "orders" || d.GetDatabaseTransaction().GetXid() != 700 || d.GetAggregateId() != "a-1" || d.GetEvents() != 1 ||
			d.GetSince() == nil || time.Since(d.GetNextCheckTime().AsTime()) < -time.Minute {
			t.Errorf("%v", d)
		}
		seen[string(d.GetTransactionId())] = true
		token = resp.GetNextPageToken()
	}
	if len(seen) != 3 || token != "" {
		t.Errorf("%d seen, next %q", len(seen), token)
	}
	_, err := r.admin.ListInDoubtTransactions(t.Context(), &outboxv1.ListInDoubtTransactionsRequest{PageToken: "x"})
	wantError(t, err, codes.InvalidArgument, outboxv1.ErrorReason_ERROR_REASON_FIELD_INVALID)
}

// parkAll parks every event of the log as undecided, as the holders of all shards would.
func parkAll(t *testing.T, r *running) {
	t.Helper()
	ctx := t.Context()
	leases, err := r.db.Store.AcquireShards(ctx, "relay", time.Minute, 64)
	if err != nil {
		t.Fatal(err)
	}
	reader, err := r.db.Store.OpenReader(ctx)
	if err != nil {
		t.Fatal(err)
	}
	defer reader.Close(ctx) //nolint:errcheck // the test goes on
	for _, l := range leases {
		segments, err := reader.Read(ctx, []store.Cursor{{Shard: l.Shard, Position: l.Position}}, 100)
		if err != nil {
			t.Fatal(err)
		}
		step := store.Step{Shard: l.Shard, Epoch: l.Epoch, Checkpoint: l.Checkpoint}
		for i := range segments {
			step.Checkpoint.Position, step.Checkpoint.Oldest = segments[i].Position, segments[i].XID
			err := segments[i].Records(func(rec *store.Record) bool {
				d := *rec.Database
				step.Park = append(step.Park, store.Parked{
					EventPosition: store.EventPosition{Position: segments[i].Position, Record: rec.Number}, Key: rec.Key,
					Aggregate: store.Aggregate{Source: rec.Key.Source, Type: rec.Event.AggregateType, ID: rec.Event.AggregateID},
					Body:      store.EncodeEvent(nil, rec), Cause: store.CauseInDoubt, Database: &d,
				})
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
			t.Fatalf("parking: %v, %v", fenced, err)
		}
	}
}
