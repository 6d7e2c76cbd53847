package relay

import (
	"time"

	"github.com/outbox-platform/outbox/internal/fault"
	"github.com/outbox-platform/outbox/store"
)

// segmentOverhead is about what an event costs in memory beside what it points into.
const segmentOverhead = 700

// feed takes the next segment of a shard: pos is its place, bytes its size, and records yields what is in it. If records
// fails, the shard is corrupt: what was yielded stands, nothing more is read.
func (c *core) feed(s *shard, pos store.Position, bytes int, records func(func(*store.Record) bool) error, now time.Time) error {
	m := &memory{bytes: int64(bytes)}
	err := records(func(r *store.Record) bool {
		if r.IsDecision {
			c.decided(s, r.Key, r.State, now)
		} else {
			c.prepared(s, store.EventPosition{Position: pos, Record: r.Number}, m, r, now)
		}
		return true
	})
	if err != nil {
		s.corrupt = true
		return err
	}
	s.cursor = pos
	s.dirty = true
	if s.restored != nil && pos.Compare(s.restoredTo) >= 0 {
		c.endRestored(s)
	}
	return nil
}

// caughtUp takes note that a read brought all of a shard's log below a horizon, and reports whether everything that the last
// holder may have read has been read. It may have read more than we are shown at first: the horizon of a reader that knows
// which transactions are foreign is further than that of one that has yet to learn it. But all that it read had begun before
// our first read.
func (c *core) caughtUp(s *shard, h store.Horizon) bool {
	if s.readTo == 0 {
		s.readTo = h.Next
	}
	s.behind = s.behind && h.XID < min(s.readTo, h.Next) // a crash of the store may have taken ids back
	return !s.behind
}

// endRestored forgets which rows the last holder left: what is read from now on is new.
func (c *core) endRestored(s *shard) {
	all := s.restored
	s.restored = nil
	for _, a := range all {
		a.restored = false
		c.removeIfIdle(a)
	}
}

// prepared takes an event that was read.
func (c *core) prepared(s *shard, pos store.EventPosition, m *memory, r *store.Record, now time.Time) {
	a := c.aggregate(s, store.Aggregate{Source: r.Key.Source, Type: r.Event.AggregateType, ID: r.Event.AggregateID})
	if a.restored && pos.Compare(a.lastRow) <= 0 {
		return // the last holder had parked it: it is a row of parked, or done
	}
	c.append(a, pos, m, r, r.State, now)
	if a.frozen() && !a.parking {
		a.parking = true
		s.toPark.push(a)
	}
	c.advance(a)
}

// append adds a hot event to its aggregate. The record is copied, what it points to is not.
func (c *core) append(a *aggregate, pos store.EventPosition, m *memory, r *store.Record, state store.State, now time.Time) {
	e := c.newEvent()
	e.rec, e.pos, e.state, e.shard, e.aggregate, e.readAt = *r, pos, state, a.shard, a, now
	c.account(e, m)
	switch state {
	case store.Prepared:
		c.txn(a.shard, r.Key).add(e)
	case store.Committed:
		e.decidedAt = now
	}
	a.back.push(e)
	a.shard.hot.push(e)
	a.shard.hotCount++
}

// account makes an event one of those that keep a piece of memory.
func (c *core) account(e *event, m *memory) {
	if m.refs == 0 {
		c.bytes += m.bytes
	}
	m.refs++
	m.bytes += segmentOverhead
	c.bytes += segmentOverhead
	e.memory = m
}

// decided takes a decision that was read. If rows of parked are undecided because of it, the next step says so.
func (c *core) decided(s *shard, k store.Key, state store.State, now time.Time) {
	t := s.txns[k]
	if t == nil {
		// Known already, from tx. Rows that the last holder left may not know it yet.
		if s.rows > 0 && s.behind {
			s.decides = append(s.decides, store.ParkedDecision{Key: k, State: state})
			s.deciding[k] = state
			s.dirty = true
		}
		return
	}
	delete(s.txns, k)
	if t.rows > 0 {
		s.decides = append(s.decides, store.ParkedDecision{Key: k, State: state})
		s.deciding[k] = state
		s.dirty = true
	}
	// First every event learns it, then the aggregates look at their heads: one of them may drop several at once.
	touched := c.touched[:0]
	for e := t.events; e != nil; {
		next := e.nextInTxn
		e.state, e.decidedAt, e.txn, e.nextInTxn = state, now, nil, nil
		if fault.Mutant("M6") && state == store.Committed { // whose Commit comes first is first
			e.aggregate.overtake(e)
		}
		if a := e.aggregate; a.head() == e && !a.touched {
			a.touched = true
			touched = append(touched, a)
		}
		e = next
	}
	for _, a := range t.waiting {
		a.headTxn = nil
		if !a.touched {
			a.touched = true
			touched = append(touched, a)
		}
	}
	clear(t.waiting)
	*t = txn{waiting: t.waiting[:0], nextFree: c.freeTxns}
	c.freeTxns = t
	for _, a := range touched {
		a.touched = false
		c.thaw(a)
		c.advance(a)
	}
	c.touched = touched[:0]
}
