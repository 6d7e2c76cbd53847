package relay

import (
	"bytes"
	"fmt"
	"testing"
	"time"

	"github.com/google/uuid"
	"pgregory.net/rapid"

	"github.com/outbox-platform/outbox/store"
)

var (
	testEventID       = uuid.MustParse("0192f0a1-7c1e-7d3a-9b1e-1f2e3d4c5b6a")
	testTransactionID = uuid.MustParse("0192f0a1-0000-7000-8000-000000000001")
	testPreparedAt    = time.Date(2026, 11, 24, 8, 0, 0, 250_000_000, time.UTC)
	testOccurredAt    = time.Date(2026, 11, 24, 7, 59, 58, 123_456_789, time.UTC)
)

func testSource(profile int16) *store.Source {
	return &store.Source{ID: 3, Name: "shop", RecordProfile: profile, CloudEventsSource: "/outbox/shop"}
}

func testRecord() *store.Record {
	return &store.Record{
		Key:        store.Key{Source: 3, Transaction: store.TransactionID(testTransactionID)},
		State:      store.Committed,
		PreparedAt: testPreparedAt.UnixNano(),
		Event: store.Event{
			ID: testEventID, Topic: "shop.orders", AggregateType: "order", AggregateID: "o-17", Type: "order.placed.v1",
			ContentType: "application/json", Payload: []byte(`{"n":1}`), OccurredAt: testOccurredAt.UnixNano(),
		},
	}
}

// text writes headers as "name=value" lines, to be compared and read in failures.
func text(headers []store.Header) string {
	var b bytes.Buffer
	for _, h := range headers {
		fmt.Fprintf(&b, "%s=%s\n", h.Name, h.Value)
	}
	return b.String()
}

func TestBuildRecordProfiles(t *testing.T) {
	id, tx := testEventID.String(), testTransactionID.String()
	tests := []struct {
		name    string
		profile int16
		want    string
	}{
		{"cloudevents", profileCloudEvents, "ce_specversion=1.0\nce_id=" + id + "\nce_source=/outbox/shop\nce_type=order.placed.v1\n" +
			"ce_time=2026-11-24T07:59:58.123456789Z\nce_subject=o-17\ncontent-type=application/json\n"},
		{"debezium", profileDebezium, "id=" + id + "\neventType=order.placed.v1\naggregateType=order\n"},
		{"huleedu", profileHuleEdu, "event_id=" + id + "\ntrace_id=" + tx + "\nschema_version=1\noccurred_at=2026-11-24T07:59:58.123456789Z\n" +
			"content_type=application/json\nsource_service=shop\nevent_type=order.placed.v1\n"},
		{"plain", profilePlain, ""},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			r := BuildRecord(testSource(tt.profile), 7, 12, testRecord())
			if got, want := text(r.Headers), tt.want+"outbox-epoch=7:12\n"; got != want {
				t.Errorf("headers:\n%swant:\n%s", got, want)
			}
			if r.Topic != "shop.orders" || string(r.Key) != "o-17" || string(r.Value) != `{"n":1}` || !r.Timestamp.Equal(testOccurredAt) {
				t.Errorf("record %+v", r)
			}
			if name := EventIDHeader(tt.profile); name != "" && !hasHeader(r.Headers, name, id) {
				t.Errorf("EventIDHeader is %q, which does not carry the event id", name)
			}
		})
	}
}

func hasHeader(headers []store.Header, name, value string) bool {
	for _, h := range headers {
		if h.Name == name && string(h.Value) == value {
			return true
		}
	}
	return false
}

func TestBuildRecordCallersHeadersWin(t *testing.T) {
	rec := testRecord()
	rec.Event.Headers = []store.Header{
		{Name: "traceparent", Value: []byte("00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01")},
		{Name: "ce_id", Value: []byte("mine")},
		{Name: "CE_TYPE", Value: []byte("another name")},
		{Name: "x", Value: nil},
		{Name: "x", Value: []byte{0, 0xff}},
		{Name: "content-type", Value: []byte("text/plain")},
	}
	given := text(rec.Event.Headers)
	r := BuildRecord(testSource(profileCloudEvents), 0, 1, rec)
	want := given + "ce_specversion=1.0\nce_source=/outbox/shop\nce_type=order.placed.v1\n" +
		"ce_time=2026-11-24T07:59:58.123456789Z\nce_subject=o-17\noutbox-epoch=0:1\n"
	if got := text(r.Headers); got != want {
		t.Errorf("headers:\n%swant:\n%s", got, want)
	}
	if text(rec.Event.Headers) != given {
		t.Error("the event's own headers were changed")
	}
}

func TestBuildRecordWhatIsAbsent(t *testing.T) {
	rec := testRecord()
	rec.Event.OccurredAt, rec.Event.ContentType, rec.Event.Payload = 0, "", nil
	rec.Event.HasKey = true
	r := BuildRecord(testSource(profileCloudEvents), 0, 1, rec)
	if !r.Timestamp.Equal(testPreparedAt) || !hasHeader(r.Headers, "ce_time", "2026-11-24T08:00:00.25Z") {
		t.Errorf("without occurred_at the time of Prepare must stand in: %v\n%s", r.Timestamp, text(r.Headers))
	}
	if r.Key == nil || len(r.Key) != 0 {
		t.Errorf("a present empty key must stay empty and not become nil: %#v", r.Key)
	}
	if r.Value == nil {
		t.Error("an empty payload must not become a tombstone")
	}
	for _, h := range r.Headers {
		if h.Name == "content-type" {
			t.Error("content-type without a value must be left out")
		}
	}
	if r := BuildRecord(testSource(profileHuleEdu), 0, 1, rec); !hasHeader(r.Headers, "content_type", "application/json") {
		t.Error("huleedu: content_type defaults to JSON")
	}
}

// TestBuildRecordRapid checks, for any event and profile: value and key are the event's bytes; the caller's headers come
// first and unchanged; no profile header repeats a name; the epoch is last; no value can grow into its neighbour.
func TestBuildRecordRapid(t *testing.T) {
	names := append([]string{"x", "traceparent", EpochHeader}, profileNames()...)
	rapid.Check(t, func(t *rapid.T) {
		rec := drawRecord(t, names)
		src := testSource(int16(rapid.IntRange(1, 4).Draw(t, "profile")))
		shard, epoch := rapid.Int16Min(0).Draw(t, "shard"), rapid.Int64Min(1).Draw(t, "epoch")
		r := BuildRecord(src, shard, epoch, rec)

		wantKey := []byte(rec.Event.AggregateID)
		if rec.Event.HasKey {
			wantKey = rec.Event.Key
		}
		if !bytes.Equal(r.Key, wantKey) || r.Key == nil || !bytes.Equal(r.Value, rec.Event.Payload) || r.Value == nil {
			t.Fatalf("key %q value %q", r.Key, r.Value)
		}
		n := len(rec.Event.Headers)
		if text(r.Headers[:n]) != text(rec.Event.Headers) {
			t.Fatalf("the caller's headers changed:\n%s", text(r.Headers))
		}
		last := r.Headers[len(r.Headers)-1]
		if last.Name != EpochHeader || string(last.Value) != fmt.Sprintf("%d:%d", shard, epoch) {
			t.Fatalf("last header %s=%s", last.Name, last.Value)
		}
		before := text(r.Headers)
		seen := map[string]bool{}
		for _, h := range rec.Event.Headers {
			seen[h.Name] = true
		}
		for _, h := range r.Headers[n : len(r.Headers)-1] {
			if seen[h.Name] {
				t.Fatalf("profile header %q twice, or although the caller gave it", h.Name)
			}
			seen[h.Name] = true
			_ = append(h.Value, "overwrite"...)
		}
		if text(r.Headers) != before {
			t.Fatal("header values share room to grow")
		}
	})
}

func profileNames() []string {
	var names []string
	for profile := profileCloudEvents; profile <= profileHuleEdu; profile++ {
		for _, h := range BuildRecord(testSource(profile), 0, 0, testRecord()).Headers {
			names = append(names, h.Name)
		}
	}
	return names
}

func drawRecord(t *rapid.T, names []string) *store.Record {
	rec := testRecord()
	e := &rec.Event
	e.AggregateID = rapid.String().Draw(t, "aggregate id")
	e.Type = rapid.String().Draw(t, "type")
	e.ContentType = rapid.SampledFrom([]string{"", "application/json", "text/plain"}).Draw(t, "content type")
	e.Payload = rapid.SliceOf(rapid.Byte()).Draw(t, "payload")
	e.HasKey = rapid.Bool().Draw(t, "has key")
	e.Key = rapid.SliceOf(rapid.Byte()).Draw(t, "key")
	e.OccurredAt = rapid.Int64Min(0).Draw(t, "occurred at")
	header := rapid.Custom(func(t *rapid.T) store.Header {
		return store.Header{Name: rapid.SampledFrom(names).Draw(t, "name"), Value: rapid.SliceOf(rapid.Byte()).Draw(t, "value")}
	})
	e.Headers = rapid.SliceOfN(header, 0, 12).Draw(t, "headers")
	return rec
}

func TestBuildRecordAllocations(t *testing.T) {
	src, rec := testSource(profileCloudEvents), testRecord()
	rec.Event.Headers = []store.Header{{Name: "traceparent", Value: []byte("00-x-y-01")}}
	if n := testing.AllocsPerRun(100, func() { recordSink = BuildRecord(src, 7, 12, rec) }); n > 2 {
		t.Errorf("%v allocations, want 2: the headers and one buffer for their values", n)
	}
}

// recordSink keeps the compiler from removing what is measured.
var recordSink Record

func BenchmarkBuildRecord(b *testing.B) {
	for _, p := range []struct {
		name    string
		profile int16
	}{{"cloudevents", profileCloudEvents}, {"debezium", profileDebezium}, {"huleedu", profileHuleEdu}, {"plain", profilePlain}} {
		b.Run(p.name, func(b *testing.B) {
			src, rec := testSource(p.profile), testRecord()
			b.ReportAllocs()
			for b.Loop() {
				recordSink = BuildRecord(src, 7, 12, rec)
			}
		})
	}
}
