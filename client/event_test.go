package client_test

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"buf.build/go/protovalidate"
	"github.com/google/uuid"
	"go.opentelemetry.io/otel/propagation"
	"go.opentelemetry.io/otel/trace"
	"google.golang.org/protobuf/proto"
	"pgregory.net/rapid"

	"github.com/outbox-platform/outbox/client"
	"github.com/outbox-platform/outbox/client/internal/fakeplatform"
	outboxv1 "github.com/outbox-platform/outbox/gen/go/outbox/v1"
)

// offline is a client whose platform is never asked.
func offline(tb testing.TB, change func(*client.Config)) *client.Client {
	tb.Helper()
	cfg := client.Config{Target: "localhost:1", Source: "orders", Plaintext: true}
	if change != nil {
		change(&cfg)
	}
	c, err := client.New(cfg)
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() { c.Close() })
	return c
}

func TestEventsAreChecked(t *testing.T) {
	c := offline(t, nil)
	long := strings.Repeat("x", 256)
	same := client.NewID()
	cases := map[string]func(*client.Event) string{
		"no topic":        func(e *client.Event) string { e.Topic = ""; return "events[0].topic is empty" },
		"long topic":      func(e *client.Event) string { e.Topic = long; return "more than 249" },
		"dots":            func(e *client.Event) string { e.Topic = ".."; return `must not be "."` },
		"internal topic":  func(e *client.Event) string { e.Topic = "__consumer_offsets"; return `must not start with "__"` },
		"space":           func(e *client.Event) string { e.Topic = "a b"; return "' '" },
		"no aggregate":    func(e *client.Event) string { e.AggregateID = ""; return "events[0].aggregate_id is empty" },
		"long type":       func(e *client.Event) string { e.Type = long; return "events[0].event_type has 256 bytes" },
		"NUL":             func(e *client.Event) string { e.AggregateType = "a\x00"; return "aggregate_type contains NUL" },
		"UTF-8":           func(e *client.Event) string { e.ContentType = "\xff"; return "content_type is not UTF-8" },
		"large key":       func(e *client.Event) string { e.Key = make([]byte, 4097); return "key has 4097 bytes" },
		"large payload":   func(e *client.Event) string { e.Payload = make([]byte, 1<<20); return "events[0] has" },
		"nameless header": func(e *client.Event) string { e.Headers = []client.Header{{}}; return "headers.name is empty" },
		"reserved header": func(e *client.Event) string {
			e.Headers = []client.Header{{Name: "outbox-epoch"}}
			return "belongs to the platform"
		},
		"many headers": func(e *client.Event) string { e.Headers = make([]client.Header, 65); return "headers has 65 entries" },
		"large headers": func(e *client.Event) string {
			e.Headers = []client.Header{{Name: "h", Value: make([]byte, 16<<10)}}
			return "headers has 16385 bytes"
		},
		"a time after all": func(e *client.Event) string {
			e.OccurredAt = time.Date(2263, 1, 1, 0, 0, 0, 0, time.UTC)
			return "occurred_at"
		},
		"a time before all": func(e *client.Event) string { e.OccurredAt = time.Unix(-1, 0); return "occurred_at" },
	}
	for name, change := range cases {
		t.Run(name, func(t *testing.T) {
			e := event("1", "a")
			want := change(&e)
			err := c.Publish(t.Context(), client.NewID(), e)
			var ce *client.Error
			if !client.IsInvalid(err) || !errors.As(err, &ce) || len(ce.Fields) == 0 || !strings.Contains(err.Error(), want) {
				t.Errorf("error: %v, want %q", err, want)
			}
		})
	}
	two := event("1", "a")
	two.ID = same
	for name, tc := range map[string]struct {
		events []client.Event
		want   string
	}{
		"none":     {nil, "events is empty"},
		"same id":  {[]client.Event{two, two}, "used twice"},
		"too many": {make([]client.Event, 1001), "1001 entries"},
		"together": {slicesOf(event("1", strings.Repeat("x", 900_000)), 5), "events has"},
	} {
		if err := c.CheckEvents(tc.events...); !client.IsInvalid(err) || !strings.Contains(err.Error(), tc.want) {
			t.Errorf("%s: %v", name, err)
		}
	}
	err := c.CheckEvents(make([]client.Event, 100)...)
	var ce *client.Error
	if !errors.As(err, &ce) || len(ce.Fields) != 16 {
		t.Errorf("all of many violations are told: %v", err)
	}
	if err := c.CheckEvents(event("1", "")); err != nil {
		t.Errorf("an empty payload: %v", err)
	}
}

func slicesOf(e client.Event, n int) []client.Event {
	out := make([]client.Event, n)
	for i := range out {
		out[i] = e
	}
	return out
}

// TestCheckAgreesWithTheProto: what passes here passes the rules of the proto, and what these refuse is refused here.
func TestCheckAgreesWithTheProto(t *testing.T) {
	c := offline(t, nil)
	validator, err := protovalidate.New(protovalidate.WithMessages(&outboxv1.PrepareRequest{}))
	if err != nil {
		t.Fatal(err)
	}
	text := rapid.OneOf(
		rapid.SampledFrom([]string{"", "a", "é", "a\x00", strings.Repeat("x", 255), strings.Repeat("x", 256)}), rapid.StringN(0, 20, -1),
	)
	topic := rapid.OneOf(rapid.SampledFrom([]string{"", ".", "..", "__x", "_x", strings.Repeat("x", 249), strings.Repeat("x", 250), "a b", "ä"}),
		rapid.StringMatching(`[a-zA-Z0-9._-]{1,20}`))
	rapid.Check(t, func(t *rapid.T) {
		e := client.Event{
			ID: client.NewID(), Topic: topic.Draw(t, "topic"), AggregateType: text.Draw(t, "type"), AggregateID: text.Draw(t, "id"),
			Type: text.Draw(t, "event type"), ContentType: text.Draw(t, "content type"), OccurredAt: time.Unix(1, 0),
			Key: rapid.SampledFrom([][]byte{nil, {}, make([]byte, 4096), make([]byte, 4097)}).Draw(t, "key"),
		}
		for range rapid.SampledFrom([]int{0, 1, 64, 65}).Draw(t, "headers") {
			e.Headers = append(e.Headers, client.Header{Name: text.Draw(t, "header")})
		}
		here := c.CheckEvents(e)
		p := &outboxv1.Event{
			EventId: e.ID[:], Topic: e.Topic, AggregateType: e.AggregateType, AggregateId: e.AggregateID, EventType: e.Type,
			Key: e.Key, ContentType: e.ContentType,
		}
		for _, h := range e.Headers {
			p.Headers = append(p.Headers, &outboxv1.Header{Name: h.Name, Value: h.Value})
		}
		there := validator.Validate(&outboxv1.PrepareRequest{
			Source: "orders", TransactionId: e.ID[:], DatabaseTransaction: &outboxv1.DatabaseTransaction{}, Events: []*outboxv1.Event{p},
		})
		if (here == nil) != (there == nil) {
			// The limits that Welcome tells are stricter than the proto: sizes of all headers together.
			var ce *client.Error
			if there == nil && errors.As(here, &ce) && ce.Reason == client.ReasonEventTooLarge {
				return
			}
			t.Fatalf("here: %v\nproto: %v", here, there)
		}
	})
}

func encode(tb testing.TB, c *client.Client, ctx context.Context, e client.Event) *outboxv1.Event {
	tb.Helper()
	r, err := c.Encode(ctx, client.NewID(), client.DatabaseTransaction{}, e)
	if err != nil {
		tb.Fatal(err)
	}
	var p outboxv1.PrepareRequest
	if err := proto.Unmarshal(r.Bytes(), &p); err != nil {
		tb.Fatal(err)
	}
	return p.GetEvents()[0]
}

func TestDefaultsOfEvents(t *testing.T) {
	c := offline(t, nil)
	before := time.Now()
	p := encode(t, c, t.Context(), event("1", "a"))
	if p.Key != nil || p.GetOccurredAt().AsTime().Before(before.Add(-time.Second)) || uuid.UUID(p.GetEventId()).Version() != 7 {
		t.Errorf("%v", p)
	}
	e := event("1", "a")
	e.Key, e.ID, e.OccurredAt = []byte{}, uuid.New(), time.Unix(5, 6)
	p = encode(t, c, t.Context(), e)
	if p.Key == nil || uuid.UUID(p.GetEventId()) != e.ID || !p.GetOccurredAt().AsTime().Equal(e.OccurredAt) {
		t.Errorf("%v", p)
	}
}

func TestTraceContext(t *testing.T) {
	span := trace.NewSpanContext(trace.SpanContextConfig{
		TraceID: trace.TraceID{1}, SpanID: trace.SpanID{2}, TraceFlags: trace.FlagsSampled, TraceState: state(t, "a=b"),
	})
	ctx := trace.ContextWithSpanContext(t.Context(), span)
	header := func(p *outboxv1.Event, name string) string {
		var out []string
		for _, h := range p.GetHeaders() {
			if strings.EqualFold(h.GetName(), name) {
				out = append(out, string(h.GetValue()))
			}
		}
		return strings.Join(out, ",")
	}
	c := offline(t, nil)
	p := encode(t, c, ctx, event("1", "a"))
	if header(p, "traceparent") != "00-01000000000000000000000000000000-0200000000000000-01" || header(p, "tracestate") != "a=b" {
		t.Errorf("%v", p.GetHeaders())
	}
	if p := encode(t, c, t.Context(), event("1", "a")); len(p.GetHeaders()) != 0 {
		t.Errorf("without a trace: %v", p.GetHeaders())
	}
	own := event("1", "a")
	own.Headers = []client.Header{{Name: "x"}, {Name: "TraceParent", Value: []byte("mine")}}
	if p := encode(t, c, ctx, own); header(p, "traceparent") != "mine" || len(p.GetHeaders()) != 2 {
		t.Errorf("the application's own: %v", p.GetHeaders())
	}
	full := event("1", "a")
	for i := range 63 {
		full.Headers = append(full.Headers, client.Header{Name: fmt.Sprint(i)})
	}
	if p := encode(t, c, ctx, full); len(p.GetHeaders()) != 63 {
		t.Errorf("no room: %d headers", len(p.GetHeaders()))
	}
	off := offline(t, func(cfg *client.Config) { cfg.Propagator = propagation.NewCompositeTextMapPropagator() })
	if p := encode(t, off, ctx, event("1", "a")); len(p.GetHeaders()) != 0 {
		t.Errorf("switched off: %v", p.GetHeaders())
	}
	// A propagator that reads what is there already.
	curious := offline(t, func(cfg *client.Config) { cfg.Propagator = readBack{t} })
	encode(t, curious, ctx, event("1", "a"))
}

type readBack struct{ t *testing.T }

func (readBack) Extract(ctx context.Context, _ propagation.TextMapCarrier) context.Context {
	return ctx
}
func (readBack) Fields() []string { return nil }
func (r readBack) Inject(_ context.Context, c propagation.TextMapCarrier) {
	c.Set("x", "1")
	if c.Get("x") != "1" || c.Get("y") != "" || len(c.Keys()) != 1 {
		r.t.Error("the carrier forgets")
	}
}

func state(t *testing.T, s string) trace.TraceState {
	t.Helper()
	ts, err := trace.ParseTraceState(s)
	if err != nil {
		t.Fatal(err)
	}
	return ts
}

func TestIDs(t *testing.T) {
	before := time.Now().Truncate(time.Millisecond)
	a, b := client.NewID(), client.NewID()
	if a.String() >= b.String() || a.Version() != 7 {
		t.Errorf("%v %v", a, b)
	}
	if at := client.IDTime(a); at.Before(before) || at.After(time.Now()) {
		t.Errorf("made at %v", at)
	}
	if !client.IDTime(uuid.New()).IsZero() {
		t.Error("a version 4 has no time")
	}
}

func TestSpilledRequestsAreReadable(t *testing.T) {
	p := fakeplatform.Start(t)
	c := newClient(t, p, nil)
	e := event("1", "a")
	e.ID, e.OccurredAt, e.Headers = client.NewID(), time.Unix(7, 0).UTC(), []client.Header{{Name: "h", Value: []byte("v")}}
	id := client.NewID()
	r, err := c.Encode(t.Context(), id, client.DatabaseTransaction{}, e)
	if err != nil || r.ID() != id {
		t.Fatal(err)
	}
	events, err := c.SpilledEvents(r.Bytes())
	if err != nil || fmt.Sprintf("%+v", events) != fmt.Sprintf("%+v", []client.Event{e}) {
		t.Errorf("%+v, %v", events, err)
	}
	if err := c.PublishSpilled(t.Context(), r.Bytes()); err != nil {
		t.Error(err)
	}
	if calls := p.Calls("publish"); len(calls) != 1 || !calls[0].Kept {
		t.Errorf("the platform is not told that the request is kept: %+v", calls)
	}
	if err := c.PublishSpilled(t.Context(), []byte{0xff}); !client.IsInvalid(err) {
		t.Error(err)
	}
	if _, err := c.SpilledEvents([]byte{0xff}); err == nil {
		t.Error("garbage was read")
	}
	if got := p.Published("1"); fmt.Sprint(got) != "[a]" {
		t.Errorf("published %v", got)
	}
}

func TestMarkerDDL(t *testing.T) {
	if !strings.HasPrefix(client.MarkerDDLGoose, "-- +goose Up\n") || !strings.Contains(client.MarkerDDLGoose, client.MarkerDDL) ||
		!strings.Contains(client.MarkerDDLGoose, "-- +goose Down\nDROP TABLE outbox_marker;") {
		t.Error(client.MarkerDDLGoose)
	}
}

// TestSpilledBeforeTheLimitsWereKnown: what is too large for the platform that is there now is refused here. Sent, it would end
// the session, again and again.
func TestSpilledBeforeTheLimitsWereKnown(t *testing.T) {
	r, err := offline(t, nil).Encode(t.Context(), client.NewID(), client.DatabaseTransaction{}, event("1", strings.Repeat("x", 1000)))
	if err != nil {
		t.Fatal(err)
	}
	p := fakeplatform.Start(t)
	p.SetLimits(&outboxv1.Limits{MaxEventBytes: 500})
	c := newClient(t, p, nil)
	connected(t, c)
	if err := c.PublishSpilled(t.Context(), r.Bytes()); !client.HasReason(err, client.ReasonEventTooLarge) {
		t.Error(err)
	}
}
