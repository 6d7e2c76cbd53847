package relay

import (
	"errors"
	"fmt"
	"testing"
	"time"

	"github.com/outbox-platform/outbox/store"
)

func (w *world) pass(d time.Duration) {
	w.now = w.now.Add(d)
	w.core.tick(w.now)
}

// run delivers, reports and writes until nothing moves, but lets no time pass.
func (w *world) run() {
	for moved := true; moved; {
		moved = false
		for w.read() {
			moved = true
		}
		for w.deliver() {
			w.report(0, 0)
			moved = true
		}
		for w.step(0) || w.load(false) {
			moved = true
		}
	}
}

func (w *world) wantPublished(a store.Aggregate, want ...*modelEvent) {
	if got := fmt.Sprint(w.published[a]); got != fmt.Sprint(want) {
		w.fail(a, "published %s, want %s", got, fmt.Sprint(want))
	}
}

func TestUndecidedRowBecomesTheHead(t *testing.T) {
	w := newWorld(t)
	a := modelAggregates[0]
	e1, e2 := w.add(a, false), w.add(a, false)
	w.pass(time.Second)
	w.run()
	if len(w.parked) != 2 {
		t.Fatalf("%d parked", len(w.parked))
	}
	w.decide(e1.txn, store.Committed)
	w.run() // e2 is loaded with it, and is the head now
	w.wantPublished(a, e1)
	if w.core.tally.byStatus[statusInDoubt] != 1 {
		t.Fatalf("statuses %v", w.core.tally.byStatus)
	}
	e3 := w.add(a, true)
	w.run() // at once: its head is in doubt already
	if len(w.parked) != 2 {
		t.Fatalf("%d parked", len(w.parked))
	}
	w.decide(e2.txn, store.Aborted)
	w.run()
	w.wantPublished(a, e1, e3)
	w.checkAllOut()
}

func TestDecisionWhileItsRowIsBeingWritten(t *testing.T) {
	for outcome := range 3 {
		w := newWorld(t)
		a := modelAggregates[0]
		e1, e2 := w.add(a, false), w.add(a, true)
		w.pass(time.Second)
		w.step(1) // built, not written
		w.decide(e1.txn, store.Committed)
		w.read()
		w.deliver() // from memory, before its row is written
		w.step(outcome)
		w.report(0, 0)
		w.run()
		w.wantPublished(a, e1, e2)
		w.checkAllOut()
	}
}

func TestOldDecisionIsNotTakenFromALoad(t *testing.T) {
	w := newWorld(t)
	a := modelAggregates[0]
	e1 := w.add(a, false)
	w.pass(time.Second)
	w.run()
	w.decide(e1.txn, store.Committed)
	w.read()
	w.load(false) // on its way: it saw the row undecided
	if w.rows[0][0].State != store.Prepared {
		t.Fatal("the row is decided already")
	}
	w.txnOf(e1.txn.key).state = store.Prepared // what tx said when the load began
	w.load(false)
	e1.txn.state = store.Committed
	w.run()
	w.wantPublished(a, e1)
	w.checkAllOut()
}

func TestRedriveGoesAheadOfAnInDoubtHead(t *testing.T) {
	w := newWorld(t)
	a := modelAggregates[3] // skip policy
	e1 := w.add(a, true)
	e1.poison = true
	w.run()
	e2 := w.add(a, false)
	w.pass(time.Second)
	w.run() // a dead letter, and an in-doubt row that is not in memory
	e1.poison = false
	w.operate(a, store.ActionRedrive)
	w.pass(time.Millisecond)
	w.run()
	w.wantPublished(a, e1)
	w.decide(e2.txn, store.Committed)
	w.run()
	w.wantPublished(a, e1, e2)
	w.checkAllOut()
}

func TestUntrustedShardDeliversNothing(t *testing.T) {
	w := newWorld(t)
	w.add(modelAggregates[0], true)
	w.sh.trustUntil = w.now
	if w.core.next(w.now) != nil {
		t.Fatal("delivered without trust")
	}
	w.sh.trustUntil = w.now.Add(time.Second)
	if e := w.core.next(w.now); e == nil {
		t.Fatal("not delivered with trust")
	}
}

func TestProbeMovesToAnotherShard(t *testing.T) {
	w := newWorld(t)
	w.down["x"] = true
	a, b := w.add(modelAggregates[0], true), w.add(modelAggregates[1], true)
	w.run()
	p := w.core.pauses[0]
	if len(w.core.pauses) != 1 || len(p.waiting) != 2 {
		t.Fatalf("%d pauses, %d wait", len(w.core.pauses), len(p.waiting))
	}
	w.pass(w.core.retryMin)
	if p.probe == nil {
		t.Fatal("nothing tries")
	}
	w.sh.trustUntil = w.now // it cannot try any more
	w.pass(time.Millisecond)
	if p.probe != nil {
		t.Fatal("it still tries")
	}
	w.sh.trustUntil = w.now.Add(time.Hour)
	w.pass(time.Millisecond)
	if p.probe == nil {
		t.Fatal("nothing tries")
	}
	p.dropShard(w.sh, w.now)
	if p.probe != nil || len(p.waiting) != 0 {
		t.Fatal("aggregates of a lost shard still wait")
	}
	w.crash(false, false)
	w.down["x"] = false
	w.run()
	w.wantPublished(modelAggregates[0], a)
	w.wantPublished(modelAggregates[1], b)
}

func TestProbeWithAnotherHeadGivesUp(t *testing.T) {
	w := newWorld(t)
	c, s := w.core, w.sh
	a := c.aggregate(s, modelAggregates[0])
	p := &pause{topic: "y", probe: a}
	a.probing = p
	c.pauses = append(c.pauses, p)
	e := w.add(modelAggregates[0], true) // goes to topic x
	if p.probe != nil {
		t.Fatal("it tries for a topic it does not go to")
	}
	w.run()
	w.wantPublished(e.agg, e)
	b := c.aggregate(s, modelAggregates[1])
	p.probe, b.probing = b, p
	c.removeIfIdle(b)
	if p.probe != nil {
		t.Fatal("a forgotten aggregate still tries")
	}
}

func TestUnknownSourceIsAskedForLessAndLess(t *testing.T) {
	w := newWorld(t)
	e := w.add(modelAggregates[4], true)
	w.run()
	p := w.core.pauses[0]
	for range 10 {
		w.core.wantSources = false
		w.now = p.next
		w.pass(0)
		if !w.core.wantSources {
			t.Fatal("nobody asks for the source")
		}
	}
	if p.backoff != w.core.retryMax {
		t.Errorf("backoff %s", p.backoff)
	}
	if p.concerns(&event{rec: store.Record{Key: store.Key{Source: 9}}}) || !p.concerns(&event{rec: store.Record{Key: store.Key{Source: sourceLate}}}) {
		t.Error("it concerns another source")
	}
	w.registered[sourceLate] = &store.Source{ID: sourceLate, RecordProfile: 4}
	w.sources()
	w.now = p.next
	w.pass(0)
	w.run()
	w.wantPublished(e.agg, e)
	w.checkAllOut()
}

func TestAggregatesWithOneHash(t *testing.T) {
	for _, order := range [][]int{{0, 1, 2}, {2, 1, 0}, {1, 0, 2}, {1, 2, 0}} {
		c := newCore(modelLimits())
		s := c.acquire(0, 1, store.Checkpoint{})
		var all []*aggregate
		for _, id := range []string{"a", "b", "c"} {
			all = append(all, c.aggregateAt(s, store.Aggregate{ID: id}, 7))
		}
		for i, a := range all {
			if got := c.aggregateAt(s, store.Aggregate{ID: string(rune('a' + i))}, 7); got != a {
				t.Fatal("another aggregate was found")
			}
		}
		for _, i := range order {
			c.removeIfIdle(all[i])
		}
		if len(s.aggregates) != 0 {
			t.Fatalf("%d are left", len(s.aggregates))
		}
	}
}

func TestCorruptSegmentStopsReadingOnly(t *testing.T) {
	w := newWorld(t)
	e := w.add(modelAggregates[0], true)
	cursor := w.sh.cursor
	seg := store.Segment{Position: store.Position{XID: 99}, Body: []byte{77}}
	if err := w.core.feed(w.sh, seg.Position, 1, seg.Records, w.now); err == nil {
		t.Fatal("garbage was accepted")
	}
	if w.sh.reading() || w.sh.cursor != cursor {
		t.Error("it reads on")
	}
	w.run()
	w.wantPublished(e.agg, e)
}

func TestCorruptRowBlocksItsAggregate(t *testing.T) {
	w := newWorld(t)
	a := modelAggregates[0]
	e1 := w.add(a, false)
	w.add(a, true)
	w.pass(time.Second)
	w.run()
	w.decide(e1.txn, store.Committed)
	w.read()
	loads := w.core.load(w.sh, w.now)
	rows := w.rowsOf(loads[0].id, loads[0].after, loads[0].limit)
	good := rows[1].Body
	rows[1].Body = []byte{0}
	if err := w.core.loaded(loads[0], rows, w.now); err == nil {
		t.Fatal("garbage was accepted")
	}
	w.core.loadsDone(w.sh)
	w.deliver() // the one before it
	w.report(0, 0)
	w.step(0)
	loads = w.core.load(w.sh, w.now)
	if err := w.core.loaded(loads[0], rows[1:], w.now); err == nil {
		t.Fatal("garbage was accepted")
	}
	w.core.loadsDone(w.sh)
	if w.core.tally.byStatus[statusRecord] != 1 {
		t.Fatal("its aggregate is not blocked")
	}
	rows[1].Body = good
	w.operate(a, store.ActionRedrive)
	w.pass(time.Millisecond)
	w.run()
	if len(w.published[a]) != 2 {
		t.Fatalf("published %v", w.published[a])
	}
	w.checkAllOut()
}

func TestRowsThatAreGoneAreNotWaitedFor(t *testing.T) {
	w := newWorld(t)
	a := modelAggregates[0]
	e1 := w.add(a, false)
	w.pass(time.Second)
	w.run()
	clear(w.parked) // by hand
	w.decide(e1.txn, store.Committed)
	w.run()
	e2 := w.add(a, true)
	w.run()
	w.wantPublished(a, e2)
}

func TestFullMemoryLoadsOnlyWhatMustMove(t *testing.T) {
	w := newWorld(t)
	a, b := modelAggregates[0], modelAggregates[1]
	e1, e2 := w.add(a, false), w.add(b, false)
	w.pass(time.Second)
	w.run()
	w.decide(e1.txn, store.Committed)
	w.decide(e2.txn, store.Committed)
	w.read()
	w.read()
	w.core.bytes += w.core.memoryBytes
	w.core.cluster.failed(w.now, time.Second, time.Second)
	if w.core.load(w.sh, w.now) != nil {
		t.Fatal("loaded although nothing can be delivered")
	}
	w.core.cluster.succeeded()
	w.core.unacked++
	if w.core.load(w.sh, w.now) != nil {
		t.Fatal("loaded although what is in flight will make room")
	}
	w.core.unacked--
	loads := w.core.load(w.sh, w.now)
	if len(loads) != 1 || loads[0].limit != 1 {
		t.Fatalf("loads %+v", loads)
	}
	w.core.notLoaded(loads[0])
	w.core.loadsDone(w.sh)
	w.core.bytes -= w.core.memoryBytes
	w.run()
	w.wantPublished(a, e1)
	w.wantPublished(b, e2)
	w.checkAllOut()
}

func TestBoundOfUnacknowledgedRecords(t *testing.T) {
	w := newWorld(t)
	w.core.maxUnacked = 1
	w.add(modelAggregates[0], true)
	w.add(modelAggregates[1], true)
	if !w.deliver() || w.deliver() {
		t.Fatal("not exactly one was delivered")
	}
	w.report(0, 0)
	if !w.deliver() {
		t.Fatal("the other was not delivered")
	}
}

func TestClusterPauseProbesWithOne(t *testing.T) {
	w := newWorld(t)
	for _, a := range modelAggregates[:4] {
		w.add(a, true)
	}
	for w.deliver() {
	}
	if len(w.inflight) != 4 {
		t.Fatalf("%d in flight", len(w.inflight))
	}
	for range 4 {
		w.report(0, ClassCluster)
	}
	if w.core.cluster.backoff != w.core.retryMin {
		t.Errorf("those in flight counted as tries: backoff %s", w.core.cluster.backoff)
	}
	if w.deliver() {
		t.Fatal("delivered during the pause")
	}
	w.pass(w.core.retryMin)
	if !w.deliver() || w.deliver() {
		t.Fatal("not exactly one tries")
	}
	w.report(0, ClassCluster)
	if w.core.cluster.backoff != 2*w.core.retryMin {
		t.Errorf("backoff %s", w.core.cluster.backoff)
	}
	w.pass(2 * w.core.retryMin)
	w.deliver()
	w.report(0, 0)
	for w.deliver() {
	}
	if len(w.inflight) != 3 {
		t.Fatalf("%d in flight after the pause", len(w.inflight))
	}
}

func TestErrorsOfNoClassAreTheClusters(t *testing.T) {
	if e := asSinkError(errors.New("odd")); e.Class != ClassCluster {
		t.Errorf("class %s", e.Class)
	}
	if e := asSinkError(&SinkError{Class: 99}); e.Class != ClassCluster {
		t.Errorf("class %s", e.Class)
	}
	if e := asSinkError(fmt.Errorf("wrapped: %w", &SinkError{Class: ClassTopic})); e.Class != ClassTopic {
		t.Errorf("class %s", e.Class)
	}
	for class, name := range map[Class]string{0: "none", ClassRecord: "record", ClassTopic: "topic", ClassCluster: "cluster", ClassFatal: "fatal", ClassPurged: "purged"} {
		if class.String() != name {
			t.Errorf("%d is %s", class, class)
		}
	}
}

func TestOperationIsDoneOnce(t *testing.T) {
	w := newWorld(t)
	o := store.Operation{ID: 1, Aggregate: modelAggregates[0], Action: store.ActionSkip}
	w.operations = append(w.operations, o)
	if !w.core.operate(w.sh, o) {
		t.Fatal("refused")
	}
	w.pass(time.Millisecond)
	w.run()
	if w.outcomes[1] == "" {
		t.Fatal("not done")
	}
	if w.core.operate(w.sh, o) { // read before it was done, told after
		t.Fatal("done twice")
	}
}

func TestOffsetsOnlyGrowAndAreBounded(t *testing.T) {
	w := newWorld(t)
	tp := TopicPartition{"x", 0}
	w.sh.acknowledged(tp, 7)
	w.sh.acknowledged(tp, 3)
	if w.sh.offsets[tp] != 8 {
		t.Errorf("offset %d", w.sh.offsets[tp])
	}
	for i := range int32(maxOffsets + 10) {
		w.sh.acknowledged(TopicPartition{"y", i}, 1)
	}
	all, err := store.DecodeOffsets(w.sh.encodeOffsets())
	if err != nil || len(all) != maxOffsets {
		t.Errorf("%d offsets, %v", len(all), err)
	}
}

func TestTakeoverNeedsTheWholePend(t *testing.T) {
	c := newCore(modelLimits())
	lease := store.Lease{Shard: 1, Epoch: 2, Checkpoint: store.Checkpoint{Position: store.Position{XID: 9}}}
	s := c.acquire(1, 2, lease.Checkpoint)
	at := store.EventPosition{Position: store.Position{XID: 5}}
	pend := []store.PendEntry{{EventPosition: at}}
	if err := c.restore(s, &inheritance{pend: pend}, time.Now()); err == nil {
		t.Error("an event that the log does not have was not missed")
	}
	s = c.reacquire(s, lease, time.Now())
	bad := store.Segment{Body: []byte{77}}
	if err := c.restore(s, &inheritance{pend: pend, sources: []segmentSource{{pos: at.Position, records: bad.Records}}}, time.Now()); err == nil {
		t.Error("garbage was accepted")
	}
	if s = c.reacquire(s, lease, time.Now()); len(c.shards) != 1 || s.cursor != lease.Position || c.bytes != 0 {
		t.Error("the tenure did not begin anew")
	}
	if st := s.renewal(); st.Checkpoint.Position != lease.Position || st.Epoch != 2 {
		t.Errorf("renewal %+v", st)
	}
}

func TestDequeTakesBackWhatItGave(t *testing.T) {
	var d deque[int]
	if d.pop() != 0 {
		t.Error("an empty one gave something")
	}
	for i := range 40 {
		d.push(i)
		if i%3 == 0 {
			d.pushFirst(d.pop())
		}
	}
	for i := range 40 {
		if got := d.pop(); got != i {
			t.Fatalf("%d came instead of %d", got, i)
		}
	}
}

func TestParseUUID(t *testing.T) {
	id, ok := parseUUID([]byte("0192f3a4-5b6c-7d8e-9fa0-b1c2d3e4f506"))
	if !ok || string(appendUUID(nil, id)) != "0192f3a4-5b6c-7d8e-9fa0-b1c2d3e4f506" {
		t.Errorf("%x, %v", id, ok)
	}
	for _, bad := range []string{"", "0192f3a45b6c7d8e9fa0b1c2d3e4f506", "0192f3a4-5b6c-7d8e-9fa0-b1c2d3e4f50g", "0192f3a4+5b6c-7d8e-9fa0-b1c2d3e4f506"} {
		if _, ok := parseUUID([]byte(bad)); ok {
			t.Errorf("%q was accepted", bad)
		}
	}
}

func TestTailTakesOnlyItsShard(t *testing.T) {
	enough := 0
	tl := tail{shard: "3:", left: 4, enough: func() { enough++ }}
	uuid := []byte("0192f3a4-5b6c-7d8e-9fa0-b1c2d3e4f506")
	take := func(headers ...store.Header) { tl.take(TopicPartition{"x", 0}, 0, headers) }
	take(store.Header{Name: "ce_id", Value: uuid})
	take(store.Header{Name: "ce_id", Value: uuid}, store.Header{Name: EpochHeader, Value: []byte("33:1")})
	take(store.Header{Name: EpochHeader, Value: []byte("3:1")})
	if len(tl.published) != 0 {
		t.Fatalf("published %v", tl.published)
	}
	take(store.Header{Name: "id", Value: uuid}, store.Header{Name: EpochHeader, Value: []byte("3:1")})
	if len(tl.published) != 1 || enough != 0 {
		t.Fatalf("published %v", tl.published)
	}
	take(store.Header{Name: "id", Value: uuid})
	if enough != 1 {
		t.Error("the limit did not end it")
	}
}

func TestSuppressionNeedsTopicAndOwnHeader(t *testing.T) {
	w := newWorld(t)
	e := w.add(modelAggregates[0], true)
	w.sh.published = map[publishedEvent]struct{}{{e.id, "ce_id", "y"}: {}, {e.id, "id", "x"}: {}}
	w.run()
	w.wantPublished(e.agg, e)
	other := w.add(modelAggregates[0], true)
	w.sh.published = map[publishedEvent]struct{}{{other.id, "ce_id", "x"}: {}}
	w.run()
	w.wantPublished(e.agg, e)
	if w.core.tally.suppressed != 1 {
		t.Error("not suppressed")
	}
}

func TestHeadIsNotDroppedBeforeTheCheckpointHasReachedIt(t *testing.T) {
	for _, action := range []store.Action{store.ActionSkip, store.ActionDiscard} {
		w := newWorld(t)
		var young []*modelEvent // as many as a checkpoint lists, and one more
		for i := range w.core.maxPend + 1 {
			young = append(young, w.add(store.Aggregate{Source: sourceBlock, Type: "young", ID: fmt.Sprint(i)}, false))
		}
		e := w.add(modelAggregates[0], true)
		e.poison = true
		next := w.add(modelAggregates[0], true)
		w.run()
		w.operate(e.agg, action)
		for range 3 { // the head is loaded, then moved
			w.pass(time.Millisecond)
			w.run()
		}
		if w.outcomes[1] != "" || len(w.sh.moves) != 1 {
			t.Fatalf("%s was done at checkpoint %s: a new holder would read the head again", action, w.cp.Position)
		}
		w.decide(young[0].txn, store.Committed)
		w.run()
		if w.outcomes[1] == "" {
			t.Fatalf("%s was not done at checkpoint %s", action, w.cp.Position)
		}
		w.crash(false, true)
		w.run()
		w.wantPublished(e.agg, next)
	}
}

func TestForgottenShardLeavesNothing(t *testing.T) {
	w := newWorld(t)
	e := w.add(modelAggregates[0], true)
	e.poison = true
	w.run()
	w.operate(e.agg, store.ActionSkip)
	other := w.add(modelAggregates[2], true) // park policy
	other.poison = true
	w.deliver()
	w.report(0, 0)
	flying := w.add(modelAggregates[1], true)
	w.deliver()
	w.pass(time.Millisecond) // the operation begins
	w.load(false)
	w.load(false)
	w.step(1) // on its way: the head set aside, a dead letter
	w.core.forget(w.sh, w.now)
	if len(w.inflight) != 1 || w.events[w.inflight[0].rec.Event.ID] != flying {
		t.Fatalf("%d in flight", len(w.inflight))
	}
	w.core.report(w.inflight[0], 0, 0, &SinkError{Class: ClassPurged}, w.now)
	if w.core.bytes != 0 || w.core.unacked != 0 || w.core.tally.byStatus != [statusCount]int64{} {
		t.Errorf("left: %d bytes, %d unacked, %v", w.core.bytes, w.core.unacked, w.core.tally.byStatus)
	}
}

func TestLoadOfAForgottenShardIsIgnored(t *testing.T) {
	w := newWorld(t)
	e := w.add(modelAggregates[0], false)
	w.pass(time.Second)
	w.run()
	w.decide(e.txn, store.Committed)
	w.read()
	loads := w.core.load(w.sh, w.now)
	rows := w.rowsOf(loads[0].id, loads[0].after, loads[0].limit)
	w.core.forget(w.sh, w.now)
	if err := w.core.loaded(loads[0], rows, w.now); err != nil || w.core.bytes != 0 {
		t.Errorf("%v, %d bytes", err, w.core.bytes)
	}
}

func TestLostShardLeavesOthersWaitingForATopic(t *testing.T) {
	w := newWorld(t)
	c := w.core
	w.down["x"] = true
	w.add(modelAggregates[0], true)
	w.run()
	other := c.acquire(1, 1, store.Checkpoint{})
	if err := c.restore(other, &inheritance{}, w.now); err != nil {
		t.Fatal(err)
	}
	p := c.pauses[0]
	a := c.aggregate(other, modelAggregates[1])
	c.pauseFor(a, p)
	p.dropShard(w.sh, w.now)
	if len(p.waiting) != 1 || p.waiting[0] != a || a.slot != 0 {
		t.Errorf("waiting: %v", p.waiting)
	}
}

func TestStepsAreBounded(t *testing.T) {
	w := newWorld(t)
	a, b := modelAggregates[0], modelAggregates[1]
	var first, second []*modelEvent
	for range 4 {
		first = append(first, w.add(a, false))
	}
	for range 3 {
		second = append(second, w.add(b, false))
	}
	w.pass(time.Second)
	for n := 0; w.step(1); n++ { // built, then written
		if rows := len(w.pending.Park); rows > w.core.stepRows {
			t.Fatalf("%d rows in a step", rows)
		}
		w.step(0)
		if n == 0 && len(w.parked) != 4 {
			t.Fatalf("%d parked by the first step", len(w.parked))
		}
	}
	if len(w.parked) != 7 {
		t.Fatalf("%d parked", len(w.parked))
	}
	for _, e := range append(first, second...) {
		w.decide(e.txn, store.Committed)
	}
	w.run()
	w.wantPublished(a, first...)
	w.wantPublished(b, second...)
	w.checkAllOut()
}

func TestThawedBeforeItsRowsAreLoaded(t *testing.T) {
	w := newWorld(t)
	a := modelAggregates[0]
	w.down["x"] = true
	e := w.add(a, true)
	w.run()
	w.pass(w.core.retryMin) // tries: its row is to be loaded
	if w.sh.thaw.n != 1 {
		t.Fatalf("%d to load", w.sh.thaw.n)
	}
	w.sh.thaw.push(w.core.aggregate(w.sh, modelAggregates[1])) // nothing to load for it
	if loads := w.core.load(w.sh, w.now); len(loads) != 1 || loads[0].id != a {
		t.Fatalf("loads %+v", loads)
	} else if err := w.core.loaded(loads[0], w.rowsOf(a, loads[0].after, 2), w.now); err != nil {
		t.Fatal(err)
	}
	w.core.loadsDone(w.sh)
	w.down["x"] = false
	w.run()
	w.wantPublished(a, e)
	w.checkAllOut()
}

func TestSuppressionNeedsAHeaderThatIsOurs(t *testing.T) {
	w := newWorld(t)
	e := w.add(modelAggregates[0], true)
	w.sh.published = map[publishedEvent]struct{}{{e.id, "ce_id", "x"}: {}}
	in := w.sh.hot.first
	in.rec.Event.Headers = []store.Header{{Name: "ce_id", Value: []byte("the caller's")}}
	if w.core.delivered(w.sh, in) {
		t.Error("the caller's own header was taken for ours")
	}
	in.rec.Event.Headers = nil
	delete(w.core.sources, sourceBlock)
	if w.core.delivered(w.sh, in) {
		t.Error("the profile of an unknown source was guessed")
	}
}

// lag holds the checkpoint back: as many records as it lists, and one more, are in flight. It returns what ends it.
func (w *world) lag() (end func()) {
	for i := range w.core.maxPend + 1 {
		w.add(store.Aggregate{Source: sourceBlock, Type: "slow", ID: fmt.Sprint(i)}, true)
		w.deliver()
	}
	return func() {
		for range w.core.maxPend + 1 {
			w.report(0, 0)
		}
	}
}

func TestDeadLetterIsNotWrittenBeforeTheCheckpointHasReachedIt(t *testing.T) {
	w := newWorld(t)
	end := w.lag()
	e := w.add(modelAggregates[3], true) // skip policy
	e.poison = true
	w.deliver()
	w.report(len(w.inflight)-1, 0)
	for w.step(0) {
	}
	if len(w.dead) != 0 {
		t.Fatalf("%s is a dead letter, the checkpoint is %s: a new holder would read it again", e, w.cp.Position)
	}
	end()
	w.run()
	if len(w.dead) != 1 {
		t.Fatalf("%d dead letters", len(w.dead))
	}
}

func TestRowsAreOlderThanWhatIsReadAgain(t *testing.T) {
	w := newWorld(t)
	end := w.lag()
	a := modelAggregates[3] // skip policy
	e1 := w.add(a, true)
	e1.poison = true
	w.deliver()
	w.report(len(w.inflight)-1, 0) // to be buried, once the checkpoint has reached it
	w.add(a, false)
	w.pass(time.Second)
	for w.step(0) {
	}
	if len(w.parked) != 0 {
		t.Fatal("a row is younger than what a new holder reads again: it would be taken for done")
	}
	end()
	w.crash(false, true)
	w.run()
	if len(w.dead) != 1 {
		t.Fatalf("lost: %s", e1)
	}
}

func TestOperationWaitsForWhatIsInFlight(t *testing.T) {
	w := newWorld(t)
	a := modelAggregates[3] // skip policy
	e1 := w.add(a, true)
	e1.poison = true
	w.run() // a dead letter
	e1.poison = false
	e2 := w.add(a, false)
	w.pass(time.Second)
	w.run() // a row
	w.decide(e2.txn, store.Committed)
	w.read()
	w.load(false)
	w.load(false)
	w.deliver()
	w.operate(a, store.ActionRedrive)
	for range 3 {
		w.pass(time.Millisecond)
		for w.load(false) || w.step(0) {
		}
	}
	if len(w.dead) != 1 {
		t.Fatal("dead letters were put back ahead of a record in flight")
	}
	w.report(0, 0)
	w.pass(time.Millisecond)
	w.run()
	w.wantPublished(a, e2, e1)
	w.pass(time.Millisecond)
	w.run()
	w.checkAllOut()
}

func TestWhatWasDeliveredIsKnownAsLongAsItMatters(t *testing.T) {
	w := newWorld(t)
	a := modelAggregates[0]
	w.down["x"] = true
	e1 := w.add(a, true)
	w.write(e1.id) // by the last holder
	w.sh.published = map[publishedEvent]struct{}{{e1.id, "ce_id", "x"}: {}}
	w.sh.knownTo, w.sh.knownUntil = w.sh.cursor, w.now.Add(knownFor)
	w.core.pauseFor(w.core.aggregate(w.sh, a), w.core.pauseTopic("x", nil, &SinkError{Class: ClassTopic}, w.now))
	w.run() // a row now, and its topic is away
	if len(w.parked) != 1 || w.sh.published == nil {
		t.Fatalf("%d parked, known %v", len(w.parked), w.sh.published)
	}
	w.down["x"] = false
	w.pass(w.core.retryMin)
	w.run()
	w.wantPublished(a, e1)
	if w.core.tally.suppressed != 1 || len(w.parked) != 0 {
		t.Error("delivered again")
	}
	w.sh.published = map[publishedEvent]struct{}{{}: {}}
	w.add(a, false)
	w.pass(time.Second)
	w.run()
	if w.sh.published == nil {
		t.Error("forgotten although a row is left")
	}
	w.now = w.sh.knownUntil.Add(1)
	w.add(modelAggregates[1], true)
	w.run()
	if w.sh.published != nil {
		t.Error("kept for ever")
	}
}

// An event that is not recognised is delivered again, and with it what follows in its aggregate: else the last record of an
// aggregate would not be that of its last event.
func TestNothingIsRecognisedBehindWhatIsNot(t *testing.T) {
	w := newWorld(t)
	w.crashes = 1 // duplicates are allowed
	a, b := modelAggregates[0], modelAggregates[2]
	e1, e2, other := w.add(a, true), w.add(a, true), w.add(b, true)
	for _, e := range []*modelEvent{e1, e2, other} {
		w.write(e.id) // by the last holder
	}
	w.sh.published = map[publishedEvent]struct{}{{e2.id, "ce_id", "x"}: {}, {other.id, "ce_id", "x"}: {}}
	w.sh.knownTo, w.sh.knownUntil = w.sh.cursor, w.now.Add(knownFor)
	w.run()
	w.wantPublished(a, e1, e2, e1, e2)
	w.wantPublished(b, other)
}

// A relay may not know a source, and so not what its events' header is: that is no delivery.
func TestWhatWasDeliveredIsRecognisedOnceTheSourceIsKnown(t *testing.T) {
	w := newWorld(t)
	a := modelAggregates[0]
	e := w.add(a, true)
	w.write(e.id) // by the last holder
	known := w.core.sources
	w.core.sources = map[int32]*store.Source{}
	w.sh.published = map[publishedEvent]struct{}{{e.id, "ce_id", "x"}: {}}
	w.sh.knownTo, w.sh.knownUntil = w.sh.cursor, w.now.Add(knownFor)
	if d := w.core.next(w.now); d != nil {
		t.Fatal("delivered for a source that is not known")
	}
	w.core.sources = known
	w.pass(w.core.retryMin)
	w.run()
	w.wantPublished(a, e)
	if w.core.tally.suppressed != 1 {
		t.Error("delivered again")
	}
}

// What the last holder delivered was found from the offsets of its checkpoint. As long as some of it is outstanding those stay, or
// the next holder would not find it.
func TestOffsetsStayUntilWhatWasDeliveredIsRecognised(t *testing.T) {
	w := newWorld(t)
	a, b := modelAggregates[0], modelAggregates[2]
	txn := &modelTxn{key: store.Key{Source: a.Source}}
	w.txns = append(w.txns, txn)
	e := w.addEvent(w.newSegment(), txn, a, "y", true)
	w.read()
	w.write(e.id) // by the last holder
	w.add(b, true)
	w.sh.published = map[publishedEvent]struct{}{{e.id, "ce_id", "y"}: {}}
	w.sh.knownTo, w.sh.knownUntil, w.sh.offsetsFrom = w.sh.cursor, w.now.Add(knownFor), w.now.Add(offsetsKept)
	w.core.pauseFor(w.core.aggregate(w.sh, a), w.core.pauseTopic("y", nil, &SinkError{Class: ClassTopic}, w.now))
	before := string(w.sh.saved.Offsets)
	w.deliver()
	w.report(0, 0)
	if cp := w.core.checkpoint(w.sh, w.now.Add(offsetsEvery)); string(cp.Offsets) != before {
		t.Error("the next holder would not find what was delivered")
	}
	w.sh.offsetsAdded = true
	if cp := w.core.checkpoint(w.sh, w.now); string(cp.Offsets) != before {
		t.Error("the next holder would not find what was delivered")
	}
	w.run() // a row now: it may come back at any time
	if len(w.parked) != 1 || string(w.sh.saved.Offsets) != before {
		t.Errorf("%d rows; offsets %v", len(w.parked), w.sh.saved.Offsets)
	}
	w.pass(w.core.retryMin)
	w.run()
	w.add(b, true)
	w.pass(offsetsEvery)
	w.run()
	if string(w.sh.saved.Offsets) == before || w.core.tally.suppressed != 1 {
		t.Errorf("offsets %v; %d suppressed", w.sh.saved.Offsets, w.core.tally.suppressed)
	}
}

// Rows that were loaded when their aggregate thawed leave memory when it freezes again: else enough of them fill it, and the
// log with their decisions is not read any more. Found by the simulator.
func TestFrozenAggregateKeepsNoMemory(t *testing.T) {
	w := newWorld(t)
	a := modelAggregates[0]
	e1, e2, e3 := w.add(a, false), w.add(a, false), w.add(a, true)
	w.pass(time.Second)
	w.run()
	w.decide(e1.txn, store.Committed)
	w.run() // e2 was loaded with e1, and is the head now
	w.wantPublished(a, e1)
	if w.core.bytes != 0 {
		t.Fatalf("%d bytes are kept of an aggregate that waits for a decision", w.core.bytes)
	}
	w.decide(e2.txn, store.Committed)
	w.run()
	w.wantPublished(a, e1, e2, e3)
	w.checkAllOut()
}

// The same when an operation had its hand on the aggregate while its rows were written.
func TestOperationLeavesNoRowsInMemory(t *testing.T) {
	w := newWorld(t)
	a := modelAggregates[0]
	e := w.add(a, false)
	w.operate(a, store.ActionRedrive)
	w.pass(time.Second) // parked, and held
	w.step(0)
	w.run()
	if w.core.bytes != 0 || len(w.sh.operations) != 0 {
		t.Fatalf("%d bytes, %d operations are kept", w.core.bytes, len(w.sh.operations))
	}
	w.decide(e.txn, store.Committed)
	w.run()
	w.wantPublished(a, e)
	w.checkAllOut()
}

// More to be set aside from one segment than a checkpoint lists.
func TestSegmentWithMoreThanACheckpointLists(t *testing.T) {
	w := newWorld(t)
	a := modelAggregates[2] // park policy
	txn := &modelTxn{key: store.Key{Source: a.Source}}
	seg := w.newSegment()
	for range w.core.maxPend + 2 {
		w.addEvent(seg, txn, a, "x", true)
	}
	txn.events[0].poison = true
	w.txns = append(w.txns, txn)
	w.run()
	if len(w.dead) != w.core.maxPend+2 {
		t.Fatalf("%d dead letters", len(w.dead))
	}
}
