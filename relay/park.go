package relay

import (
	"time"

	"github.com/outbox-platform/outbox/store"
)

// freeze keeps an aggregate for long: with the next steps all its hot events become rows of parked, and so do those that
// are read until it thaws.
func (c *core) freeze(a *aggregate, st status) {
	c.setStatus(a, st)
	if e := a.head(); e != nil && e.row != hot && st != statusInDoubt {
		a.headChanged = true // its row says another cause
	}
	if !a.parking && (a.headChanged || a.back.last != nil && a.back.last.row == hot) {
		a.parking = true
		a.shard.toPark.push(a)
	}
	a.shard.dirty = true
	c.unloadFrozen(a)
}

// unloadFrozen takes what is rows already out of the memory of a frozen aggregate. Else memory may be full of events whose
// decision is in the log that is not read because memory is full. If a step is to write something of it, that does it then.
func (c *core) unloadFrozen(a *aggregate) {
	if a.frozen() && !a.parking && !a.stepping && a.held == nil { // an operation may be about to move the head
		c.unloadFront(a)
		c.unloadBack(a)
	}
}

// tick does what time alone brings about: undecided heads that waited long enough are parked, paused topics tried again.
func (c *core) tick(now time.Time) {
	for _, s := range c.shards {
		for i := 0; i < len(s.waiting); {
			a := s.waiting[i]
			e := a.head()
			limit := c.parkAfter
			if e.next != nil || c.full() {
				limit = c.parkFollowerAfter
			}
			if now.Sub(e.readAt) < limit {
				i++
				continue
			}
			c.thaw(a) // off the list: another one has its place
			c.freeze(a, statusInDoubt)
		}
	}
	c.tryPauses(now)
	for _, s := range c.shards {
		c.workOnOperations(s)
	}
}

// park adds rows of frozen aggregates to a step until it is big enough; then there are more. What is to be buried comes
// first: rows must be older than everything of their aggregate that a new holder reads again.
func (c *core) park(s *shard, st *store.Step) (more bool) {
	room := c.stepRows
	bytes := c.stepBytes
	for range s.toPark.n {
		if room <= 0 || bytes <= 0 {
			return true
		}
		a := s.toPark.pop()
		if a.toBury > 0 && a.frozen() {
			s.toPark.push(a)
			continue
		}
		a.parking = false
		if !a.frozen() {
			a.headChanged = false
			c.removeIfIdle(a)
			continue
		}
		head := a.head()
		if a.headChanged && head != nil {
			st.Park = append(st.Park, c.parkedRow(a, head, true))
			bytes -= len(st.Park[len(st.Park)-1].Body)
			room--
		}
		a.headChanged = false
		for e := a.back.first; e != nil; e = e.next {
			if e.row != hot {
				continue
			}
			if room <= 0 || bytes <= 0 {
				a.parking, more = true, true
				s.toPark.pushFirst(a)
				break
			}
			st.Park = append(st.Park, c.parkedRow(a, e, e == head))
			bytes -= len(st.Park[len(st.Park)-1].Body)
			room--
			c.becomeRow(s, e)
		}
		if !a.stepping {
			a.stepping = true
			s.stepping.parked = append(s.stepping.parked, a)
		}
	}
	return more
}

// becomeRow makes a hot event a row that the step on its way writes.
func (c *core) becomeRow(s *shard, e *event) {
	e.row = writing
	if e.txn != nil {
		e.txn.rows++
	}
	s.hot.remove(e)
	s.hotCount--
	s.rows++
	c.tally.parked++
}

// parkedRow is the row of an event.
func (c *core) parkedRow(a *aggregate, e *event, isHead bool) store.Parked {
	p := store.Parked{
		EventPosition: e.pos,
		Key:           e.rec.Key,
		Aggregate:     a.id,
		State:         e.state,
		Body:          store.EncodeEvent(nil, &e.rec),
		Database:      e.rec.Database,
		Cause:         store.CauseFollower,
	}
	switch {
	case e.state == store.Prepared:
		p.Cause = store.CauseInDoubt
	case isHead && a.status == statusTopic:
		p.Cause, p.Error, p.NextTry = store.CauseTopic, a.problem, a.pause.next
	case isHead && a.status == statusRecord:
		p.Cause, p.Error, p.Attempts = store.CauseRecord, a.problem, a.attempts
	}
	return p
}

// rowsWritten takes note that the rows of an aggregate are written. What need not be in memory leaves it.
func (c *core) rowsWritten(a *aggregate) {
	a.stepping = false
	for e := a.back.first; e != nil && e.row != hot; e = e.next {
		e.row = written
	}
	switch {
	case a.frozen() && !a.headChanged && a.held == nil: // an operation may be about to move the head
		c.unloadFront(a)
		c.unloadBack(a)
	case a.unloaded > 0:
		c.unloadBack(a) // they come after rows that must be loaded first
	}
	c.removeIfIdle(a)
}

// unloadFront takes the loaded rows out of memory.
func (c *core) unloadFront(a *aggregate) {
	for a.front.first != nil {
		c.unload(a, &a.front)
	}
}

// unloadBack takes the rows before the hot events out of memory.
func (c *core) unloadBack(a *aggregate) {
	for a.back.first != nil && a.back.first.row == written {
		c.unload(a, &a.back)
	}
}

// unload takes the first event of a queue out of memory: it stays a row.
func (c *core) unload(a *aggregate, f *fifo) {
	isHead := a.head() == f.first
	e := f.pop()
	a.unloaded++
	if t := e.txn; t != nil {
		t.remove(e)
		if isHead {
			a.headTxn = t
			t.waiting = append(t.waiting, a)
		}
	}
	c.release(e)
}

// load is rows of one aggregate to be loaded.
type load struct {
	aggregate *aggregate
	shard     int16
	id        store.Aggregate
	after     store.EventPosition
	limit     int
}

// load returns what to load for a shard now; the shard is busy until loaded. Nothing: it has nothing to load, or memory
// is full and will be freed by what is in flight.
func (c *core) load(s *shard, now time.Time) []load {
	if s.busy != idle || !s.usable(now) || s.thaw.n == 0 || now.Before(s.loadAt) {
		return nil
	}
	aggregates, rows := c.loadAggregates, c.loadRows
	if c.full() {
		if c.unacked > 0 || !c.cluster.open(now) {
			return nil
		}
		aggregates, rows = 1, 1
	}
	var loads []load
	for s.thaw.n > 0 && len(loads) < aggregates {
		a := s.thaw.pop()
		a.thawing = false
		if a.status != statusFlowing && a.held == nil || a.head() != nil || a.unloaded == 0 {
			c.removeIfIdle(a)
			continue
		}
		a.loading = true
		loads = append(loads, load{aggregate: a, shard: s.number, id: a.id, after: a.popped, limit: rows})
	}
	if len(loads) > 0 {
		s.busy = loading
	}
	return loads
}

// loaded takes the rows of one load, with the states that tx has now: they may be ahead of what was read, which does no
// harm. Call loadsDone after the last. A row that cannot be decoded blocks its aggregate.
func (c *core) loaded(l load, rows []store.Parked, now time.Time) error {
	a := l.aggregate
	if a.shard.phase == phaseGone {
		return nil
	}
	a.loading = false
	for i := range rows {
		if err := c.loadRow(a, &rows[i], now); err != nil {
			if i == 0 {
				a.problem = err.Error()
				c.freeze(a, statusRecord)
			} else {
				c.advance(a)
			}
			return err
		}
	}
	if len(rows) < l.limit { // no more: no step was written meanwhile
		a.shard.rows -= int64(a.unloaded)
		a.unloaded = 0
	}
	c.advance(a)
	return nil
}

// loadRow puts one row back into memory.
func (c *core) loadRow(a *aggregate, row *store.Parked, now time.Time) error {
	rec, err := store.DecodeEvent(row.Body)
	if err != nil {
		return err
	}
	s := a.shard
	e := c.newEvent()
	e.rec, e.pos, e.state, e.row = *rec, row.EventPosition, row.State, written
	e.rec.Key, e.rec.Database = row.Key, row.Database
	e.shard, e.aggregate, e.readAt, e.attempts = s, a, now, row.Attempts
	c.account(e, &memory{bytes: int64(len(row.Body))})
	if state, known := s.deciding[row.Key]; known {
		e.state = state
	}
	if e.state == store.Prepared {
		t := c.txn(s, row.Key)
		t.rows = max(t.rows, 1)
		t.add(e)
	}
	a.front.push(e)
	a.unloaded = max(a.unloaded-1, 0)
	return nil
}

// notLoaded takes back a load that failed.
func (c *core) notLoaded(l load) {
	if l.aggregate.shard.phase == phaseGone {
		return
	}
	l.aggregate.loading = false
	c.advance(l.aggregate)
}

// loadsDone ends the loading of a shard.
func (c *core) loadsDone(s *shard) { s.busy = idle }
