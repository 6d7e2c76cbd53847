package relay

import (
	"context"
	"log/slog"
	"sync"
	"time"
)

// Stepped is a relay without goroutines and without a clock of its own: whoever steps it says what time it is, when each
// access to the store takes place, and when the relay is told. It is how a seed drives everything that Run does through its
// interleavings; see test/simulation. Not safe for concurrent use.
type Stepped struct {
	r     *Relay
	begun []*Access
	end   func()
}

// Access is an access to the store or to the sink that a Stepped has begun. Do makes it, Tell hands the outcome to the relay:
// each once, in this order.
type Access struct {
	r    *Relay
	work func() func()
	told func()
}

// steppedMetrics are shared by all Stepped: nobody reads them.
var steppedMetrics = sync.OnceValues(func() (*metrics, error) { return newMetrics(nil) })

// NewStepped returns a relay that takes the time from now.
func NewStepped(cfg Config, st Store, sink Sink, now func() time.Time) (*Stepped, error) {
	cfg = cfg.withDefaults()
	if err := cfg.validate(); err != nil {
		return nil, err
	}
	m, err := steppedMetrics()
	if err != nil {
		return nil, err
	}
	own := *m // what was counted last is a relay's own
	own.setAt = now().Add(1000 * time.Hour)
	s := &Stepped{r: newRelay(cfg, st, sink, slog.New(slog.DiscardHandler), &own)}
	s.r.now = now
	s.r.after = func(time.Duration) <-chan time.Time { // how long an access takes is its caller's to say
		over := make(chan time.Time)
		close(over)
		return over
	}
	s.r.spawn = func(work func() func()) { s.begun = append(s.begun, &Access{r: s.r, work: work}) }
	s.end = s.r.begin(context.Background()) //nolint:forbidigo // a simulation has no caller whose patience could end
	return s, nil
}

// Limit sets how much the state machine does at once, to reach its bounds with few events: entries of a checkpoint, rows of
// a step, and rows and aggregates of a load.
func (s *Stepped) Limit(pend, stepRows, loadRows, loadAggregates int) {
	c := s.r.core
	c.maxPend, c.stepRows, c.loadRows, c.loadAggregates = pend, stepRows, loadRows, loadAggregates
}

// Work does everything that is due now, as the loop of Run does after each event, and returns how long nothing will be.
func (s *Stepped) Work() time.Duration {
	s.r.work(s.r.now())
	return s.r.wait(s.r.now())
}

// Begun returns the accesses begun since it was last called, in order.
func (s *Stepped) Begun() []*Access {
	begun := s.begun
	s.begun = nil
	return begun
}

// Do makes the access.
func (a *Access) Do() { a.told = a.work() }

// Tell hands the outcome to the relay.
func (a *Access) Tell() {
	a.r.inProgress--
	a.told()
}

// Report hands a report of the sink to the relay.
func (s *Stepped) Report(d *Delivery) { s.r.takeReports(d) }

// Stop begins what Run does when its context ends; Stopped reports whether that is over.
func (s *Stepped) Stop() { s.r.beginStop(s.r.now()) }

// Stopped reports whether a relay that was stopped may end.
func (s *Stepped) Stopped() bool { return s.r.stopped(s.r.now()) }

// End gives up what the relay holds. It is as if the process were killed.
func (s *Stepped) End() { s.end() }

// Tenure is what a relay believes about a shard that it holds.
type Tenure struct {
	Shard  int16
	Epoch  int64
	Active bool // it delivers
	// Outstanding counts the events that it knows of and that are neither done nor dead, Hot those of them that are in memory
	// only.
	Outstanding, Hot int
}

// Tenures returns what the relay holds, in order of acquisition.
func (s *Stepped) Tenures() []Tenure {
	all := make([]Tenure, 0, len(s.r.core.shards))
	for _, sh := range s.r.core.shards {
		all = append(all, Tenure{
			Shard: sh.number, Epoch: sh.epoch, Active: sh.phase == phaseActive,
			Outstanding: int(sh.hotCount + sh.rows), Hot: int(sh.hotCount),
		})
	}
	return all
}

// Memory returns what the relay keeps of the log, in bytes, and how many records it waits for reports of.
func (s *Stepped) Memory() (bytes int64, unacked int) { return s.r.core.bytes, s.r.core.unacked }
