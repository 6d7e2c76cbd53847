package relay

import (
	"time"

	"github.com/outbox-platform/outbox/internal/fault"
	"github.com/outbox-platform/outbox/store"
)

// status says what keeps an aggregate.
type status int

const (
	statusFlowing status = iota // nothing: its head is in flight, or about to be, or it is empty
	statusWaiting               // its head is hot and undecided, and young
	// The rest are frozen: all its events go to parked, and nothing of it needs memory.
	statusInDoubt // its head is undecided for long
	statusTopic   // its head's topic, or its source, is paused
	statusRecord  // Kafka refused its head for good; an operator decides
	statusCount   = iota
)

// aggregate is the unit of order.
type aggregate struct {
	shard     *shard
	id        store.Aggregate
	hash      uint64
	collision *aggregate // next with the same hash

	front    fifo // rows of parked that were loaded again
	unloaded int  // rows of parked that are not in memory
	back     fifo // rows not yet unloaded, then hot events
	// popped is the place of the last event that left: unloaded rows are younger. Zero: of none.
	popped store.EventPosition
	// lastRow is the youngest row that the last holder left. What is read again up to it is a row, or done.
	lastRow store.EventPosition

	status   status
	headTxn  *txn   // statusInDoubt, head not in memory: the transaction it waits for
	pause    *pause // statusTopic: what it waits for
	probing  *pause // it tries for all that wait for this
	slot     int    // statusWaiting, statusTopic: its index in the list it is on
	attempts int32  // statusRecord: how often the head was tried
	problem  string // statusRecord, statusTopic: why

	deadQueue bool       // park policy: committed events are buried in order
	bypass    bool       // an operator wants the head tried although its topic is paused
	held      *operation // an operation works on it: nothing of it moves
	retry     *operation // an operation that ends with the head's next report

	inflight    bool
	queued      bool // on shard.ready
	thawing     bool // on shard.thaw
	loading     bool
	parking     bool // on shard.toPark
	stepping    bool // a step on its way has rows of it
	headChanged bool // the row of its head must be written again
	restored    bool // on shard.restored
	touched     bool // on core.touched
	// anew: the last holder may have delivered an event of it that was not recognised. Later ones are delivered again, too, or the
	// last record of the aggregate would not be that of its last event.
	anew   bool
	toBury int // on shard.burying
	buried int // dead letters not yet written, toBury included
}

// event is one event in memory.
type event struct {
	rec       store.Record
	pos       store.EventPosition
	state     store.State
	row       rowState
	inflight  bool
	attempts  int32
	shard     *shard
	aggregate *aggregate
	txn       *txn // while undecided
	memory    *memory
	readAt    time.Time
	decidedAt time.Time // zero: not by what was read
	queue     bool      // when buried: the aggregate is in dead-queue mode
	problem   string    // when buried: why

	next          *event // in its aggregate, or free
	nextInTxn     *event
	before, after *event // in the shard's hot list
	delivery      Delivery
}

// rowState says whether an event has a row in parked.
type rowState uint8

const (
	hot     rowState = iota // no
	writing                 // the step on its way writes it
	written                 // yes
)

// memory is a piece that events point into. It is given back as a whole.
type memory struct {
	bytes int64
	refs  int
}

// fifo is a queue of events.
type fifo struct {
	first, last *event
	n           int
}

func (f *fifo) push(e *event) {
	if f.last == nil {
		f.first = e
	} else {
		f.last.next = e
	}
	f.last = e
	f.n++
}

func (f *fifo) pop() *event {
	e := f.first
	if e == nil {
		return nil
	}
	if f.first = e.next; f.first == nil {
		f.last = nil
	}
	e.next = nil
	f.n--
	return e
}

// hotList holds the hot events of a shard in position order: what a checkpoint must account for.
type hotList struct{ first, last *event }

func (l *hotList) push(e *event) {
	if e.before = l.last; l.last == nil {
		l.first = e
	} else {
		l.last.after = e
	}
	l.last = e
}

func (l *hotList) remove(e *event) {
	if e.before == nil {
		l.first = e.after
	} else {
		e.before.after = e.after
	}
	if e.after == nil {
		l.last = e.before
	} else {
		e.after.before = e.before
	}
	e.before, e.after = nil, nil
}

// head returns the oldest event outstanding, or nil when there is none or it is not in memory.
func (a *aggregate) head() *event {
	if a.front.first != nil {
		return a.front.first
	}
	if a.unloaded == 0 {
		return a.back.first
	}
	return nil
}

// frozen reports whether everything of the aggregate belongs in parked.
func (a *aggregate) frozen() bool { return a.status > statusWaiting }

// blocked reports whether a record or a topic keeps its head.
func (a *aggregate) blocked() bool { return a.status == statusRecord || a.status == statusTopic }

// outstanding is the number of its events that are neither done nor dead.
func (a *aggregate) outstanding() int { return a.front.n + a.unloaded + a.back.n }

// aggregate returns the aggregate with this id, made if there is none. The id's strings are copied: they may point into a
// segment.
func (c *core) aggregate(s *shard, id store.Aggregate) *aggregate {
	return c.aggregateAt(s, id, id.Hash())
}

func (c *core) aggregateAt(s *shard, id store.Aggregate, hash uint64) *aggregate {
	a := s.find(id, hash)
	if a != nil {
		return a
	}
	if a = c.freeAggregates; a != nil {
		c.freeAggregates = a.collision
	} else {
		a = &aggregate{}
	}
	text := id.Type + id.ID
	*a = aggregate{
		shard:     s,
		id:        store.Aggregate{Source: id.Source, Type: text[:len(id.Type)], ID: text[len(id.Type):]},
		hash:      hash,
		collision: s.aggregates[hash],
	}
	if text != "" && (id.Type == "" || id.ID == "") {
		a.id.Type, a.id.ID = cloneString(id.Type), cloneString(id.ID) // concatenating with "" does not copy
	}
	s.aggregates[hash] = a
	c.tally.byStatus[statusFlowing]++
	return a
}

func cloneString(s string) string { return string([]byte(s)) }

// removeIfIdle forgets an aggregate of which nothing is left.
func (c *core) removeIfIdle(a *aggregate) {
	if a.outstanding() > 0 || a.buried > 0 || a.deadQueue || a.held != nil || a.retry != nil || a.status != statusFlowing ||
		a.inflight || a.queued || a.thawing || a.loading || a.parking || a.stepping || a.restored {
		return
	}
	if a.probing != nil {
		a.probing.giveUpProbe()
	}
	s := a.shard
	if first := s.aggregates[a.hash]; first == a {
		if a.collision == nil {
			delete(s.aggregates, a.hash)
		} else {
			s.aggregates[a.hash] = a.collision
		}
	} else {
		for ; first.collision != a; first = first.collision {
		}
		first.collision = a.collision
	}
	c.tally.byStatus[statusFlowing]--
	*a = aggregate{collision: c.freeAggregates}
	c.freeAggregates = a
}

// setStatus changes the status only; see freeze, wait and thaw.
func (c *core) setStatus(a *aggregate, st status) {
	c.tally.byStatus[a.status]--
	c.tally.byStatus[st]++
	a.status = st
}

// thaw ends whatever keeps an aggregate. The caller advances it.
func (c *core) thaw(a *aggregate) {
	switch a.status {
	case statusWaiting:
		w := a.shard.waiting
		last := w[len(w)-1]
		w[a.slot], last.slot = last, a.slot
		w[len(w)-1] = nil
		a.shard.waiting = w[:len(w)-1]
	case statusInDoubt:
		if a.headTxn != nil {
			a.headTxn.stopWaiting(a)
			a.headTxn = nil
		}
	case statusTopic:
		a.pause.stopWaiting(a)
		a.pause = nil
	case statusFlowing, statusRecord:
	}
	c.setStatus(a, statusFlowing)
}

// advance looks at the head of a flowing aggregate and does what can be done: drops what is aborted, buries in dead-queue
// mode, queues what is committed for delivery, waits for what is undecided. It may forget the aggregate.
func (c *core) advance(a *aggregate) {
	s := a.shard
	for !a.inflight && a.held == nil && a.status == statusFlowing {
		e := a.head()
		switch {
		case e == nil && a.unloaded > 0:
			if !a.thawing && !a.loading {
				a.thawing = true
				s.thaw.push(a)
			}
			return
		case e == nil:
			c.removeIfIdle(a)
			return
		case e.state == store.Aborted:
			c.tally.dropped++
			c.done(e)
		case e.state == store.Prepared && fault.Mutant("S3") && e.next != nil: // whoever waits is passed
			e.txn.remove(e)
			c.done(e)
		case e.state == store.Prepared:
			c.awaitDecision(a, e)
			return
		case a.deadQueue:
			c.bury(e, true, "follows a dead letter of its aggregate")
		case !c.admitted(a, e):
			return
		default:
			if !a.queued {
				a.queued = true
				s.ready.push(a)
			}
			return
		}
	}
}

// awaitDecision keeps an aggregate whose head is undecided: for a while in memory, or for long when it has a row already.
func (c *core) awaitDecision(a *aggregate, e *event) {
	if e.row != hot {
		c.freeze(a, statusInDoubt)
		return
	}
	c.setStatus(a, statusWaiting)
	a.slot = len(a.shard.waiting)
	a.shard.waiting = append(a.shard.waiting, a)
}

// admitted reports whether nothing but the gate is between a committed head and Kafka. If not, the aggregate is frozen.
func (c *core) admitted(a *aggregate, e *event) bool {
	if a.probing != nil && !a.probing.concerns(e) {
		a.probing.giveUpProbe()
	}
	if c.sources[e.rec.Key.Source] == nil {
		c.wantSources = true
		c.pauseFor(a, c.sourcePause(e))
		return false
	}
	if p := c.topicPause(e.rec.Event.Topic); p != nil && p != a.probing && !a.bypass {
		c.pauseFor(a, p)
		return false
	}
	return true
}

// done takes the head of its aggregate out: delivered, dropped or not wanted. Its row, if it has one, goes with the next
// step.
func (c *core) done(e *event) {
	s, a := e.shard, e.aggregate
	c.pop(e)
	if e.row == hot {
		s.hot.remove(e)
		s.hotCount--
	} else {
		s.unpark = append(s.unpark, e.pos)
		s.rows--
	}
	s.dirty = true
	a.bypass = false
	c.release(e)
}

// pop takes the head out of its aggregate's queue.
func (c *core) pop(e *event) {
	a := e.aggregate
	if a.front.first == e {
		a.front.pop()
	} else {
		a.back.pop()
	}
	if e.row != hot {
		a.popped = e.pos
	}
	a.attempts, a.problem, a.headChanged = 0, "", false
}
