package store_test

import (
	"encoding/binary"
	"encoding/hex"
	"math"
	"reflect"
	"runtime"
	"slices"
	"strings"
	"testing"

	"pgregory.net/rapid"

	"github.com/outbox-platform/outbox/store"
)

var goldenRecord = store.Record{
	Key:        store.Key{Source: 300, Transaction: store.TransactionID{1, 2, 3, 15: 9}},
	PreparedAt: 1764000000123456789,
	Database: &store.DatabaseTransaction{
		Database: "default", XID: 1 << 33, SystemIdentifier: 7654321098765432109, Timeline: 3, DatabaseOID: 16384, MarkerOID: 16390, Mode: store.ModeMarker,
	},
	Event: store.Event{
		ID: [16]byte{0xaa, 15: 0xbb}, Topic: "orders", AggregateType: "order", AggregateID: "4711", Type: "order.placed", ContentType: "application/json",
		Key: []byte("k"), HasKey: true, Payload: []byte(`{"a":1}`), OccurredAt: -5,
		Headers: []store.Header{{Name: "traceparent", Value: []byte("00")}, {Name: "", Value: []byte{}}},
	},
}

// Stored bytes outlive binaries. If this fails, old rows can no longer be read as they were meant: do not change the
// bytes here, give the new format a new number.
func TestEventFormatIsGolden(t *testing.T) {
	t.Parallel()
	const golden = "0101009401ac0201020300000000000000000000000009187afca76f25cd15010764656661756c7480808080206a399c7c28b0f52d03808001868001aa0000000000000000000000000000bb066f7264657273056f7264657204343731310c6f726465722e706c61636564106170706c69636174696f6e2f6a736f6e09026b020b7472616365706172656e740230300000077b2261223a317d"
	if got := hex.EncodeToString(store.EncodeEvent(nil, &goldenRecord)); got != golden {
		t.Errorf("encoded\n%s, stored rows have\n%s", got, golden)
	}
	stored, err := hex.DecodeString(golden)
	if err != nil {
		t.Fatal(err)
	}
	got, err := store.DecodeEvent(stored)
	if err != nil || !reflect.DeepEqual(*got, goldenRecord) {
		t.Errorf("decoded\n%+v, %v, want\n%+v", got, err, goldenRecord)
	}
	const digest = 0xaaa65e0f222616e5
	if got := store.Digest([]store.Event{goldenRecord.Event}); got != digest {
		t.Errorf("digest %#x, stored rows have %#x: every retried transaction id would count as used with other content", got, uint64(digest))
	}
}

func TestShardsAreGolden(t *testing.T) {
	t.Parallel()
	for a, want := range map[store.Aggregate]uint64{
		{Source: 1, Type: "order", ID: "1"}:        0xe87a4d75f6916d16,
		{Source: 70000, Type: "", ID: ""}:          0x3b4f4f90a95b1c3,
		{Source: 1, Type: "order\x001", ID: "äöü"}: 0x6528ab6db386d0f3,
	} {
		if got := a.Hash(); got != want {
			t.Errorf("hash of %+v is %#x: stored events would not be found", a, got)
		}
	}
}

func drawEvent(t *rapid.T) store.Event {
	text := rapid.StringN(0, 40, 60)
	e := store.Event{
		Topic: text.Draw(t, "topic"), AggregateType: text.Draw(t, "aggregate type"), AggregateID: text.Draw(t, "aggregate id"),
		Type: text.Draw(t, "type"), ContentType: text.Draw(t, "content type"), OccurredAt: rapid.Int64().Draw(t, "occurred at"),
		HasKey: rapid.Bool().Draw(t, "has key"), Payload: rapid.SliceOfN(rapid.Byte(), 0, 50).Draw(t, "payload"),
	}
	copy(e.ID[:], rapid.SliceOfN(rapid.Byte(), 16, 16).Draw(t, "id"))
	if e.HasKey {
		e.Key = rapid.SliceOfN(rapid.Byte(), 0, 20).Draw(t, "key")
	}
	for range rapid.IntRange(0, 3).Draw(t, "headers") {
		e.Headers = append(e.Headers, store.Header{Name: text.Draw(t, "name"), Value: rapid.SliceOfN(rapid.Byte(), 0, 20).Draw(t, "value")})
	}
	return e
}

func drawRecord(t *rapid.T) store.Record {
	r := store.Record{
		Key:        store.Key{Source: rapid.Int32Min(0).Draw(t, "source")},
		PreparedAt: rapid.Int64().Draw(t, "prepared at"), Event: drawEvent(t),
	}
	copy(r.Key.Transaction[:], rapid.SliceOfN(rapid.Byte(), 16, 16).Draw(t, "transaction"))
	if rapid.Bool().Draw(t, "published") {
		r.State = store.Committed
	}
	if rapid.Bool().Draw(t, "database") {
		r.Database = &store.DatabaseTransaction{
			Database: rapid.String().Draw(t, "database name"), XID: rapid.Uint64().Draw(t, "xid"), SystemIdentifier: rapid.Uint64().Draw(t, "system"),
			Timeline: rapid.Uint32().Draw(t, "timeline"), DatabaseOID: rapid.Uint32().Draw(t, "oid"), MarkerOID: math.MaxUint32,
			Mode: rapid.SampledFrom([]store.Mode{store.ModeMarker, store.ModeXIDFenced, store.ModeClientOnly}).Draw(t, "mode"),
		}
	}
	return r
}

// What is encoded is decoded, equal events have equal digests, and others other ones.
func TestEventsSurviveEncoding(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(t *rapid.T) {
		want := drawRecord(t)
		prefix := rapid.SliceOfN(rapid.Byte(), 0, 5).Draw(t, "prefix")
		body := store.EncodeEvent(slices.Clone(prefix), &want)
		if !slices.Equal(body[:len(prefix)], prefix) {
			t.Fatal("the prefix was changed")
		}
		got, err := store.DecodeEvent(body[len(prefix):])
		if err != nil {
			t.Fatal(err)
		}
		if !reflect.DeepEqual(*got, want) {
			t.Fatalf("decoded\n%+v, want\n%+v", *got, want)
		}
		if other := drawEvent(t); (store.Digest([]store.Event{got.Event}) == store.Digest([]store.Event{other})) != reflect.DeepEqual(got.Event, other) {
			t.Fatal("digests do not tell events apart")
		}
		// Any part of it is refused, not misread.
		cut := rapid.IntRange(0, len(body)-len(prefix)-1).Draw(t, "cut")
		if r, err := store.DecodeEvent(body[len(prefix):][:cut]); err == nil {
			t.Fatalf("%d of %d bytes decode as %+v", cut, len(body)-len(prefix), r)
		}
	})
}

// Events of one shard count in their order; between shards there is none.
func TestDigestIsOverTheOrderAndAllEvents(t *testing.T) {
	t.Parallel()
	a, b := order("1"), order("1")
	all := [][]store.Event{{a, b}, {b, a}, {a}, {b}, {a, a}, {a, b, b}}
	seen := map[uint64]int{}
	for i, events := range all {
		if j, twice := seen[store.Digest(events)]; twice {
			t.Errorf("contents %d and %d have one digest", i, j)
		}
		seen[store.Digest(events)] = i
	}
	// What cannot be told from absent has the digest of absent.
	c := a
	c.Headers, c.Key = []store.Header{}, []byte("ignored without HasKey")
	a.Headers = nil
	if store.Digest([]store.Event{a}) != store.Digest([]store.Event{c}) {
		t.Error("equal events have other digests")
	}
}

func TestGarbageIsRefused(t *testing.T) { //nolint:paralleltest // it counts what is allocated
	good := store.EncodeEvent(nil, &goldenRecord)
	for name, body := range map[string][]byte{
		"empty":               {},
		"unknown format":      append([]byte{9}, good[1:]...),
		"unknown kind":        {1, 77, 0, 0},
		"more without event":  {1, 5, 0},
		"length beyond":       {1, 1, 0, 200, 1},
		"ordinal beyond":      {1, 1, 0xff, 0xff, 0xff, 0xff, 0xff, 0x0f, 0},
		"varint without end":  {1, 1, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff},
		"trailing bytes":      append(slices.Clone(good), 3),
		"two events":          append(slices.Clone(good), good[1:]...),
		"only a decision":     append([]byte{1, 3, 0, 17, 1}, make([]byte, 16)...),
		"bytes in a decision": append([]byte{1, 3, 0, 18, 1}, make([]byte, 17)...),
		"only the format":     {1},
	} {
		if r, err := store.DecodeEvent(body); err == nil {
			t.Errorf("%s: decoded as %+v", name, r)
		}
	}
	// A count of headers that cannot be is not allocated.
	huge := slices.Clone(good)
	i := strings.Index(string(huge), "\x02\x0btraceparent")
	huge = slices.Replace(huge, i, i+1, 0xff, 0xff, 0xff, 0xff, 0x0f)
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	if r, err := store.DecodeEvent(huge); err == nil {
		t.Errorf("2³² headers decoded as %+v", r)
	}
	if runtime.ReadMemStats(&after); after.TotalAlloc-before.TotalAlloc > 1<<20 {
		t.Errorf("allocated %d bytes for garbage", after.TotalAlloc-before.TotalAlloc)
	}
}

// An event whose content is cut short anywhere is refused, although its length says that it is all there.
func TestEventsCutShortAreRefused(t *testing.T) {
	t.Parallel()
	good := store.EncodeEvent(nil, &goldenRecord)
	length, n := binary.Uvarint(good[3:]) // after format, kind and ordinal
	content := good[3+n:]
	if int(length) != len(content) {
		t.Fatalf("length %d of %d bytes", length, len(content))
	}
	for n := range content {
		body := append(binary.AppendUvarint(slices.Clone(good[:3]), uint64(n)), content[:n]...)
		if r, err := store.DecodeEvent(body); err == nil {
			t.Errorf("%d of %d bytes: decoded as %+v", n, len(content), r)
		}
	}
}

// FuzzSegment: garbage never panics, never reads beyond the body, and what decodes is what encodes to the same.
func FuzzSegment(f *testing.F) {
	f.Add(store.EncodeEvent(nil, &goldenRecord), int32(0))
	published := goldenRecord
	published.Database, published.State = nil, store.Committed
	body := store.EncodeEvent(nil, &published)
	f.Add(body, int32(1))
	f.Add(append([]byte{1, 3, 2, 17, 1}, make([]byte, 16)...), int32(-2))
	f.Fuzz(func(t *testing.T, body []byte, stale int32) {
		s := store.Segment{Body: body, Stale: []int32{stale}}
		last := int32(-1)
		records := 0
		err := s.Records(func(r *store.Record) bool {
			if r.Number <= last {
				t.Fatalf("record %d after %d", r.Number, last)
			}
			last = r.Number
			records++
			if r.IsDecision {
				return true
			}
			again, err := store.DecodeEvent(store.EncodeEvent(nil, r))
			if err != nil {
				t.Fatalf("decoded, encoded and not decoded: %v", err)
			}
			want := *r
			want.Number = 0
			if !reflect.DeepEqual(*again, want) {
				t.Fatalf("%+v became %+v", want, *again)
			}
			return records < 1000
		})
		if err == nil && len(body) == 0 {
			t.Fatal("an empty body has no format")
		}
	})
}
