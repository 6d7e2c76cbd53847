package server

import (
	"bytes"
	"compress/gzip"
	"context"
	"encoding/binary"
	"io"
	"net"
	"runtime"
	"strings"
	"testing"
	"time"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/encoding"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/metadata"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"

	outboxv1 "github.com/outbox-platform/outbox/gen/go/outbox/v1"
	"github.com/outbox-platform/outbox/store"
	"github.com/outbox-platform/outbox/store/storetest"
)

// rawCodec sends bytes as they are.
type rawCodec struct{}

func (rawCodec) Marshal(v any) ([]byte, error)      { return v.([]byte), nil }
func (rawCodec) Unmarshal(data []byte, v any) error { *v.(*[]byte) = bytes.Clone(data); return nil }
func (rawCodec) Name() string                       { return "proto" }

// raw makes a unary call with bytes of the test's own.
func (r *running) raw(ctx context.Context, method string, body []byte, opts ...grpc.CallOption) error {
	var resp []byte
	return r.conn.Invoke(ctx, method, body, &resp, append(opts, grpc.ForceCodec(rawCodec{}))...)
}

// Bytes that are no message are refused before any interceptor, and counted.
func TestUndecodable(t *testing.T) {
	r := startWithout(t, newMemoryWriter(t))
	good, err := proto.Marshal(newPrepare("orders"))
	if err != nil {
		t.Fatal(err)
	}
	invalid := bytes.Replace(good, []byte("order.placed"), []byte("order\xff\xfeaced"), 1)
	for name, body := range map[string][]byte{
		"invalid UTF-8": invalid,
		"truncated":     good[:len(good)-3],
		"garbage":       []byte("\xff\xff\xff\xff"),
	} {
		if err := r.raw(t.Context(), outboxv1.OutboxService_Prepare_FullMethodName, body); grpcCode(err) != codes.Internal {
			t.Errorf("%s: %v, want INTERNAL", name, err)
		}
	}
	if n := metric(t, r, "outbox_undecodable_messages_total"); n != 3 {
		t.Errorf("%v counted, want 3", n)
	}
	if err := r.raw(t.Context(), outboxv1.OutboxService_Prepare_FullMethodName, good); err != nil {
		t.Errorf("the good one: %v", err)
	}
}

// A message above the limit, plain or compressed, is refused, and memory stays bounded.
func TestOversize(t *testing.T) {
	r := startWithout(t, newMemoryWriter(t))
	if err := r.raw(t.Context(), outboxv1.OutboxService_Prepare_FullMethodName, make([]byte, 9<<20)); grpcCode(err) != codes.ResourceExhausted {
		t.Errorf("9 MiB: %v", err)
	}
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	// The bomb: 64 MiB of zeroes in 64 KiB, sent as it is under the name of a compressor that does nothing.
	encoding.RegisterCompressor(bomb{})
	if err := r.raw(t.Context(), outboxv1.OutboxService_Prepare_FullMethodName, []byte("x"), grpc.UseCompressor("gzip-bomb")); grpcCode(err) != codes.ResourceExhausted {
		t.Errorf("bomb: %v", err)
	}
	runtime.ReadMemStats(&after)
	if grown := after.TotalAlloc - before.TotalAlloc; grown > 48<<20 {
		t.Errorf("%d MiB were allocated for it", grown>>20)
	}
}

// bomb compresses every message to 64 MiB of zeroes.
type bomb struct{}

func (bomb) Name() string { return "gzip-bomb" }
func (bomb) Compress(w io.Writer) (io.WriteCloser, error) {
	z, err := gzip.NewWriterLevel(w, gzip.BestSpeed)
	if err != nil {
		return nil, err
	}
	block := make([]byte, 1<<20)
	for range 64 {
		if _, err := z.Write(block); err != nil {
			return nil, err
		}
	}
	return z, nil
}
func (bomb) Decompress(rd io.Reader) (io.Reader, error) { return gzip.NewReader(rd) }

// A million events in two megabytes must not become gigabytes, and the answer names the field.
func TestMillionEvents(t *testing.T) {
	r := startWithout(t, newMemoryWriter(t))
	var events []byte
	events = protowire.AppendTag(events, 1, protowire.BytesType)
	events = protowire.AppendString(events, "orders")
	one := protowire.AppendBytes(protowire.AppendTag(nil, prepareEvents, protowire.BytesType), nil)
	events = append(events, bytes.Repeat(one, 1_000_000)...)
	runtime.GC()
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	err := r.raw(t.Context(), outboxv1.OutboxService_Prepare_FullMethodName, events)
	runtime.ReadMemStats(&after)
	md, _ := wantError(t, err, codes.InvalidArgument, outboxv1.ErrorReason_ERROR_REASON_FIELD_INVALID)
	if md["field"] != "events" {
		t.Errorf("metadata %v", md)
	}
	if grown := after.TotalAlloc - before.TotalAlloc; grown > 64<<20 {
		t.Errorf("%d MiB were allocated for it", grown>>20)
	}
	// The same as Publish.
	events = append(events[:8:8], bytes.Repeat(protowire.AppendBytes(protowire.AppendTag(nil, publishEvents, protowire.BytesType), nil), 1_000_000)...)
	wantError(t, r.raw(t.Context(), outboxv1.OutboxService_Publish_FullMethodName, events), codes.InvalidArgument, outboxv1.ErrorReason_ERROR_REASON_FIELD_INVALID)
	// A million headers in one event, and a million events inside a session.
	header := protowire.AppendBytes(protowire.AppendTag(nil, eventHeaders, protowire.BytesType), nil)
	event := protowire.AppendBytes(protowire.AppendTag(nil, prepareEvents, protowire.BytesType), bytes.Repeat(header, 1_000_000))
	if err := r.raw(t.Context(), outboxv1.OutboxService_Prepare_FullMethodName, event); grpcCode(err) != codes.Internal || !strings.Contains(err.Error(), errTooMany.Error()) {
		t.Errorf("a million headers: %v", err)
	}
	s := openSession(t, t.Context(), r.client, hello("orders"))
	prepare := protowire.AppendBytes(protowire.AppendTag(nil, callPrepare, protowire.BytesType), bytes.Repeat(one, 1_000_000))
	callsBody := protowire.AppendBytes(protowire.AppendTag(nil, callsCall, protowire.BytesType), prepare)
	body := protowire.AppendBytes(protowire.AppendTag(nil, requestCalls, protowire.BytesType), callsBody)
	if err := s.SendMsg(rawMessage(t, body)); err != nil {
		t.Fatal(err)
	}
	_, err = s.Recv()
	if grpcCode(err) != codes.Internal {
		t.Errorf("a million events in a session: %v", err)
	}
	// Compressed answers of a check cannot do it either.
	answers := protowire.AppendBytes(protowire.AppendTag(nil, requestAnswers, protowire.BytesType),
		bytes.Repeat(protowire.AppendBytes(protowire.AppendTag(nil, answersAnswer, protowire.BytesType), nil), 1_000_000))
	if n := countSession(answers); n != 1_000_000 {
		t.Errorf("%d answers counted", n)
	}
}

// rawMessage is a message that encodes to b: unknown fields pass through.
func rawMessage(t *testing.T, b []byte) proto.Message {
	t.Helper()
	m := &outboxv1.ListShardsRequest{}
	m.ProtoReflect().SetUnknown(b)
	return m
}

func TestOversizeMetadata(t *testing.T) {
	r := startWithout(t, newMemoryWriter(t))
	ctx := metadata.AppendToOutgoingContext(t.Context(), "x-big", strings.Repeat("x", 20<<10))
	if _, err := r.client.Prepare(ctx, newPrepare("orders")); err == nil {
		t.Fatal("20 KiB of metadata were accepted")
	}
	if _, err := r.client.Prepare(t.Context(), newPrepare("orders")); err != nil {
		t.Fatal("afterwards:", err)
	}
}

// h2 is a raw HTTP/2 client.
type h2 struct {
	t      *testing.T
	conn   net.Conn
	framer *http2.Framer
	hpack  *hpack.Encoder
	block  bytes.Buffer
	next   uint32
	ends   map[uint32]string // how streams ended
}

func dialH2(t *testing.T, addr string, settings ...http2.Setting) *h2 {
	t.Helper()
	conn, err := net.Dial("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	if _, err := io.WriteString(conn, http2.ClientPreface); err != nil {
		t.Fatal(err)
	}
	h := &h2{t: t, conn: conn, framer: http2.NewFramer(conn, conn), next: 1, ends: make(map[uint32]string)}
	h.framer.ReadMetaHeaders = hpack.NewDecoder(4096, nil)
	h.hpack = hpack.NewEncoder(&h.block)
	if err := h.framer.WriteSettings(settings...); err != nil {
		t.Fatal(err)
	}
	return h
}

// headers opens a stream without a body.
func (h *h2) headers(path string) uint32 {
	h.t.Helper()
	h.block.Reset()
	for _, f := range [][2]string{{":method", "POST"}, {":scheme", "http"}, {":path", path}, {":authority", "x"}, {"content-type", "application/grpc"}, {"te", "trailers"}} {
		if err := h.hpack.WriteField(hpack.HeaderField{Name: f[0], Value: f[1]}); err != nil {
			h.t.Fatal(err)
		}
	}
	id := h.next
	h.next += 2
	if err := h.framer.WriteHeaders(http2.HeadersFrameParam{StreamID: id, BlockFragment: h.block.Bytes(), EndHeaders: true}); err != nil {
		h.t.Fatal(err)
	}
	return id
}

// body sends one gRPC message and ends the client's side.
func (h *h2) body(stream uint32, m []byte) {
	h.t.Helper()
	b := binary.BigEndian.AppendUint32([]byte{0}, uint32(len(m)))
	if err := h.framer.WriteData(stream, true, append(b, m...)); err != nil {
		h.t.Fatal(err)
	}
}

// ended waits until a stream has ended and returns its grpc-status, or "RST".
func (h *h2) ended(stream uint32) string {
	h.t.Helper()
	if err := h.conn.SetReadDeadline(time.Now().Add(20 * time.Second)); err != nil {
		h.t.Fatal(err)
	}
	for h.ends[stream] == "" {
		f, err := h.framer.ReadFrame()
		if err != nil {
			h.t.Fatal("reading a frame:", err)
		}
		id := f.Header().StreamID
		switch f := f.(type) {
		case *http2.RSTStreamFrame:
			if h.ends[id] == "" {
				h.ends[id] = "RST"
			}
		case *http2.MetaHeadersFrame:
			for _, field := range f.Fields {
				if field.Name == "grpc-status" {
					h.ends[id] = field.Value
				}
			}
		}
	}
	return h.ends[stream]
}

// A path that is not exactly one of ours is unknown to grpc itself; no rule is ever consulted by another spelling.
func TestPaths(t *testing.T) {
	r := startWithout(t, newMemoryWriter(t))
	h := dialH2(t, r.GRPCAddr())
	for _, path := range []string{
		strings.TrimPrefix(outboxv1.AdminService_ListShards_FullMethodName, "/"),
		"/" + outboxv1.AdminService_ListShards_FullMethodName,
		"/outbox.v1.AdminService//ListShards",
		"/outbox.v1.AdminService/ListShards/",
		"/outbox.v1.adminservice/ListShards",
		"/outbox.v1.NoService/Prepare",
		"/outbox.v1.OutboxService/Nothing",
		"/", "x",
	} {
		stream := h.headers(path)
		h.body(stream, nil)
		if got := h.ended(stream); got != "12" {
			t.Errorf("%q: grpc-status %s, want 12 (UNIMPLEMENTED)", path, got)
		}
	}
}

// Streams that send headers and then nothing are freed by the server's own deadline.
func TestHeaderOnlyStreams(t *testing.T) {
	r := startWithout(t, newMemoryWriter(t), func(c *Config) {
		c.DefaultDeadline = time.Second
		c.MaxConcurrentStreams = 4
	})
	h := dialH2(t, r.GRPCAddr())
	var streams []uint32
	for range 3 {
		streams = append(streams, h.headers(outboxv1.OutboxService_Prepare_FullMethodName))
	}
	session := h.headers(outboxv1.OutboxService_Session_FullMethodName)
	for _, s := range streams {
		if got := h.ended(s); got != "4" {
			t.Errorf("grpc-status %s, want 4 (DEADLINE_EXCEEDED)", got)
		}
	}
	if got := h.ended(session); got != "1" {
		t.Errorf("session without Hello: grpc-status %s, want 1 (CANCELLED)", got)
	}
	// The slots are free again.
	m, err := proto.Marshal(newPrepare("orders"))
	if err != nil {
		t.Fatal(err)
	}
	s := h.headers(outboxv1.OutboxService_Prepare_FullMethodName)
	h.body(s, m)
	if got := h.ended(s); got != "0" {
		t.Errorf("afterwards: grpc-status %s", got)
	}
}

// Calls that have not arrived yet hold memory: there are only so many of them, and what is too much is refused at once.
func TestMaxCalls(t *testing.T) {
	r := startWithout(t, newMemoryWriter(t), func(c *Config) { c.MaxCalls = 3 })
	h := dialH2(t, r.GRPCAddr())
	var streams []uint32
	for range 3 {
		streams = append(streams, h.headers(outboxv1.OutboxService_Prepare_FullMethodName))
	}
	storetest.Eventually(t, 10*time.Second, func() bool { return r.unaryCalls.Load() == 3 })
	_, err := r.client.Prepare(t.Context(), newPrepare("orders"))
	wantError(t, err, codes.ResourceExhausted, outboxv1.ErrorReason_ERROR_REASON_BACKLOG_FULL)
	prepare := "http://" + r.HTTPAddr() + outboxv1.OutboxService_Prepare_FullMethodName
	if code, text := request(t, "POST", prepare, "", []byte(`{}`)); code != 429 || !strings.Contains(text, "resource_exhausted") {
		t.Errorf("through the other port: %d %s", code, text)
	}
	if _, err := healthpb.NewHealthClient(r.conn).Check(t.Context(), &healthpb.HealthCheckRequest{}); err != nil {
		t.Error("a health check:", err)
	}
	for _, s := range streams {
		if err := h.framer.WriteRSTStream(s, http2.ErrCodeCancel); err != nil {
			t.Fatal(err)
		}
	}
	storetest.Eventually(t, 10*time.Second, func() bool { return r.unaryCalls.Load() == 0 })
	if _, err := r.client.Prepare(t.Context(), newPrepare("orders")); err != nil {
		t.Error("afterwards:", err)
	}
	if code, text := request(t, "POST", prepare, "", []byte(`{}`)); code != 403 {
		t.Errorf("afterwards, through the other port: %d %s", code, text)
	}
	// Calls that end as they should leave no place taken.
	storetest.Eventually(t, 10*time.Second, func() bool { return r.unaryCalls.Load() == 0 })
}

// A client that never opens its window, and one that resets every stream it opens, harm nobody else.
func TestWindowZeroAndResets(t *testing.T) {
	r := startWithout(t, newMemoryWriter(t))
	m, err := proto.Marshal(newPrepare("orders"))
	if err != nil {
		t.Fatal(err)
	}
	closed := dialH2(t, r.GRPCAddr(), http2.Setting{ID: http2.SettingInitialWindowSize, Val: 0})
	for range 100 {
		closed.body(closed.headers(outboxv1.OutboxService_Prepare_FullMethodName), m)
	}
	resets := dialH2(t, r.GRPCAddr())
	go func() { _, _ = io.Copy(io.Discard, resets.conn) }() // it ends with the connection
	for range 2000 {
		s := resets.headers(outboxv1.OutboxService_Prepare_FullMethodName)
		if err := resets.framer.WriteRSTStream(s, http2.ErrCodeCancel); err != nil {
			break // the server has had enough of it
		}
	}
	if _, err := r.client.Prepare(t.Context(), newPrepare("orders")); err != nil {
		t.Fatal("another client:", err)
	}
	_ = resets.conn.Close()
}

// SQL in every string that callers choose is only a string.
func TestSQLInStrings(t *testing.T) {
	r := start(t)
	r.register(t, "orders")
	const evil = `'); DROP TABLE outbox.tx CASCADE; --`
	req := newPrepare("orders")
	e := req.Events[0]
	e.AggregateType, e.AggregateId, e.EventType, e.ContentType = evil, evil, evil, evil
	e.Key, e.Payload, e.Headers[0].Name = []byte(evil), []byte(evil), evil
	if _, err := r.client.Prepare(t.Context(), req); err != nil {
		t.Fatal(err)
	}
	get, err := r.client.GetTransaction(t.Context(), &outboxv1.GetTransactionRequest{Source: "orders", TransactionId: req.GetTransactionId()})
	if err != nil || get.GetTransaction().GetEvents()[0].GetAggregateId() != evil {
		t.Fatalf("%v, %v", get, err)
	}
	_, err = r.admin.GetSource(t.Context(), &outboxv1.GetSourceRequest{Name: evil})
	wantError(t, err, codes.NotFound, outboxv1.ErrorReason_ERROR_REASON_NOT_FOUND)
	_, err = r.admin.ListSources(t.Context(), &outboxv1.ListSourcesRequest{PageToken: evil})
	wantError(t, err, codes.InvalidArgument, outboxv1.ErrorReason_ERROR_REASON_FIELD_INVALID)
	_, err = r.client.Prepare(t.Context(), newPrepare(evil))
	wantError(t, err, codes.PermissionDenied, outboxv1.ErrorReason_ERROR_REASON_SOURCE_DENIED)
	blocked, err := r.admin.ListBlockedAggregates(t.Context(), &outboxv1.ListBlockedAggregatesRequest{Source: evil})
	if err == nil && len(blocked.GetAggregates()) != 0 {
		t.Fatalf("%v", blocked)
	}
	if bad, err := r.db.Store.Verify(t.Context()); err != nil || len(bad) != 0 {
		t.Fatalf("verify: %v, %v", bad, err)
	}
}

// A panic is a bug of one call: it is told as INTERNAL without its cause, and the server lives.
func TestPanic(t *testing.T) {
	var log lockedBuffer
	w := newMemoryWriter(t)
	w.answer = func(*store.Request) { panic("out of cheese") }
	r := startLogging(t, w, textLog(&log))
	_, err := r.client.Prepare(t.Context(), newPrepare("orders"))
	md, _ := wantError(t, err, codes.Internal, outboxv1.ErrorReason_ERROR_REASON_INTERNAL)
	if strings.Contains(err.Error(), "cheese") || !strings.Contains(log.String(), md["log_id"]) || !strings.Contains(log.String(), "cheese") {
		t.Errorf("error %v, log %s", err, log.String())
	}
	if n := metric(t, r, "outbox_panics_total"); n != 1 {
		t.Errorf("%v panics counted", n)
	}
	// In a session it ends the session, not the server.
	s := openSession(t, t.Context(), r.client, hello("orders"))
	sendCalls(t, s, callPrepareOf(1, newPrepare("orders")))
	_, err = s.Recv()
	wantError(t, err, codes.Internal, outboxv1.ErrorReason_ERROR_REASON_INTERNAL)
	if _, err := r.client.Commit(t.Context(), &outboxv1.CommitRequest{Source: "nobody", TransactionId: newID()}); grpcCode(err) != codes.PermissionDenied {
		t.Errorf("afterwards: %v", err)
	}
}
