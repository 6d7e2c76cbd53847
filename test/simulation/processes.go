package simulation

import (
	"context"
	"fmt"
	"time"

	"github.com/outbox-platform/outbox/relay"
	"github.com/outbox-platform/outbox/server/resolver"
	"github.com/outbox-platform/outbox/store"
)

// relayProcess is a relay, its producer, and what comes after it when it was killed.
type relayProcess struct {
	process
	w        *world
	number   int
	starts   int
	stepped  *relay.Stepped
	producer *Producer
	stopping bool
}

func (r *relayProcess) String() string { return fmt.Sprintf("relay %d.%d", r.number, r.starts) }

func (r *relayProcess) start() {
	w := r.w
	r.starts++
	r.producer = w.broker.Producer(3 + w.c.n(20))
	r.producer.keep = func() bool { return !w.healing && w.c.n(2) == 0 }
	r.producer.onDeliver = func(rec *relay.Record) { w.checkDelivery(r, rec) }
	r.producer.onGiveUp = func() { w.disturbed++ }
	r.producer.access = w.access
	r.producer.apart = func(*relay.Record) bool { return w.c.n(2) == 0 }
	r.producer.atOnce = func(rec *relay.Record) bool {
		if w.c.n(4) > 0 {
			return false
		}
		w.refused(rec)
		return true
	}
	r.producer.again = func() bool { return w.healing || w.c.n(2) == 0 }
	cfg := w.config
	cfg.Instance = r.String()
	var err error
	if r.stepped, err = relay.NewStepped(cfg, w.store, r.producer, func() time.Time { return w.now }); err != nil {
		panic(err) // the configuration is ours
	}
	r.stepped.Limit(w.limits[0], w.limits[1], w.limits[2], w.limits[3])
	r.alive, r.stopping = true, false
	w.note("%s starts", r)
	r.work()
}

// work does what is due, and begins the accesses that it asks for.
func (r *relayProcess) work() {
	w := r.w
	r.stepped.Work()
	for _, a := range r.stepped.Begun() {
		w.begin(&r.process, a.Do, func() {
			a.Tell()
			r.work()
		})
	}
	w.checkMemory(r)
	if r.stopping && r.stepped.Stopped() {
		w.note("%s has stopped", r)
		r.end()
	}
}

// end is the end of the process. What it has handed to its producer may still arrive.
func (r *relayProcess) end() {
	r.producer.leave()
	r.w.kill(&r.process)
	r.stepped.End()
	r.stepped, r.producer = nil, nil
}

// report hands one report over.
func (r *relayProcess) report(i int) {
	d := r.producer.reports[i]
	r.producer.reports = append(r.producer.reports[:i], r.producer.reports[i+1:]...)
	if r.w.trace != nil {
		r.w.note("%s: report of %s: %v", r, r.w.eventOf(&d.Record), d.Err)
	}
	if d.Err != nil && isRefusal(d.Err) {
		r.w.refused(&d.Record)
	}
	r.stepped.Report(d)
	r.work()
}

// refused is told of records that will never be accepted.
func (w *world) refused(rec *relay.Record) {
	if e := w.eventOf(rec); e.agg.Source == sourceSkip {
		e.skipped = true // whatever the relay makes of it: it may be set aside
	}
}

func isRefusal(err error) bool {
	e, ok := err.(*relay.SinkError) //nolint:errorlint // the broker's own
	return ok && e.Class == relay.ClassRecord
}

// serverProcess is a server: the writer behind its API, and its resolver.
type serverProcess struct {
	process
	w         *world
	writer    *store.SteppedWriter
	resolving bool
}

func (s *serverProcess) start() {
	s.alive, s.resolving = true, false
	s.writer = store.NewSteppedWriter(shardCount, store.WriterConfig{MaxBatch: 1 + s.w.c.n(6), SecondWriterAt: 1 + s.w.c.n(3)}, backend{s.w})
}

// work takes a batch or a look-up, if there is one to take.
func (s *serverProcess) work() bool {
	if put, n := s.writer.Batch(); put != nil {
		s.w.note("a batch of %d", n)
		s.w.begin(&s.process, put, func() {})
		return true
	}
	if look := s.writer.LookUp(); look != nil {
		s.w.begin(&s.process, look, func() {})
		return true
	}
	return false
}

// backend is the store as a writer reaches it.
type backend struct{ w *world }

func (b backend) Now() time.Time { return b.w.now }

func (b backend) Pause(time.Duration) { b.w.others() }

// longestAttempt is a little more than the deadline of an attempt.
const longestAttempt = 6 * time.Second

func (b backend) Append(a *store.Append) (stale []int32, err error) {
	w := b.w
	began := w.now
	w.others()
	if w.happens(w.swarm.network, 12) || w.now.Sub(began) > longestAttempt {
		return nil, errLost
	}
	t := w.store.begin(a)
	defer func() { // if the server is killed meanwhile
		if r := recover(); r != nil {
			if t.running() {
				w.orphans = append(w.orphans, t)
			}
			panic(r)
		}
	}()
	for t.blocked() {
		if w.healing {
			w.finishOrphans()
		}
		w.others()
		if !t.alive(w) {
			return nil, errLost
		}
	}
	t.run()
	w.others()
	switch {
	case !t.alive(w):
		return nil, errLost
	case w.happens(w.swarm.network, 24):
		t.end()
		return nil, fmt.Errorf("deadlock: %w", store.ErrContention)
	}
	stale = t.commit()
	w.others()
	if w.happens(w.swarm.network, 12) {
		return nil, errLost
	}
	return stale, nil
}

// alive reports whether a statement goes on: a crash or its timeout ends it.
func (t *appending) alive(w *world) bool {
	if t.running() && w.now.Sub(t.began) > statementTimeout {
		t.end()
	}
	return t.running()
}

func (b backend) LookUp(keys []store.Key) (rows map[store.Key]store.Row, err error) {
	err = b.w.access(func() error {
		rows = b.w.store.LookUp(keys)
		return nil
	})
	return rows, err
}

// finishOrphan lets a statement end whose server is gone: it commits, or it was lost.
func (w *world) finishOrphan(i int) {
	t := w.orphans[i]
	w.orphans = append(w.orphans[:i], w.orphans[i+1:]...)
	switch {
	case !t.running():
	case t.blocked() || w.c.n(2) == 0:
		t.end()
	default:
		t.run()
		t.commit()
	}
}

func (w *world) finishOrphans() {
	for len(w.orphans) > 0 {
		w.finishOrphan(0)
	}
}

// resolve claims what is in doubt, asks the source databases, and writes down what they say.
func (s *serverProcess) resolve() {
	if s.resolving {
		return
	}
	s.resolving = true
	w := s.w
	w.begin(&s.process, func() {
		claimed, err := w.store.ClaimInDoubt(context.Background(), 100, 3*time.Second)
		if err != nil {
			return
		}
		bySource := map[int32][]store.Parked{}
		for _, p := range claimed {
			bySource[p.Key.Source] = append(bySource[p.Key.Source], p)
		}
		for source := sourceBlock; source <= sourceSkip; source++ {
			if len(bySource[source]) == 0 {
				continue
			}
			decisions, err := resolver.Judge(context.Background(), w.databases[source], bySource[source], "simulation")
			if err != nil {
				continue
			}
			w.others()
			for _, d := range decisions {
				w.count["resolved"]++
				w.note("resolver: %x is to be %d", d.Key.Transaction[:2], d.Kind)
				d.Done = func(*store.Request, store.Answer) {}
				_ = s.writer.Submit(d) // if not, the claim runs out
			}
			var rest []store.Key
			for _, p := range bySource[source] {
				rest = append(rest, p.Key)
			}
			_ = w.store.RecordAnswer(context.Background(), rest, "asked", 500*time.Millisecond) // else the claim runs out
		}
	}, func() { s.resolving = false })
}
