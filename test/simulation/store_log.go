package simulation

import (
	"context"
	"fmt"
	"slices"
	"time"

	"github.com/outbox-platform/outbox/relay"
	"github.com/outbox-platform/outbox/store"
)

// statementTimeout bounds an append; a generation is not truncated before twice that.
const statementTimeout = 5 * time.Second

// appending is the append statement on its way. Its xid is given out when it begins; what it writes is visible at its end.
type appending struct {
	s          *Store
	a          *store.Append
	xid        uint64
	snapshot   int
	generation int
	began      time.Time
	stale      []int32
	won        int
	stores     []store.Key // that it has won, once it has run
	decides    []store.Key
}

// begin starts the statement: from here on its xid holds the horizon.
func (s *Store) begin(a *store.Append) *appending {
	t := &appending{s: s, a: a, xid: s.nextXID, snapshot: s.commits, generation: s.generation, began: s.now()}
	s.nextXID++
	s.inProgress = append(s.inProgress, t)
	return t
}

// blocked reports whether another statement that has run, and not ended, has changed a row that this one wants to change: an
// insert waits for any row of its key, a decision only for one that it sees and that it would decide.
func (t *appending) blocked() bool {
	for _, other := range t.s.inProgress {
		if other == t || other.won == 0 {
			continue
		}
		for i := range t.a.Prepares {
			if k := t.a.Prepares[i].Key; slices.Contains(other.stores, k) || slices.Contains(other.decides, k) {
				return true
			}
		}
		for i := range t.a.Decisions {
			if r := &t.a.Decisions[i]; slices.Contains(other.decides, r.Key) && t.s.decides(r, t.snapshot) {
				return true
			}
		}
	}
	return false
}

// run decides who wins, under the row locks.
func (t *appending) run() {
	for i, r := range t.a.Prepares {
		if t.s.tx[r.Key] != nil {
			t.stale = append(t.stale, int32(i+1)) //nolint:gosec // few
		} else {
			t.stores = append(t.stores, r.Key)
		}
	}
	for i := range t.a.Decisions {
		if t.s.decides(&t.a.Decisions[i], t.snapshot) {
			t.decides = append(t.decides, t.a.Decisions[i].Key)
		} else {
			t.stale = append(t.stale, int32(-i-1)) //nolint:gosec // few
		}
	}
	t.won = len(t.stores) + len(t.decides)
	t.s.pages[t.generation] = t.s.pages[t.generation] || t.won > 0
}

// decides reports whether a decision wins: the row is in its snapshot, undecided now, and of these shards.
func (s *Store) decides(r *store.Row, snapshot int) bool {
	row := s.tx[r.Key]
	return row != nil && row.stored <= snapshot && row.State == store.Prepared && row.Shards == r.Shards
}

// commit makes everything durable and visible.
func (t *appending) commit() []int32 {
	s := t.s
	t.end()
	s.flush()
	s.commits++
	lost := func(ordinal int) bool { return slices.Contains(t.stale, int32(ordinal)) } //nolint:gosec // few
	for i, r := range t.a.Prepares {
		if lost(i + 1) {
			continue
		}
		row := &txRow{Row: r, logXID: t.xid, stored: s.commits}
		if r.State != store.Prepared {
			s.tell(r.Key, store.Prepared, r.State)
			row.decidedAt = s.now()
		}
		if res := t.a.Resolutions[r.Key]; res != nil {
			s.resolutions[r.Key], row.resolvedAt = res, s.now()
		}
		s.tx[r.Key] = row
	}
	for i, r := range t.a.Decisions {
		if lost(-i - 1) {
			continue
		}
		row := s.tx[r.Key]
		s.tell(r.Key, row.State, r.State)
		row.State, row.decidedAt = r.State, s.now()
		if res := t.a.Resolutions[r.Key]; res != nil {
			s.resolutions[r.Key], row.resolvedAt = res, s.now()
		}
	}
	if t.won == 0 {
		return t.stale
	}
	for _, g := range t.a.Segments {
		g.XID, g.Stale = t.xid, t.stale
		log := s.log[g.Shard]
		at := len(log)
		for at > 0 && log[at-1].Position.Compare(g.Position) > 0 {
			at--
		}
		s.log[g.Shard] = slices.Insert(log, at, segment{Segment: g, generation: t.generation})
	}
	return t.stale
}

// tell tells of a decision.
func (s *Store) tell(k store.Key, before, after store.State) {
	if s.decided != nil {
		s.decided(k, before, after)
	}
}

// end lets go of the xid.
func (t *appending) end() {
	if i := slices.Index(t.s.inProgress, t); i >= 0 {
		t.s.inProgress = slices.Delete(t.s.inProgress, i, i+1)
	}
}

// running reports whether the statement is still there: a crash ends it.
func (t *appending) running() bool { return slices.Contains(t.s.inProgress, t) }

// LookUp returns rows of tx.
func (s *Store) LookUp(keys []store.Key) map[store.Key]store.Row {
	rows := map[store.Key]store.Row{}
	for _, k := range keys {
		if row := s.tx[k]; row != nil {
			rows[k] = row.Row
		}
	}
	return rows
}

// horizon is below which everything is final.
func (s *Store) horizon() uint64 {
	h := s.nextXID
	if s.broken == "horizon" {
		return h
	}
	for _, t := range s.inProgress {
		h = min(h, t.xid)
	}
	return h
}

// reader reads the log over a connection that a crash breaks.
type reader struct {
	s               *Store
	server, crashes int
	open            bool
	horizon, next   uint64 // as the last Read saw
}

// OpenReader connects.
func (s *Store) OpenReader(context.Context) (relay.Reader, error) {
	return &reader{s: s, server: s.server, crashes: s.crashes, open: true}, nil
}

// connected tells once that the connection broke, then connects again, and tells once if that leads elsewhere.
func (r *reader) connected() error {
	if r.open && r.crashes != r.s.crashes {
		r.open = false
		return fmt.Errorf("reading the log: %w", store.ErrUnavailable)
	}
	r.open, r.crashes = true, r.s.crashes
	if r.server != r.s.server {
		r.server = r.s.server
		return store.ErrStoreChanged
	}
	return nil
}

func (r *reader) Read(_ context.Context, cursors []store.Cursor, limit int) (found []store.Segment, err error) {
	err = r.s.access(func() error {
		if err := r.connected(); err != nil {
			return err
		}
		found = nil
		horizon, size := r.s.horizon(), int64(0)
		r.horizon, r.next = horizon, r.s.nextXID
		for _, c := range cursors {
			n := 0
			for _, g := range r.s.log[c.Shard] {
				if n == limit || g.XID >= horizon {
					break
				}
				if g.Position.Compare(c.Position) > 0 {
					found = append(found, g.Segment)
					n++
					size += int64(len(g.Body)) + 700*10
				}
			}
		}
		r.s.biggest = max(r.s.biggest, size)
		return nil
	})
	return found, err
}

func (r *reader) ReadAt(_ context.Context, shard int16, at []store.Position) (found []store.Segment, err error) {
	err = r.s.access(func() error {
		if err := r.connected(); err != nil {
			return err
		}
		found = nil
		for _, g := range r.s.log[shard] {
			if slices.Contains(at, g.Position) {
				found = append(found, g.Segment)
			}
		}
		return nil
	})
	return found, err
}

func (r *reader) Horizon() store.Horizon { return store.Horizon{XID: r.horizon, Next: r.next} }

func (r *reader) Close(context.Context) error { return nil }

// flush makes every step durable: whoever commits with a flush flushes what came before.
func (s *Store) flush() { s.unflushed = s.unflushed[:0] }

// remember keeps what a step is about to change, until it is flushed.
func (s *Store) remember(shard int16) {
	row, parked, dead, operations := s.shards[shard], slices.Clone(s.parked[shard]), slices.Clone(s.dead[shard]), slices.Clone(s.operations)
	s.unflushed = append(s.unflushed, unflushed{at: s.now(), undo: func() {
		s.shards[shard], s.parked[shard], s.dead[shard] = row, parked, dead
		for i := range operations {
			if operations[i].Shard == shard {
				s.operations[i] = operations[i]
			}
		}
	}})
}

// crash takes back what was not flushed, ends what is in progress, and breaks all connections. takenBack steps of those that
// may be lost are.
func (s *Store) crash(takenBack int) {
	s.crashes++
	s.inProgress = nil
	late := s.now().Add(-flushWithin)
	for i := len(s.unflushed) - 1; i >= 0 && takenBack > 0 && s.unflushed[i].at.After(late); i-- {
		s.unflushed[i].undo()
		takenBack--
	}
	s.flush()
}

// ringSize is how many generations the log has.
const ringSize = 8

// maintain is a pass over the ring: it empties what nobody needs once that is older than retention, or when the ring needs
// it, and closes the open generation when it is old enough, or full. It hands over what it removed.
func (s *Store) maintain(full bool, retention time.Duration) (gone []segment, rotated bool) {
	due := s.pages[s.generation] && (full || s.now().Sub(s.opened) >= retention/6)
	next := s.generation + 1 - ringSize // what has the place that is wanted next
	for generation := max(0, next); generation < s.generation; generation++ {
		if at, used := s.closed[generation]; used && (s.now().Sub(at) >= retention || due && generation == next) {
			gone = append(gone, s.truncate(generation)...)
		}
	}
	if _, used := s.closed[next]; due && !used {
		s.closed[s.generation], s.opened = s.now(), s.now()
		s.generation++
		rotated = true
	}
	return gone, rotated
}

// needed reports whether the holder of a shard may still read a segment.
func (s *Store) needed(g *segment) bool {
	sh := &s.shards[g.Shard]
	return g.Position.Compare(sh.Position) > 0 || g.XID >= sh.Oldest && (len(sh.Pend) > 0 || sh.Oldest < sh.Position.XID)
}

// truncate empties a closed generation, if nobody needs it and nobody can still write to it.
func (s *Store) truncate(generation int) (gone []segment) {
	if s.now().Sub(s.closed[generation]) < 2*statementTimeout {
		return nil
	}
	for shard := range s.log {
		last := -1
		for i := range s.log[shard] {
			if s.log[shard][i].generation == generation {
				last = i
			}
		}
		if last >= 0 && s.needed(&s.log[shard][last]) && s.broken != "retention" {
			return nil
		}
	}
	delete(s.closed, generation)
	delete(s.pages, generation)
	for shard := range s.log {
		kept := s.log[shard][:0:0]
		for _, g := range s.log[shard] {
			if g.generation == generation {
				gone = append(gone, g)
			} else {
				kept = append(kept, g)
			}
		}
		s.log[shard] = kept
	}
	return gone
}

// purge deletes rows of tx that are past retention and that nothing refers to.
func (s *Store) purge(retention, resolutionRetention time.Duration) (purged int) {
	for k, row := range s.tx {
		if row.State == store.Prepared || row.decidedAt.After(s.now().Add(-retention)) ||
			!row.resolvedAt.IsZero() && !row.resolvedAt.Before(s.now().Add(-resolutionRetention)) || s.refersTo(row) {
			continue
		}
		delete(s.tx, k)
		delete(s.resolutions, k)
		purged++
	}
	return purged
}

func (s *Store) refersTo(row *txRow) bool {
	for shard := range s.shards {
		if !row.Shards.Has(int16(shard)) { //nolint:gosec // few
			continue
		}
		sh := &s.shards[shard]
		bound := sh.Position.XID + 1
		switch {
		case len(sh.Pend) > 0 || sh.Oldest < sh.Position.XID:
			bound = sh.Oldest
		case slices.ContainsFunc(s.log[shard], func(g segment) bool { return g.XID == sh.Position.XID && g.Seq > sh.Position.Seq }):
			bound = sh.Position.XID
		}
		if row.logXID >= bound ||
			slices.ContainsFunc(s.parked[shard], func(p parkedRow) bool { return p.XID == row.logXID && p.Key == row.Key }) ||
			slices.ContainsFunc(s.dead[shard], func(d store.DeadLetter) bool { return d.XID == row.logXID && d.Key == row.Key }) {
			return true
		}
	}
	return false
}
