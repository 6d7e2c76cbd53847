package simulation

import (
	"encoding/binary"
	"errors"
	"slices"

	"github.com/outbox-platform/outbox/store"
)

// arrive begins a client's transaction, if the aggregates that it wants are not locked.
func (w *world) arrive() bool {
	src := []int32{sourceBlock, sourceBlock, sourceBlock, sourcePark, sourceSkip}[w.c.n(5)]
	c := &client{key: store.Key{Source: src}, db: w.databases[src], publish: w.c.n(6) == 0}
	binary.BigEndian.PutUint16(c.key.Transaction[:], uint16(len(w.byKey)+1)) //nolint:gosec // few
	for range 1 + w.c.n(2) {
		a := store.Aggregate{Source: src, Type: "order", ID: string(rune('a'+w.c.n(3))) + []string{"", "", "p", "s"}[src]}
		if w.locks[a] != nil {
			return false
		}
		if !slices.Contains(c.locked, a) {
			c.locked = append(c.locked, a)
		}
	}
	for _, a := range c.locked {
		w.locks[a] = c
		for range 1 + w.c.n(2) {
			w.newEvent(c, a)
		}
	}
	c.over, c.committed = c.publish, c.publish
	if !c.publish {
		c.xact = c.db.Begin()
	}
	w.clients = append(w.clients, c)
	w.byKey[c.key] = c
	w.count["transactions"]++
	w.note("client %x begins: publish %v, %v", c.key.Transaction[:2], c.publish, c.events)
	return true
}

func (w *world) newEvent(c *client, a store.Aggregate) {
	e := &event{number: len(w.events), agg: a, client: c, poison: w.swarm.topics && w.c.n(10) == 0}
	w.events = append(w.events, e)
	h := w.order[a]
	if h == nil {
		h = &history{}
		w.order[a] = h
		w.all = append(w.all, a)
	}
	e.rank = len(h.events)
	h.events = append(h.events, e)
	c.events = append(c.events, e)
	value := binary.BigEndian.AppendUint32(nil, uint32(e.number)) //nolint:gosec // few
	ev := store.Event{Topic: topicNames[w.c.n(len(topicNames))], AggregateType: a.Type, AggregateID: a.ID, Payload: value}
	copy(ev.ID[:], value)
	ev.ID[15] = 1
	c.content = append(c.content, ev)
}

// unlock is the end of a local transaction.
func (w *world) unlock(c *client) {
	c.over = true
	for _, a := range c.locked {
		if w.locks[a] == c {
			delete(w.locks, a)
		}
	}
}

// rollback ends a local transaction without effect.
func (w *world) rollback(c *client) {
	w.note("client %x rolls back", c.key.Transaction[:2])
	c.db.Rollback(c.xact.XID)
	w.unlock(c)
}

// anyServer is one that is alive, or nil.
func (w *world) anyServer() *serverProcess {
	at := w.c.n(len(w.servers))
	for i := range w.servers {
		if s := w.servers[(at+i)%len(w.servers)]; s.alive {
			return s
		}
	}
	return nil
}

// send hands a request to a server. The answer may get lost.
func (w *world) send(c *client, kind store.Kind) {
	s := w.anyServer()
	if s == nil {
		return
	}
	r := &store.Request{Kind: kind, Key: c.key}
	switch kind {
	case store.KindPrepare:
		r.Events, r.Database = slices.Clone(c.content), c.xact
	case store.KindPublish:
		r.Events = slices.Clone(c.content)
		if c.key.Transaction[1]%2 == 0 {
			r.Resolution = store.KeptByCaller("")
		}
	default:
		if w.c.n(2) == 0 {
			r.Shards = c.token
		}
		c.decisions++
	}
	if kind == store.KindPrepare || kind == store.KindPublish {
		c.attempts++
		c.underWay++
	}
	r.Done = func(_ *store.Request, a store.Answer) {
		if w.happens(w.swarm.network, 10) {
			w.note("client %x: answer to %d is lost", c.key.Transaction[:2], kind)
			return
		}
		w.answered(c, kind, a)
	}
	if err := s.writer.Submit(r); err != nil {
		w.note("client %x: %d refused: %v", c.key.Transaction[:2], kind, err)
		if kind == store.KindPrepare || kind == store.KindPublish {
			c.underWay--
		}
	}
}

// answered takes an answer, and checks that it may be given.
func (w *world) answered(c *client, kind store.Kind, a store.Answer) {
	w.note("client %x: answer to %d: %v", c.key.Transaction[:2], kind, a.Err)
	var decided *store.DecidedError
	vague := errors.Is(a.Err, store.ErrUnavailable) || errors.Is(a.Err, store.ErrContention)
	if kind == store.KindPrepare || kind == store.KindPublish {
		c.underWay--
	}
	switch {
	case vague:
	case a.Err == nil && kind == store.KindPrepare:
		c.prepared, c.token = true, a.Shards
		w.checkStored(c)
	case a.Err == nil && kind == store.KindPublish:
		c.prepared, c.token = true, a.Shards
		w.checkStored(c)
		w.unlock(c)
	case a.Err == nil && kind == store.KindCommit:
		if !c.committed {
			w.fail("the Commit of a transaction that is not committed was accepted")
		}
		c.acked = true
	case a.Err == nil: // Abort
		if c.committed {
			w.fail("the Abort of a transaction that is committed was accepted")
		}
		c.acked = true
	case errors.Is(a.Err, store.ErrUnknown) && (kind == store.KindAbort || w.swarm.retention):
		c.acked = true // never stored; or purged
	case errors.As(a.Err, &decided):
		w.fail("transaction %x (committed %v): answer to %d was %v", c.key.Transaction[:2], c.committed, kind, a.Err)
	default:
		w.fail("transaction %x: answer to %d was %v", c.key.Transaction[:2], kind, a.Err)
	}
}

// act lets a client do what it does next.
func (w *world) act(c *client) {
	switch {
	case c.publish && !c.prepared:
		if c.underWay == 0 || w.c.n(8) == 0 {
			w.send(c, store.KindPublish)
		}
	case c.publish:
		c.done = true
	case c.dying:
		w.rollback(c)
		c.dying, c.done = false, true
	case !c.over && !c.prepared:
		w.prepare(c)
	case !c.over:
		switch n := w.c.n(16); {
		case n < 10:
			w.note("client %x commits", c.key.Transaction[:2])
			c.committed = true
			c.db.Commit(c.xact.XID, c.key.Transaction)
			w.unlock(c)
		case n < 12:
			w.rollback(c)
		case n < 13:
			c.dying = true
		}
	case c.acked:
		if c.committed {
			delete(c.db.markers, c.key.Transaction) // the SDK cleans up, once its Commit is acknowledged
		}
		c.done = true
	case c.decisions > 2 || w.c.n(4) == 0:
		c.done = true // it forgets, or it is gone
	case c.committed:
		w.send(c, store.KindCommit)
	default:
		w.send(c, store.KindAbort)
	}
}

func (w *world) prepare(c *client) {
	switch {
	case c.attempts == 0:
		w.send(c, store.KindPrepare)
	case c.underWay <= 0 && c.attempts < 4, w.swarm.network && c.attempts < 4 && w.c.n(6) == 0:
		w.send(c, store.KindPrepare)
	case w.c.n(8) == 0: // the deadline is over
		w.rollback(c)
	}
}
