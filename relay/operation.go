package relay

import (
	"time"

	"github.com/outbox-platform/outbox/store"
)

// deadLettersAtOnce is how many dead letters one step moves.
const deadLettersAtOnce = 100

// operation is an operator's request at work. It holds its aggregate: nothing of it moves meanwhile. If the shard is lost
// before the outcome is written, the next holder begins again; every move may be repeated.
type operation struct {
	store.Operation
	aggregate *aggregate // nil: not begun
	stage     stage
	after     store.EventPosition // dead letters up to here were moved
	loading   bool                // a page of dead letters is being loaded
	moving    bool                // a move of it is not yet written
}

type stage int

const (
	stageBegin   stage = iota
	stageLetters       // dead letters are moved, page by page
	stageHead          // the head is set aside or dropped
	stageRetry         // the head is tried again
	stageDone          // the outcome is written, or about to be
)

// move is a change of rows that an operation makes with the next step, or, when the head is set aside or dropped, with the
// first whose checkpoint is not before it: a new holder must not read it again.
type move struct {
	operation *operation
	park      []store.Parked
	exhume    []store.EventPosition
	head      *event // set aside (bury) or dropped
	bury      bool
	outcome   string // of the operation; "": it goes on
}

// operate takes a request. False: it is known already, and may be done: the request may have been read before that.
func (c *core) operate(s *shard, o store.Operation) bool {
	if s.known[o.ID] {
		return false
	}
	s.known[o.ID] = true
	s.operations = append(s.operations, &operation{Operation: o})
	return true
}

// workOnOperations takes each operation as far as it goes now.
func (c *core) workOnOperations(s *shard) {
	if s.busy != idle || s.phase != phaseActive {
		return
	}
	for _, o := range s.operations {
		if !o.moving && !o.loading {
			c.workOn(s, o)
		}
	}
}

func (c *core) workOn(s *shard, o *operation) {
	if o.stage == stageBegin && !c.begin(s, o) {
		return
	}
	a := o.aggregate
	if o.stage != stageHead {
		return
	}
	e := a.head()
	switch {
	case !a.blocked():
		c.conclude(s, o, "nothing to do: the aggregate is not blocked any more")
	case e == nil && !a.thawing && !a.loading:
		a.thawing = true
		s.thaw.push(a)
	case e != nil && e.row == written && !a.headChanged:
		m := move{operation: o, head: e, bury: o.Action == store.ActionSkip}
		m.outcome = "dropped the head"
		if m.bury {
			m.outcome = "set the head aside as a dead letter"
		}
		o.Events = 1
		s.move(m)
	}
}

// begin holds the aggregate once nothing of it is on its way, and decides what to do. False: not yet.
func (c *core) begin(s *shard, o *operation) bool {
	a := o.aggregate
	if a == nil {
		a = c.aggregate(s, o.Aggregate)
		if a.held != nil || a.retry != nil {
			return false // after the one before
		}
		o.aggregate, a.held = a, o
	}
	if a.inflight || a.buried > 0 {
		return false
	}
	if a.status == statusWaiting {
		c.thaw(a) // its head may not be the head for long
	}
	switch {
	case o.Action == store.ActionRedrive, o.Action == store.ActionDiscard && !a.blocked():
		o.stage = stageLetters
	case a.blocked() && (o.Action == store.ActionSkip || o.Action == store.ActionDiscard):
		o.stage = stageHead
	default:
		c.conclude(s, o, "nothing to do: the aggregate is not blocked by a record or topic")
	}
	return true
}

// lettersWanted returns the operations that need a page of dead letters now. The shard is busy until loadsDone.
func (s *shard) lettersWanted(now time.Time) []*operation {
	if s.busy != idle || s.phase != phaseActive || now.Before(s.loadAt) {
		return nil
	}
	var wanted []*operation
	for _, o := range s.operations {
		if o.stage == stageLetters && !o.moving && !o.loading {
			o.loading = true
			wanted = append(wanted, o)
		}
	}
	if len(wanted) > 0 {
		s.busy = loading
	}
	return wanted
}

// lettersLoaded takes a page of dead letters: moves them, or concludes if there is none.
func (c *core) lettersLoaded(s *shard, o *operation, page []store.DeadLetter) {
	o.loading = false
	if s.phase == phaseGone {
		return
	}
	if len(page) == 0 {
		c.lettersMoved(s, o)
		return
	}
	m := move{operation: o}
	for i := range page {
		l := &page[i]
		m.exhume = append(m.exhume, l.EventPosition)
		if o.Action == store.ActionRedrive {
			m.park = append(m.park, store.Parked{
				EventPosition: l.EventPosition, Key: l.Key, Aggregate: l.Aggregate, State: store.Committed, Body: l.Body,
				Cause: store.CauseRedriven, Attempts: l.Attempts,
			})
		}
	}
	o.after = page[len(page)-1].EventPosition
	o.Events += int64(len(page))
	s.move(m)
}

// lettersMoved goes on when an aggregate has no dead letters any more.
func (c *core) lettersMoved(s *shard, o *operation) {
	a := o.aggregate
	a.deadQueue = false
	switch {
	case o.Action == store.ActionDiscard && o.Events > 0:
		c.conclude(s, o, "dropped the dead letters")
	case o.Action == store.ActionDiscard:
		c.conclude(s, o, "nothing to do: no dead letters, and not blocked by a record or topic")
	case o.Events > 0:
		// The rows that were put back come first. All rows are loaded again, in order.
		c.unloadFront(a)
		c.unloadBack(a)
		a.popped = store.EventPosition{}
		a.headChanged = false
		c.thaw(a)
		c.conclude(s, o, "put the dead letters back")
	case a.blocked():
		o.stage = stageRetry
		a.held, a.retry = nil, o
		a.bypass = true
		c.thaw(a)
		c.advance(a)
	default:
		c.conclude(s, o, "nothing to do: no dead letters, and not blocked by a record or topic")
	}
}

// endRetry concludes the operation that wanted the head tried again, if there is one.
func (c *core) endRetry(a *aggregate, outcome string, events int64) {
	if o := a.retry; o != nil {
		a.retry = nil
		o.Events = events
		c.conclude(a.shard, o, outcome)
	}
}

// conclude lets the aggregate go and writes the outcome with the next step.
func (c *core) conclude(s *shard, o *operation, outcome string) {
	a := o.aggregate
	o.stage, o.aggregate = stageDone, nil
	s.move(move{operation: o, outcome: outcome})
	if a.held == o {
		a.held = nil
		c.unloadFrozen(a)
		c.advance(a)
	}
}

// move queues a move.
func (s *shard) move(m move) {
	m.operation.moving = true
	s.moves = append(s.moves, m)
	s.dirty = true
}

// moveDue adds the moves whose time has come to a step.
func (c *core) moveDue(s *shard, st *store.Step) {
	kept := s.moves[:0]
	for _, m := range s.moves {
		if m.head != nil && m.head.pos.Position.Compare(st.Checkpoint.Position) > 0 {
			kept = append(kept, m)
			continue
		}
		st.Park = append(st.Park, m.park...)
		st.Exhume = append(st.Exhume, m.exhume...)
		if e := m.head; e != nil {
			e.problem, e.attempts = e.aggregate.problem, e.aggregate.attempts
			c.pop(e)
			st.Unpark = append(st.Unpark, e.pos)
			s.rows--
			if m.bury {
				st.Bury = append(st.Bury, deadLetter(e))
				c.tally.deadLetters++
			}
		}
		if m.outcome != "" {
			st.Operations = append(st.Operations, store.OperationOutcome{
				ID: m.operation.ID, Outcome: m.outcome, Events: m.operation.Events,
			})
		}
		s.stepping.moves = append(s.stepping.moves, m)
	}
	clear(s.moves[len(kept):])
	s.moves = kept
}

// moved takes note that a move is written.
func (c *core) moved(s *shard, m *move) {
	o := m.operation
	a := o.aggregate
	o.moving = false
	if len(m.park) > 0 {
		a.unloaded += len(m.park)
		s.rows += int64(len(m.park))
	}
	if m.head != nil {
		c.release(m.head)
		c.thaw(a)
	}
	if m.outcome == "" {
		return
	}
	for i, other := range s.operations {
		if other == o {
			s.operations = append(s.operations[:i], s.operations[i+1:]...)
			break
		}
	}
	if a != nil {
		a.held = nil
		c.unloadFrozen(a)
		c.advance(a)
	}
}
