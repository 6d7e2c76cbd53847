package relay

import (
	"github.com/outbox-platform/outbox/internal/fault"
	"github.com/outbox-platform/outbox/store"
)

// Failure policies, numbered as in outbox.v1.FailurePolicy and stored in Source.FailurePolicy. Anything else is block.
const (
	policyPark int16 = 2
	policySkip int16 = 3
)

// refusedForGood does with a head what its source wants done when Kafka refuses a record for good.
func (c *core) refusedForGood(e *event, failure *SinkError) {
	a := e.aggregate
	e.attempts++
	a.bypass = false
	policy := int16(0)
	if src := c.sources[e.rec.Key.Source]; src != nil {
		policy = src.FailurePolicy
	}
	if fault.Mutant("M5") { // and on we go
		c.succeeded(e)
		c.advance(a)
		return
	}
	c.endRetry(a, "refused again: "+failure.Error(), 0)
	switch policy {
	case policyPark:
		a.deadQueue = true
		c.bury(e, true, failure.Error())
		c.advance(a)
	case policySkip:
		c.bury(e, false, failure.Error())
		c.advance(a)
	default:
		a.attempts, a.problem = e.attempts, failure.Error()
		c.freeze(a, statusRecord)
	}
}

// bury sets the head of an aggregate aside with the next step.
func (c *core) bury(e *event, queue bool, problem string) {
	a := e.aggregate
	c.pop(e)
	e.queue, e.problem = queue, problem
	e.shard.burying = append(e.shard.burying, e)
	a.toBury++
	a.buried++
	e.shard.dirty = true
}

// buryDue adds dead letters to a step until it is big enough; then there are more. None is written before the checkpoint
// has reached it: a new holder must not read again what is a dead letter. Until then a hot one counts as outstanding.
func (c *core) buryDue(s *shard, st *store.Step, position store.Position) (more bool) {
	bytes := c.stepBytes
	kept := s.burying[:0]
	for i, e := range s.burying {
		if len(st.Bury) >= c.stepRows || bytes <= 0 {
			kept = append(kept, s.burying[i:]...)
			more = true
			break
		}
		if e.pos.Position.Compare(position) > 0 {
			kept = append(kept, e)
			continue
		}
		letter := deadLetter(e)
		bytes -= len(letter.Body)
		st.Bury = append(st.Bury, letter)
		if e.row == hot {
			s.hot.remove(e)
			s.hotCount--
		} else {
			st.Unpark = append(st.Unpark, e.pos)
			s.rows--
		}
		e.aggregate.toBury--
		s.stepping.buried = append(s.stepping.buried, e)
		c.tally.deadLetters++
	}
	clear(s.burying[len(kept):])
	s.burying = kept
	return more
}

// deadLetter is the dead letter of an event.
func deadLetter(e *event) store.DeadLetter {
	return store.DeadLetter{
		EventPosition: e.pos,
		Shard:         e.shard.number,
		Key:           e.rec.Key,
		Aggregate:     e.aggregate.id,
		Body:          store.EncodeEvent(nil, &e.rec),
		Error:         e.problem,
		Attempts:      e.attempts,
		Queue:         e.queue,
	}
}

// buriedWritten takes note that dead letters are written.
func (c *core) buriedWritten(e *event) {
	a := e.aggregate
	a.buried--
	c.release(e)
	c.removeIfIdle(a)
}
