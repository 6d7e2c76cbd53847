package relay

import (
	"flag"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"pgregory.net/rapid"

	"github.com/outbox-platform/outbox/store"
)

// world is a store, a log, a Kafka and a holder, each as simple as can be: what the core is checked against.
type world struct {
	t    failer
	now  time.Time
	core *core
	sh   *shard

	// The truth.
	log     []*modelSegment
	txns    []*modelTxn
	events  map[[16]byte]*modelEvent
	at      map[store.EventPosition]*modelEvent
	byAgg   map[store.Aggregate][]*modelEvent // in prepare order
	nextXID uint64

	// Kafka.
	published  map[store.Aggregate][]*modelEvent
	offsets    map[TopicPartition]int64
	tails      map[TopicPartition][]*modelEvent
	down       map[string]bool // topics
	inflight   []*event
	rebuilds   int // deliveries that were reported as failed but may have been written
	crashes    int
	registered map[int32]*store.Source

	// The store.
	cp         store.Checkpoint
	epoch      int64
	parked     map[store.EventPosition]store.Parked
	dead       map[store.EventPosition]store.DeadLetter
	operations []store.Operation
	outcomes   map[int64]string
	pending    *store.Step // built, outcome unknown

	// A load on its way: what was asked, and what was found then.
	loads     []load
	rows      [][]store.Parked
	letters   []*operation
	pages     [][]store.DeadLetter
	discarded map[[16]byte]bool

	trace []string // what happened, for the message of a failure
}

func (w *world) note(format string, args ...any) {
	w.trace = append(w.trace, fmt.Sprintf(format, args...))
}

// fail ends the run with what happened to an aggregate.
func (w *world) fail(a store.Aggregate, format string, args ...any) {
	text := fmt.Sprintf(format, args...)
	for _, line := range w.trace {
		if strings.HasPrefix(line, a.ID+":") || strings.HasPrefix(line, "*") {
			text += "\n" + line
		}
	}
	w.t.Fatalf("%s%s", text, w.dump())
}

// failer is a *rapid.T or a *testing.T.
type failer interface {
	Fatal(args ...any)
	Fatalf(format string, args ...any)
}

type modelSegment struct {
	pos     store.Position
	records []store.Record
}

type modelTxn struct {
	key     store.Key
	state   store.State
	decided bool // the decision is in the log
	events  []*modelEvent
}

type modelEvent struct {
	id      [16]byte
	agg     store.Aggregate
	topic   string
	txn     *modelTxn
	poison  bool
	skipped bool // set aside alone, or dropped by an operator: out of order from then on
	writes  int
}

func (e *modelEvent) String() string { return fmt.Sprintf("event %d of %s", e.id[0], e.agg.ID) }

const (
	sourceBlock, sourcePark, sourceSkip, sourceLate = 1, 2, 3, 4
)

func modelLimits() limits {
	return limits{
		parkAfter: 500 * time.Millisecond, parkFollowerAfter: 50 * time.Millisecond, memoryBytes: 40 * segmentOverhead,
		maxUnacked: 8, maxPend: 3, stepRows: 4, stepBytes: 4 << 20, loadRows: 2, loadAggregates: 2,
		retryMin: 100 * time.Millisecond, retryMax: time.Second,
	}
}

func newWorld(t failer) *world {
	w := &world{
		t: t, now: time.Unix(1_000_000, 0), events: map[[16]byte]*modelEvent{},
		at: map[store.EventPosition]*modelEvent{}, byAgg: map[store.Aggregate][]*modelEvent{},
		published: map[store.Aggregate][]*modelEvent{}, offsets: map[TopicPartition]int64{},
		tails: map[TopicPartition][]*modelEvent{}, down: map[string]bool{}, parked: map[store.EventPosition]store.Parked{},
		dead: map[store.EventPosition]store.DeadLetter{}, outcomes: map[int64]string{}, nextXID: 10,
		discarded: map[[16]byte]bool{}, cp: store.Checkpoint{Position: store.Position{Seq: -1}},
		registered: map[int32]*store.Source{
			sourceBlock: {ID: sourceBlock, Name: "block", FailurePolicy: 1, RecordProfile: 1},
			sourcePark:  {ID: sourcePark, Name: "park", FailurePolicy: policyPark, RecordProfile: 1},
			sourceSkip:  {ID: sourceSkip, Name: "skip", FailurePolicy: policySkip, RecordProfile: 1},
		},
	}
	w.core = newCore(modelLimits())
	w.takeOver(false)
	return w
}

var modelAggregates = []store.Aggregate{
	{Source: sourceBlock, Type: "order", ID: "a"}, {Source: sourceBlock, Type: "order", ID: "b"},
	{Source: sourcePark, Type: "order", ID: "c"}, {Source: sourceSkip, Type: "order", ID: "d"},
	{Source: sourceLate, Type: "", ID: "e"},
}

// prepare appends the events of a new transaction to the log.
func (w *world) prepare(t *rapid.T) {
	first := rapid.SampledFrom(modelAggregates).Draw(t, "aggregate")
	txn := &modelTxn{key: store.Key{Source: first.Source}}
	txn.key.Transaction[0], txn.key.Transaction[1] = byte(len(w.txns)), byte(len(w.txns)>>8)
	publish := rapid.IntRange(0, 4).Draw(t, "publish") == 0
	seg := w.newSegment()
	for range rapid.IntRange(1, 3).Draw(t, "events") {
		agg := first
		if first.Source == sourceBlock && rapid.Bool().Draw(t, "other") {
			agg = modelAggregates[1]
		}
		topic := rapid.SampledFrom([]string{"x", "y"}).Draw(t, "topic")
		w.addEvent(seg, txn, agg, topic, publish).poison = rapid.IntRange(0, 7).Draw(t, "poison") == 0
	}
	w.txns = append(w.txns, txn)
}

// addEvent appends one event of a transaction to a segment.
func (w *world) addEvent(seg *modelSegment, txn *modelTxn, agg store.Aggregate, topic string, publish bool) *modelEvent {
	e := &modelEvent{agg: agg, txn: txn, topic: topic}
	w.at[store.EventPosition{Position: seg.pos, Record: int32(len(seg.records))}] = e
	e.id[0], e.id[1] = byte(len(w.events)), byte(len(w.events)>>8)
	w.events[e.id] = e
	w.byAgg[agg] = append(w.byAgg[agg], e)
	txn.events = append(txn.events, e)
	r := store.Record{Number: int32(len(seg.records)), Key: txn.key, PreparedAt: 1, Event: store.Event{
		ID: e.id, Topic: e.topic, AggregateType: agg.Type, AggregateID: agg.ID, Payload: []byte{1},
	}}
	if publish {
		r.State = store.Committed
		txn.state, txn.decided = store.Committed, true
	} else {
		r.Database = &store.DatabaseTransaction{XID: 1, Mode: store.ModeMarker}
	}
	seg.records = append(seg.records, r)
	return e
}

// add appends a transaction of one event to topic x, and reads it.
func (w *world) add(agg store.Aggregate, publish bool) *modelEvent {
	txn := &modelTxn{key: store.Key{Source: agg.Source}}
	txn.key.Transaction[0], txn.key.Transaction[1] = byte(len(w.txns)), byte(len(w.txns)>>8)
	e := w.addEvent(w.newSegment(), txn, agg, "x", publish)
	w.txns = append(w.txns, txn)
	w.read()
	return e
}

func (w *world) newSegment() *modelSegment {
	w.nextXID++
	seg := &modelSegment{pos: store.Position{XID: w.nextXID}}
	w.log = append(w.log, seg)
	return seg
}

// decide appends the decision of a transaction.
func (w *world) decide(txn *modelTxn, state store.State) {
	txn.state, txn.decided = state, true
	seg := w.newSegment()
	seg.records = append(seg.records, store.Record{Key: txn.key, IsDecision: true, State: state})
}

func (w *world) undecided() []*modelTxn {
	var found []*modelTxn
	for _, txn := range w.txns {
		if !txn.decided {
			found = append(found, txn)
		}
	}
	return found
}

// read feeds the next segment. False: there is none, or memory is full.
func (w *world) read() bool {
	if w.core.full() || !w.sh.reading() {
		return false
	}
	for _, seg := range w.log {
		if seg.pos.Compare(w.sh.cursor) > 0 {
			w.feed(seg)
			return true
		}
	}
	w.core.caughtUp(w.sh, store.Horizon{})
	return false
}

func (w *world) feed(seg *modelSegment) {
	for _, r := range seg.records {
		if r.IsDecision {
			w.note("* read %s: transaction %d %s", seg.pos, r.Key.Transaction[0], r.State)
		} else {
			w.note("%s: read %s: %d of transaction %d %s", r.Event.AggregateID, seg.pos, r.Event.ID[0], r.Key.Transaction[0], r.State)
		}
	}
	err := w.core.feed(w.sh, seg.pos, 10, func(yield func(*store.Record) bool) error {
		for i := range seg.records {
			r := seg.records[i]
			if !yield(&r) {
				return nil
			}
		}
		return nil
	}, w.now)
	if err != nil {
		w.t.Fatalf("feed: %v", err)
	}
}

func (w *world) sources() {
	for id, src := range w.registered {
		w.core.sources[id] = src
	}
}

// deliver hands one event to Kafka.
func (w *world) deliver() bool {
	e := w.core.next(w.now)
	if e == nil {
		return false
	}
	for _, other := range w.inflight {
		if other.aggregate == e.aggregate {
			w.t.Fatalf("two records of one aggregate in flight: %s and %s", w.events[other.rec.Event.ID], w.events[e.rec.Event.ID])
		}
	}
	w.inflight = append(w.inflight, e)
	return true
}

// write is what the broker does with a record that it accepts.
func (w *world) write(id [16]byte) (TopicPartition, int64) {
	m := w.events[id]
	if m.txn.state != store.Committed {
		w.t.Fatalf("phantom: %s is %s", m, m.txn.state)
	}
	if w.discarded[id] {
		w.fail(m.agg, "%s was dropped by an operator, and published", m)
	}
	m.writes++
	w.note("%s: published %d", m.agg.ID, id[0])
	if m.writes > 1 && w.crashes == 0 && w.rebuilds == 0 {
		w.t.Fatalf("%s was published twice without a crash", m)
	}
	w.published[m.agg] = append(w.published[m.agg], m)
	tp := TopicPartition{m.topic, 0}
	w.tails[tp] = append(w.tails[tp], m)
	w.offsets[tp]++
	return tp, w.offsets[tp] - 1
}

// report ends the flight of one record with an outcome: 0 as the broker would, else a class.
func (w *world) report(i int, class Class) {
	e := w.inflight[i]
	w.inflight = slices.Delete(w.inflight, i, i+1)
	m := w.events[e.rec.Event.ID]
	switch {
	case class == ClassFatal || class == ClassPurged || class == ClassCluster:
		if class != ClassCluster && len(m.txn.events)%2 == 0 { // it may have been written
			w.rebuilds++
			w.write(m.id)
		}
		w.core.report(e, 0, 0, &SinkError{Class: class, Code: "C"}, w.now)
	case w.down[m.topic]:
		w.note("%s: topic refused %d", m.agg.ID, m.id[0])
		w.core.report(e, 0, 0, &SinkError{Class: ClassTopic, Code: "UNKNOWN_TOPIC"}, w.now)
	case m.poison:
		if w.registered[e.rec.Key.Source].FailurePolicy == policySkip {
			m.skipped = true
		}
		w.note("%s: refused %d", m.agg.ID, m.id[0])
		w.core.report(e, 0, 0, &SinkError{Class: ClassRecord, Code: "TOO_LARGE"}, w.now)
	default:
		tp, offset := w.write(m.id)
		w.core.report(e, tp.Partition, offset, nil, w.now)
	}
}

// step builds a step if one is due, and writes it: outcome 0 written and told, 1 unknown and not written, 2 unknown but
// written. An unknown one is repeated by the next call.
func (w *world) step(outcome int) bool {
	if w.pending == nil {
		if !w.sh.stepDue() {
			return false
		}
		st := w.core.step(w.sh, w.now)
		w.pending = &st
	}
	if outcome != 1 {
		w.apply(w.pending)
	}
	if outcome == 0 {
		w.pending = nil
		w.core.stepped(w.sh)
	}
	return true
}

// apply is the store's side of a step; applying it twice changes nothing.
func (w *world) apply(st *store.Step) {
	if st.Epoch != w.epoch {
		w.t.Fatalf("a step of epoch %d was written in epoch %d", st.Epoch, w.epoch)
	}
	if st.Checkpoint.Position.Compare(w.cp.Position) < 0 {
		w.t.Fatalf("checkpoint moved back from %s to %s", w.cp.Position, st.Checkpoint.Position)
	}
	w.note("* step at %s", st.Checkpoint.Position)
	for _, p := range st.Park {
		w.note("%s: park %d cause %d state %s", p.Aggregate.ID, w.at[p.EventPosition].id[0], p.Cause, p.State)
		w.parked[p.EventPosition] = p
	}
	for _, pos := range st.Unpark {
		w.note("%s: unpark %d", w.at[pos].agg.ID, w.at[pos].id[0])
	}
	for _, pos := range st.Exhume {
		w.note("%s: exhume %d", w.at[pos].agg.ID, w.at[pos].id[0])
	}
	for _, l := range st.Bury {
		w.note("%s: bury %d queue %v", l.Aggregate.ID, w.at[l.EventPosition].id[0], l.Queue)
	}
	for _, o := range st.Operations {
		w.note("%s: operation %d %s", w.operations[o.ID-1].Aggregate.ID, o.ID, o.Outcome)
	}
	for _, d := range st.Decide {
		for pos, p := range w.parked {
			if p.Key == d.Key {
				p.State = d.State
				w.parked[pos] = p
			}
		}
	}
	for _, pos := range st.Unpark {
		delete(w.parked, pos)
	}
	for _, l := range st.Bury {
		if _, there := w.dead[l.EventPosition]; !there {
			w.dead[l.EventPosition] = l
		}
	}
	for _, pos := range st.Exhume {
		delete(w.dead, pos)
	}
	for _, o := range st.Operations {
		w.outcomes[o.ID] = o.Outcome
	}
	w.setAside(st)
	pend, err := store.DecodePend(st.Checkpoint.Pend)
	if err != nil {
		w.t.Fatalf("pend: %v", err)
	}
	for _, e := range pend {
		if e.Position.Compare(st.Checkpoint.Position) > 0 {
			w.t.Fatalf("pend lists %s after the checkpoint %s", e.Position, st.Checkpoint.Position)
		}
		if e.XID < st.Checkpoint.Oldest {
			w.t.Fatalf("oldest %d is after pend's %s", st.Checkpoint.Oldest, e.Position)
		}
		if _, also := w.parked[e.EventPosition]; also {
			w.fail(w.at[e.EventPosition].agg, "%s is in pend and parked", w.at[e.EventPosition])
		}
	}
	w.cp = st.Checkpoint
}

// setAside notes what operators and policies took out of order: what is buried alone, and what is deleted though it was
// never published.
func (w *world) setAside(st *store.Step) {
	buried := map[store.EventPosition]bool{}
	for _, l := range st.Bury {
		buried[l.EventPosition] = true
		if !l.Queue {
			w.at[l.EventPosition].skipped = true
		}
	}
	put := map[store.EventPosition]bool{}
	for _, p := range st.Park {
		put[p.EventPosition] = true
	}
	drop := func(pos store.EventPosition) {
		e := w.at[pos]
		if e.txn.state != store.Committed || e.writes > 0 {
			return
		}
		if !slices.ContainsFunc(w.operations, func(o store.Operation) bool {
			return o.Action == store.ActionDiscard && o.Aggregate == e.agg
		}) {
			w.t.Fatalf("%s was dropped though nobody asked for it", e)
		}
		e.skipped = true
		w.discarded[e.id] = true
	}
	for _, pos := range st.Unpark {
		if !buried[pos] {
			drop(pos)
		}
	}
	for _, pos := range st.Exhume {
		if !put[pos] {
			drop(pos)
		}
	}
}

func (w *world) rowsOf(a store.Aggregate, after store.EventPosition, limit int) []store.Parked {
	var rows []store.Parked
	for _, p := range w.parked {
		if p.Aggregate == a && p.EventPosition.Compare(after) > 0 {
			rows = append(rows, p)
		}
	}
	slices.SortFunc(rows, func(a, b store.Parked) int { return a.EventPosition.Compare(b.EventPosition) })
	return rows[:min(limit, len(rows))]
}

func (w *world) lettersOf(a store.Aggregate, after store.EventPosition, limit int) []store.DeadLetter {
	var rows []store.DeadLetter
	for _, p := range w.dead {
		if p.Aggregate == a && p.EventPosition.Compare(after) > 0 {
			rows = append(rows, p)
		}
	}
	slices.SortFunc(rows, func(a, b store.DeadLetter) int { return a.EventPosition.Compare(b.EventPosition) })
	return rows[:min(limit, len(rows))]
}

// load starts a load, or ends the one on its way.
func (w *world) load(fail bool) bool {
	if w.loads == nil && w.letters == nil {
		if w.letters = w.sh.lettersWanted(w.now); w.letters != nil {
			w.pages = nil
			for _, o := range w.letters {
				w.pages = append(w.pages, w.lettersOf(o.Aggregate, o.after, 2))
			}
			return true
		}
		w.loads = w.core.load(w.sh, w.now)
		w.rows = nil
		for _, l := range w.loads {
			w.rows = append(w.rows, w.rowsOf(l.id, l.after, l.limit))
		}
		return w.loads != nil
	}
	for i, o := range w.letters {
		if fail {
			o.loading = false
		} else {
			w.core.lettersLoaded(w.sh, o, w.pages[i])
		}
	}
	for i, l := range w.loads {
		if fail {
			w.core.notLoaded(l)
			continue
		}
		rows := slices.Clone(w.rows[i])
		for j := range rows { // as loadRows does
			if txn := w.txnOf(rows[j].Key); rows[j].State == store.Prepared {
				rows[j].State = txn.state
			}
		}
		if err := w.core.loaded(l, rows, w.now); err != nil {
			w.t.Fatalf("loaded: %v", err)
		}
	}
	w.core.loadsDone(w.sh)
	w.loads, w.letters = nil, nil
	return true
}

func (w *world) txnOf(k store.Key) *modelTxn {
	return w.txns[int(k.Transaction[0])|int(k.Transaction[1])<<8]
}

// crash forgets the holder, and another one takes over. What was in flight may have been written. Within one process the
// old tenure is forgotten, and its reports come after that.
func (w *world) crash(tails, sameProcess bool) {
	w.crashes++
	w.note("* crash")
	for i, e := range w.inflight {
		m := w.events[e.rec.Event.ID]
		if i%2 == 0 && !w.down[m.topic] && !m.poison {
			w.write(m.id)
		}
	}
	if sameProcess {
		w.core.forget(w.sh, w.now)
		for i, e := range w.inflight {
			if i%2 == 0 {
				w.core.refused(e)
			} else {
				w.core.report(e, 0, 0, nil, w.now)
			}
		}
		for _, l := range w.loads {
			w.core.notLoaded(l)
		}
		for i, o := range w.letters {
			w.core.lettersLoaded(w.sh, o, w.pages[i])
		}
		if w.core.bytes != 0 || w.core.unacked != 0 || len(w.core.shards) != 0 || w.core.tally.byStatus != [statusCount]int64{} {
			w.t.Fatalf("something of a forgotten shard is left: %d bytes, %d unacked, %v", w.core.bytes, w.core.unacked, w.core.tally.byStatus)
		}
	} else {
		w.core = newCore(modelLimits())
	}
	w.inflight, w.pending, w.loads, w.letters = nil, nil, nil, nil
	w.takeOver(tails)
}

func (w *world) takeOver(tails bool) {
	w.sources()
	w.epoch++
	w.sh = w.core.acquire(0, w.epoch, w.cp)
	w.sh.trustUntil = w.now.Add(1000 * time.Hour)
	h := &inheritance{states: map[store.Key]store.State{}}
	var err error
	if h.pend, err = store.DecodePend(w.cp.Pend); err != nil {
		w.t.Fatal(err)
	}
	if h.offsets, err = store.DecodeOffsets(w.cp.Offsets); err != nil {
		w.t.Fatal(err)
	}
	for _, txn := range w.txns {
		h.states[txn.key] = txn.state
	}
	for _, p := range w.parked {
		p.Body = nil
		p.State = w.txnOf(p.Key).state
		h.parked = append(h.parked, p)
	}
	slices.SortFunc(h.parked, func(a, b store.Parked) int { return a.EventPosition.Compare(b.EventPosition) })
	for _, l := range w.dead {
		if l.Queue && !slices.Contains(h.deadQueues, l.Aggregate) {
			h.deadQueues = append(h.deadQueues, l.Aggregate)
		}
	}
	slices.SortFunc(h.deadQueues, func(a, b store.Aggregate) int { return int(a.Source - b.Source) })
	if err := w.core.restoreModel(w.sh, h, w.log, w.now); err != nil {
		w.t.Fatalf("restore: %v", err)
	}
	for w.read() {
	}
	var published map[publishedEvent]struct{}
	if tails {
		published = map[publishedEvent]struct{}{}
		for tp, tail := range w.tails {
			from, ok := w.sh.offsets[tp]
			if !ok {
				continue
			}
			for _, m := range tail[from:] {
				published[publishedEvent{m.id, EventIDHeader(w.core.sources[m.agg.Source].RecordProfile), m.topic}] = struct{}{}
			}
		}
	}
	w.core.start(w.sh, published, w.now)
	for _, o := range w.operations {
		if w.outcomes[o.ID] == "" {
			w.core.operate(w.sh, o)
		}
	}
}

// restoreModel is restore with the segments of a model.
func (c *core) restoreModel(s *shard, h *inheritance, log []*modelSegment, now time.Time) error {
	for _, seg := range log {
		if slices.ContainsFunc(h.pend, func(e store.PendEntry) bool { return e.Position == seg.pos }) {
			h.sources = append(h.sources, segmentSource{pos: seg.pos, bytes: 10, records: func(yield func(*store.Record) bool) error {
				for i := range seg.records {
					r := seg.records[i]
					if !yield(&r) {
						return nil
					}
				}
				return nil
			}})
		}
	}
	return c.restore(s, h, now)
}

func (w *world) operate(a store.Aggregate, action store.Action) {
	o := store.Operation{ID: int64(len(w.operations) + 1), Aggregate: a, Action: action}
	w.note("%s: request %d to %s", a.ID, o.ID, action)
	w.operations = append(w.operations, o)
	w.core.operate(w.sh, o)
}

// settle runs everything without faults until nothing moves.
func (w *world) settle() {
	for range 2000 {
		w.now = w.now.Add(300 * time.Millisecond)
		w.core.tick(w.now)
		moved := false
		for w.read() {
			moved = true
		}
		for w.deliver() {
			moved = true
		}
		for len(w.inflight) > 0 {
			w.report(0, 0)
			moved = true
		}
		moved = w.step(0) || moved
		for w.load(false) {
			moved = true
		}
		if !moved && w.outstanding() == 0 && w.core.bytes == 0 && len(w.sh.operations) == 0 {
			return
		}
	}
}

func (w *world) outstanding() int {
	n := 0
	for _, all := range w.sh.aggregates {
		for a := all; a != nil; a = a.collision {
			n += a.outstanding()
		}
	}
	return n
}

// check judges what was published.
func (w *world) check() {
	for agg, published := range w.published {
		var expected []*modelEvent
		for _, e := range w.byAgg[agg] {
			if e.txn.state == store.Committed && !e.skipped {
				expected = append(expected, e)
			}
		}
		high := -1
		for _, e := range published {
			if e.skipped {
				continue
			}
			rank := slices.Index(expected, e)
			if rank > high+1 {
				w.fail(agg, "%s was published before %s", e, expected[high+1])
			}
			high = max(high, rank)
		}
	}
}

func (w *world) checkAllOut() {
	for _, e := range w.events {
		if e.txn.state == store.Committed && e.writes == 0 && !e.skipped {
			w.t.Fatalf("lost: %s of transaction %d%s", e, e.txn.key.Transaction[0], w.dump())
		}
	}
	if len(w.parked) > 0 || len(w.dead) > 0 || w.outstanding() > 0 {
		w.t.Fatalf("left over: %d parked, %d dead, %d in memory", len(w.parked), len(w.dead), w.outstanding())
	}
	if w.core.bytes != 0 || w.core.unacked != 0 || w.sh.inflight != 0 || w.sh.hotCount != 0 || w.sh.rows != 0 {
		w.t.Fatalf("accounts are not balanced: %d bytes, %d unacked, %d in flight, %d hot, %d rows",
			w.core.bytes, w.core.unacked, w.sh.inflight, w.sh.hotCount, w.sh.rows)
	}
	if n := len(w.sh.txns); n > 0 {
		w.t.Fatalf("%d transactions are still kept", n)
	}
	if n := len(w.sh.aggregates); n > 0 {
		w.t.Fatalf("%d aggregates are still kept", n)
	}
}

func TestCoreKeepsItsPromises(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		w := newWorld(t)
		faults := rapid.Bool().Draw(t, "faults")
		crashes := rapid.Bool().Draw(t, "crashes")
		operators := rapid.Bool().Draw(t, "operators")
		t.Repeat(map[string]func(*rapid.T){
			"prepare": func(t *rapid.T) { w.prepare(t) },
			"decide": func(t *rapid.T) {
				open := w.undecided()
				if len(open) == 0 {
					t.Skip("nothing is undecided")
				}
				state := rapid.SampledFrom([]store.State{store.Committed, store.Committed, store.Aborted}).Draw(t, "state")
				w.decide(rapid.SampledFrom(open).Draw(t, "transaction"), state)
			},
			"read": func(*rapid.T) { w.read() },
			"readAll": func(*rapid.T) {
				for w.read() {
				}
			},
			"deliver": func(t *rapid.T) {
				for range rapid.IntRange(1, 5).Draw(t, "n") {
					w.deliver()
				}
			},
			"work": func(t *rapid.T) {
				for range rapid.IntRange(1, 12).Draw(t, "n") {
					w.now = w.now.Add(time.Duration(rapid.IntRange(1, 100).Draw(t, "ms")) * time.Millisecond)
					switch rapid.IntRange(0, 5).Draw(t, "what") {
					case 0:
						w.read()
					case 1:
						w.deliver()
					case 2:
						if len(w.inflight) > 0 {
							w.report(0, 0)
						}
					case 3:
						w.step(0)
					case 4:
						w.load(false)
					case 5:
						w.core.tick(w.now)
					}
				}
			},
			"refuse": func(t *rapid.T) {
				if e := w.core.next(w.now); e != nil {
					w.core.refused(e)
				}
			},
			"report": func(t *rapid.T) {
				if len(w.inflight) == 0 {
					t.Skip("nothing is in flight")
				}
				class := Class(0)
				if faults && rapid.IntRange(0, 3).Draw(t, "fail") == 0 {
					class = rapid.SampledFrom([]Class{ClassCluster, ClassFatal, ClassPurged}).Draw(t, "class")
				}
				w.report(rapid.IntRange(0, len(w.inflight)-1).Draw(t, "which"), class)
			},
			"tick": func(t *rapid.T) {
				w.now = w.now.Add(time.Duration(rapid.SampledFrom([]int{1, 60, 200, 600, 1500}).Draw(t, "ms")) * time.Millisecond)
				w.core.tick(w.now)
			},
			"step": func(t *rapid.T) {
				outcome := 0
				if faults {
					outcome = rapid.IntRange(0, 2).Draw(t, "outcome")
				}
				w.step(outcome)
			},
			"load": func(t *rapid.T) { w.load(faults && rapid.IntRange(0, 3).Draw(t, "fail") == 0) },
			"topic": func(t *rapid.T) {
				if rapid.IntRange(0, 2).Draw(t, "rarely") > 0 {
					t.Skip("not now")
				}
				topic := rapid.SampledFrom([]string{"x", "y"}).Draw(t, "topic")
				w.down[topic] = !w.down[topic]
			},
			"register": func(t *rapid.T) {
				if rapid.IntRange(0, 5).Draw(t, "rarely") > 0 {
					t.Skip("not now")
				}
				w.registered[sourceLate] = &store.Source{ID: sourceLate, Name: "late", RecordProfile: 4}
				w.sources()
			},
			"crash": func(t *rapid.T) {
				if !crashes || rapid.IntRange(0, 3).Draw(t, "rarely") > 0 {
					t.Skip("no crashes in this run")
				}
				w.crash(rapid.Bool().Draw(t, "tails"), rapid.Bool().Draw(t, "sameProcess"))
			},
			"operate": func(t *rapid.T) {
				if !operators || rapid.IntRange(0, 1).Draw(t, "rarely") > 0 {
					t.Skip("no operators in this run")
				}
				w.operate(rapid.SampledFrom(modelAggregates).Draw(t, "aggregate"),
					rapid.SampledFrom([]store.Action{store.ActionRedrive, store.ActionSkip, store.ActionDiscard}).Draw(t, "action"))
			},
			"": func(*rapid.T) { w.check() },
		})
		// Heal everything; then all that is committed must come out.
		for _, txn := range w.undecided() {
			w.decide(txn, store.Committed)
		}
		clear(w.down)
		w.registered[sourceLate] = &store.Source{ID: sourceLate, Name: "late", RecordProfile: 4}
		w.sources()
		w.settle()
		for _, e := range w.events {
			e.poison = false
		}
		for _, a := range modelAggregates {
			w.operate(a, store.ActionRedrive)
		}
		w.settle()
		for _, a := range modelAggregates {
			w.operate(a, store.ActionRedrive)
		}
		w.settle()
		w.check()
		w.checkAllOut()
		for _, o := range w.operations {
			if w.outcomes[o.ID] == "" {
				w.t.Fatalf("operation %d (%s) has no outcome", o.ID, o.Action)
			}
		}
	})
}

func (w *world) dump() string {
	var b []byte
	for _, all := range w.sh.aggregates {
		for a := all; a != nil; a = a.collision {
			b = fmt.Appendf(b, "\n%s: front %d unloaded %d back %d status %d flags inflight %v queued %v thawing %v loading %v parking %v held %v retry %v dead %v buried %d probing %v",
				a.id.ID, a.front.n, a.unloaded, a.back.n, a.status, a.inflight, a.queued, a.thawing, a.loading, a.parking, a.held != nil, a.retry != nil, a.deadQueue, a.buried, a.probing != nil)
		}
	}
	return string(fmt.Appendf(b, "\nbusy %d dirty %v full %v unacked %d cluster %v ready %d thaw %d bytes %d ops %d cursor %s pauses %d", w.sh.busy, w.sh.dirty, w.core.full(), w.core.unacked, w.core.cluster, w.sh.ready.n, w.sh.thaw.n, w.core.bytes, len(w.sh.operations), w.sh.cursor, len(w.core.pauses)))
}

// Longer runs than rapid's own 30 actions: what goes wrong needs many. Flags on the command line come later and win.
func init() {
	for name, value := range map[string]string{"rapid.checks": "1000", "rapid.steps": "120"} {
		if err := flag.Set(name, value); err != nil {
			panic(err)
		}
	}
}
