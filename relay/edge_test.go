package relay

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/outbox-platform/outbox/store"
)

// bench is a relay whose accesses take place when the test says so, by the test's clock.
type bench struct {
	*Relay
	t     *testing.T
	clock time.Time
	begun []func() func()
	log   bytes.Buffer
	store *partStore
	sink  *partSink
}

// partStore is a store of which a test has as much as it needs.
type partStore struct {
	Store
	away   bool
	broken int16 // the shard whose rows cannot be read, 0: none
	asked  []int // of how many aggregates at a time rows were loaded
	reads  []store.Segment
	at     store.Horizon
	rows   []store.Parked
	states error
}

var errAway = fmt.Errorf("away: %w", store.ErrUnavailable)

func (p *partStore) OpenReader(context.Context) (Reader, error) {
	if p.away {
		return nil, errAway
	}
	return p, nil
}

func (p *partStore) Read(context.Context, []store.Cursor, int) ([]store.Segment, error) {
	return p.reads, nil
}

func (p *partStore) ReadAt(context.Context, int16, []store.Position) ([]store.Segment, error) {
	return nil, nil
}

func (p *partStore) Horizon() store.Horizon      { return p.at }
func (p *partStore) Close(context.Context) error { return nil }

func (p *partStore) LoadParkedOf(_ context.Context, of []store.ParkedAfter, _ int) ([][]store.Parked, error) {
	p.asked = append(p.asked, len(of))
	if p.away || slices.ContainsFunc(of, func(a store.ParkedAfter) bool { return p.broken != 0 && a.Shard == p.broken }) {
		return nil, errAway
	}
	found := make([][]store.Parked, len(of))
	found[0] = p.rows
	return found, nil
}

func (p *partStore) States(context.Context, []store.Key) (map[store.Key]store.State, error) {
	return nil, p.states
}

// partSink takes everything, and has tails unless they fail.
type partSink struct {
	Sink
	taken  int
	purges int
	tail   error

	asked    map[TopicPartition]time.Time // of OffsetsForTimes
	most     int64
	since    map[TopicPartition]int64 // its answer
	sinceErr error
	from     map[TopicPartition]int64 // of Tail
	records  int                      // that it has
}

func (p *partSink) Deliver(*Delivery) error { p.taken++; return nil }

func (p *partSink) Purge() { p.purges++ }

func (p *partSink) Reports() <-chan *Delivery { return make(chan *Delivery) }

func (p *partSink) Partitions(_ context.Context, topics []string) (map[string]int32, error) {
	return onePartition(topics), nil
}

func onePartition(topics []string) map[string]int32 {
	counts := map[string]int32{}
	for _, topic := range topics {
		counts[topic] = 1
	}
	return counts
}

func (p *partSink) OffsetsForTimes(_ context.Context, at map[TopicPartition]time.Time, most int64) (map[TopicPartition]int64, error) {
	p.asked, p.most = at, most
	if p.sinceErr != nil && asSinkError(p.sinceErr).Class == ClassCluster {
		return nil, p.sinceErr
	}
	return p.since, p.sinceErr
}

func (p *partSink) Tail(_ context.Context, from map[TopicPartition]int64, fn func(TopicPartition, int64, []store.Header)) error {
	p.from = from
	for range p.records {
		fn(TopicPartition{"t", 0}, 0, nil)
	}
	return p.tail
}

func newBench(t *testing.T) *bench {
	t.Helper()
	b := &bench{t: t, clock: time.Unix(1_000_000, 0), store: &partStore{}, sink: &partSink{}}
	m, err := newMetrics(nil)
	if err != nil {
		t.Fatal(err)
	}
	b.Relay = newRelay(Config{Instance: "bench"}.withDefaults(), b.store, b.sink, slog.New(slog.NewTextHandler(&b.log, nil)), m)
	b.now = func() time.Time { return b.clock }
	b.after = func(time.Duration) <-chan time.Time {
		over := make(chan time.Time)
		close(over)
		return over
	}
	b.spawn = func(work func() func()) { b.begun = append(b.begun, work) }
	t.Cleanup(b.begin(t.Context()))
	b.core.sources = map[int32]*store.Source{1: {ID: 1, Name: "shop", RecordProfile: 1}}
	return b
}

// access does what was begun, and tells the relay.
func (b *bench) do() {
	b.t.Helper()
	if len(b.begun) == 0 {
		b.t.Fatal("nothing was begun")
	}
	begun := b.begun
	b.begun = nil
	for _, work := range begun {
		b.inProgress--
		work()()
	}
}

// hold gives the relay a shard in a phase.
func (b *bench) hold(p phase) *shard { return b.holdShard(0, p) }

func (b *bench) holdShard(number int16, p phase) *shard {
	s := b.core.acquire(number, 1, store.Checkpoint{})
	s.phase, s.trustUntil, s.renewAt = p, b.clock.Add(time.Hour), b.clock.Add(time.Hour)
	return s
}

func (b *bench) logged(what string) {
	b.t.Helper()
	if !strings.Contains(b.log.String(), what) {
		b.t.Errorf("the log does not say %q:\n%s", what, &b.log)
	}
}

// What a fence did is of no interest any more once the shard is given up.
func TestAFenceThatComesTooLate(t *testing.T) {
	b := newBench(t)
	s := b.hold(phaseGone)
	s.bar = barFence
	b.fenceTried(t.Context(), s, 0, nil)
	b.fenceTried(t.Context(), s, 0, errAway)
	if s.bar != barFence || len(b.begun) != 0 || b.log.Len() != 0 {
		t.Errorf("bar %v, %d begun: %s", s.bar, len(b.begun), &b.log)
	}
}

// tailing is a shard that looks for what the last holder delivered.
func (b *bench) tailing() *shard {
	b.t.Helper()
	s := b.hold(phaseCatchUp)
	s.epoch = firstEpoch + 1
	s.offsets[TopicPartition{"t", 0}] = 7
	b.publish(s, 1)
	b.startTailRead(s)
	if s.phase != phaseTail {
		b.t.Fatalf("phase %v", s.phase)
	}
	return s
}

// publish feeds a shard events of so many aggregates.
func (b *bench) publish(s *shard, n int) {
	b.t.Helper()
	err := b.core.feed(s, store.Position{XID: 10}, n, func(yield func(*store.Record) bool) error {
		for i := range n {
			r := store.Record{
				Number: int32(i), Key: store.Key{Source: 1, Transaction: store.TransactionID{byte(i), byte(i >> 8)}}, State: store.Committed, PreparedAt: 1,
				Event: store.Event{ID: [16]byte{byte(i), byte(i >> 8)}, Topic: "t", AggregateType: "a", AggregateID: fmt.Sprint(i)},
			}
			yield(&r)
		}
		return nil
	}, b.clock)
	if err != nil {
		b.t.Fatal(err)
	}
}

// Tails that cannot be read keep a shard from starting only as long as the cluster is away: nothing can be delivered then anyway.
func TestTailsThatCannotBeRead(t *testing.T) {
	t.Run("another error", func(t *testing.T) {
		b := newBench(t)
		s := b.tailing()
		b.sink.tail = &SinkError{Class: ClassTopic, Code: "UNKNOWN_TOPIC"}
		b.do()
		b.logged("may be delivered twice")
		if s.phase != phaseActive {
			t.Errorf("phase %v", s.phase)
		}
	})
	t.Run("the cluster comes back", func(t *testing.T) {
		b := newBench(t)
		s := b.tailing()
		b.sink.tail = &SinkError{Class: ClassCluster, Code: "_TRANSPORT"}
		pause := b.after
		b.after = func(d time.Duration) <-chan time.Time {
			b.sink.tail = nil
			return pause(d)
		}
		b.do()
		if s.phase != phaseActive || strings.Contains(b.log.String(), "twice") {
			t.Errorf("phase %v: %s", s.phase, &b.log)
		}
	})
	t.Run("the relay stops", func(t *testing.T) {
		b := newBench(t)
		s := b.tailing()
		b.sink.tail = &SinkError{Class: ClassCluster, Code: "_TRANSPORT"}
		b.after = func(time.Duration) <-chan time.Time { return nil }
		b.endTakes()
		b.do()
		b.logged("context canceled")
		if s.phase != phaseActive {
			t.Errorf("phase %v", s.phase)
		}
	})
	t.Run("the relay stops meanwhile", func(t *testing.T) {
		b := newBench(t)
		s := b.tailing()
		b.sink.tail = &SinkError{Class: ClassCluster, Code: "_TRANSPORT"}
		b.after = func(time.Duration) <-chan time.Time {
			b.endTakes()
			return nil
		}
		b.do()
		b.logged("_TRANSPORT")
		if s.phase != phaseActive {
			t.Errorf("phase %v", s.phase)
		}
	})
	t.Run("too much", func(t *testing.T) {
		b := newBench(t)
		s := b.tailing()
		b.cfg.TakeoverTailLimit, b.sink.records = 2, 3
		b.do()
		b.logged("limit of 2 records is reached")
		if s.phase != phaseActive {
			t.Errorf("phase %v", s.phase)
		}
	})
	t.Run("the shard is lost meanwhile", func(t *testing.T) {
		b := newBench(t)
		s := b.tailing()
		b.core.forget(s, b.clock)
		b.do()
		if s.phase != phaseGone {
			t.Errorf("phase %v", s.phase)
		}
	})
}

// Where nothing is known to be acknowledged, former holders may have delivered all the same: it is looked for since what is
// outstanding was prepared, or happened.
func TestTailsWhereNothingIsAcknowledged(t *testing.T) {
	tail := func(t *testing.T, epoch int64) (*bench, *shard) {
		b := newBench(t)
		s := b.hold(phaseCatchUp)
		s.epoch = epoch
		b.publish(s, 2)
		b.startTailRead(s)
		return b, s
	}
	t.Run("found", func(t *testing.T) {
		b, s := tail(t, 2)
		tp := TopicPartition{"t", 0}
		b.sink.since = map[TopicPartition]int64{tp: 3}
		b.do()
		if want := map[TopicPartition]time.Time{tp: time.Unix(0, 1).Add(-clockSlack)}; !maps.Equal(b.sink.asked, want) {
			t.Errorf("asked since %v, want %v", b.sink.asked, want)
		}
		if !maps.Equal(b.sink.from, b.sink.since) || b.sink.most != int64(b.cfg.TakeoverTailLimit) || s.phase != phaseActive {
			t.Errorf("read from %v, %d at most; phase %v", b.sink.from, b.sink.most, s.phase)
		}
	})
	t.Run("the cluster comes back", func(t *testing.T) {
		b, s := tail(t, 2)
		b.sink.sinceErr = &SinkError{Class: ClassCluster, Code: "_TRANSPORT"}
		b.sink.since = map[TopicPartition]int64{{"t", 0}: 3}
		pause := b.after
		b.after = func(d time.Duration) <-chan time.Time {
			b.sink.sinceErr = nil
			return pause(d)
		}
		b.do()
		if s.phase != phaseActive || b.sink.from == nil || strings.Contains(b.log.String(), "twice") {
			t.Errorf("phase %v, from %v: %s", s.phase, b.sink.from, &b.log)
		}
	})
	t.Run("it is refused", func(t *testing.T) {
		b, s := tail(t, 2)
		b.sink.since = map[TopicPartition]int64{{"t", 0}: 3} // of another, this is all the same
		b.sink.sinceErr = &SinkError{Class: ClassTopic, Code: "_PARTIAL"}
		b.do()
		if !maps.Equal(b.sink.from, b.sink.since) {
			t.Errorf("read from %v", b.sink.from)
		}
		b.logged("may be delivered twice")
		if s.phase != phaseActive {
			t.Errorf("phase %v", s.phase)
		}
	})
	t.Run("nobody was before", func(t *testing.T) {
		b, s := tail(t, firstEpoch)
		if s.phase != phaseActive || len(b.begun) != 0 {
			t.Errorf("phase %v, %d begun", s.phase, len(b.begun))
		}
	})
}

// A checkpoint that cannot be read is an error, whichever part of it.
func TestAnInheritanceThatCannotBeRead(t *testing.T) {
	for _, cp := range []store.Checkpoint{{Pend: []byte{9}}, {Offsets: []byte{9}}} {
		_, err := loadInheritance(t.Context(), nil, nil, store.Lease{Checkpoint: cp})
		if !errors.Is(err, store.ErrInvalid) || !strings.Contains(err.Error(), "checkpoint") {
			t.Errorf("%v", err)
		}
	}
}

// inheritanceStore has what a takeover asks for, but for one thing.
type inheritanceStore struct {
	Store
	lacks string
}

func (s inheritanceStore) lack(what string) error {
	if s.lacks == what {
		return errAway
	}
	return nil
}

func (s inheritanceStore) ReadAt(context.Context, int16, []store.Position) ([]store.Segment, error) {
	return nil, s.lack("read outstanding events")
}

func (s inheritanceStore) LoadParked(context.Context, int16) ([]store.Parked, error) {
	return nil, s.lack("load parked events")
}

func (s inheritanceStore) LoadDeadQueues(context.Context, int16) ([]store.Aggregate, error) {
	return nil, s.lack("load dead queues")
}

func (s inheritanceStore) States(context.Context, []store.Key) (map[store.Key]store.State, error) {
	return nil, s.lack("read states")
}

func (inheritanceStore) Read(context.Context, []store.Cursor, int) ([]store.Segment, error) {
	return nil, nil
}
func (inheritanceStore) Horizon() store.Horizon      { return store.Horizon{} }
func (inheritanceStore) Close(context.Context) error { return nil }

// A takeover needs all that the last holder left: whichever part cannot be read, nothing is begun without it.
func TestATakeoverNeedsAllThatWasLeft(t *testing.T) {
	pend := store.EncodePend([]store.PendEntry{{EventPosition: store.EventPosition{Position: store.Position{XID: 7}}, Key: store.Key{Source: 1, Transaction: store.TransactionID{1}}, State: store.Prepared}})
	lease := store.Lease{Checkpoint: store.Checkpoint{Pend: pend}}
	for _, part := range []string{"read outstanding events", "load parked events", "load dead queues", "read states"} {
		st := inheritanceStore{lacks: part}
		if h, err := loadInheritance(t.Context(), st, st, lease); h != nil || !errors.Is(err, errAway) || !strings.Contains(err.Error(), part) {
			t.Errorf("without %q: %+v, %v", part, h, err)
		}
	}
	if h, err := loadInheritance(t.Context(), inheritanceStore{}, inheritanceStore{}, lease); h == nil || err != nil {
		t.Errorf("with everything: %+v, %v", h, err)
	}
}

// What the last holder may have read is hidden from the next one at first: it waits, but not for ever, and not for ids that a
// crash of the store took back.
func TestATakeoverWaitsForWhatIsHidden(t *testing.T) {
	read := func(b *bench, h store.Horizon) {
		t.Helper()
		b.store.at = h
		b.read.at, b.read.rest = time.Time{}, time.Time{}
		b.startRead(b.clock)
		b.do()
	}
	begin := func(t *testing.T) (*bench, *shard) {
		b := newBench(t)
		b.read.limit = 8
		s := b.hold(phaseCatchUp)
		read(b, store.Horizon{XID: 5, Next: 10})
		if s.phase != phaseCatchUp || !s.behind || b.read.pause != b.cfg.PollMin {
			t.Fatalf("phase %v, behind %v, next read after %s", s.phase, s.behind, b.read.pause)
		}
		read(b, store.Horizon{XID: 9, Next: 20})
		if s.phase != phaseCatchUp {
			t.Fatalf("phase %v with 9 still hidden", s.phase)
		}
		return b, s
	}
	t.Run("until it is shown", func(t *testing.T) {
		b, s := begin(t)
		read(b, store.Horizon{XID: 10, Next: 20})
		if s.phase != phaseActive || s.behind || b.log.Len() != 0 {
			t.Errorf("phase %v, behind %v: %s", s.phase, s.behind, &b.log)
		}
	})
	t.Run("until nothing is hidden", func(t *testing.T) {
		b, s := begin(t)
		read(b, store.Horizon{XID: 7, Next: 7})
		if s.phase != phaseActive || s.behind {
			t.Errorf("phase %v, behind %v", s.phase, s.behind)
		}
	})
	t.Run("no longer than for tails", func(t *testing.T) {
		b, s := begin(t)
		b.clock = b.clock.Add(b.cfg.TakeoverTailTimeout + 1)
		read(b, store.Horizon{XID: 9, Next: 30})
		b.logged("may be delivered twice")
		if s.phase != phaseActive || !s.behind { // decisions for rows may still come
			t.Errorf("phase %v, behind %v", s.phase, s.behind)
		}
		read(b, store.Horizon{XID: 30, Next: 30})
		if s.behind {
			t.Error("it is behind for ever")
		}
	})
}

// A purge takes the records of all shards. Those of a shard whose lease is trusted a little longer may be written: it does not
// deliver them again before its lease is renewed.
func TestAPurgeForOneLeaseHoldsBackOthers(t *testing.T) {
	b := newBench(t)
	var shards [2]*shard
	var events [2]*event
	for i := range shards {
		s := b.hold(phaseActive)
		s.number = int16(i)
		shards[i] = s
		b.publish(s, 1)
		events[i] = b.core.next(b.clock)
		if events[i] == nil || events[i].shard != s {
			t.Fatalf("event %d: %+v", i, events[i])
		}
	}
	idle := b.hold(phaseActive)
	shards[0].trustUntil, shards[1].trustUntil, idle.trustUntil = b.clock, b.clock.Add(time.Millisecond), b.clock.Add(time.Millisecond)
	for range 2 { // once is enough
		b.distrust(b.clock)
	}
	if b.sink.purges != 1 {
		t.Errorf("%d purges", b.sink.purges)
	}
	for _, e := range events {
		b.core.report(e, 0, 0, &SinkError{Class: ClassPurged}, b.clock)
	}
	if e := b.core.next(b.clock); e != nil {
		t.Errorf("shard %d delivers again what may be written", e.shard.number)
	}
	b.publish(idle, 1)
	if e := b.core.next(b.clock); e == nil || e.shard != idle {
		t.Errorf("a shard of which nothing was purged does not deliver: %+v", e)
	}
	if shards[1].renewAt != b.clock {
		t.Error("it does not ask for its renewal at once")
	}
	b.renewed(shards[1], b.clock)
	if e := b.core.next(b.clock); e == nil || e.shard != shards[1] {
		t.Errorf("after its renewal the shard delivers %+v", e)
	}
}

// Where to look in Kafka: from what was acknowledged, or since what is outstanding was prepared, in topics that are there.
func TestWhereToLook(t *testing.T) {
	offsets := map[TopicPartition]int64{{"a", 0}: 5, {"a", 1}: 6, {"gone", 0}: 7, {"any", 0}: 8, {"any", 1}: 9, {"any", 2}: 10}
	sh := &shard{offsets: offsets}
	if got := lookOf(sh); got.anywhere || len(got.keys) != 0 {
		t.Errorf("nothing is outstanding, and it looks in %v", got)
	}
	sh.thaw.push(&aggregate{})
	if got := lookOf(sh); !got.anywhere || len(got.keys) != 0 {
		t.Errorf("rows may go anywhere, and it looks in %v", got)
	}
	b := newBench(t)
	hot := b.hold(phaseCatchUp)
	if err := b.core.feed(hot, store.Position{XID: 1}, 1, func(yield func(*store.Record) bool) error {
		for i, state := range []store.State{store.Committed, store.Committed, store.Prepared} {
			yield(&store.Record{
				Number: int32(i), Key: store.Key{Source: 1, Transaction: store.TransactionID{byte(i)}}, State: state,
				PreparedAt: 10 * int64(time.Second),
				Event: store.Event{
					Topic: "t", AggregateType: "a", AggregateID: fmt.Sprint(i), HasKey: i == 1, Key: []byte("own"),
					OccurredAt: int64(i) * int64(time.Second),
				},
			})
		}
		return nil
	}, b.clock); err != nil {
		t.Fatal(err)
	}
	wantKeys := map[string][]lookFor{"t": {{[]byte("0"), time.Unix(5, 0)}, {[]byte("own"), time.Unix(1, 0)}}}
	if got := lookOf(hot); got.anywhere || !reflect.DeepEqual(got.keys, wantKeys) {
		t.Errorf("it looks in %v, want %v", got.keys, wantKeys)
	}
	early, late := time.Unix(1, 0), time.Unix(2, 0)
	look := lookIn{keys: map[string][]lookFor{
		"a": {{[]byte("foobar"), late}, {[]byte("foobar"), early}}, "gone": {{[]byte("k"), early}},
		"never": {{[]byte("k"), late}, {[]byte("l"), early}, {[]byte("m"), late}},
	}}
	if got := look.topics(offsets); !slices.Equal(got, []string{"a", "gone", "never"}) {
		t.Errorf("topics %v", got)
	}
	counts := map[string]int32{"a": 2, "any": 2, "never": 1}
	got, since := look.from(offsets, counts)
	p := Partition([]byte("foobar"), 2)
	wantFrom := map[TopicPartition]int64{{"a", p}: offsets[TopicPartition{"a", p}]}
	wantSince := map[TopicPartition]time.Time{{"never", 0}: early}
	if !maps.Equal(got, wantFrom) || !maps.Equal(since, wantSince) {
		t.Errorf("from %v, since %v; want %v, %v", got, since, wantFrom, wantSince)
	}
	look.anywhere = true
	if got := look.topics(offsets); !slices.Equal(got, []string{"a", "any", "gone", "never"}) {
		t.Errorf("topics %v", got)
	}
	got, since = look.from(offsets, counts)
	wantFrom = map[TopicPartition]int64{{"a", 0}: 5, {"a", 1}: 6, {"any", 0}: 8, {"any", 1}: 9}
	if !maps.Equal(got, wantFrom) || !maps.Equal(since, wantSince) {
		t.Errorf("from %v, since %v; want %v, %v", got, since, wantFrom, wantSince)
	}
}

func TestPlacesForTheLog(t *testing.T) {
	from := map[TopicPartition]int64{}
	for i := range int32(12) {
		from[TopicPartition{"t", 10 + i}] = int64(i)
	}
	if got, want := places(from), "t/10@0 t/11@1 t/12@2 t/13@3 t/14@4 t/15@5 t/16@6 t/17@7 t/18@8 t/19@9 and 2 more"; got != want {
		t.Errorf("%q, want %q", got, want)
	}
}

// Rows of parked that may go on tell where they go, too: former holders may have delivered them.
func TestWhereRowsGo(t *testing.T) {
	rec := store.Record{PreparedAt: 10 * int64(time.Second), Event: store.Event{Topic: "t", AggregateType: "a", AggregateID: "x"}}
	body := store.EncodeEvent(nil, &rec)
	look := func(t *testing.T, rows ...store.Parked) *bench {
		b := newBench(t)
		s := b.hold(phaseCatchUp)
		s.epoch = firstEpoch + 1
		for range maxThawing + 1 {
			s.thaw.push(&aggregate{id: store.Aggregate{Source: 1, Type: "a", ID: "x"}})
		}
		b.store.rows = rows
		b.startTailRead(s)
		b.do()
		if s.phase != phaseActive {
			t.Errorf("phase %v", s.phase)
		}
		return b
	}
	want := map[TopicPartition]time.Time{{"t", 0}: time.Unix(5, 0)}
	t.Run("committed", func(t *testing.T) {
		b := look(t, store.Parked{State: store.Committed, Body: body}, store.Parked{State: store.Prepared, Body: []byte{9}})
		if !maps.Equal(b.sink.asked, want) {
			t.Errorf("asked %v, want %v", b.sink.asked, want)
		}
		asked := 0
		for _, n := range b.store.asked {
			asked += n
		}
		if asked != maxThawing {
			t.Errorf("asked for the rows of %d aggregates, want %d", asked, maxThawing)
		}
	})
	t.Run("not readable", func(t *testing.T) {
		look(t, store.Parked{State: store.Committed, Body: []byte{9}}).logged("decode parked event")
	})
	t.Run("the store is away", func(t *testing.T) {
		b := newBench(t)
		s := b.hold(phaseCatchUp)
		s.epoch = firstEpoch + 1
		s.offsets[TopicPartition{"t", 0}] = 7
		s.thaw.push(&aggregate{})
		b.store.away = true
		b.startTailRead(s)
		b.do()
		b.logged("load parked events")
		if want := map[TopicPartition]int64{{"t", 0}: 7}; !maps.Equal(b.sink.from, want) {
			t.Errorf("read from %v, want %v", b.sink.from, want)
		}
	})
}

// The store is away when a relay begins to read, and comes back.
func TestReadingBeginsWhenTheStoreIsBack(t *testing.T) {
	b := newBench(t)
	s := b.hold(phaseActive)
	b.read.limit = 8
	b.takeHints() // a signal whose hint was taken before
	b.store.away = true
	b.startRead(b.clock)
	b.do()
	b.logged("reading the log")
	if b.read.reader != nil || !b.read.failing {
		t.Fatal("it reads")
	}
	b.startRead(b.clock)
	if len(b.begun) != 0 {
		t.Error("it does not wait before it tries again")
	}
	b.store.away = false
	b.store.reads = []store.Segment{{Position: store.Position{XID: 3}, Body: []byte{1}}} // without a record
	b.clock = b.clock.Add(readRetry)
	b.Hint(store.ShardSet(0).Add(0))
	b.takeHints()
	b.startRead(b.clock)
	b.do()
	b.logged("reading the log again")
	if want := min(hintedPause*b.cfg.PollMin, b.cfg.PollMax); b.read.pause != want || s.cursor.XID != 3 {
		t.Errorf("pause %s after a hint, want %s; read to %s", b.read.pause, want, s.cursor)
	}
	// A shard whose hint came too early is looked at again, before all are.
	b.store.reads = nil
	b.Hint(store.ShardSet(0).Add(0))
	b.takeHints()
	b.read.at = b.clock.Add(time.Hour)
	b.startRead(b.clock)
	b.do()
	if !b.read.late.Has(0) {
		t.Fatalf("late %v", b.read.late)
	}
	next := b.clock.Add(time.Hour)
	b.read.wake(b.Relay, &next)
	if !next.Equal(later(b.read.lateAt, b.read.rest)) {
		t.Errorf("next read at %s, late at %s", next, b.read.lateAt)
	}
}

// Rows that cannot be loaded are loaded later.
func TestRowsThatCannotBeLoaded(t *testing.T) {
	a := store.Aggregate{Source: 1, Type: "a", ID: "0"}
	for name, change := range map[string]func(*partStore){
		"rows": func(p *partStore) { p.away = true },
		"states": func(p *partStore) {
			p.states = errAway
			p.rows = []store.Parked{{Key: store.Key{Source: 1}, Aggregate: a, State: store.Prepared}}
		},
	} {
		t.Run(name, func(t *testing.T) {
			b := newBench(t)
			s := b.hold(phaseActive)
			agg := b.core.aggregate(s, a)
			agg.unloaded = 1
			b.core.advance(agg)
			change(b.store)
			b.startLoads(b.clock)
			b.do()
			b.logged("loading parked events")
			if s.busy != idle || !s.loadAt.After(b.clock) {
				t.Errorf("busy %v, next load at %s", s.busy, s.loadAt)
			}
		})
	}
}

// wantRows lets so many aggregates of a shard go on whose rows are not in memory.
func (b *bench) wantRows(s *shard, aggregates int) {
	for i := range aggregates {
		a := b.core.aggregate(s, store.Aggregate{Source: 1, Type: "a", ID: fmt.Sprint(s.number, "/", i)})
		a.unloaded = 1
		b.core.advance(a)
	}
}

// Rows of several shards are loaded together, but those that cannot be loaded hold up their own shard only.
func TestRowsOfSeveralShards(t *testing.T) {
	b := newBench(t)
	shards := []*shard{b.holdShard(1, phaseActive), b.holdShard(2, phaseActive), b.holdShard(3, phaseActive)}
	for _, s := range shards {
		b.wantRows(s, 2)
	}
	load := func(wantAsked ...int) {
		t.Helper()
		b.store.asked = nil
		b.clock = b.clock.Add(b.cfg.RetryMin)
		b.startLoads(b.clock)
		b.do()
		if !slices.Equal(b.store.asked, wantAsked) {
			t.Errorf("asked for the rows of %d aggregates, want %d", b.store.asked, wantAsked)
		}
	}
	left := func(want ...int) {
		t.Helper()
		for i, s := range shards {
			if s.busy != idle || s.thaw.n != want[i] {
				t.Errorf("shard %d: busy %v, %d aggregates left, want %d", s.number, s.busy, s.thaw.n, want[i])
			}
		}
	}
	b.store.broken = 2
	load(6)
	left(2, 2, 2)
	load(2, 2, 2) // nobody knows whose rows they were
	left(0, 2, 0)
	b.wantRows(shards[0], 1)
	b.wantRows(shards[2], 1)
	load(2, 2) // the broken shard's are asked for before the others' together
	left(0, 2, 0)
	b.store.broken = 0
	load(2)
	left(0, 0, 0)
	for _, s := range shards {
		b.wantRows(s, 1)
	}
	load(3)
	left(0, 0, 0)
}

// A query reads the rows of so many aggregates and not more. A shard that is lost meanwhile gets none; the others do.
func TestRowsOfManyAggregates(t *testing.T) {
	b := newBench(t)
	b.core.loadAggregates = 4
	lost, kept := b.holdShard(1, phaseActive), b.holdShard(2, phaseActive)
	b.wantRows(lost, 3)
	b.wantRows(kept, 2)
	b.startLoads(b.clock)
	lost.phase = phaseGone
	b.do()
	if !slices.Equal(b.store.asked, []int{3, 2}) {
		t.Errorf("asked for the rows of %d aggregates", b.store.asked)
	}
	b = newBench(t)
	lost, kept = b.holdShard(1, phaseActive), b.holdShard(2, phaseActive)
	b.wantRows(lost, 2)
	b.wantRows(kept, 2)
	b.startLoads(b.clock)
	lost.phase = phaseGone
	b.do()
	if !slices.Equal(b.store.asked, []int{4}) || kept.thaw.n != 0 || kept.busy != idle || len(kept.aggregates) != 0 || len(lost.aggregates) != 2 {
		t.Errorf("asked for the rows of %d aggregates; %d left, %d of the lost shard's", b.store.asked, len(kept.aggregates), len(lost.aggregates))
	}
}

func (p *partStore) LoadDeadLettersOf(context.Context, int16, store.Aggregate, store.EventPosition, int) ([]store.DeadLetter, error) {
	return nil, errAway
}

// Dead letters that cannot be loaded are loaded later.
func TestLettersThatCannotBeLoaded(t *testing.T) {
	b := newBench(t)
	s := b.hold(phaseActive)
	b.core.operate(s, store.Operation{ID: 1, Aggregate: store.Aggregate{Source: 1, Type: "a", ID: "0"}, Action: store.ActionRedrive})
	b.core.tick(b.clock)
	b.startLoads(b.clock)
	b.do()
	b.logged("loading dead letters")
	if o := s.operations[0]; o.loading || s.busy != idle || !s.loadAt.After(b.clock) {
		t.Errorf("loading %v, busy %v, next load at %s", o.loading, s.busy, s.loadAt)
	}
}

// What cannot be decoded is not passed over: nothing more is read of the shard, and the row's aggregate is blocked.
func TestWhatCannotBeDecoded(t *testing.T) {
	b := newBench(t)
	s := b.hold(phaseActive)
	b.store.reads = []store.Segment{{Position: store.Position{XID: 3}, Body: []byte{99}}}
	b.startRead(b.clock)
	b.do()
	b.logged("segment cannot be decoded")
	if s.reading() || s.cursor.XID != 0 {
		t.Errorf("reading %v, read to %s", s.reading(), s.cursor)
	}
	id := store.Aggregate{Source: 1, Type: "a", ID: "0"}
	a := b.core.aggregate(s, id)
	a.unloaded = 1
	b.core.advance(a)
	b.store.rows = []store.Parked{{Key: store.Key{Source: 1}, Aggregate: id, State: store.Committed, Body: []byte{99}}}
	b.startLoads(b.clock)
	b.do()
	b.logged("parked event cannot be decoded")
	if a.status != statusRecord {
		t.Errorf("status %v", a.status)
	}
}

// Reports are looked at between many deliveries.
func TestDeliveriesAreBounded(t *testing.T) {
	b := newBench(t)
	s := b.hold(phaseCatchUp)
	b.publish(s, deliverAtOnce+1)
	b.core.start(s, nil, b.clock)
	b.core.maxUnacked = deliverAtOnce + 1
	b.deliver(b.clock)
	if b.sink.taken != deliverAtOnce || !b.more {
		t.Errorf("%d delivered, more: %v", b.sink.taken, b.more)
	}
	b.deliver(b.clock)
	if b.sink.taken != deliverAtOnce+1 || b.more {
		t.Errorf("%d delivered, more: %v", b.sink.taken, b.more)
	}
}

// A shard is lost while a step is on its way that sets a head aside: nothing of it is left.
func TestAHeadSetAsideInAForgottenShard(t *testing.T) {
	w := newWorld(t)
	e := w.add(modelAggregates[0], true)
	e.poison = true
	w.run() // refused, and parked
	w.operate(e.agg, store.ActionSkip)
	w.pass(time.Millisecond)
	for range 4 {
		w.load(false)
		w.pass(time.Millisecond)
	}
	w.step(1)
	if m := w.sh.stepping.moves; len(m) != 1 || m[0].head == nil {
		t.Fatalf("moves %+v", m)
	}
	w.core.forget(w.sh, w.now)
	if w.core.bytes != 0 || w.core.unacked != 0 || w.core.tally.byStatus != [statusCount]int64{} {
		t.Errorf("left: %d bytes, %d unacked, %v", w.core.bytes, w.core.unacked, w.core.tally.byStatus)
	}
}
