package relay

import (
	"time"

	"github.com/outbox-platform/outbox/store"
)

// core decides what is delivered when, and what must be written down: the order of events, and nothing else. It has no
// goroutine, no clock and no I/O, so that a seed can drive it through every interleaving. One goroutine owns it.
//
// In go segments (read), reports (report, refused), the time (tick), rows (restore, loaded, loadedDead), operators'
// requests (operate) and what became of a step (stepped). Out come events to deliver (next), steps to write (step) and
// rows to load (load).
//
// Every event outstanding in a shard is in exactly one of these places:
//   - hot: only in memory, in the FIFO of its aggregate and in the shard's list of hot events. A checkpoint lists it in
//     pend, or stops before it.
//   - a row of parked, in memory too or not.
//
// The events of one aggregate are, in order: front (rows in memory), unloaded (rows not in memory), back (rows just
// written, then hot events). Only the first of all may be delivered, and only when the one before it was acknowledged:
// that is the gate. So rows are always older than hot events of the same aggregate, and a position that is not younger
// than an aggregate's youngest row needs no second look when a new holder reads the log again.
//
// The machine is always as if the last step that was built had been written: a step is repeated until it is known to be
// written, or the shard is lost. While a step of a shard is on its way no rows are loaded, and the other way round: what
// is loaded is never older than what the machine believes.
type core struct {
	limits
	shards  []*shard // in order of acquisition
	turn    int      // the shard whose turn it is to deliver
	sources map[int32]*store.Source
	pauses  []*pause
	cluster clusterPause
	unacked int
	bytes   int64 // of segments and rows that events in memory point into
	tally   tally

	touched        []*aggregate // scratch of decided
	freeEvents     *event
	freeAggregates *aggregate
	freeTxns       *txn
	// sourcesRead: the sources were read at least once.
	sourcesRead bool
	// wantSources: an event names a source that is not known; look for it.
	wantSources bool
}

// limits of the machine; see Config.
type limits struct {
	parkAfter         time.Duration
	parkFollowerAfter time.Duration
	memoryBytes       int64
	maxUnacked        int
	maxPend           int // entries in a checkpoint
	stepRows          int // rows that a step may park or bury
	stepBytes         int
	loadRows          int // rows loaded at once for one aggregate
	loadAggregates    int // aggregates loaded for at once
	retryMin          time.Duration
	retryMax          time.Duration
}

// tally counts what the machine did since the start, for metrics. The loop takes differences.
type tally struct {
	published   int64
	dropped     int64 // of aborted transactions
	suppressed  int64 // found in Kafka at a takeover: not delivered again
	parked      int64
	deadLetters int64
	byClass     [ClassPurged + 1]int64 // failed deliveries
	byStatus    [statusCount]int64     // aggregates now
}

func newCore(l limits) *core {
	return &core{limits: l, sources: map[int32]*store.Source{}}
}

// full reports whether memory is at its bound: nothing more is read.
func (c *core) full() bool { return c.bytes >= c.memoryBytes }

// acquire adds a shard that was just leased. It delivers nothing before restore and start.
func (c *core) acquire(shardNumber int16, epoch int64, cp store.Checkpoint) *shard {
	s := &shard{
		number:     shardNumber,
		epoch:      epoch,
		cursor:     cp.Position,
		saved:      cp,
		aggregates: map[uint64]*aggregate{},
		txns:       map[store.Key]*txn{},
		deciding:   map[store.Key]store.State{},
		behind:     true,
		offsets:    map[TopicPartition]int64{},
		known:      map[int64]bool{},
	}
	c.shards = append(c.shards, s)
	return s
}

// reacquire begins the tenure of a shard anew, from its checkpoint.
func (c *core) reacquire(s *shard, lease store.Lease, now time.Time) *shard {
	c.forget(s, now)
	fresh := c.acquire(lease.Shard, lease.Epoch, lease.Checkpoint)
	fresh.trustUntil, fresh.renewAt, fresh.flushed = s.trustUntil, s.renewAt, s.flushed
	return fresh
}

// forget drops a shard and all that is known of it. Records in flight are reported later and then ignored.
func (c *core) forget(s *shard, now time.Time) {
	s.phase = phaseGone
	for i, other := range c.shards {
		if other == s {
			c.shards = append(c.shards[:i], c.shards[i+1:]...)
			break
		}
	}
	for _, p := range c.pauses {
		p.dropShard(s, now)
	}
	for _, a := range s.aggregates {
		for ; a != nil; a = a.collision {
			c.tally.byStatus[a.status]--
			c.forgetEvents(&a.front)
			c.forgetEvents(&a.back)
		}
	}
	for _, e := range s.burying {
		c.release(e)
	}
	for _, e := range s.stepping.buried {
		c.release(e)
	}
	for i := range s.stepping.moves {
		if e := s.stepping.moves[i].head; e != nil {
			c.release(e)
		}
	}
	s.aggregates, s.txns = nil, nil
}

// forgetEvents frees events but for the one in flight: its report is still to come.
func (c *core) forgetEvents(f *fifo) {
	for e := f.pop(); e != nil; e = f.pop() {
		if e.inflight {
			e.next = nil
			continue
		}
		c.release(e)
	}
}

// newEvent returns an empty event.
func (c *core) newEvent() *event {
	e := c.freeEvents
	if e == nil {
		return &event{}
	}
	c.freeEvents = e.next
	e.next = nil
	return e
}

// release gives an event and its share of memory back. Nothing may point to it any more.
func (c *core) release(e *event) {
	if m := e.memory; m != nil {
		if m.refs--; m.refs == 0 {
			c.bytes -= m.bytes
		}
	}
	*e = event{next: c.freeEvents}
	c.freeEvents = e
}
