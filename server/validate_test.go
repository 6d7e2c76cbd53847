package server

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"slices"
	"strings"
	"testing"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	outboxv1 "github.com/outbox-platform/outbox/gen/go/outbox/v1"
	"github.com/outbox-platform/outbox/store"
)

func testValidator(t testing.TB) *validator {
	t.Helper()
	v, err := newValidator(testConfig(t))
	if err != nil {
		t.Fatal(err)
	}
	return v
}

// testSource may use the topics "t-*" and "exact".
func testSource() *source {
	return prepareSource(store.Source{ID: 1, Name: "orders", Topics: []string{"t-*", "exact"}, CloudEventsSource: "/outbox/orders"})
}

// violated are the fields of e's BadRequest.
func violated(e *apiError) (fields []string) {
	for _, d := range e.details {
		if bad, is := d.(*errdetails.BadRequest); is {
			for _, v := range bad.GetFieldViolations() {
				fields = append(fields, v.GetField())
			}
		}
	}
	return fields
}

// Every field that breaks a rule is named, and the reason tells too large from wrong.
func TestPrepareRules(t *testing.T) {
	v := testValidator(t)
	many := func(n int) (hs []*outboxv1.Header) {
		for range n {
			hs = append(hs, &outboxv1.Header{Name: "h"})
		}
		return hs
	}
	const wrong, large = outboxv1.ErrorReason_ERROR_REASON_FIELD_INVALID, outboxv1.ErrorReason_ERROR_REASON_EVENT_TOO_LARGE
	const denied = outboxv1.ErrorReason_ERROR_REASON_TOPIC_DENIED
	for name, c := range map[string]struct {
		change func(*outboxv1.PrepareRequest)
		field  string
		reason outboxv1.ErrorReason
	}{
		"short id":             {func(p *outboxv1.PrepareRequest) { p.TransactionId = []byte("x") }, "transaction_id", wrong},
		"no source":            {func(p *outboxv1.PrepareRequest) { p.Source = "" }, "source", wrong},
		"no database tx":       {func(p *outboxv1.PrepareRequest) { p.DatabaseTransaction = nil }, "database_transaction", wrong},
		"no xid":               {func(p *outboxv1.PrepareRequest) { p.DatabaseTransaction.Xid = 0 }, "database_transaction.xid", wrong},
		"unknown database":     {func(p *outboxv1.PrepareRequest) { p.DatabaseTransaction.Database = "other" }, "database_transaction.database", wrong},
		"database with NUL":    {func(p *outboxv1.PrepareRequest) { p.DatabaseTransaction.Database = "a\x00" }, "database_transaction.database", wrong},
		"unknown mode":         {func(p *outboxv1.PrepareRequest) { p.DatabaseTransaction.Mode = 9 }, "database_transaction.mode", wrong},
		"no events":            {func(p *outboxv1.PrepareRequest) { p.Events = nil }, "events", wrong},
		"1001 events":          {func(p *outboxv1.PrepareRequest) { p.Events = slices.Repeat(p.Events, 1001) }, "events", wrong},
		"short event id":       {func(p *outboxv1.PrepareRequest) { p.Events[0].EventId = nil }, "events[0].event_id", wrong},
		"duplicate event id":   {func(p *outboxv1.PrepareRequest) { p.Events = append(p.Events, p.Events[0]) }, "events[1].event_id", wrong},
		"9 same ids":           {func(p *outboxv1.PrepareRequest) { p.Events = slices.Repeat(p.Events, 9) }, "events[1].event_id", wrong},
		"topic empty":          {func(p *outboxv1.PrepareRequest) { p.Events[0].Topic = "" }, "events[0].topic", wrong},
		"topic .":              {func(p *outboxv1.PrepareRequest) { p.Events[0].Topic = "." }, "events[0].topic", wrong},
		"topic ..":             {func(p *outboxv1.PrepareRequest) { p.Events[0].Topic = ".." }, "events[0].topic", wrong},
		"topic of 250":         {func(p *outboxv1.PrepareRequest) { p.Events[0].Topic = strings.Repeat("t", 250) }, "events[0].topic", wrong},
		"topic with blank":     {func(p *outboxv1.PrepareRequest) { p.Events[0].Topic = "a b" }, "events[0].topic", wrong},
		"topic with newline":   {func(p *outboxv1.PrepareRequest) { p.Events[0].Topic = "t-a\n" }, "events[0].topic", wrong},
		"offsets topic":        {func(p *outboxv1.PrepareRequest) { p.Events[0].Topic = "__consumer_offsets" }, "events[0].topic", wrong},
		"transaction topic":    {func(p *outboxv1.PrepareRequest) { p.Events[0].Topic = "__transaction_state" }, "events[0].topic", wrong},
		"another's topic":      {func(p *outboxv1.PrepareRequest) { p.Events[0].Topic = "payments" }, "", denied},
		"a.b is not a_b":       {func(p *outboxv1.PrepareRequest) { p.Events[0].Topic = "t.x" }, "", denied},
		"almost exact":         {func(p *outboxv1.PrepareRequest) { p.Events[0].Topic = "exact2" }, "", denied},
		"aggregate type empty": {func(p *outboxv1.PrepareRequest) { p.Events[0].AggregateType = "" }, "events[0].aggregate_type", wrong},
		"aggregate id of 256":  {func(p *outboxv1.PrepareRequest) { p.Events[0].AggregateId = strings.Repeat("x", 256) }, "events[0].aggregate_id", wrong},
		"aggregate id bytes":   {func(p *outboxv1.PrepareRequest) { p.Events[0].AggregateId = strings.Repeat("é", 128) }, "events[0].aggregate_id", wrong},
		"aggregate id NUL":     {func(p *outboxv1.PrepareRequest) { p.Events[0].AggregateId = "a\x00b" }, "events[0].aggregate_id", wrong},
		"aggregate type NUL":   {func(p *outboxv1.PrepareRequest) { p.Events[0].AggregateType = "\x00" }, "events[0].aggregate_type", wrong},
		"event type NUL":       {func(p *outboxv1.PrepareRequest) { p.Events[0].EventType = "\x00" }, "events[0].event_type", wrong},
		"content type NUL":     {func(p *outboxv1.PrepareRequest) { p.Events[0].ContentType = "\x00" }, "events[0].content_type", wrong},
		"key of 1 MiB":         {func(p *outboxv1.PrepareRequest) { p.Events[0].Key = make([]byte, 1<<20) }, "events[0].key", wrong},
		"10 000 headers":       {func(p *outboxv1.PrepareRequest) { p.Events[0].Headers = many(10000) }, "events[0].headers", wrong},
		"65 headers":           {func(p *outboxv1.PrepareRequest) { p.Events[0].Headers = many(65) }, "events[0].headers", wrong},
		"header without name":  {func(p *outboxv1.PrepareRequest) { p.Events[0].Headers[0].Name = "" }, "events[0].headers[0].name", wrong},
		"header with NUL":      {func(p *outboxv1.PrepareRequest) { p.Events[0].Headers[0].Name = "\x00" }, "events[0].headers[0].name", wrong},
		"reserved header":      {func(p *outboxv1.PrepareRequest) { p.Events[0].Headers[0].Name = "Outbox-Epoch" }, "events[0].headers[0].name", wrong},
		"16 KiB of headers": {func(p *outboxv1.PrepareRequest) {
			p.Events[0].Headers = []*outboxv1.Header{{Name: "a", Value: make([]byte, 9000)}, {Name: "b", Value: make([]byte, 9000)}}
		}, "events[0].headers", wrong},
		"before 1970": {func(p *outboxv1.PrepareRequest) { p.Events[0].OccurredAt = &timestamppb.Timestamp{Seconds: -1} }, "events[0].occurred_at", wrong},
		"1970 itself": {func(p *outboxv1.PrepareRequest) { p.Events[0].OccurredAt = &timestamppb.Timestamp{} }, "events[0].occurred_at", wrong},
		"year 9999": {func(p *outboxv1.PrepareRequest) {
			p.Events[0].OccurredAt = &timestamppb.Timestamp{Seconds: 253402300799}
		}, "events[0].occurred_at", wrong},
		"broken nanos": {func(p *outboxv1.PrepareRequest) {
			p.Events[0].OccurredAt = &timestamppb.Timestamp{Seconds: 1, Nanos: 1e9}
		}, "events[0].occurred_at", wrong},
		"large event": {func(p *outboxv1.PrepareRequest) { p.Events[0].Payload = make([]byte, 1<<20) }, "events[0].payload", large},
		"third is large": {func(p *outboxv1.PrepareRequest) {
			p.Events = []*outboxv1.Event{newEvent("a"), newEvent("b"), newEvent("c")}
			p.Events[2].Payload = make([]byte, 1<<20)
		}, "events[2].payload", large},
		"large transaction": {func(p *outboxv1.PrepareRequest) {
			p.Events = nil
			for range 6 {
				e := newEvent("a")
				e.Payload = make([]byte, 900_000)
				p.Events = append(p.Events, e)
			}
		}, "events", large},
	} {
		t.Run(name, func(t *testing.T) {
			req := newPrepare("orders")
			c.change(req)
			comparePlain(t, v, req)
			e := v.prepare(&call{}, req, testSource(), &catalogue{})
			if e == nil {
				t.Fatal("accepted")
			}
			if e.reason != c.reason {
				t.Fatalf("reason %s (%v), want %s", e.reason, e, c.reason)
			}
			if c.field != "" && !slices.Contains(violated(e), c.field) {
				t.Fatalf("fields %q, want %q among them", violated(e), c.field)
			}
			if n := len(violated(e)); n > maxViolations {
				t.Errorf("%d violations are told", n)
			}
		})
	}
}

// What is allowed is taken as it is, up to the limits.
func TestPrepareAccepts(t *testing.T) {
	v := testValidator(t)
	for name, change := range map[string]func(*outboxv1.PrepareRequest){
		"plain":            func(*outboxv1.PrepareRequest) {},
		"exact topic":      func(p *outboxv1.PrepareRequest) { p.Events[0].Topic = "exact" },
		"empty payload":    func(p *outboxv1.PrepareRequest) { p.Events[0].Payload = nil },
		"empty key":        func(p *outboxv1.PrepareRequest) { p.Events[0].Key = []byte{} },
		"payload with NUL": func(p *outboxv1.PrepareRequest) { p.Events[0].Payload = []byte{0} },
		"header NUL value": func(p *outboxv1.PrepareRequest) { p.Events[0].Headers[0].Value = []byte{0} },
		"same header twice": func(p *outboxv1.PrepareRequest) {
			p.Events[0].Headers = append(p.Events[0].Headers, p.Events[0].Headers[0])
		},
		"SQL":         func(p *outboxv1.PrepareRequest) { p.Events[0].AggregateId = "'; DROP TABLE outbox.tx; --" },
		"255 bytes":   func(p *outboxv1.PrepareRequest) { p.Events[0].AggregateId = strings.Repeat("x", 255) },
		"client only": func(p *outboxv1.PrepareRequest) { p.DatabaseTransaction = &outboxv1.DatabaseTransaction{Mode: 3} },
		"1000 events": func(p *outboxv1.PrepareRequest) {
			p.Events = nil
			for range 1000 {
				p.Events = append(p.Events, newEvent("a"))
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			req := newPrepare("orders")
			change(req)
			c := &call{}
			if e := v.prepare(c, req, testSource(), &catalogue{}); e != nil {
				t.Fatal(e)
			}
			if len(c.request.Events) != len(req.GetEvents()) || c.request.Key.Source != 1 {
				t.Fatalf("request %+v", c.request)
			}
			got, sent := c.request.Events[0], req.GetEvents()[0]
			if got.HasKey != (sent.Key != nil) || !bytes.Equal(got.Payload, sent.GetPayload()) || got.AggregateID != sent.GetAggregateId() {
				t.Fatalf("event %+v of %v", got, sent)
			}
		})
	}
}

// The mode of a database holds for those that do not state one.
func TestModeOfDatabase(t *testing.T) {
	src := prepareSource(store.Source{ID: 1, Name: "orders", Topics: []string{"*"}, Databases: []store.SourceDatabase{
		{Name: "main", Mode: store.ModeXIDFenced}, {Name: "other", Mode: store.ModeClientOnly},
	}})
	for _, c := range []struct {
		database string
		mode     outboxv1.DatabaseMode
		want     store.Mode
	}{
		{"main", 0, store.ModeXIDFenced}, {"main", 1, store.ModeMarker}, {"other", 0, store.ModeClientOnly}, {"other", 2, store.ModeXIDFenced},
	} {
		var d store.DatabaseTransaction
		if e := databaseTransaction(&d, &outboxv1.DatabaseTransaction{Database: c.database, Mode: c.mode, Xid: 9}, src); e != nil || d.Mode != c.want {
			t.Errorf("%+v: mode %v, %v", c, d.Mode, e)
		}
	}
	if e := databaseTransaction(new(store.DatabaseTransaction), &outboxv1.DatabaseTransaction{Xid: 9}, src); e == nil {
		t.Error(`a source with named databases has no "default"`)
	}
}

func TestNULInAdminRequests(t *testing.T) {
	v := testValidator(t)
	for field, m := range map[string]proto.Message{
		"name":                        &outboxv1.GetSourceRequest{Name: "a\x00"},
		"source":                      &outboxv1.ListDeadLettersRequest{Source: "\x00"},
		"aggregate_id":                &outboxv1.OperateAggregateRequest{Source: "a", AggregateType: "b", AggregateId: "\x00", Action: 1, Reason: "r"},
		"reason":                      &outboxv1.ApplySourceRequest{Source: &outboxv1.Source{Name: "a"}, Reason: "\x00"},
		"source.databases[0].dsn_ref": &outboxv1.ApplySourceRequest{Source: &outboxv1.Source{Name: "a", Databases: []*outboxv1.SourceDatabase{{DsnRef: "env:\x00"}}}},
	} {
		e := v.adminMessage(m)
		if e == nil || !slices.Contains(violated(e), field) {
			t.Errorf("%s: %v", field, e)
		}
	}
}

// FuzzPrepare: whatever bytes arrive, decoding, validating and converting never panics, and what is accepted keeps every
// rule that the store relies on.
func FuzzPrepare(f *testing.F) {
	v := testValidator(f)
	src := testSource()
	for _, change := range []func(*outboxv1.PrepareRequest){
		func(*outboxv1.PrepareRequest) {},
		func(p *outboxv1.PrepareRequest) { p.Events = append(p.Events, newEvent("b"), newEvent("c")) },
		func(p *outboxv1.PrepareRequest) {
			p.Events[0].Key = []byte("k")
			p.Events[0].OccurredAt = timestamppb.Now()
		},
		func(p *outboxv1.PrepareRequest) { p.Events[0].AggregateId = "\x00" },
	} {
		req := newPrepare("orders")
		change(req)
		b, err := proto.Marshal(req)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(b)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		countTransaction(b, prepareEvents)
		countSession(b)
		req := &outboxv1.PrepareRequest{}
		if proto.Unmarshal(b, req) != nil {
			return
		}
		comparePlain(t, v, req)
		c := &call{}
		if e := v.prepare(c, req, src, &catalogue{}); e != nil {
			if e.proto().GetCode() == 0 || len(e.proto().GetDetails()) == 0 {
				t.Fatalf("an error without code or details: %v", e)
			}
			return
		}
		checkAccepted(t, c, src)
		published := &call{}
		if e := v.publish(published, &outboxv1.PublishRequest{Source: req.GetSource(), TransactionId: req.GetTransactionId(), Events: req.GetEvents()}, src, &catalogue{}); e != nil {
			t.Fatalf("Prepare accepts what Publish refuses: %v", e)
		}
	})
}

// comparePlain: what is recognised as plainly valid, the rules accept.
func comparePlain(t *testing.T, v *validator, req *outboxv1.PrepareRequest) {
	t.Helper()
	publish := &outboxv1.PublishRequest{
		Source: req.GetSource(), TransactionId: req.GetTransactionId(), Events: req.GetEvents(), KeptByCaller: true,
	}
	var token []byte
	for _, e := range req.GetEvents() {
		token = e.GetPayload()
	}
	commit := &outboxv1.CommitRequest{Source: req.GetSource(), TransactionId: req.GetTransactionId(), Token: token}
	abort := &outboxv1.AbortRequest{Source: req.GetSource(), TransactionId: req.GetTransactionId(), Token: token}
	for _, c := range []struct {
		plain bool
		m     proto.Message
	}{{plainPrepare(req), req}, {plainPublish(publish), publish}, {plainDecision(commit), commit}, {plainDecision(abort), abort}} {
		if c.plain {
			if e := v.message(c.m); e != nil {
				t.Fatalf("taken for valid: %v (%v)", c.m, e)
			}
		}
	}
}

// The rules that plain.go mirrors. When this fails, look whether plain.go still says true only for what the new rules
// accept, extend TestPrepareRules, and then put the new sum here.
func TestPlainKnowsTheRules(t *testing.T) {
	h := sha256.New()
	for _, m := range []proto.Message{
		&outboxv1.PrepareRequest{}, &outboxv1.PublishRequest{}, &outboxv1.CommitRequest{}, &outboxv1.AbortRequest{},
		&outboxv1.Event{}, &outboxv1.Header{}, &outboxv1.DatabaseTransaction{},
	} {
		d := m.ProtoReflect().Descriptor()
		options, err := proto.MarshalOptions{Deterministic: true}.Marshal(d.Options())
		if err != nil {
			t.Fatal(err)
		}
		_, _ = fmt.Fprintf(h, "%s %x\n", d.FullName(), options)
		for i := range d.Fields().Len() {
			f := d.Fields().Get(i)
			if options, err = (proto.MarshalOptions{Deterministic: true}).Marshal(f.Options()); err != nil {
				t.Fatal(err)
			}
			_, _ = fmt.Fprintf(h, "%s %s %x\n", f.FullName(), f.Kind(), options)
		}
	}
	if got := hex.EncodeToString(h.Sum(nil))[:16]; got != "861f732e0497fe6b" {
		t.Errorf("the rules are %s now", got)
	}
}

// checkAccepted checks what the store relies on.
func checkAccepted(t *testing.T, c *call, src *source) {
	t.Helper()
	r := &c.request
	if r.Key.Source != src.ID || r.Database == nil || len(r.Events) == 0 || len(r.Events) > 1000 {
		t.Fatalf("accepted %+v", r)
	}
	ids := make(map[[16]byte]bool)
	for i := range r.Events {
		e := &r.Events[i]
		if ids[e.ID] || !src.allows(e.Topic) || e.AggregateID == "" || e.AggregateType == "" || e.Type == "" || len(e.Headers) > 64 {
			t.Fatalf("accepted %+v", e)
		}
		ids[e.ID] = true
		for _, s := range []string{e.Topic, e.AggregateType, e.AggregateID, e.Type, e.ContentType} {
			if strings.IndexByte(s, 0) >= 0 {
				t.Fatalf("NUL in %q", s)
			}
		}
		for _, h := range e.Headers {
			if h.Name == "" || strings.EqualFold(h.Name, reservedHeader) {
				t.Fatalf("header %q", h.Name)
			}
		}
		if e.OccurredAt < 0 {
			t.Fatalf("occurred_at %d", e.OccurredAt)
		}
	}
}

// FuzzPageToken: no token but one of ours is accepted, and none breaks anything.
func FuzzPageToken(f *testing.F) {
	f.Add("", "sources", "")
	f.Add(pageToken("sources", "", "orders"), "sources", "")
	f.Add(pageToken("blocked", "orders", "1;2"), "blocked", "payments")
	f.Add("AAAAAAAAAAAAAAAA", "x", "y")
	f.Fuzz(func(t *testing.T, token, list, filter string) {
		at, e := readPageToken(token, list, filter)
		if e == nil && at != "" && pageToken(list, filter, at) != token {
			t.Fatalf("accepted %q, which is not %q", token, pageToken(list, filter, at))
		}
	})
}

func TestPageTokens(t *testing.T) {
	token := pageToken("sources", "f", "after")
	if at, e := readPageToken(token, "sources", "f"); e != nil || at != "after" {
		t.Fatalf("%q, %v", at, e)
	}
	for _, c := range [][3]string{{token, "blocked", "f"}, {token, "sources", "g"}, {token + "A", "sources", "f"}, {"%%", "sources", "f"}, {"AAAA", "sources", "f"}, {"'; DROP TABLE x", "sources", "f"}} {
		if at, e := readPageToken(c[0], c[1], c[2]); e == nil {
			t.Errorf("%v accepted: %q", c, at)
		}
	}
	if pageSize(0) != 100 || pageSize(7) != 7 || pageSize(99999) != 1000 {
		t.Error("page sizes")
	}
}

func TestTokens(t *testing.T) {
	k := store.Key{Source: 3, Transaction: store.TransactionID(newID())}
	token := appendToken(nil, 0b1010, k)
	if got := readToken(token, k, 16); got != 0b1010 {
		t.Fatalf("read %b", got)
	}
	other := k
	other.Transaction[0]++
	if got := readToken(token, other, 16); got != 0 {
		t.Errorf("another transaction's token gives %b", got)
	}
	if got := readToken(token, k, 3); got != 0 {
		t.Errorf("a shard that does not exist: %b", got)
	}
	if got := readToken(appendToken(nil, 1<<63, k), k, 64); got != 1<<63 {
		t.Errorf("64 shards: %b", got)
	}
	if got := readToken(token[:8], k, 16); got != 0 {
		t.Errorf("a short token gives %b", got)
	}
}
