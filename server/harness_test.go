package server

import (
	"bytes"
	"context"
	"io"
	"log/slog"
	"net"
	"sync"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	outboxv1 "github.com/outbox-platform/outbox/gen/go/outbox/v1"
	"github.com/outbox-platform/outbox/store"
	"github.com/outbox-platform/outbox/store/storetest"
)

func TestMain(m *testing.M) { storetest.Main(m) }

// running is a server over a real store, serving until its test ends.
type running struct {
	*Server
	db     *storetest.Database
	conn   *grpc.ClientConn
	client outboxv1.OutboxServiceClient
	admin  outboxv1.AdminServiceClient
	reg    *prometheus.Registry
	stop   func() // begins the drain; the test's end waits for it
	done   chan error
}

// testConfig is the default configuration on free ports.
func testConfig(t testing.TB) Config {
	t.Helper()
	c, err := DefaultConfig()
	if err != nil {
		t.Fatal(err)
	}
	c.GRPCListen, c.HTTPListen = "127.0.0.1:0", "127.0.0.1:0"
	c.DrainTimeout = 5 * time.Second
	return c
}

// start runs a server on a database of its own.
func start(t testing.TB, change ...func(*Config)) *running {
	t.Helper()
	db := storetest.New(t)
	return startOn(t, db, db.Writer(t, store.WriterConfig{}), slog.New(slog.NewTextHandler(t.Output(), nil)), change...)
}

func startOn(t testing.TB, db *storetest.Database, w *store.Writer, log *slog.Logger, change ...func(*Config)) *running {
	t.Helper()
	cfg := testConfig(t)
	for _, f := range change {
		f(&cfg)
	}
	reg := prometheus.NewRegistry()
	s, err := New(cfg, db.Store, w, log, reg)
	if err != nil {
		t.Fatal(err)
	}
	return run(t, &running{Server: s, db: db, reg: reg})
}

// run serves until the test ends.
func run(t testing.TB, r *running) *running {
	t.Helper()
	ctx, cancel := context.WithCancel(context.WithoutCancel(t.Context()))
	r.done = make(chan error, 1)
	go func() { r.done <- r.Serve(ctx) }()
	r.stop = sync.OnceFunc(cancel)
	t.Cleanup(func() {
		r.stop()
		if err := <-r.done; err != nil {
			t.Error("serving:", err)
		}
		r.done <- nil
	})
	r.conn = dial(t, r.GRPCAddr())
	r.client = outboxv1.NewOutboxServiceClient(r.conn)
	r.admin = outboxv1.NewAdminServiceClient(r.conn)
	storetest.Eventually(t, 10*time.Second, r.readiness.ready.Load)
	return r
}

func dial(t testing.TB, addr string, opts ...grpc.DialOption) *grpc.ClientConn {
	t.Helper()
	conn, err := grpc.NewClient(addr, append([]grpc.DialOption{grpc.WithTransportCredentials(insecure.NewCredentials())}, opts...)...)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	return conn
}

// register registers a source that may use the topics "t-*".
func (r *running) register(t testing.TB, name string) *outboxv1.Source {
	t.Helper()
	resp, err := r.admin.ApplySource(t.Context(), &outboxv1.ApplySourceRequest{
		Source: &outboxv1.Source{Name: name, Topics: []string{"t-*"}}, Reason: "test",
	})
	if err != nil {
		t.Fatal("registering a source:", err)
	}
	return resp.GetSource()
}

func newID() []byte {
	id := uuid.Must(uuid.NewV7())
	return id[:]
}

func newEvent(aggregate string) *outboxv1.Event {
	return &outboxv1.Event{
		EventId: newID(), Topic: "t-orders", AggregateType: "order", AggregateId: aggregate, EventType: "order.placed",
		Payload: []byte(`{"n":1}`), ContentType: "application/json",
		Headers: []*outboxv1.Header{{Name: "traceparent", Value: []byte("00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01")}},
	}
}

func newPrepare(source string) *outboxv1.PrepareRequest {
	return &outboxv1.PrepareRequest{
		Source: source, TransactionId: newID(),
		DatabaseTransaction: &outboxv1.DatabaseTransaction{Xid: 700, SystemIdentifier: 7, Timeline: 1, DatabaseOid: 5, MarkerOid: 6},
		Events:              []*outboxv1.Event{newEvent("a-1")},
	}
}

// wantError checks the code, the one ErrorInfo and its reason, and returns its metadata and the status.
func wantError(t testing.TB, err error, code codes.Code, reason outboxv1.ErrorReason) (map[string]string, *status.Status) {
	t.Helper()
	st, ok := status.FromError(err)
	if err == nil || !ok || st.Code() != code {
		t.Fatalf("error %v, want code %s", err, code)
	}
	var infos []*errdetails.ErrorInfo
	for _, d := range st.Details() {
		if info, is := d.(*errdetails.ErrorInfo); is {
			infos = append(infos, info)
		}
	}
	if len(infos) != 1 {
		t.Fatalf("%v has %d ErrorInfo, want one", err, len(infos))
	}
	if got := "ERROR_REASON_" + infos[0].GetReason(); got != reason.String() || infos[0].GetDomain() != "outbox.v1" {
		t.Fatalf("reason %s of domain %s, want %s (%v)", got, infos[0].GetDomain(), reason, err)
	}
	return infos[0].GetMetadata(), st
}

// badFields are the fields that BadRequest names.
func badFields(st *status.Status) (fields []string) {
	for _, d := range st.Details() {
		if bad, is := d.(*errdetails.BadRequest); is {
			for _, v := range bad.GetFieldViolations() {
				fields = append(fields, v.GetField())
			}
		}
	}
	return fields
}

// withToken adds a bearer token to a call.
func withToken(ctx context.Context, token string) context.Context {
	return metadata.AppendToOutgoingContext(ctx, "authorization", "Bearer "+token)
}

// memoryWriter answers at once what PostgreSQL would, or what the test says. It stands in where PostgreSQL cannot produce
// the fault, and where only the cost of the RPC is measured.
type memoryWriter struct {
	refuse error                // what Submit returns
	answer func(*store.Request) // nil: OK at once, on a goroutine of the writer's own
	queue  chan *store.Request
}

// newMemoryWriter runs until the test ends.
func newMemoryWriter(t testing.TB) *memoryWriter {
	w := &memoryWriter{queue: make(chan *store.Request, 16384)}
	ctx, cancel := context.WithCancel(context.WithoutCancel(t.Context()))
	done := make(chan struct{})
	go func() {
		defer close(done)
		for {
			select {
			case r := <-w.queue:
				r.Done(r, store.Answer{Shards: 1})
			case <-ctx.Done():
				return
			}
		}
	}()
	t.Cleanup(func() { cancel(); <-done })
	return w
}

func (w *memoryWriter) Submit(r *store.Request) error {
	if w.refuse != nil {
		return w.refuse
	}
	if w.answer != nil {
		w.answer(r)
		return nil
	}
	w.queue <- r
	return nil
}

// startWithout runs a server without a store: sources are given, the writer is w.
func startWithout(t testing.TB, w submitter, change ...func(*Config)) *running {
	t.Helper()
	return startLogging(t, w, discard(), change...)
}

// startLogging is startWithout with a log of the test's own.
func startLogging(t testing.TB, w submitter, log *slog.Logger, change ...func(*Config)) *running {
	t.Helper()
	cfg := testConfig(t)
	cfg.MaintenanceInterval = time.Hour // there is nothing to maintain
	for _, f := range change {
		f(&cfg)
	}
	src := &sources{
		loadSources: func(context.Context) ([]store.Source, error) {
			return []store.Source{{ID: 1, Name: "orders", Topics: []string{"t-*"}, CloudEventsSource: "/outbox/orders"}}, nil
		},
		loadTopics: func(context.Context) ([]store.Topic, error) { return nil, nil },
		log:        log,
	}
	reg := prometheus.NewRegistry()
	s, err := build(cfg, w, src, func(context.Context) error { return nil }, 16, log, reg)
	if err != nil {
		t.Fatal(err)
	}
	return run(t, &running{Server: s, reg: reg})
}

// openSession opens a session and reads Welcome.
func openSession(t testing.TB, ctx context.Context, client outboxv1.OutboxServiceClient, hello *outboxv1.SessionRequest_Hello) outboxv1.OutboxService_SessionClient {
	t.Helper()
	stream, err := client.Session(ctx)
	if err != nil {
		t.Fatal(err)
	}
	if err := stream.Send(&outboxv1.SessionRequest{Request: &outboxv1.SessionRequest_Hello_{Hello: hello}}); err != nil {
		t.Fatal(err)
	}
	resp, err := stream.Recv()
	if err != nil {
		t.Fatal("receiving Welcome:", err)
	}
	if resp.GetWelcome() == nil {
		t.Fatalf("first response is %v, want Welcome", resp)
	}
	return stream
}

// sendCalls sends calls in one message.
func sendCalls(t testing.TB, stream outboxv1.OutboxService_SessionClient, calls ...*outboxv1.SessionRequest_Call) {
	t.Helper()
	err := stream.Send(&outboxv1.SessionRequest{Request: &outboxv1.SessionRequest_Calls_{Calls: &outboxv1.SessionRequest_Calls{Calls: calls}}})
	if err != nil {
		t.Fatal(err)
	}
}

// receiveResults reads until n results have come.
func receiveResults(t testing.TB, stream outboxv1.OutboxService_SessionClient, n int) map[uint64]*outboxv1.SessionResponse_Result {
	t.Helper()
	got := make(map[uint64]*outboxv1.SessionResponse_Result)
	for len(got) < n {
		resp, err := stream.Recv()
		if err != nil {
			t.Fatalf("after %d of %d results: %v", len(got), n, err)
		}
		for _, r := range resp.GetResults().GetResults() {
			if got[r.GetCallId()] != nil {
				t.Fatalf("call %d is answered twice", r.GetCallId())
			}
			got[r.GetCallId()] = r
		}
	}
	return got
}

func callPrepareOf(id uint64, req *outboxv1.PrepareRequest) *outboxv1.SessionRequest_Call {
	return &outboxv1.SessionRequest_Call{CallId: id, Call: &outboxv1.SessionRequest_Call_Prepare{Prepare: req}}
}

func callCommitOf(id uint64, req *outboxv1.CommitRequest) *outboxv1.SessionRequest_Call {
	return &outboxv1.SessionRequest_Call{CallId: id, Call: &outboxv1.SessionRequest_Call_Commit{Commit: req}}
}

func callAbortOf(id uint64, req *outboxv1.AbortRequest) *outboxv1.SessionRequest_Call {
	return &outboxv1.SessionRequest_Call{CallId: id, Call: &outboxv1.SessionRequest_Call_Abort{Abort: req}}
}

func callPublishOf(id uint64, req *outboxv1.PublishRequest) *outboxv1.SessionRequest_Call {
	return &outboxv1.SessionRequest_Call{CallId: id, Call: &outboxv1.SessionRequest_Call_Publish{Publish: req}}
}

// freeListener is a listener on a free port of this machine.
func freeListener(t testing.TB) net.Listener {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = l.Close() })
	return l
}

func discard() *slog.Logger { return slog.New(slog.NewTextHandler(io.Discard, nil)) }

func grpcCode(err error) codes.Code { return status.Code(err) }

// retryDelay is what RetryInfo says; 0: there is none.
func retryDelay(st *status.Status) time.Duration {
	for _, d := range st.Details() {
		if r, is := d.(*errdetails.RetryInfo); is {
			return r.GetRetryDelay().AsDuration()
		}
	}
	return 0
}

// lockedBuffer is a log that tests can read while it is written.
type lockedBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *lockedBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *lockedBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

func textLog(w io.Writer) *slog.Logger {
	return slog.New(slog.NewTextHandler(w, &slog.HandlerOptions{Level: slog.LevelDebug}))
}

func newRegistry() *prometheus.Registry { return prometheus.NewRegistry() }
