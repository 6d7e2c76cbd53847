package relay

import (
	"context"
	"time"

	"github.com/outbox-platform/outbox/store"
)

// startLoads loads rows of parked and dead letters for shards that want some. One query reads the rows of several shards: a
// batch of decisions lets a few aggregates of each go on. A shard whose last load failed is asked for apart, so that rows that
// cannot be read hold up their own shard only.
func (r *Relay) startLoads(now time.Time) {
	var shards []*shard
	var loads []load
	for _, s := range r.core.shards {
		if letters := s.lettersWanted(now); len(letters) > 0 {
			r.startLetters(s, letters)
			continue
		}
		of := r.core.load(s, now)
		switch {
		case len(of) == 0:
		case s.apart:
			r.startRows([]*shard{s}, of)
		case len(loads)+len(of) > r.core.loadAggregates && len(loads) > 0:
			r.startRows(shards, loads)
			shards, loads = []*shard{s}, of
		default:
			shards, loads = append(shards, s), append(loads, of...)
		}
	}
	if len(loads) > 0 {
		r.startRows(shards, loads)
	}
}

// startRows loads rows of parked: all that these shards want.
func (r *Relay) startRows(shards []*shard, loads []load) {
	r.access(func(ctx context.Context) func() {
		ctx, cancel := context.WithTimeout(ctx, ioTimeout)
		defer cancel()
		rows, err := r.loadRows(ctx, loads)
		return func() {
			now := r.now()
			for i, l := range loads {
				if err != nil {
					r.core.notLoaded(l)
					continue
				}
				if err := r.core.loaded(l, rows[i], now); err != nil {
					r.metrics.corrupt.Inc()
					r.log.Error("parked event cannot be decoded: its aggregate is blocked", "shard", l.shard,
						"aggregate_type", l.id.Type, "aggregate_id", l.id.ID, "error", err)
				}
			}
			for _, s := range shards {
				s.apart = err != nil
				if err != nil {
					r.loadFailed(s, "loading parked events", err)
				}
				r.core.loadsDone(s)
			}
		}
	})
}

// loadRows loads rows of aggregates, with the states that tx has now: a decision may be there that was read before the
// rows were loaded, by the last holder.
func (r *Relay) loadRows(ctx context.Context, loads []load) ([][]store.Parked, error) {
	of := make([]store.ParkedAfter, len(loads))
	limit := 0
	for i, l := range loads {
		of[i], limit = store.ParkedAfter{Shard: l.shard, Aggregate: l.id, After: l.after}, l.limit // the same for all
	}
	rows, err := r.st.LoadParkedOf(ctx, of, limit)
	if err != nil {
		return nil, err
	}
	var undecided []store.Key
	for _, of := range rows {
		for i := range of {
			if of[i].State == store.Prepared {
				undecided = append(undecided, of[i].Key)
			}
		}
	}
	if len(undecided) == 0 {
		return rows, nil
	}
	states, err := r.st.States(ctx, undecided)
	if err != nil {
		return nil, err
	}
	for _, of := range rows {
		for i := range of {
			if state, ok := states[of[i].Key]; ok && of[i].State == store.Prepared {
				of[i].State = state
			}
		}
	}
	return rows, nil
}

// startLetters loads a page of dead letters for each operation.
func (r *Relay) startLetters(s *shard, operations []*operation) {
	after := make([]store.EventPosition, len(operations))
	for i, o := range operations {
		after[i] = o.after
	}
	r.access(func(ctx context.Context) func() {
		ctx, cancel := context.WithTimeout(ctx, ioTimeout)
		defer cancel()
		pages := make([][]store.DeadLetter, len(operations))
		errs := make([]error, len(operations))
		for i, o := range operations {
			pages[i], errs[i] = r.st.LoadDeadLettersOf(ctx, s.number, o.Aggregate, after[i], deadLettersAtOnce)
		}
		return func() {
			for i, o := range operations {
				if errs[i] != nil {
					r.loadFailed(s, "loading dead letters", errs[i])
					o.loading = false
					continue
				}
				r.core.lettersLoaded(s, o, pages[i])
			}
			r.core.loadsDone(s)
		}
	})
}

// loadFailed logs a failed load, and lets some time pass before the next one.
func (r *Relay) loadFailed(s *shard, what string, err error) {
	r.metrics.storeErrors.WithLabelValues("load").Inc()
	s.loadAt = r.now().Add(r.cfg.RetryMin)
	r.log.Error(what, "shard", s.number, "error", err)
}

// startOperations looks for operators' requests.
func (r *Relay) startOperations(now time.Time) {
	if !r.operations.due(now) {
		return
	}
	var shards []*shard
	var numbers []int16
	for _, s := range r.core.shards {
		if s.phase == phaseActive {
			shards, numbers = append(shards, s), append(numbers, s.number)
		}
	}
	r.operations.at = now.Add(r.cfg.OperationsEvery)
	if len(numbers) == 0 {
		return
	}
	r.operations.running = true
	r.access(func(ctx context.Context) func() {
		ctx, cancel := context.WithTimeout(ctx, ioTimeout)
		defer cancel()
		found, err := r.st.PendingOperations(ctx, numbers)
		return func() {
			r.operations.running = false
			if err != nil {
				r.metrics.storeErrors.WithLabelValues("operations").Inc()
				return
			}
			for _, o := range found {
				r.takeOperation(shards, o)
			}
		}
	})
}

// takeOperation hands a request to its shard, if that was not lost meanwhile: another tenure may have done it since.
func (r *Relay) takeOperation(shards []*shard, o store.Operation) {
	for _, s := range shards {
		if s.number == o.Shard && s.phase == phaseActive && r.core.operate(s, o) {
			r.log.Info("operation begun", "operation", o.ID, "action", o.Action.String(), "shard", s.number,
				"aggregate_type", o.Aggregate.Type, "aggregate_id", o.Aggregate.ID)
		}
	}
}
