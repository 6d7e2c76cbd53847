package relay

import (
	"context"
	"time"

	"github.com/outbox-platform/outbox/internal/fault"
	"github.com/outbox-platform/outbox/store"
)

// phase of a shard's tenure.
type phase int

const (
	phaseLoading  phase = iota // what the last holder left is being loaded
	phaseCatchUp               // reading what the last holder had read; nothing is delivered yet
	phaseTail                  // looking in Kafka for what the last holder delivered; nothing is delivered yet
	phaseActive                // normal
	phaseDraining              // no reading, no new deliveries; ends when nothing is in flight
	phaseGone                  // lost or released; reports of it are ignored
)

// busy says which I/O of a shard is on its way: one at a time.
type busy int

const (
	idle busy = iota
	stepping
	loading
)

// shard is what one tenure of a shard knows.
type shard struct {
	number int16
	epoch  int64
	phase  phase
	// trustUntil: until then, by the monotonic clock, nobody else can hold the lease.
	trustUntil time.Time
	renewAt    time.Time // when a renewal is due
	flushed    time.Time // attempt of the last renewal that a crash of the store cannot take back
	drainBy    time.Time // when to stop waiting for what is in flight
	purged     bool      // what is in flight was purged from the sink
	loaded     bool      // what the last holder left was restored
	// corrupt: a segment could not be decoded. What was read goes on; nothing more is read.
	corrupt bool
	// behind: the last holder may have read more than was read so far. All that it read is below readTo, an xid; 0 before the
	// first read that came to the end of what is shown. After catchUpBy the shard begins to deliver although it is behind.
	behind    bool
	readTo    uint64
	catchUpBy time.Time

	cursor     store.Position
	hot        hotList
	hotCount   int64
	rows       int64 // of parked, as if the last step were written
	aggregates map[uint64]*aggregate
	txns       map[store.Key]*txn // undecided transactions with events outstanding here
	ready      deque[*aggregate]  // head may be delivered
	thaw       deque[*aggregate]  // head is a row that is not in memory
	toPark     deque[*aggregate]  // frozen, with something for the next step
	waiting    []*aggregate       // hot undecided heads
	inflight   int

	// For the next step.
	dirty    bool
	decides  []store.ParkedDecision
	unpark   []store.EventPosition
	burying  []*event
	moves    []move
	deciding map[store.Key]store.State // decisions of parked rows that are not yet known to be written

	busy     busy
	loadAt   time.Time // earliest time of the next load, after one failed
	apart    bool      // its rows are loaded in a query of their own: the last load failed, perhaps because of them
	stepping stepContent
	saved    store.Checkpoint

	operations []*operation   // not done, as they came
	known      map[int64]bool // ids of all that came

	// offsets acknowledged, for the next holder.
	offsets        map[TopicPartition]int64
	offsetsChanged bool
	offsetsAdded   bool      // a partition came
	offsetsSince   time.Time // when saved.Offsets was made

	bar      bar
	fencedAt time.Time          // when the fence of this epoch was done
	endFence context.CancelFunc // of the fence on its way, nil if there never was one

	// After a takeover: aggregates that had rows, and what the last holder delivered.
	restored   []*aggregate
	restoredTo store.Position
	published  map[publishedEvent]struct{}
	knownTo    store.Position // published matters up to here
	knownUntil time.Time      // and, for rows of parked, until then
	// offsetsFrom is when acknowledged offsets are written again in any case.
	offsetsFrom time.Time
}

// stepContent is what a step on its way will have changed.
type stepContent struct {
	parked     []*aggregate
	buried     []*event
	decides    []store.ParkedDecision
	moves      []move
	checkpoint store.Checkpoint
}

// usable reports whether records of the shard may be delivered now.
func (s *shard) usable(now time.Time) bool {
	return s.phase == phaseActive && s.bar == barNone && (now.Before(s.trustUntil) || fault.Mutant("S7")) // S7: a lease is for ever
}

// reading reports whether the shard wants more of its log.
func (s *shard) reading() bool {
	return !s.corrupt && (s.phase == phaseCatchUp || s.phase == phaseActive)
}

// find returns the aggregate with this id and hash, or nil.
func (s *shard) find(id store.Aggregate, hash uint64) *aggregate {
	for a := s.aggregates[hash]; a != nil; a = a.collision {
		if a.id == id {
			return a
		}
	}
	return nil
}

// txn returns the undecided transaction, made if it is not known.
func (c *core) txn(s *shard, k store.Key) *txn {
	t := s.txns[k]
	if t == nil {
		if t = c.freeTxns; t != nil {
			c.freeTxns = t.nextFree
			t.nextFree = nil
		} else {
			t = &txn{}
		}
		s.txns[k] = t
	}
	return t
}

// txn is an undecided transaction.
type txn struct {
	events   *event       // in memory, linked by nextInTxn
	waiting  []*aggregate // aggregates whose head is an unloaded row of it
	rows     int          // rows of parked
	nextFree *txn
}

// add links an event.
func (t *txn) add(e *event) {
	e.txn, e.nextInTxn = t, t.events
	t.events = e
}

// remove unlinks an event that leaves memory before the decision.
func (t *txn) remove(e *event) {
	for at := &t.events; *at != nil; at = &(*at).nextInTxn {
		if *at == e {
			*at = e.nextInTxn
			break
		}
	}
	e.txn, e.nextInTxn = nil, nil
}

// stopWaiting takes an aggregate off the list of those that wait.
func (t *txn) stopWaiting(a *aggregate) {
	for i, other := range t.waiting {
		if other == a {
			t.waiting = append(t.waiting[:i], t.waiting[i+1:]...)
			return
		}
	}
}

// deque is a queue that takes back what it gave.
type deque[T any] struct {
	items []T // a ring
	first int
	n     int
}

func (d *deque[T]) grow() {
	if d.n < len(d.items) {
		return
	}
	bigger := make([]T, max(16, 2*len(d.items)))
	for i := range d.n {
		bigger[i] = d.items[(d.first+i)%len(d.items)]
	}
	d.items, d.first = bigger, 0
}

// at returns the i-th from the first, which must be there.
func (d *deque[T]) at(i int) T { return d.items[(d.first+i)%len(d.items)] }

func (d *deque[T]) push(v T) {
	d.grow()
	d.items[(d.first+d.n)%len(d.items)] = v
	d.n++
}

func (d *deque[T]) pushFirst(v T) {
	d.grow()
	d.first = (d.first + len(d.items) - 1) % len(d.items)
	d.items[d.first] = v
	d.n++
}

func (d *deque[T]) pop() T {
	var zero T
	if d.n == 0 {
		return zero
	}
	v := d.items[d.first]
	d.items[d.first] = zero
	d.first = (d.first + 1) % len(d.items)
	d.n--
	return v
}
