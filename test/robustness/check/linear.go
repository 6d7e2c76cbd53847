package check

import (
	"math"

	"github.com/anishathalye/porcupine"

	"github.com/outbox-platform/outbox/test/robustness/driver"
	"github.com/outbox-platform/outbox/test/robustness/journal"
)

// operation is one call about a transaction, and its answer.
type operation struct {
	f          string
	worker     int
	from, to   int64
	answer     journal.Type // empty: none
	state      State        // of get
	unanswered bool
}

// observed are the profiles whose every answer is in the journal.
var observed = map[string]bool{driver.Sync: true, driver.Race: true, driver.Duplicate: true, driver.TwoPhase: true}

// operate adds what an entry tells.
func (t *tx) operate(e *journal.Entry) {
	switch e.F {
	case journal.Prepare, journal.Again, journal.Commit, journal.Abort, journal.Get:
	default:
		return
	}
	if !observed[t.profile] {
		return
	}
	if e.Type == journal.Invoke {
		t.operations = append(t.operations, operation{f: e.F, worker: e.Worker, from: e.At, to: math.MaxInt64, unanswered: true})
		return
	}
	for i := len(t.operations) - 1; i >= 0; i-- {
		o := &t.operations[i]
		if o.f == e.F && o.unanswered {
			o.unanswered, o.answer, o.state = false, e.Type, State(e.State)
			if e.Type != journal.Info { // what is not known may take effect at any time
				o.to = e.At
			}
			return
		}
	}
}

// input and output of porcupine's operations.
type input struct {
	f     string
	truth State // what a resolver may find out at any time
}

// states that a transaction may be in, none included.
const none State = ""

// model is PREPARED, then COMMITTED or ABORTED for ever. The resolver may decide a prepared one at any moment, as the
// source's database says.
var model = (&porcupine.NondeterministicModel{
	Init: func() []any { return []any{none} },
	Step: func(state, in, out any) []any {
		i, o := in.(input), out.(operation) //nolint:forcetypeassert // ours
		before := []State{state.(State)}    //nolint:forcetypeassert // ours
		if before[0] == Prepared {
			before = append(before, i.truth)
		}
		var after []any
		for _, s := range before {
			for _, next := range step(s, i.f, o) {
				after = append(after, next)
			}
		}
		return after
	},
}).ToModel()

// step returns the states that an operation may lead to; none when its answer cannot be.
func step(s State, f string, o operation) []State {
	unknown := o.unanswered || o.answer == journal.Info
	switch f {
	case journal.Prepare, journal.Again:
		switch {
		case unknown && s == none:
			return []State{none, Prepared}
		case unknown || o.answer == journal.Fail || s != none:
			return []State{s}
		}
		return []State{Prepared}
	case journal.Commit:
		return decideStep(s, Committed, Aborted, unknown, o.answer)
	case journal.Abort:
		return decideStep(s, Aborted, Committed, unknown, o.answer)
	case journal.Get:
		if unknown || s == o.state {
			return []State{s}
		}
	}
	return nil
}

func decideStep(s, to, opposite State, unknown bool, answer journal.Type) []State {
	switch {
	case unknown && s == Prepared:
		return []State{Prepared, to}
	case unknown:
		return []State{s}
	case answer == journal.Fail && s == opposite:
		return []State{s}
	case answer == journal.OK && (s == Prepared || s == to):
		return []State{to}
	}
	return nil
}

// linearize: I10.
func (c *checker) linearize() {
	for _, t := range c.order {
		if len(t.operations) < 2 {
			continue
		}
		c.summary.Linearized++
		truth := Aborted
		if c.Truth[t.id] {
			truth = Committed
		}
		var ops []porcupine.Operation
		for n, o := range t.operations {
			ops = append(ops, porcupine.Operation{ClientId: n, Input: input{o.f, truth}, Call: o.from, Output: o, Return: o.to})
		}
		if !porcupine.CheckOperations(model, ops) {
			about := ""
			if len(t.events) > 0 {
				about = t.events[0].Aggregate
			}
			c.violate("I10", about, t.id, "transaction %s (%s): the answers fit no order: %+v", t.id, t.profile, t.operations)
		}
	}
}
