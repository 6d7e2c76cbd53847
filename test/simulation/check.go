package simulation

import (
	"slices"
	"strconv"
	"strings"

	"github.com/outbox-platform/outbox/relay"
	"github.com/outbox-platform/outbox/store"
)

// checkDecision is told of each decision that the store records.
func (w *world) checkDecision(k store.Key, before, after store.State) {
	c := w.byKey[k]
	w.note("store: %x is %s", k.Transaction[:2], after)
	switch {
	case before != store.Prepared:
		w.fail("write-once: transaction %x was %s and is now %s", k.Transaction[:2], before, after)
	case after == store.Committed && !c.committed:
		w.fail("decision: transaction %x is on record as COMMITTED, which it is not", k.Transaction[:2])
	case after == store.Aborted && (c.committed || !c.over):
		w.fail("decision: transaction %x is on record as ABORTED, but it is committed (%v) or running (%v)", k.Transaction[:2], c.committed, !c.over)
	}
}

// checkStored: what was answered OK is there.
func (w *world) checkStored(c *client) {
	if w.store.tx[c.key] == nil && !w.swarm.retention {
		w.fail("durable: transaction %x was answered OK and is not stored", c.key.Transaction[:2])
	}
}

// checkDelivery is told of each record that a relay hands to its producer: only the holder of the shard may, and nothing
// else of the aggregate may be on its way.
func (w *world) checkDelivery(r *relayProcess, rec *relay.Record) {
	e := w.eventOf(rec)
	w.note("%s: delivers %s", r, e)
	shard, epoch := epochOf(rec)
	if sh := &w.store.shards[shard]; sh.epoch != epoch || !w.now.Before(sh.leaseUntil) {
		w.fail("fencing: %s delivers %s in epoch %d of shard %d; epoch %d runs until %s", r, e, epoch, shard, sh.epoch, sh.leaseUntil)
	}
	for _, u := range r.producer.queue {
		if other := w.eventOf(&u.d.Record); other.agg == e.agg && !w.ofOtherTenure(&u.d.Record, epoch) {
			w.fail("gate: %s delivers %s while %s is on its way", r, e, other)
		}
	}
	for _, d := range r.producer.reports {
		if other := w.eventOf(&d.Record); other.agg == e.agg && !w.ofOtherTenure(&d.Record, epoch) {
			w.fail("gate: %s delivers %s before it knows what became of %s", r, e, other)
		}
	}
}

// ofOtherTenure: what an earlier tenure of the same process left in the queue is purged, and reported later.
func (w *world) ofOtherTenure(rec *relay.Record, epoch int64) bool {
	_, other := epochOf(rec)
	return other != epoch
}

func epochOf(rec *relay.Record) (shard int, epoch int64) {
	for _, h := range rec.Headers {
		if h.Name == relay.EpochHeader {
			first, second, _ := strings.Cut(string(h.Value), ":")
			shard, _ = strconv.Atoi(first)
			epoch, _ = strconv.ParseInt(second, 10, 64)
		}
	}
	return shard, epoch
}

// checkWrite is told of each record that Kafka has: I1, I4 and I6.
func (w *world) checkWrite(rec *relay.Record, late bool) {
	e := w.eventOf(rec)
	w.note("kafka: %s (late %v)", e, late)
	w.count["published"]++
	e.writes++
	if e.writes > 1 {
		w.count["duplicates"]++
		if w.disturbed == 0 {
			w.fail("duplicate: %s, and nothing had happened", e)
		}
	}
	if late {
		w.count["late"]++
	}
	if !e.client.committed {
		w.fail("phantom: %s is published, and its transaction is not committed", e)
		return
	}
	h := w.order[e.agg]
	for _, before := range h.events[min(h.first, e.rank):e.rank] {
		if before.client.committed && before.writes == 0 && !before.skipped && !e.skipped {
			w.fail("order: %s is published before %s", e, before)
			return
		}
	}
	for h.first < len(h.events) && (h.events[h.first].writes > 0 || h.events[h.first].client.over && !h.events[h.first].client.committed) {
		h.first++
	}
}

// checkStep is told of each step: no event goes that is neither published nor somewhere else, unless an operator wants it.
func (w *world) checkStep(st *store.Step) {
	for _, at := range st.Unpark {
		rows := w.store.parked[st.Shard]
		if i, found := find(rows, at, func(p *parkedRow) store.EventPosition { return p.EventPosition }); found {
			w.checkLeft(st, at, rows[i].Aggregate, rows[i].Body)
		}
	}
	for _, at := range st.Exhume {
		rows := w.store.dead[st.Shard]
		if i, found := find(rows, at, func(d *store.DeadLetter) store.EventPosition { return d.EventPosition }); found {
			w.checkLeft(st, at, rows[i].Aggregate, rows[i].Body)
		}
	}
}

// checkLeft checks an event whose row goes.
func (w *world) checkLeft(st *store.Step, at store.EventPosition, a store.Aggregate, body []byte) {
	r, err := store.DecodeEvent(body)
	if err != nil {
		w.fail("store: %v has a body that does not decode: %v", at, err)
		return
	}
	e := w.eventOf(&relay.Record{Value: r.Event.Payload})
	wanted := func(action store.Action) bool {
		return slices.ContainsFunc(w.store.operations, func(o store.Operation) bool { return !o.Done && o.Aggregate == a && o.Action == action })
	}
	switch {
	case !e.client.committed || e.writes > 0 || slices.ContainsFunc(st.Park, func(p store.Parked) bool { return p.EventPosition == at }):
	case slices.ContainsFunc(st.Bury, func(d store.DeadLetter) bool { return d.EventPosition == at }):
		if wanted(store.ActionSkip) {
			w.count["skipped"]++
			e.skipped = true // later ones go before it
		}
	case wanted(store.ActionDiscard):
		w.count["discarded"]++
		e.skipped = true
	default:
		w.fail("dropped: %s is committed and not published, and nobody wanted it dropped", e)
	}
}

// checkMemory: a relay keeps what it was told, and one read.
func (w *world) checkMemory(r *relayProcess) {
	if r.stepped == nil {
		return
	}
	bytes, unacked := r.stepped.Memory()
	if limit := w.config.MemoryBytes + w.store.biggest + 20*700; bytes > limit {
		w.fail("memory: %s keeps %d bytes, of %d", r, bytes, limit)
	}
	if unacked > w.config.MaxUnacked {
		w.fail("memory: %s has %d unacknowledged records, of %d", r, unacked, w.config.MaxUnacked)
	}
}

// checkGone: what is truncated is published, dropped, or a row.
func (w *world) checkGone(gone []segment) {
	for i := range gone {
		g := &gone[i]
		_ = g.Records(func(rec *store.Record) bool {
			if rec.IsDecision {
				return true
			}
			e := w.eventOf(&relay.Record{Value: rec.Event.Payload})
			at := store.EventPosition{Position: g.Position, Record: rec.Number}
			_, parked := find(w.store.parked[g.Shard], at, func(p *parkedRow) store.EventPosition { return p.EventPosition })
			_, dead := find(w.store.dead[g.Shard], at, func(d *store.DeadLetter) store.EventPosition { return d.EventPosition })
			if e.writes == 0 && !e.skipped && !parked && !dead && (e.client.committed || !e.client.over) {
				w.fail("retention: the log is truncated, and %s was not published", e)
			}
			return true
		})
	}
}

// left counts what is not done yet.
func (w *world) left() int {
	n := 0
	for _, e := range w.events {
		if e.client.committed && e.writes == 0 && !e.skipped {
			n++
		}
	}
	for shard := range w.store.parked {
		n += len(w.store.parked[shard]) + len(w.store.dead[shard])
	}
	for _, row := range w.store.tx {
		if row.State == store.Prepared {
			n++
		}
	}
	for _, r := range w.relays {
		for _, t := range r.stepped.Tenures() {
			n += t.Outstanding
		}
	}
	return n
}
