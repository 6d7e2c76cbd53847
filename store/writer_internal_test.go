package store

import (
	"bytes"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"reflect"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"pgregory.net/rapid"
)

func encoded(r *Request, shards int) *Request {
	r.enc.encode(r, shards, time.Minute, time.Now())
	return r
}

func key(n byte) Key { return Key{Source: 1, Transaction: TransactionID{n, 15: 7}} }

func smallEvent(aggregate string) Event {
	return Event{Topic: "t", AggregateType: "a", AggregateID: aggregate, Payload: []byte("p")}
}

// bodiesOf decodes $10–$12 of a built batch.
func bodiesOf(t testing.TB, b *batch) (segments []Segment) {
	t.Helper()
	shards := int2s(nil, b.params[9].value())
	seqs := int4s(b.params[10].value())
	v := b.params[11].value()
	if len(shards) != len(seqs) {
		t.Fatalf("%d shards, %d seqs", len(shards), len(seqs))
	}
	at := arrayHeader
	for i := range shards {
		n := int(binary.BigEndian.Uint32(v[at:]))
		segments = append(segments, Segment{Shard: shards[i], Position: Position{Seq: seqs[i]}, Body: v[at+4 : at+4+n]})
		at += 4 + n
	}
	return segments
}

// The bytes of a segment as the writer makes them. If this fails, see TestEventFormatIsGolden.
func TestSegmentFormatIsGolden(t *testing.T) {
	t.Parallel()
	var b batch
	p := encoded(&Request{Kind: KindPrepare, Key: key(2), Database: &DatabaseTransaction{Database: "d", XID: 5, Mode: ModeMarker}, Events: []Event{smallEvent("1"), smallEvent("1")}}, 1)
	binary.BigEndian.PutUint64(p.enc.payload.b[17:], 99) // the time of Prepare
	u := encoded(&Request{Kind: KindPublish, Key: key(1), Events: []Event{smallEvent("2")}}, 1)
	binary.BigEndian.PutUint64(u.enc.payload.b[17:], 98)
	b.build([]*Request{
		p, u,
		encoded(&Request{Kind: KindCommit, Key: key(4), Shards: 1}, 1),
		encoded(&Request{Kind: KindAbort, Key: key(3), Shards: 1}, 1),
	})
	const golden = "01010245010200000000000000000000000000000700000000000000630101640500000000000000000000000000000000000000000000000000000001740161013100000000000170051d00000000000000000000000000000000017401610131000000000001700201370101000000000000000000000000000007000000000000006200000000000000000000000000000000000174016101320000000000017003021101040000000000000000000000000000070401110103000000000000000000000000000007"
	segments := bodiesOf(t, &b)
	if len(segments) != 1 {
		t.Fatalf("%d segments", len(segments))
	}
	if got := hex.EncodeToString(segments[0].Body); got != golden {
		t.Errorf("body\n%s, stored rows have\n%s", got, golden)
	}
	type seen struct {
		number int32
		key    Key
		state  State
		at     int64
	}
	for _, c := range []struct {
		stale []int32
		want  []seen
	}{
		{nil, []seen{{0, key(2), Prepared, 99}, {1, key(2), Prepared, 99}, {2, key(1), Committed, 98}, {3, key(4), Committed, 0}, {4, key(3), Aborted, 0}}},
		{[]int32{2, -1}, []seen{{2, key(1), Committed, 98}, {3, key(4), Committed, 0}}},
		{[]int32{1, -2}, []seen{{0, key(2), Prepared, 99}, {1, key(2), Prepared, 99}, {4, key(3), Aborted, 0}}},
	} {
		s := segments[0]
		s.Stale = c.stale
		var got []seen
		if err := s.Records(func(r *Record) bool {
			got = append(got, seen{r.Number, r.Key, r.State, r.PreparedAt})
			return true
		}); err != nil || !reflect.DeepEqual(got, c.want) {
			t.Errorf("stale %v: %v, %v; want %v", c.stale, got, err, c.want)
		}
	}
}

// Whatever the requests, a batch carries every record once, in the order of arrival per shard, in segments that fit, with
// keys sorted and ordinals that name the right records.
func TestBatchesCarryEverything(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(t *rapid.T) {
		const shards = 4
		type record struct {
			key   Key
			event int // -1: decision
		}
		var b batch
		for range 2 { // the second time with used buffers
			var requests []*Request
			want := map[int16][]record{}
			for i := range rapid.IntRange(0, 40).Draw(t, "requests") {
				k := key(byte(i))
				k.Source = rapid.Int32Range(1, 3).Draw(t, "source")
				rapid.SliceOfN(rapid.Byte(), 4, 4).Draw(t, "id")
				k.Transaction[1] = rapid.Byte().Draw(t, "random")
				r := &Request{Kind: Kind(rapid.IntRange(0, 3).Draw(t, "kind")), Key: k}
				if r.Kind.stores() {
					for range rapid.IntRange(1, 5).Draw(t, "events") {
						e := smallEvent(fmt.Sprint(rapid.IntRange(0, 9).Draw(t, "aggregate")))
						e.Payload = make([]byte, rapid.SampledFrom([]int{0, 100, 3000, 9000}).Draw(t, "size"))
						r.Events = append(r.Events, e)
						e.OccurredAt = int64(len(r.Events))
						r.Events[len(r.Events)-1] = e
						s := ShardOf(Aggregate{k.Source, e.AggregateType, e.AggregateID}, shards)
						want[s] = append(want[s], record{k, len(r.Events)})
					}
				} else {
					r.Shards = ShardSet(rapid.IntRange(1, 1<<shards-1).Draw(t, "shards"))
					for s := range int16(shards) {
						if r.Shards.Has(s) {
							want[s] = append(want[s], record{k, -1})
						}
					}
				}
				requests = append(requests, encoded(r, shards))
			}
			b.build(requests)
			for _, sorted := range [][]*Request{b.prepares, b.decisions} {
				if !slices.IsSortedFunc(sorted, byKey) {
					t.Fatal("keys are not sorted")
				}
			}
			var stale []int32
			lost := map[Key]bool{}
			for _, r := range requests {
				if rapid.Bool().Draw(t, "lost") {
					lost[r.Key] = true
					o := r.enc.ordinal
					if !r.Kind.stores() {
						o = -o
					}
					stale = append(stale, o)
				}
			}
			got := map[int16][]record{}
			for i, s := range bodiesOf2(t, &b) {
				if s.Seq != int32(i) {
					t.Fatalf("segment %d has seq %d", i, s.Seq)
				}
				s.Stale = stale
				n := 0
				if err := s.Records(func(r *Record) bool {
					event := -1
					if !r.IsDecision {
						event = int(r.Event.OccurredAt)
					}
					got[s.Shard] = append(got[s.Shard], record{r.Key, event})
					n++
					return true
				}); err != nil {
					t.Fatal(err)
				}
				if len(s.Body) > segmentBytes && n > 1 {
					t.Fatalf("a segment of %d records has %d bytes", n, len(s.Body))
				}
			}
			for s, records := range want {
				records = slices.DeleteFunc(records, func(r record) bool { return lost[r.key] })
				if !slices.Equal(got[s], records) {
					t.Fatalf("shard %d has %v, want %v", s, got[s], records)
				}
			}
			won, dropped := b.split(stale)
			if len(won)+len(dropped) != len(requests) {
				t.Fatalf("%d won, %d lost of %d", len(won), len(dropped), len(requests))
			}
			for _, r := range dropped {
				if !lost[r.Key] {
					t.Fatalf("%v did not lose", r.Key)
				}
			}
			at := 0
			for _, r := range requests { // winners keep the order of arrival
				if !lost[r.Key] {
					if won[at] != r {
						t.Fatal("winners are out of order")
					}
					at++
				}
			}
			b.forget()
		}
	})
}

func bodiesOf2(t *rapid.T, b *batch) []Segment {
	segments := []Segment{}
	shards := int2s(nil, b.params[9].value())
	seqs := int4s(b.params[10].value())
	v := b.params[11].value()
	at := arrayHeader
	for i := range shards {
		n := int(binary.BigEndian.Uint32(v[at:]))
		segments = append(segments, Segment{Shard: shards[i], Position: Position{Seq: seqs[i]}, Body: v[at+4 : at+4+n]})
		at += 4 + n
	}
	if len(shards) > 0 && at != len(v) {
		t.Fatalf("%d of %d bytes are bodies", at, len(v))
	}
	return segments
}

func TestJudge(t *testing.T) {
	t.Parallel()
	const (
		P = KindPrepare
		U = KindPublish
		C = KindCommit
		A = KindAbort
	)
	row := func(s State, digest uint64) *txRow { return &txRow{state: s, shards: 6, digest: digest} }
	for _, c := range []struct {
		kind Kind
		row  *txRow // nil: there is none
		want verdict
	}{
		{P, nil, verdict{again: true, as: P}},
		{P, row(Prepared, 1), verdict{shards: 6}},
		{P, row(Committed, 1), verdict{shards: 6}},
		{P, row(Aborted, 1), verdict{shards: 6}},
		{P, row(Prepared, 2), verdict{err: ErrReused}},
		{U, nil, verdict{again: true, as: U}},
		{U, row(Prepared, 1), verdict{again: true, as: C, shards: 6}},
		{U, row(Committed, 1), verdict{shards: 6}},
		{U, row(Aborted, 1), verdict{err: &DecidedError{Aborted}}},
		{U, row(Committed, 2), verdict{err: ErrReused}},
		{U, row(Aborted, 2), verdict{err: ErrReused}},
		{C, nil, verdict{err: ErrUnknown}},
		{C, row(Prepared, 9), verdict{again: true, as: C, shards: 6}},
		{C, row(Committed, 9), verdict{shards: 6}},
		{C, row(Aborted, 9), verdict{err: &DecidedError{Aborted}}},
		{A, nil, verdict{err: ErrUnknown}},
		{A, row(Prepared, 9), verdict{again: true, as: A, shards: 6}},
		{A, row(Aborted, 9), verdict{shards: 6}},
		{A, row(Committed, 9), verdict{err: &DecidedError{Committed}}},
	} {
		r := &Request{Kind: c.kind}
		r.enc.digest = 1
		var stored txRow
		if c.row != nil {
			stored = *c.row
		}
		got := judge(r, stored, c.row != nil)
		var decided, wanted *DecidedError
		sameError := errors.Is(got.err, c.want.err)
		if errors.As(c.want.err, &wanted) {
			sameError = errors.As(got.err, &decided) && *decided == *wanted
		}
		if got.again != c.want.again || got.as != c.want.as || got.shards != c.want.shards || !sameError || (got.err == nil) != (c.want.err == nil) {
			t.Errorf("kind %d, row %+v: %+v, want %+v", c.kind, c.row, got, c.want)
		}
	}
}

func TestQueueTakesWhatFits(t *testing.T) {
	t.Parallel()
	var q queue
	q.init(WriterConfig{MaxBatch: 3, MaxBatchBytes: 2*perRequest + 200, SecondWriterAt: 2}.withDefaults())
	for i := range 9 {
		r := encoded(&Request{Kind: KindCommit, Key: key(byte(i)), Shards: 1}, 1)
		if i == 3 {
			r.enc.size = 1 << 20 // alone it may be larger than a batch
		}
		if err := q.submit(r); err != nil {
			t.Fatal(err)
		}
	}
	var sizes []int
	for q.ready.len() > 0 {
		b, from := q.take(nil)
		if from == nothing {
			t.Fatal("drained")
		}
		sizes = append(sizes, len(b))
		if len(sizes) == 1 {
			// One is in flight: the second needs enough that wait, and a third is not allowed.
			if q.mayTake() != fromReady {
				t.Error("no second batch although enough wait")
			}
			q.inFlight++
			if q.mayTake() != nothing {
				t.Error("a third batch")
			}
			q.inFlight--
			q.secondAt = 100
			if q.mayTake() != nothing {
				t.Error("a second batch although few wait")
			}
		}
		q.batchDone(from)
		q.settle(b, nil, false)
	}
	if !slices.Equal(sizes, []int{2, 1, 1, 2, 2, 1}) {
		t.Errorf("batches of %v", sizes)
	}
	q.drain()
	if _, from := q.take(nil); from != nothing {
		t.Error("work after the end")
	}
	if _, more := q.takeWanting(nil); more {
		t.Error("look-ups after the end")
	}
}

// What is of the background goes in batches of its own, one at a time and with rests between them while others use the writer;
// it neither holds the others up nor waits for there to be none.
func TestBackgroundLeavesRoomForOthers(t *testing.T) {
	t.Parallel()
	n := byte(0)
	submit := func(q *queue, background bool, count int) {
		for range count {
			n++
			r := encoded(&Request{Kind: KindCommit, Key: key(n), Shards: 1, Resolution: &Resolution{}, Background: background}, 1)
			r.enc.queued = time.Now()
			if err := q.submit(r); err != nil {
				t.Error(err)
			}
		}
	}
	const most = backgroundBatch
	type taken struct {
		from     choice
		requests []*Request
	}
	take := func(t *testing.T, q *queue, want choice, size int) taken {
		t.Helper()
		if may := q.mayTake(); may != want {
			t.Fatalf("may take %d, want %d", may, want)
		}
		b, from := q.take(nil)
		if from != want || len(b) != size {
			t.Fatalf("a batch of %d from %d, want %d from %d", len(b), from, size, want)
		}
		return taken{from, b}
	}
	end := func(q *queue, b taken) {
		q.settle(b.requests, nil, true)
		q.batchDone(b.from)
	}
	rest := func(d time.Duration) { time.Sleep(d) } //nolint:forbidigo // of the bubble's clock
	t.Run("alone it does not rest", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			var q queue
			q.init(WriterConfig{}.withDefaults())
			submit(&q, true, most+1)
			b := take(t, &q, fromBackground, most)
			if q.mayTake() != nothing {
				t.Error("a second batch of the background")
			}
			rest(time.Millisecond)
			end(&q, b)
			end(&q, take(t, &q, fromBackground, 1))
		})
	})
	t.Run("beside others it rests", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			var q queue
			q.init(WriterConfig{}.withDefaults())
			submit(&q, true, 2*most)
			submit(&q, false, 2)
			first := take(t, &q, fromReady, 2)
			submit(&q, false, q.secondAt) // enough for a second batch: still it is the turn of the background
			b := take(t, &q, fromBackground, most)
			if q.mayTake() != nothing {
				t.Error("a third batch")
			}
			end(&q, first)
			first = take(t, &q, fromReady, q.secondAt)
			rest(5 * time.Millisecond)
			end(&q, b)
			end(&q, first)
			rest(backgroundRest*5*time.Millisecond - 1)
			if q.mayTake() != nothing {
				t.Error("it does not rest")
			}
			submit(&q, false, 1)
			end(&q, take(t, &q, fromReady, 1))
			rest(1)
			synctest.Wait()
			end(&q, take(t, &q, fromBackground, most))
			if q.outstanding.Load() != 0 || q.urgent != 0 {
				t.Errorf("%d outstanding, %d urgent", q.outstanding.Load(), q.urgent)
			}
		})
	})
	t.Run("a batch that took long is followed by a short rest", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			var q queue
			q.init(WriterConfig{}.withDefaults())
			submit(&q, true, most+1)
			b := take(t, &q, fromBackground, most)
			rest(time.Minute) // the store was away
			submit(&q, false, 1)
			end(&q, take(t, &q, fromReady, 1))
			end(&q, b)
			rest(longestRest)
			synctest.Wait()
			end(&q, take(t, &q, fromBackground, 1))
		})
	})
	t.Run("in the end it does not rest", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			var q queue
			q.init(WriterConfig{}.withDefaults())
			submit(&q, true, most+1)
			submit(&q, false, 1)
			end(&q, take(t, &q, fromReady, 1))
			b := take(t, &q, fromBackground, most)
			rest(time.Millisecond)
			end(&q, b)
			q.drain()
			end(&q, take(t, &q, fromBackground, 1))
			if _, from := q.take(nil); from != nothing {
				t.Error("work after the end")
			}
			rest(time.Second) // the timer ends too
		})
	})
	t.Run("what waits too long is given up", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			var q queue
			q.init(WriterConfig{}.withDefaults())
			submit(&q, true, 2)
			if late := q.expired(time.Now().Add(time.Hour)); len(late) != 2 || q.mayTake() != nothing {
				t.Errorf("%d given up", len(late))
			}
		})
	})
}

// Decisions wait for the next prepare while prepares come often, but no longer than they may; and not at all else.
func TestDecisionsRideWithPrepares(t *testing.T) {
	t.Parallel()
	n := byte(0)
	next := func(k Kind) *Request {
		n++
		r := &Request{Kind: k, Key: key(n), Shards: 1}
		if k.stores() {
			r.Events = []Event{smallEvent("1")}
		}
		return encoded(r, 1)
	}
	for _, c := range []struct {
		name     string
		gap      time.Duration // between prepares before
		wait     time.Duration // DecisionWait
		then     *Request      // comes 300 µs after the decision
		resolved bool          // the decision carries evidence: a resolver waits for it
		drain    bool
		after    time.Duration // until the batch is taken
		size     int
	}{
		{"with the next prepare", 200 * time.Microsecond, time.Millisecond, next(KindPrepare), false, false, 300 * time.Microsecond, 2},
		{"with a publish", 200 * time.Microsecond, time.Millisecond, next(KindPublish), false, false, 300 * time.Microsecond, 2},
		{"with another decision at the end of the wait", 200 * time.Microsecond, time.Millisecond, next(KindAbort), false, false, time.Millisecond, 2},
		{"alone at the end of the wait", 200 * time.Microsecond, time.Millisecond, nil, false, false, time.Millisecond, 1},
		{"at once while prepares are rare", 5 * time.Millisecond, time.Millisecond, next(KindPrepare), false, false, 0, 1},
		{"at once when it may not wait", 200 * time.Microsecond, -1, next(KindPrepare), false, false, 0, 1},
		{"at once with evidence", 200 * time.Microsecond, time.Millisecond, next(KindPrepare), true, false, 0, 1},
		{"at once when the writer ends", 200 * time.Microsecond, time.Millisecond, nil, false, true, 0, 1},
	} {
		t.Run(c.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				var q queue
				q.init(WriterConfig{DecisionWait: c.wait}.withDefaults())
				submit := func(r *Request) {
					r.enc.queued = time.Now()
					if err := q.submit(r); err != nil {
						t.Error(err)
					}
				}
				serve := func() int {
					b, from := q.take(nil)
					q.settle(b, nil, true)
					q.batchDone(from)
					return len(b)
				}
				for range 60 {
					submit(next(KindPrepare))
					serve()
					time.Sleep(c.gap) //nolint:forbidigo // of the bubble's clock
				}
				decision := next(KindCommit)
				if c.resolved {
					decision.Resolution = &Resolution{}
				}
				begun := time.Now()
				submit(decision)
				if c.drain {
					q.drain()
				}
				if c.then != nil {
					time.AfterFunc(300*time.Microsecond, func() { submit(c.then) })
				}
				if size, after := serve(), time.Since(begun); size != c.size || after != c.after {
					t.Errorf("a batch of %d after %s, want %d after %s", size, after, c.size, c.after)
				}
				if !c.drain {
					time.Sleep(time.Millisecond) //nolint:forbidigo // of the bubble's clock
					for q.outstanding.Load() > 0 {
						serve()
					}
				}
				if q.urgent != 0 || q.outstanding.Load() != 0 {
					t.Errorf("in the end %d urgent, %d outstanding", q.urgent, q.outstanding.Load())
				}
			})
		})
	}
}

// The ring keeps the order whatever is pushed and popped.
func TestRing(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(t *rapid.T) {
		var q ring
		var want []*Request
		for range rapid.IntRange(0, 300).Draw(t, "steps") {
			if rapid.IntRange(0, 2).Draw(t, "push") > 0 {
				r := new(Request)
				q.push(r)
				want = append(want, r)
			} else if len(want) > 0 {
				if q.first() != want[0] {
					t.Fatal("out of order")
				}
				q.pop()
				want = want[1:]
			}
			if q.len() != len(want) {
				t.Fatalf("length %d, want %d", q.len(), len(want))
			}
		}
	})
}

func TestHorizonBound(t *testing.T) {
	t.Parallel()
	encode := func(xmin, xmax uint64, inProgress ...uint64) []byte {
		b := binary.BigEndian.AppendUint32(nil, uint32(len(inProgress)))
		b = binary.BigEndian.AppendUint64(b, xmin)
		b = binary.BigEndian.AppendUint64(b, xmax)
		for _, x := range inProgress {
			b = binary.BigEndian.AppendUint64(b, x)
		}
		return b
	}
	now := time.Now()
	var h horizon
	h.observe(now, encode(10, 10))
	if h.bound() != 10 || h.suspicious(now.Add(time.Hour)) {
		t.Errorf("nothing in progress: bound %d", h.bound())
	}
	h.observe(now, encode(10, 20, 10, 15))
	if h.bound() != 10 || h.suspicious(now) {
		t.Errorf("bound %d", h.bound())
	}
	h.observe(now.Add(holdPatience), encode(10, 30, 10, 15))
	if !h.suspicious(now.Add(holdPatience)) {
		t.Error("held and not suspicious")
	}
	h.searched = now.Add(holdPatience)
	if h.suspicious(now.Add(holdPatience)) {
		t.Error("searched twice at once")
	}
	h.foreign = map[uint64]bool{10: true}
	if h.bound() != 15 {
		t.Errorf("bound %d beside a foreign transaction", h.bound())
	}
	h.foreign[15] = true
	if h.bound() != 30 {
		t.Errorf("bound %d with foreign ones only", h.bound())
	}
	h.observe(now, encode(15, 30, 15))
	if h.foreign[10] || !h.foreign[15] {
		t.Errorf("foreign %v after 10 ended", h.foreign)
	}
	h.observe(now, []byte{1})
	if h.bound() != 0 {
		t.Errorf("bound %d of garbage", h.bound())
	}
}

func TestArrays(t *testing.T) {
	t.Parallel()
	var a array
	a.reset(oidInt4)
	if !bytes.Equal(a.value(), []byte{0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 23}) {
		t.Errorf("empty: %x", a.value())
	}
	a.int4(-7)
	a.int4(7)
	if got := int4s(a.value()); !slices.Equal(got, []int32{-7, 7}) {
		t.Errorf("int4s %v", got)
	}
	a.reset(oidInt2)
	a.int2(-3)
	if got := int2s(nil, a.value()); !slices.Equal(got, []int16{-3}) {
		t.Errorf("int2s %v", got)
	}
	if int4s(nil) != nil || int2s(nil, []byte{1}) != nil {
		t.Error("NULL has elements")
	}
}

func TestClasses(t *testing.T) {
	t.Parallel()
	for code, want := range map[string]error{
		"40001": ErrContention, "40P01": ErrContention, "55P03": ErrContention, "22P02": ErrInvalid, "23505": ErrInvalid,
		"57014": ErrUnavailable, "57P01": ErrUnavailable, "53100": ErrUnavailable, "08006": ErrUnavailable, "25006": ErrUnavailable,
		"28P01": ErrUnavailable, "58030": ErrUnavailable, "42P01": nil, "XX000": nil, "": nil,
	} {
		if got := classOfState(code); !errors.Is(got, want) || (want == nil) != (got == nil) {
			t.Errorf("%s: %v, want %v", code, got, want)
		}
	}
	if storeError("x", nil) != nil {
		t.Error("no error is an error")
	}
	if err := storeError("reading", errors.New("odd")); err == nil || err.Error() != "reading: odd" {
		t.Errorf("error %v", err)
	}
}

// The timer of riding decisions goes off while a prepare takes them along: nothing is left to be let go.
func TestATimerThatComesTooLateLetsNothingGo(t *testing.T) {
	t.Parallel()
	var q queue
	q.init(WriterConfig{}.withDefaults())
	q.ride.end()
	if q.ride.over || q.ride.armed {
		t.Errorf("%+v", &q.ride)
	}
}

// What one large batch has blown up is not kept.
func TestALargeBatchIsForgotten(t *testing.T) {
	t.Parallel()
	var b batch
	big := smallEvent("1")
	big.Payload = make([]byte, keptBodies)
	for _, e := range []Event{big, smallEvent("1")} {
		r := encoded(&Request{Kind: KindPublish, Key: key(1), Events: []Event{e}}, 1)
		b.build([]*Request{r})
		before := cap(b.params[11].b)
		b.forget()
		if after := cap(b.params[11].b); after > keptBodies || before <= keptBodies && after != before {
			t.Errorf("%d bytes became %d", before, after)
		}
		r.enc.release()
	}
}

// A segment that is cut short anywhere is refused, or shows only records that are there whole.
func TestPrefixesOfASegment(t *testing.T) {
	t.Parallel()
	var b batch
	d := &DatabaseTransaction{Database: "default", XID: 1 << 40, SystemIdentifier: 1 << 62, Timeline: 3, DatabaseOID: 1 << 20, MarkerOID: 1 << 30, Mode: ModeMarker}
	e := smallEvent("1")
	e.ID, e.OccurredAt, e.Headers = [16]byte{1}, 1<<60, []Header{{Name: "n", Value: []byte("v")}}
	requests := []*Request{
		encoded(&Request{Kind: KindPrepare, Key: key(1), Database: d, Events: []Event{e, e}}, 1),
		encoded(&Request{Kind: KindPublish, Key: key(2), Events: []Event{e}}, 1),
		encoded(&Request{Kind: KindCommit, Key: key(3), Shards: 1}, 1),
	}
	b.build(requests)
	whole := bodiesOf(t, &b)[0]
	var records []Record
	if err := whole.Records(func(r *Record) bool { records = append(records, *r); return true }); err != nil || len(records) != 4 {
		t.Fatalf("%d records, %v", len(records), err)
	}
	for n := range len(whole.Body) {
		s := Segment{Body: whole.Body[:n]}
		seen := 0
		err := s.Records(func(r *Record) bool {
			if !reflect.DeepEqual(*r, records[seen]) {
				t.Fatalf("%d bytes: record %d is %+v", n, seen, *r)
			}
			seen++
			return true
		})
		if seen == len(records) || err == nil && seen == 0 && n != 1 { // the format alone is an empty segment
			t.Fatalf("%d bytes: %d records, %v", n, seen, err)
		}
	}
}

func TestUsableServers(t *testing.T) {
	t.Parallel()
	good := server{version: oldestServer, fsync: "on", synchronousCommit: "on"}
	for name, c := range map[string]struct {
		change func(*server)
		unsafe bool
		says   string
	}{
		"good":                     {func(*server) {}, false, ""},
		"too old":                  {func(s *server) { s.version = 130014 }, true, "13.14"},
		"a standby":                {func(s *server) { s.standby = true }, true, "standby"},
		"fsync=off":                {func(s *server) { s.fsync = "off" }, false, "fsync"},
		"synchronous_commit=off":   {func(s *server) { s.synchronousCommit = "off" }, false, "synchronous_commit"},
		"both, and that is wanted": {func(s *server) { s.fsync, s.synchronousCommit = "off", "off" }, true, ""},
	} {
		s := good
		c.change(&s)
		switch err := s.usable(c.unsafe); {
		case c.says == "" && err != nil, c.says != "" && (err == nil || !strings.Contains(err.Error(), c.says)):
			t.Errorf("%s: %v", name, err)
		}
	}
}
