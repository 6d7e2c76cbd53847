package server

import (
	"context"
	"slices"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/protobuf/types/known/timestamppb"

	outboxv1 "github.com/outbox-platform/outbox/gen/go/outbox/v1"
	"github.com/outbox-platform/outbox/store"
	"github.com/outbox-platform/outbox/store/storetest"
)

func TestPrepareCommit(t *testing.T) {
	r := start(t)
	r.register(t, "orders")
	req := newPrepare("orders")
	req.Events[0].OccurredAt = timestamppb.New(time.Date(2026, 11, 24, 7, 0, 0, 5, time.UTC))
	resp, err := r.client.Prepare(t.Context(), req)
	if err != nil {
		t.Fatal(err)
	}
	again, err := r.client.Prepare(t.Context(), req)
	if err != nil || string(again.GetToken()) != string(resp.GetToken()) {
		t.Fatalf("repetition: %v, %v; want the same token %x", again, err, resp.GetToken())
	}
	get, err := r.client.GetTransaction(t.Context(), &outboxv1.GetTransactionRequest{Source: "orders", TransactionId: req.GetTransactionId()})
	if err != nil {
		t.Fatal(err)
	}
	if tx := get.GetTransaction(); tx.GetState() != outboxv1.Transaction_STATE_PREPARED || tx.GetDatabaseTransaction().GetXid() != 700 ||
		len(tx.GetEvents()) != 1 || tx.GetEvents()[0].GetPlace() != outboxv1.EventStatus_PLACE_IN_DOUBT || tx.GetDecideTime() != nil {
		t.Fatalf("after Prepare: %v", tx)
	}
	if _, err := r.client.Commit(t.Context(), &outboxv1.CommitRequest{Source: "orders", TransactionId: req.GetTransactionId(), Token: resp.GetToken()}); err != nil {
		t.Fatal(err)
	}
	// A second time, without the token, and with one that is not of this transaction.
	for _, token := range [][]byte{nil, []byte("nonsense"), make([]byte, tokenBytes)} {
		if _, err := r.client.Commit(t.Context(), &outboxv1.CommitRequest{Source: "orders", TransactionId: req.GetTransactionId(), Token: token}); err != nil {
			t.Fatalf("with token %x: %v", token, err)
		}
	}
	get, err = r.client.GetTransaction(t.Context(), &outboxv1.GetTransactionRequest{Source: "orders", TransactionId: req.GetTransactionId()})
	if err != nil {
		t.Fatal(err)
	}
	if tx := get.GetTransaction(); tx.GetState() != outboxv1.Transaction_STATE_COMMITTED || tx.GetDecidedBy() != "client" || tx.GetDecideTime() == nil {
		t.Fatalf("after Commit: %v", tx)
	}
	md, _ := wantError(t, abort(t, r, req), codes.FailedPrecondition, outboxv1.ErrorReason_ERROR_REASON_TRANSACTION_ALREADY_DECIDED)
	if md["state"] != "COMMITTED" {
		t.Errorf("metadata %v, want state COMMITTED", md)
	}
	if v := metric(t, r, "outbox_contradictions_total", "call", "abort"); v != 1 {
		t.Errorf("outbox_contradictions_total is %v, want 1", v)
	}
	if v := metric(t, r, "outbox_prepares_total"); v != 2 {
		t.Errorf("outbox_prepares_total is %v, want 2", v)
	}
	if v := metric(t, r, "outbox_open_calls"); v != 0 {
		t.Errorf("outbox_open_calls is %v, want 0", v)
	}
}

func abort(t testing.TB, r *running, req *outboxv1.PrepareRequest) error {
	t.Helper()
	_, err := r.client.Abort(t.Context(), &outboxv1.AbortRequest{Source: "orders", TransactionId: req.GetTransactionId()})
	return err
}

// metric returns the value of one metric.
func metric(t testing.TB, r *running, name string, labels ...string) float64 {
	t.Helper()
	families, err := r.reg.Gather()
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range families {
		if f.GetName() != name {
			continue
		}
		for _, m := range f.GetMetric() {
			fits := 0
			for _, l := range m.GetLabel() {
				for i := 0; i+1 < len(labels); i += 2 {
					if l.GetName() == labels[i] && l.GetValue() == labels[i+1] {
						fits++
					}
				}
			}
			if fits*2 == len(labels) {
				return m.GetCounter().GetValue() + m.GetGauge().GetValue()
			}
		}
	}
	t.Fatalf("no metric %s %v", name, labels)
	return 0
}

func TestAbort(t *testing.T) {
	r := start(t)
	r.register(t, "orders")
	req := newPrepare("orders")
	if _, err := r.client.Prepare(t.Context(), req); err != nil {
		t.Fatal(err)
	}
	if err := abort(t, r, req); err != nil {
		t.Fatal(err)
	}
	if err := abort(t, r, req); err != nil {
		t.Fatal("repetition:", err)
	}
	_, err := r.client.Commit(t.Context(), &outboxv1.CommitRequest{Source: "orders", TransactionId: req.GetTransactionId()})
	md, _ := wantError(t, err, codes.FailedPrecondition, outboxv1.ErrorReason_ERROR_REASON_TRANSACTION_ALREADY_DECIDED)
	if md["state"] != "ABORTED" {
		t.Errorf("metadata %v, want state ABORTED", md)
	}
	_, err = r.client.Publish(t.Context(), &outboxv1.PublishRequest{Source: "orders", TransactionId: req.GetTransactionId(), Events: req.GetEvents()})
	wantError(t, err, codes.FailedPrecondition, outboxv1.ErrorReason_ERROR_REASON_TRANSACTION_ALREADY_DECIDED)
}

func TestPublish(t *testing.T) {
	r := start(t)
	r.register(t, "orders")
	req := &outboxv1.PublishRequest{Source: "orders", TransactionId: newID(), Events: []*outboxv1.Event{newEvent("a"), newEvent("b")}}
	for range 2 {
		if _, err := r.client.Publish(t.Context(), req); err != nil {
			t.Fatal(err)
		}
	}
	get, err := r.client.GetTransaction(t.Context(), &outboxv1.GetTransactionRequest{Source: "orders", TransactionId: req.GetTransactionId()})
	if err != nil {
		t.Fatal(err)
	}
	if tx := get.GetTransaction(); tx.GetState() != outboxv1.Transaction_STATE_COMMITTED || len(tx.GetEvents()) != 2 || tx.GetDatabaseTransaction() != nil {
		t.Fatalf("after Publish: %v", tx)
	}
	// A spilled transaction whose Prepare had arrived after all is committed by it.
	prepared := newPrepare("orders")
	if _, err := r.client.Prepare(t.Context(), prepared); err != nil {
		t.Fatal(err)
	}
	if _, err := r.client.Publish(t.Context(), &outboxv1.PublishRequest{Source: "orders", TransactionId: prepared.GetTransactionId(), Events: prepared.GetEvents()}); err != nil {
		t.Fatal(err)
	}
	// The same id with other content.
	other := &outboxv1.PublishRequest{Source: "orders", TransactionId: req.GetTransactionId(), Events: []*outboxv1.Event{newEvent("c")}}
	_, err = r.client.Publish(t.Context(), other)
	wantError(t, err, codes.AlreadyExists, outboxv1.ErrorReason_ERROR_REASON_TRANSACTION_ID_REUSED)
}

// TestPublishThatIsKept: the server remembers a Publish whose caller keeps it like a decision that it found out, by unary call and
// session, stored or found prepared; others leave nothing.
func TestPublishThatIsKept(t *testing.T) {
	r := start(t)
	r.register(t, "orders")
	prepared := newPrepare("orders")
	if _, err := r.client.Prepare(t.Context(), prepared); err != nil {
		t.Fatal(err)
	}
	unary := &outboxv1.PublishRequest{Source: "orders", TransactionId: newID(), Events: []*outboxv1.Event{newEvent("a")}, KeptByCaller: true}
	found := &outboxv1.PublishRequest{Source: "orders", TransactionId: prepared.GetTransactionId(), Events: prepared.GetEvents(), KeptByCaller: true}
	ordinary := &outboxv1.PublishRequest{Source: "orders", TransactionId: newID(), Events: []*outboxv1.Event{newEvent("c")}}
	onSession := &outboxv1.PublishRequest{Source: "orders", TransactionId: newID(), Events: []*outboxv1.Event{newEvent("b")}, KeptByCaller: true}
	for _, req := range []*outboxv1.PublishRequest{unary, found, ordinary} {
		if _, err := r.client.Publish(t.Context(), req); err != nil {
			t.Fatal(err)
		}
	}
	s := openSession(t, t.Context(), r.client, hello("orders"))
	sendCalls(t, s, callPublishOf(1, onSession))
	if err := resultError(receiveResults(t, s, 1)[1]); err != nil {
		t.Fatal(err)
	}
	for _, req := range []*outboxv1.PublishRequest{unary, found, onSession, ordinary} {
		get, err := r.client.GetTransaction(t.Context(), &outboxv1.GetTransactionRequest{Source: "orders", TransactionId: req.GetTransactionId()})
		if err != nil {
			t.Fatal(err)
		}
		want := ""
		if req.GetKeptByCaller() {
			want = `{"kept_by_caller": true}`
		}
		if tx := get.GetTransaction(); tx.GetDecidedBy() != "client" || tx.GetEvidence() != want {
			t.Errorf("kept %v: %v", req.GetKeptByCaller(), tx)
		}
	}
	if n := storetest.Query[int64](t, r.db, `SELECT count(*) FROM outbox.resolution WHERE method = 'client' AND actor = 'orders'`)[0]; n != 3 {
		t.Errorf("%d are kept, want 3", n)
	}
}

func TestUnknownTransaction(t *testing.T) {
	r := start(t)
	r.register(t, "orders")
	id := newID()
	_, err := r.client.Commit(t.Context(), &outboxv1.CommitRequest{Source: "orders", TransactionId: id})
	wantError(t, err, codes.NotFound, outboxv1.ErrorReason_ERROR_REASON_TRANSACTION_UNKNOWN)
	_, err = r.client.GetTransaction(t.Context(), &outboxv1.GetTransactionRequest{Source: "orders", TransactionId: id})
	md, _ := wantError(t, err, codes.NotFound, outboxv1.ErrorReason_ERROR_REASON_TRANSACTION_UNKNOWN)
	horizon, err := time.Parse(time.RFC3339Nano, md["retention_horizon"])
	if err != nil || horizon.After(time.Now()) {
		t.Errorf("retention_horizon %q, want a time in the past (%v)", md["retention_horizon"], err)
	}
}

func TestSourcesAndTopicsAreDenied(t *testing.T) {
	r := start(t)
	r.register(t, "orders")
	_, err := r.client.Prepare(t.Context(), newPrepare("nobody"))
	wantError(t, err, codes.PermissionDenied, outboxv1.ErrorReason_ERROR_REASON_SOURCE_DENIED)
	req := newPrepare("orders")
	req.Events[0].Topic = "payments"
	_, err = r.client.Prepare(t.Context(), req)
	md, _ := wantError(t, err, codes.PermissionDenied, outboxv1.ErrorReason_ERROR_REASON_TOPIC_DENIED)
	if md["topic"] != "payments" || md["source"] != "orders" {
		t.Errorf("metadata %v", md)
	}
}

func TestTopicLimit(t *testing.T) {
	r := start(t)
	r.register(t, "orders")
	if err := r.db.Store.PutTopics(t.Context(), []store.Topic{{Name: "t-small", Partitions: 1, MaxMessageBytes: 4096}}); err != nil {
		t.Fatal(err)
	}
	if err := r.sources.refresh(t.Context()); err != nil {
		t.Fatal(err)
	}
	req := newPrepare("orders")
	req.Events[0].Topic = "t-small"
	req.Events[0].Payload = make([]byte, 4096)
	_, err := r.client.Prepare(t.Context(), req)
	md, st := wantError(t, err, codes.InvalidArgument, outboxv1.ErrorReason_ERROR_REASON_EVENT_TOO_LARGE)
	if md["field"] != "events[0].payload" || !slices.Equal(badFields(st), []string{"events[0].payload"}) {
		t.Errorf("metadata %v, fields %v", md, badFields(st))
	}
	req.Events[0].Payload = make([]byte, 1024)
	if _, err := r.client.Prepare(t.Context(), req); err != nil {
		t.Fatal(err)
	}
}

// Overload and an absent store are answered with what retrying clients need.
func TestRefusalsOfTheWriter(t *testing.T) {
	w := newMemoryWriter(t)
	r := startWithout(t, w)
	for _, c := range []struct {
		err    error
		code   codes.Code
		reason outboxv1.ErrorReason
	}{
		{store.ErrBacklogFull, codes.ResourceExhausted, outboxv1.ErrorReason_ERROR_REASON_BACKLOG_FULL},
		{store.ErrUnavailable, codes.Unavailable, outboxv1.ErrorReason_ERROR_REASON_STORE_UNAVAILABLE},
	} {
		w.refuse = c.err
		var trailer metadata.MD
		_, err := r.client.Prepare(t.Context(), newPrepare("orders"), grpc.Trailer(&trailer))
		_, st := wantError(t, err, c.code, c.reason)
		if len(trailer.Get("grpc-retry-pushback-ms")) != 1 || retryDelay(st) <= 0 {
			t.Errorf("%s: trailer %v, RetryInfo %s", c.reason, trailer, retryDelay(st))
		}
	}
}

func TestContentionIsAborted(t *testing.T) {
	w := newMemoryWriter(t)
	w.answer = func(r *store.Request) { r.Done(r, store.Answer{Err: store.ErrContention}) }
	r := startWithout(t, w)
	_, err := r.client.Prepare(t.Context(), newPrepare("orders"))
	wantError(t, err, codes.Aborted, outboxv1.ErrorReason_ERROR_REASON_CONTENTION)
}

// A call that the store never answers ends with its deadline, and its late answer harms nobody.
func TestDeadlineOfUnaryCall(t *testing.T) {
	late := make(chan *store.Request, 1)
	w := newMemoryWriter(t)
	w.answer = func(r *store.Request) { late <- r }
	r := startWithout(t, w, func(c *Config) { c.DefaultDeadline = time.Second })
	_, err := r.client.Prepare(t.Context(), newPrepare("orders"))
	if code := grpcCode(err); code != codes.DeadlineExceeded {
		t.Fatalf("%v, want DEADLINE_EXCEEDED", err)
	}
	req := <-late
	req.Done(req, store.Answer{})
}

func TestSourceQuota(t *testing.T) {
	held := make(chan *store.Request, 4)
	w := newMemoryWriter(t)
	w.answer = func(r *store.Request) { held <- r }
	r := startWithout(t, w, func(c *Config) { c.MaxSourceCalls = 1 })
	first := make(chan error, 1)
	go func() {
		_, err := r.client.Prepare(t.Context(), newPrepare("orders"))
		first <- err
	}()
	req := <-held
	_, err := r.client.Prepare(t.Context(), newPrepare("orders"))
	md, _ := wantError(t, err, codes.ResourceExhausted, outboxv1.ErrorReason_ERROR_REASON_QUOTA_EXCEEDED)
	if md["quota"] != "calls" {
		t.Errorf("metadata %v", md)
	}
	req.Done(req, store.Answer{Shards: 1})
	if err := <-first; err != nil {
		t.Fatal(err)
	}
}

// While the store is away calls are refused quickly, health says so, and both come back by themselves.
func TestStoreAwayAndBack(t *testing.T) {
	cluster := storetest.NewCluster(t)
	db := cluster.New(t)
	w := db.Writer(t, store.WriterConfig{MaxWait: 200 * time.Millisecond})
	r := startOn(t, db, w, discard())
	r.register(t, "orders")
	cluster.Kill()
	storetest.Eventually(t, 20*time.Second, func() bool { return !r.readiness.ready.Load() })
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	_, err := r.client.Prepare(ctx, newPrepare("orders"))
	wantError(t, err, codes.Unavailable, outboxv1.ErrorReason_ERROR_REASON_STORE_UNAVAILABLE)
	// A name that is not in memory cannot be looked up: that is not the same as not registered.
	_, err = r.client.Prepare(ctx, newPrepare("unknown"))
	wantError(t, err, codes.Unavailable, outboxv1.ErrorReason_ERROR_REASON_STORE_UNAVAILABLE)
	cluster.Restart(t)
	storetest.Eventually(t, 20*time.Second, r.readiness.ready.Load)
	storetest.Eventually(t, 20*time.Second, func() bool {
		_, err := r.client.Prepare(t.Context(), newPrepare("orders"))
		return err == nil
	})
}
