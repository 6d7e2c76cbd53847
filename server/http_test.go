package server

import (
	"bytes"
	"context"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"strings"
	"testing"
	"time"

	collectorv1 "go.opentelemetry.io/proto/otlp/collector/trace/v1"
	"google.golang.org/grpc"
	"google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/protobuf/encoding/protojson"

	outboxv1 "github.com/outbox-platform/outbox/gen/go/outbox/v1"
	"github.com/outbox-platform/outbox/store"
	"github.com/outbox-platform/outbox/store/storetest"
)

// request makes one HTTP request and returns its code and body.
func request(t testing.TB, method, url, token string, body []byte) (int, string) {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), method, url, bytes.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("Content-Type", "application/json")
	if token != "" {
		req.Header.Set("Authorization", "Bearer "+token)
	}
	client := &http.Client{Transport: &http.Transport{DisableKeepAlives: true}}
	resp, err := client.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close() //nolint:errcheck // it is read
	text, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return resp.StatusCode, string(text)
}

// Everything that gRPC callers can do, curl can.
func TestJSON(t *testing.T) {
	r := start(t, withPrincipals(t))
	base := "http://" + r.HTTPAddr()
	code, text := request(t, "POST", base+outboxv1.AdminService_ApplySource_FullMethodName, "ops-secret",
		[]byte(`{"source":{"name":"orders","topics":["t-*"]},"reason":"curl"}`))
	if code != 200 || !strings.Contains(text, `"revision"`) {
		t.Fatalf("ApplySource: %d %s", code, text)
	}
	req := newPrepare("orders")
	body, err := protojson.Marshal(req)
	if err != nil {
		t.Fatal(err)
	}
	if code, text = request(t, "POST", base+outboxv1.OutboxService_Prepare_FullMethodName, "orders-secret", body); code != 200 {
		t.Fatalf("Prepare: %d %s", code, text)
	}
	get := fmt.Sprintf(`{"source":"orders","transactionId":%q}`, base64.StdEncoding.EncodeToString(req.GetTransactionId()))
	code, text = request(t, "POST", base+outboxv1.OutboxService_GetTransaction_FullMethodName, "orders-secret", []byte(get))
	if code != 200 || !strings.Contains(text, "STATE_PREPARED") {
		t.Fatalf("GetTransaction: %d %s", code, text)
	}
	// The same rules hold.
	for name, c := range map[string]struct {
		method, token, body, want string
		code                      int
	}{
		"nobody":        {outboxv1.OutboxService_GetTransaction_FullMethodName, "", get, "IDENTITY_UNKNOWN", 401},
		"another":       {outboxv1.OutboxService_GetTransaction_FullMethodName, "payments-secret", get, "SOURCE_DENIED", 403},
		"not an admin":  {outboxv1.AdminService_ListShards_FullMethodName, "orders-secret", "{}", "METHOD_DENIED", 403},
		"no id":         {outboxv1.OutboxService_GetTransaction_FullMethodName, "orders-secret", `{"source":"orders"}`, "FIELD_INVALID", 400},
		"not JSON":      {outboxv1.OutboxService_GetTransaction_FullMethodName, "orders-secret", `{{`, "FIELD_INVALID", 400},
		"unknown field": {outboxv1.OutboxService_GetTransaction_FullMethodName, "orders-secret", `{"source":"orders","bogus":1}`, "bogus", 400},
		"no such call":  {"/outbox.v1.OutboxService/Nothing", "orders-secret", `{}`, "", 404},
		"a session":     {outboxv1.OutboxService_Session_FullMethodName, "orders-secret", `{}`, "gRPC port", 501},
	} {
		code, text := request(t, "POST", base+c.method, c.token, []byte(c.body))
		if code != c.code || !strings.Contains(detailsOf(text), c.want) {
			t.Errorf("%s: %d %s, want %d with %s", name, code, text, c.code, c.want)
		}
	}
	if code, _ := request(t, "POST", base+outboxv1.OutboxService_Prepare_FullMethodName, "orders-secret", bytes.Repeat([]byte(" "), 13<<20)); code < 400 {
		t.Errorf("13 MiB: %d", code)
	}
}

// detailsOf adds the decoded details of an error in JSON to its text.
func detailsOf(text string) string {
	var e struct {
		Details []struct{ Value string }
	}
	if json.Unmarshal([]byte(text), &e) != nil {
		return text
	}
	for _, d := range e.Details {
		if b, err := base64.RawStdEncoding.DecodeString(d.Value); err == nil {
			text += string(b)
		}
	}
	return text
}

func TestMetricsAndHealth(t *testing.T) {
	cluster := storetest.NewCluster(t)
	db := cluster.New(t)
	r := startOn(t, db, db.Writer(t, store.WriterConfig{}), discard())
	base := "http://" + r.HTTPAddr()
	_, text := request(t, "GET", base+"/metrics", "", nil)
	for _, want := range []string{
		`outbox_store_up 1`, `outbox_calls_total{call="prepare",code="OK"} 0`, `outbox_calls_total{call="commit",code="FailedPrecondition"} 0`,
		`outbox_refused_calls_total{reason="TOPIC_DENIED"} 0`, `outbox_decisions_total{method="client",state="aborted"} 0`,
		`grpc_server_started_total{grpc_method="Session",grpc_service="outbox.v1.OutboxService",grpc_type="bidi_stream"} 0`,
		`outbox_call_seconds_count{call="publish"} 0`,
	} {
		if !strings.Contains(text, want) {
			t.Errorf("no %s in /metrics", want)
		}
	}
	if code, text := request(t, "GET", base+"/readyz", "", nil); code != 200 {
		t.Errorf("/readyz: %d %s", code, text)
	}
	if code, _ := request(t, "GET", base+"/healthz", "", nil); code != 200 {
		t.Errorf("/healthz: %d", code)
	}
	health := grpc_health_v1.NewHealthClient(r.conn)
	state := func(service string) grpc_health_v1.HealthCheckResponse_ServingStatus {
		resp, err := health.Check(t.Context(), &grpc_health_v1.HealthCheckRequest{Service: service})
		if err != nil {
			t.Fatal(err)
		}
		return resp.GetStatus()
	}
	for _, s := range []string{"", "outbox.v1.OutboxService", "outbox.v1.AdminService"} {
		if got := state(s); got != grpc_health_v1.HealthCheckResponse_SERVING {
			t.Errorf("%q is %s", s, got)
		}
	}
	cluster.Kill()
	storetest.Eventually(t, 20*time.Second, func() bool { return state("") == grpc_health_v1.HealthCheckResponse_NOT_SERVING })
	if code, text := request(t, "GET", base+"/readyz", "", nil); code != 503 || !strings.Contains(text, "store") {
		t.Errorf("/readyz without a store: %d %s", code, text)
	}
	if code, _ := request(t, "GET", base+"/healthz", "", nil); code != 200 {
		t.Errorf("/healthz without a store: %d", code)
	}
	cluster.Restart(t)
	storetest.Eventually(t, 20*time.Second, func() bool { return state("outbox.v1.OutboxService") == grpc_health_v1.HealthCheckResponse_SERVING })
	r.readiness.drain()
	if code, text := request(t, "GET", base+"/readyz", "", nil); code != 503 || !strings.Contains(text, "draining") {
		t.Errorf("/readyz while draining: %d %s", code, text)
	}
}

// The maintenance loop rotates a full generation, and says what it did.
func TestMaintenance(t *testing.T) {
	var log lockedBuffer
	db := storetest.New(t)
	r := startOn(t, db, db.Writer(t, store.WriterConfig{}), textLog(&log), func(c *Config) {
		c.MaintenanceInterval = 20 * time.Millisecond
		c.GenerationBytes = 16 << 10
	})
	r.register(t, "orders")
	for range 40 {
		e := newEvent("a")
		e.Payload = bytes.Repeat([]byte("x"), 4096)
		if _, err := r.client.Publish(t.Context(), &outboxv1.PublishRequest{Source: "orders", TransactionId: newID(), Events: []*outboxv1.Event{e}}); err != nil {
			t.Fatal(err)
		}
	}
	storetest.Eventually(t, 20*time.Second, func() bool { return metric(t, r, "outbox_log_rotations_total") > 0 })
	if metric(t, r, "outbox_log_bytes") == 0 || !strings.Contains(log.String(), "log maintained") {
		t.Errorf("log %s", log.String())
	}
}

// A full ring is an alarm, told once in a while.
func TestFullRing(t *testing.T) {
	var log lockedBuffer
	r := startLogging(t, newMemoryWriter(t), textLog(&log))
	told := r.maintained(store.MaintenanceReport{RingFull: true}, time.Time{})
	if told.IsZero() || metric(t, r, "outbox_log_ring_full") != 1 || !strings.Contains(log.String(), "cannot rotate") {
		t.Errorf("a full ring: %s", log.String())
	}
	if again := r.maintained(store.MaintenanceReport{RingFull: true}, told); again != told {
		t.Error("told twice")
	}
	if !r.maintained(store.MaintenanceReport{}, told).IsZero() || metric(t, r, "outbox_log_ring_full") != 0 {
		t.Error("the alarm does not end")
	}
}

func TestWriterHooks(t *testing.T) {
	r := startWithout(t, newMemoryWriter(t))
	onBatch, err := WriterHooks(r.reg)
	if err != nil {
		t.Fatal(err)
	}
	onBatch(7, time.Millisecond, 2*time.Millisecond)
	_, text := request(t, "GET", "http://"+r.HTTPAddr()+"/metrics", "", nil)
	if !strings.Contains(text, "outbox_batch_requests_sum 7") || !strings.Contains(text, "outbox_batch_statement_seconds_count 1") {
		t.Error("batches are not counted")
	}
	if _, err := WriterHooks(r.reg); err == nil {
		t.Error("registering twice is accepted")
	}
}

// The access log tells who called what: admin calls always, data calls at debug level.
func TestAccessLog(t *testing.T) {
	var log lockedBuffer
	r := startLogging(t, newMemoryWriter(t), textLog(&log), withPrincipals(t))
	if _, err := r.client.Prepare(withToken(t.Context(), "orders-secret"), newPrepare("orders")); err != nil {
		t.Fatal(err)
	}
	_, _ = r.admin.ListSources(withToken(t.Context(), "orders-secret"), &outboxv1.ListSourcesRequest{}) // refused, and logged
	for _, want := range []string{
		`level=DEBUG msg=call method=/outbox.v1.OutboxService/Prepare code=OK`, `principal=orders`,
		`level=INFO msg=call method=/outbox.v1.AdminService/ListSources code=PermissionDenied`,
	} {
		if !strings.Contains(log.String(), want) {
			t.Errorf("no %q in the log:\n%s", want, log.String())
		}
	}
	if strings.Contains(log.String(), "secret") {
		t.Error("the log tells a token")
	}
}

// collector is an OTLP collector that counts spans by name.
type collector struct {
	collectorv1.UnimplementedTraceServiceServer
	names chan string
}

func (c *collector) Export(_ context.Context, req *collectorv1.ExportTraceServiceRequest) (*collectorv1.ExportTraceServiceResponse, error) {
	for _, r := range req.GetResourceSpans() {
		for _, s := range r.GetScopeSpans() {
			for _, span := range s.GetSpans() {
				c.names <- span.GetName()
			}
		}
	}
	return &collectorv1.ExportTraceServiceResponse{}, nil
}

// Unary calls are traced, sessions are not; what is left is sent when the server stops.
func TestTracing(t *testing.T) {
	c := &collector{names: make(chan string, 16)}
	g := grpc.NewServer()
	collectorv1.RegisterTraceServiceServer(g, c)
	l := freeListener(t)
	go func() { _ = g.Serve(l) }() // it ends with Stop
	t.Cleanup(g.Stop)
	r := startWithout(t, newMemoryWriter(t), func(c *Config) { c.OTLPEndpoint = l.Addr().String() })
	s := openSession(t, t.Context(), r.client, hello("orders"))
	sendCalls(t, s, callPrepareOf(1, newPrepare("orders")))
	receiveResults(t, s, 1)
	if _, err := r.client.Prepare(t.Context(), newPrepare("orders")); err != nil {
		t.Fatal(err)
	}
	if err := s.CloseSend(); err != nil {
		t.Fatal(err)
	}
	r.stop()
	if err := <-r.done; err != nil {
		t.Fatal(err)
	}
	r.done <- nil
	if name := <-c.names; name != "outbox.v1.OutboxService/Prepare" || len(c.names) != 0 {
		t.Errorf("span %q and %d more", name, len(c.names))
	}
}
