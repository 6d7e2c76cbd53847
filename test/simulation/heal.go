package simulation

import (
	"context"
	"time"

	"github.com/outbox-platform/outbox/store"
)

// healRounds is how often everything is given its turn before what is left counts as stuck.
const healRounds = 600

// heal ends all faults, and waits until everything that is committed is out and nothing is left over.
func (w *world) heal() {
	w.healing = true
	w.note("everything heals")
	w.broker.down = false
	for _, name := range topicNames {
		w.broker.topics[name].missing = false
	}
	for _, e := range w.events {
		e.poison = false
	}
	for source := sourceBlock; source <= sourceSkip; source++ {
		w.databases[source].away = false
	}
	w.finishOrphans()
	for _, s := range w.servers {
		if !s.alive {
			s.start()
		}
	}
	for _, c := range w.clients {
		if !c.over && !c.publish {
			w.rollback(c)
		}
	}
	for round := range healRounds {
		w.now = w.now.Add(100 * time.Millisecond)
		if round > 100 {
			w.now = w.now.Add(time.Second)
		}
		w.healRelays()
		w.healServers(round)
		if w.failure != "" {
			return
		}
		if round%60 == 5 {
			for _, a := range w.all {
				_, _ = w.store.RequestOperation(context.Background(), a, store.ActionRedrive, "", "") // or there is nothing to redrive
			}
		}
		if round > 8 && w.left() == 0 && w.quiet() {
			w.count["rounds"] += round
			return
		}
	}
	w.stuck()
}

func (w *world) healRelays() {
	for _, r := range w.relays {
		if !r.alive {
			r.start()
		}
		r.paused = false
		r.producer.rebuilt()
		r.work()
		w.finishTasks(&r.process)
		if !r.alive {
			continue // it was told to stop
		}
		for len(r.producer.queue) > 0 && w.failure == "" {
			if !r.producer.queue[0].written {
				r.producer.write(0)
			}
			if len(r.producer.queue) > 0 && r.producer.queue[0].written {
				r.producer.acknowledge(0)
			}
		}
		for len(r.producer.reports) > 0 && r.alive {
			r.report(0)
			if !r.alive {
				return
			}
		}
	}
}

// finishTasks gives every task its turn until there is none.
func (w *world) finishTasks(of ...*process) {
	for range 10_000 {
		busy := false
		for _, p := range of {
			for i := len(p.tasks) - 1; i >= 0; i-- {
				busy = true
				if i < len(p.tasks) {
					w.turn(p, i)
				}
			}
		}
		if !busy {
			return
		}
	}
	w.fail("stuck: accesses that do not end, long after everything healed")
}

func (w *world) healServers(round int) {
	for _, c := range w.clients {
		if c.publish && !c.prepared {
			if round%10 == 0 {
				w.send(c, store.KindPublish)
			}
		}
	}
	for _, s := range w.servers {
		if round%4 == 0 {
			s.resolve()
		}
		for range 100 {
			worked := s.work()
			worked = worked || len(s.tasks) > 0
			w.finishTasks(w.processes()...) // one server's statement may wait for another's
			if !worked {
				break
			}
		}
	}
	if round%20 == 10 {
		w.confirmFailOver()
	}
}

// confirmFailOver is an operator who knows that the old primaries are fenced: what was not committed then never was.
func (w *world) confirmFailOver() {
	for _, c := range w.byClient() {
		row := w.store.tx[c.key]
		if row == nil || row.State != store.Prepared || c.publish || c.xact.Timeline == c.db.timeline || c.committed {
			continue
		}
		r := &store.Request{Kind: store.KindAbort, Key: c.key, Resolution: &store.Resolution{Method: "operator"}}
		r.Done = func(*store.Request, store.Answer) {}
		_ = w.anyServer().writer.Submit(r) // it is asked again
	}
}

// byClient returns all clients in the order in which they came.
func (w *world) byClient() []*client {
	var all []*client
	for _, e := range w.events {
		if len(all) == 0 || all[len(all)-1] != e.client {
			all = append(all, e.client)
		}
	}
	return all
}

// quiet reports whether nobody waits for an answer.
func (w *world) quiet() bool {
	for _, c := range w.clients {
		if c.publish && !c.prepared {
			return false
		}
	}
	for _, s := range w.servers {
		if s.writer.Outstanding() > 0 {
			return false
		}
	}
	return true
}

// stuck says what is left.
func (w *world) stuck() {
	for _, t := range w.store.inProgress {
		w.note("in progress: xid %d since %s", t.xid, t.began)
	}
	for _, r := range w.relays {
		bytes, unacked := r.stepped.Memory()
		w.note("%s holds %+v, %d bytes, %d unacknowledged, %d accesses", r, r.stepped.Tenures(), bytes, unacked, len(r.tasks))
	}
	for shard := range w.store.shards {
		w.note("shard %d: %+v, %d segments", shard, w.store.shards[shard], len(w.store.log[shard]))
	}
	for _, e := range w.events {
		if e.client.committed && e.writes == 0 && !e.skipped {
			w.fail("lost: %s is committed and was not published, long after everything healed", e)
		}
	}
	for _, c := range w.byClient() {
		if row := w.store.tx[c.key]; row != nil && row.State == store.Prepared {
			w.fail("stuck: transaction %x is undecided, long after everything healed", c.key.Transaction[:2])
		}
	}
	for shard := range w.store.parked {
		for _, p := range w.store.parked[shard] {
			w.fail("stuck: %v is parked (%s), long after everything healed", p.EventPosition, p.Aggregate.ID)
		}
		for _, d := range w.store.dead[shard] {
			w.fail("stuck: %v is a dead letter (%s), long after it was redriven", d.EventPosition, d.Aggregate.ID)
		}
	}
	w.fail("stuck: something is left in a relay's memory, or a request was not answered, long after everything healed")
}
