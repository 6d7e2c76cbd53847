package relay

import (
	"context"
	"time"

	"github.com/outbox-platform/outbox/internal/fault"
	"github.com/outbox-platform/outbox/store"
)

// stepLoop writes the steps of all shards, one call at a time. A call whose outcome is unknown is repeated before anything
// else is written.
type stepLoop struct {
	running bool
	at      time.Time // earliest time of the next call
	shards  []*shard  // of steps
	steps   []store.Step
	failing bool
	tries   int
}

// wake lowers next to when a call is due.
func (l *stepLoop) wake(r *Relay, next *time.Time) {
	if l.running {
		return
	}
	if len(l.steps) > 0 {
		earlier(next, l.at)
		return
	}
	due := *next
	for _, s := range r.core.shards {
		switch {
		case s.busy != idle:
		case s.stepDue():
			due = l.at
		default:
			earlier(&due, s.renewAt)
		}
	}
	if due.Before(l.at) {
		due = l.at
	}
	earlier(next, due)
}

// startSteps writes what is due: steps of shards that changed, and renewals.
func (r *Relay) startSteps(now time.Time) {
	l := &r.checkpoint
	if l.running || now.Before(l.at) {
		return
	}
	if len(l.steps) == 0 {
		for _, s := range r.core.shards {
			if s.busy != idle || !s.stepDue() && now.Before(s.renewAt) {
				continue
			}
			l.shards = append(l.shards, s)
			if s.phase == phaseLoading || s.phase == phaseDraining && !s.loaded {
				l.steps = append(l.steps, s.renewal())
			} else {
				l.steps = append(l.steps, r.core.step(s, now))
			}
		}
		if len(l.steps) == 0 {
			return
		}
	}
	l.running = true
	l.at = now.Add(r.cfg.CheckpointEvery)
	// A crash of the store must not take back more of a lease than lies between its end and that of our trust.
	for i, s := range l.shards {
		l.steps[i].Flush = now.Sub(s.flushed) > r.cfg.LeaseTTL-r.cfg.trust()
	}
	steps := l.steps
	r.access(func(ctx context.Context) func() {
		ctx, cancel := context.WithTimeout(ctx, ioTimeout)
		defer cancel()
		fault.Point("relay.before-step")
		fenced, err := r.st.Steps(ctx, r.cfg.LeaseTTL, steps)
		fault.Point("relay.after-step")
		return func() {
			l.running = false
			r.takeSteps(fenced, err, now)
		}
	})
}

// takeSteps takes the outcome of a call that began at attempt.
func (r *Relay) takeSteps(fenced []int16, err error, attempt time.Time) {
	l := &r.checkpoint
	now := r.now()
	for _, number := range fenced {
		for _, s := range l.shards {
			if s.number == number && s.phase != phaseGone {
				r.fenced(s, now)
			}
		}
	}
	if err != nil {
		r.keepSteps()
		l.tries++
		l.at = now.Add(min(r.cfg.CheckpointEvery<<min(l.tries, 6), time.Second))
		r.metrics.storeErrors.WithLabelValues("step").Inc()
		if !l.failing {
			l.failing = true
			r.log.Error("writing steps; repeating them", "steps", len(l.steps), "error", err)
		}
		return
	}
	if l.failing {
		l.failing = false
		r.log.Info("writing steps again")
	}
	l.tries = 0
	for i, s := range l.shards {
		if s.phase != phaseGone {
			if l.steps[i].Flush {
				s.flushed = attempt
			}
			r.core.stepped(s)
			r.renewed(s, attempt)
		}
	}
	clear(l.shards)
	l.shards, l.steps = l.shards[:0], nil
}

// keepSteps keeps the steps to be repeated: those of shards that are still ours.
func (r *Relay) keepSteps() {
	l := &r.checkpoint
	shards, steps := l.shards[:0], make([]store.Step, 0, len(l.steps))
	for i, s := range l.shards {
		if s.phase != phaseGone {
			shards, steps = append(shards, s), append(steps, l.steps[i])
		}
	}
	clear(l.shards[len(shards):])
	l.shards, l.steps = shards, steps
}
