package store_test

import (
	"errors"
	"math"
	"reflect"
	"slices"
	"testing"

	"pgregory.net/rapid"

	"github.com/outbox-platform/outbox/store"
)

func pendAt(xid uint64, seq, record int32, key byte, state store.State) store.PendEntry {
	return store.PendEntry{
		EventPosition: store.EventPosition{Position: store.Position{XID: xid, Seq: seq}, Record: record},
		Key:           store.Key{Source: int32(key) + 1, Transaction: store.TransactionID{15: key}}, State: state,
	}
}

func TestPendRoundTrip(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(t *rapid.T) {
		small := rapid.Int32Range(0, 3)
		entries := rapid.SliceOf(rapid.Custom(func(t *rapid.T) store.PendEntry {
			e := pendAt(uint64(small.Draw(t, "xid")), small.Draw(t, "seq"), small.Draw(t, "record"),
				byte(small.Draw(t, "key")), store.State(rapid.IntRange(0, 2).Draw(t, "state")))
			if rapid.Bool().Draw(t, "large") {
				e.XID, e.Seq, e.Record = math.MaxUint64-e.XID, math.MaxInt32-e.Seq, math.MaxInt32-e.Record
			}
			return e
		})).Draw(t, "entries")
		before := slices.Clone(entries)
		got, err := store.DecodePend(store.EncodePend(entries))
		if err != nil {
			t.Fatal(err)
		}
		if !slices.Equal(before, entries) {
			t.Fatal("EncodePend changed its argument")
		}
		want := map[store.EventPosition]store.PendEntry{}
		for _, e := range slices.Backward(entries) {
			want[e.EventPosition] = e
		}
		if len(got) != len(want) {
			t.Fatalf("got %d entries, want %d", len(got), len(want))
		}
		for i, e := range got {
			if e != want[e.EventPosition] {
				t.Fatalf("got %v, want %v", e, want[e.EventPosition])
			}
			if i > 0 && got[i-1].EventPosition.Compare(e.EventPosition) >= 0 {
				t.Fatalf("not in order: %v, %v", got[i-1], e)
			}
		}
	})
}

func TestPendIsSmall(t *testing.T) {
	t.Parallel()
	var entries []store.PendEntry
	for i := range int32(1000) {
		entries = append(entries, pendAt(1e9+uint64(i), 0, i%7, byte(i%251), store.Committed))
	}
	if n := len(store.EncodePend(entries)); n > 1000*24 {
		t.Fatalf("1,000 entries take %d bytes", n)
	}
}

func TestOffsetsRoundTrip(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(t *rapid.T) {
		offsets := rapid.SliceOfDistinct(rapid.Custom(func(t *rapid.T) store.TopicOffset {
			return store.TopicOffset{
				Topic:     rapid.SampledFrom([]string{"a", "b", "bb", "orders.created"}).Draw(t, "topic"),
				Partition: rapid.Int32Range(0, math.MaxInt32).Draw(t, "partition"),
				Offset:    rapid.Int64Range(0, math.MaxInt64).Draw(t, "offset"),
			}
		}), func(o store.TopicOffset) store.TopicOffset { o.Offset = 0; return o }).Draw(t, "offsets")
		got, err := store.DecodeOffsets(store.EncodeOffsets(offsets))
		if err != nil {
			t.Fatal(err)
		}
		want := map[store.TopicOffset]bool{}
		for _, o := range offsets {
			want[o] = true
		}
		if len(got) != len(want) {
			t.Fatalf("got %v, want %v", got, offsets)
		}
		for _, o := range got {
			if !want[o] {
				t.Fatalf("%v was not encoded", o)
			}
		}
	})
}

func TestDecodePendRefuses(t *testing.T) {
	t.Parallel()
	good := store.EncodePend([]store.PendEntry{pendAt(7, 1, 2, 3, store.Committed), pendAt(7, 1, 3, 3, store.Prepared)})
	for name, b := range map[string][]byte{
		"version": {9}, "no count": {1}, "count 0": {1, 0}, "impossible count": {1, 200, 1, 0}, "cut": good[:len(good)-1],
		"left over": append(slices.Clone(good), 0), "first without a key": {1, 1, 4, 1, 1, 1},
		"state 3": append([]byte{1, 1, 3, 1, 1, 1, 1}, make([]byte, 16)...),
		"flags":   append([]byte{1, 1, 8, 1, 1, 1, 1}, make([]byte, 16)...),
		"seq":     append([]byte{1, 1, 0, 1, 255, 255, 255, 255, 255, 1, 1, 1}, make([]byte, 16)...),
		"same position twice": slices.Concat([]byte{1, 2, 0, 1, 1, 1, 1}, make([]byte, 16),
			[]byte{4, 0, 0, 0}),
	} {
		if got, err := store.DecodePend(b); !errors.Is(err, store.ErrInvalid) {
			t.Errorf("%s: got %v, %v, want ErrInvalid", name, got, err)
		}
	}
	for name, b := range map[string][]byte{
		"version": {9}, "first without a topic": {1, 1, 0, 0, 0}, "offset": {1, 1, 2, 'a', 0, 255, 255, 255, 255, 255, 255, 255, 255, 255, 1},
		"not in order": {1, 2, 2, 'b', 0, 0, 2, 'a', 0, 0}, "cut": {1, 1, 5, 'a', 0},
	} {
		if got, err := store.DecodeOffsets(b); !errors.Is(err, store.ErrInvalid) {
			t.Errorf("offsets, %s: got %v, %v, want ErrInvalid", name, got, err)
		}
	}
	if got, err := store.DecodePend(nil); got != nil || err != nil {
		t.Errorf("no bytes: %v, %v", got, err)
	}
	if got, err := store.DecodeOffsets(nil); got != nil || err != nil {
		t.Errorf("no bytes: %v, %v", got, err)
	}
	if b := store.EncodePend(nil); b != nil {
		t.Errorf("no entries: %v", b)
	}
	if b := store.EncodeOffsets(nil); b != nil {
		t.Errorf("no offsets: %v", b)
	}
}

func FuzzDecodePend(f *testing.F) {
	f.Add([]byte(nil))
	f.Add(store.EncodePend([]store.PendEntry{pendAt(7, 1, 2, 3, store.Committed), pendAt(7, 1, 3, 3, store.Prepared), pendAt(9, 0, 0, 4, store.Aborted)}))
	f.Fuzz(func(t *testing.T, b []byte) {
		entries, err := store.DecodePend(b)
		if err != nil {
			if !errors.Is(err, store.ErrInvalid) {
				t.Fatal(err)
			}
			return
		}
		again, err := store.DecodePend(store.EncodePend(entries))
		if err != nil || !reflect.DeepEqual(entries, again) {
			t.Fatalf("%v encodes to what decodes to %v, %v", entries, again, err)
		}
	})
}

func FuzzDecodeOffsets(f *testing.F) {
	f.Add([]byte(nil))
	f.Add(store.EncodeOffsets([]store.TopicOffset{{"a", 1, 2}, {"a", 2, 900}, {"b", 0, 1}}))
	f.Fuzz(func(t *testing.T, b []byte) {
		offsets, err := store.DecodeOffsets(b)
		if err != nil {
			if !errors.Is(err, store.ErrInvalid) {
				t.Fatal(err)
			}
			return
		}
		again, err := store.DecodeOffsets(store.EncodeOffsets(offsets))
		if err != nil || !reflect.DeepEqual(offsets, again) {
			t.Fatalf("%v encodes to what decodes to %v, %v", offsets, again, err)
		}
	})
}
