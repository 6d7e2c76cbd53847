package simulation

import (
	"context"
	"time"

	"github.com/outbox-platform/outbox/relay"
	"github.com/outbox-platform/outbox/store"
)

// happening is one kind of event, and how often it is chosen. It reports whether it could happen.
type happening struct {
	weight int
	do     func(w *world) bool
}

var happenings = []happening{
	{30, (*world).resumeTask},
	{8, (*world).moveTime},
	{7, (*world).arrive},
	{16, (*world).actOne},
	{14, (*world).serve},
	{10, (*world).produce},
	{10, (*world).report},
	{3, (*world).resolve},
	{2, (*world).ghost},
	{1, (*world).endOrphan},
	{1, (*world).crash},
	{2, (*world).restart},
	{1, (*world).pause},
	{1, (*world).stop},
	{1, (*world).disturbKafka},
	{1, (*world).disturbTopics},
	{1, (*world).crashStore},
	{1, (*world).crashSource},
	{1, (*world).retain},
	{3, (*world).operate},
}

var happeningsTotal = func() (n int) {
	for _, h := range happenings {
		n += h.weight
	}
	return n
}()

// happen lets one event happen. If the one that was chosen cannot, another one is.
func (w *world) happen() {
	for range 8 {
		n := w.c.n(happeningsTotal)
		for _, h := range happenings {
			if n -= h.weight; n < 0 {
				if h.do(w) {
					return
				}
				break
			}
		}
	}
	w.moveTime()
}

// one picks a process's task, or nothing.
func (w *world) resumeTask() bool {
	n := 0
	for _, p := range w.processes() {
		if !p.paused {
			n += len(p.tasks)
		}
	}
	if n == 0 {
		return false
	}
	at := w.c.n(n)
	for _, p := range w.processes() {
		if p.paused {
			continue
		}
		if at < len(p.tasks) {
			w.turn(p, at)
			return true
		}
		at -= len(p.tasks)
	}
	return false
}

func (w *world) processes() []*process {
	all := make([]*process, 0, len(w.relays)+len(w.servers))
	for _, r := range w.relays {
		all = append(all, &r.process)
	}
	for _, s := range w.servers {
		all = append(all, &s.process)
	}
	return all
}

var steps = []time.Duration{1, 2, 5, 10, 20, 20, 60, 60, 200, 200, 600, 1000, 2000, 4000}

func (w *world) moveTime() bool {
	w.now = w.now.Add(steps[w.c.n(len(steps))] * time.Millisecond)
	for _, r := range w.relays {
		if r.alive && !r.paused && w.c.n(4) > 0 {
			r.work()
		}
	}
	return true
}

func (w *world) actOne() bool {
	kept := w.clients[:0]
	for _, c := range w.clients {
		if !c.done {
			kept = append(kept, c)
		}
	}
	w.clients = kept
	if len(kept) == 0 {
		return false
	}
	w.act(kept[w.c.n(len(kept))])
	return true
}

func (w *world) serve() bool {
	s := w.servers[w.c.n(len(w.servers))]
	return s.alive && s.work()
}

// someRelay is any relay that is alive.
func (w *world) someRelay() *relayProcess {
	r := w.relays[w.c.n(len(w.relays))]
	if !r.alive {
		return nil
	}
	return r
}

// produce moves one record on: to the brokers, or to its acknowledgement. A process that is stopped has sent it before.
func (w *world) produce() bool {
	r := w.someRelay()
	if r == nil || len(r.producer.queue) == 0 {
		return r != nil && r.rebuild()
	}
	n := w.c.n(len(r.producer.queue))
	if r.producer.queue[n].written {
		return !r.paused && r.producer.acknowledge(n)
	}
	return r.producer.write(n)
}

// rebuild ends the rebuilding of a producer.
func (r *relayProcess) rebuild() bool {
	if !r.producer.rebuilding {
		return false
	}
	r.producer.rebuilt()
	return true
}

func (w *world) report() bool {
	r := w.someRelay()
	if r == nil || r.paused || len(r.producer.reports) == 0 {
		return false
	}
	r.report(w.c.n(len(r.producer.reports)))
	return true
}

func (w *world) resolve() bool {
	s := w.servers[w.c.n(len(w.servers))]
	if !s.alive || !w.swarm.resolver || s.resolving {
		return false
	}
	s.resolve()
	return true
}

func (w *world) ghost() bool {
	if len(w.broker.ghosts) == 0 || w.broker.down {
		return false
	}
	w.disturbed++
	w.broker.writeGhost(w.c.n(len(w.broker.ghosts)))
	return true
}

func (w *world) endOrphan() bool {
	if len(w.orphans) == 0 {
		return false
	}
	w.finishOrphan(w.c.n(len(w.orphans)))
	return true
}

func (w *world) crash() bool {
	if !w.swarm.crashes {
		return false
	}
	w.disturbed++
	if w.c.n(2) == 0 {
		s := w.servers[w.c.n(len(w.servers))]
		if !s.alive {
			return false
		}
		w.count["server crashes"]++
		w.note("a server is killed")
		w.kill(&s.process)
		return true
	}
	r := w.someRelay()
	if r == nil {
		return false
	}
	w.count["relay crashes"]++
	w.note("%s is killed", r)
	r.end()
	return true
}

func (w *world) restart() bool {
	for _, s := range w.servers {
		if !s.alive {
			s.start()
			return true
		}
	}
	for _, r := range w.relays {
		switch {
		case !r.alive:
			r.start()
			return true
		case r.paused && w.c.n(4) == 0:
			w.note("%s goes on", r)
			r.paused = false
			r.work()
			return true
		}
	}
	return false
}

// pause stops a process, as SIGSTOP does.
func (w *world) pause() bool {
	r := w.someRelay()
	if !w.swarm.pauses || r == nil || r.paused {
		return false
	}
	w.disturbed++
	w.count["pauses"]++
	w.note("%s is paused", r)
	r.paused = true
	return true
}

func (w *world) stop() bool {
	r := w.someRelay()
	if !w.swarm.stops || r == nil || r.paused || r.stopping {
		return false
	}
	w.disturbed++
	w.count["stops"]++
	w.note("%s is to stop", r)
	r.stopping = true
	r.stepped.Stop()
	r.work()
	return true
}

func (w *world) disturbKafka() bool {
	r := w.someRelay()
	if !w.swarm.kafka || r == nil {
		return false
	}
	switch w.c.n(3) {
	case 0:
		w.broker.down = !w.broker.down
		w.note("kafka down: %v", w.broker.down)
	case 1:
		w.disturbed++
		w.count["fatal"]++
		w.note("%s: its producer is rebuilt", r)
		r.producer.giveUp(relay.ClassFatal)
	default:
		if len(r.producer.queue) == 0 {
			return false
		}
		w.disturbed++
		n := w.c.n(len(r.producer.queue))
		class := []relay.Class{relay.ClassCluster, relay.ClassPurged}[w.c.n(2)]
		r.producer.giveUpOne(n, class)
	}
	return true
}

func (w *world) disturbTopics() bool {
	if !w.swarm.topics {
		return false
	}
	t := w.broker.topics[topicNames[w.c.n(len(topicNames))]]
	t.missing = !t.missing
	w.count["topics"]++
	return true
}

func (w *world) crashStore() bool {
	if !w.swarm.storeCrash {
		return false
	}
	w.disturbed++
	w.count["store crashes"]++
	lost := w.c.n(4)
	w.note("the store crashes, up to %d steps are lost", lost)
	w.store.crash(lost)
	if w.c.n(3) == 0 {
		w.store.server++
	}
	return true
}

func (w *world) crashSource() bool {
	if !w.swarm.sourceCrash && !w.swarm.failOver {
		return false
	}
	db := w.databases[1+int32(w.c.n(3))] //nolint:gosec // few
	switch {
	case w.c.n(3) == 0:
		db.away = !db.away
		w.note("database %s away: %v", db.name, db.away)
		return true
	case w.swarm.failOver && w.c.n(2) == 0:
		w.note("database %s fails over", db.name)
		db.FailOver()
	default:
		w.note("database %s crashes", db.name)
		db.Crash()
	}
	w.count["source crashes"]++
	for _, c := range w.clients {
		if c.db == db && !c.over && !c.publish {
			w.unlock(c)
			c.dying = false
		}
	}
	return true
}

func (w *world) retain() bool {
	if !w.swarm.retention {
		return false
	}
	switch w.c.n(3) {
	case 0:
		gone, _ := w.store.maintain(true, time.Hour)
		w.checkGone(gone)
	case 1:
		gone, _ := w.store.maintain(false, 0)
		w.checkGone(gone)
	default:
		w.store.purge(time.Minute, time.Hour)
	}
	return true
}

func (w *world) operate() bool {
	if !w.swarm.operators || len(w.all) == 0 {
		return false
	}
	var some []store.Aggregate
	for _, a := range w.all {
		if w.store.hasRows(a) {
			some = append(some, a)
		}
	}
	if len(some) == 0 {
		return false
	}
	a := some[w.c.n(len(some))]
	action := []store.Action{store.ActionRedrive, store.ActionRedrive, store.ActionSkip, store.ActionDiscard}[w.c.n(4)]
	_, _ = w.store.RequestOperation(context.Background(), a, action, "", "") // as it has rows
	w.note("an operator wants to %s %s", action, a.ID)
	w.count["operations"]++
	return true
}
