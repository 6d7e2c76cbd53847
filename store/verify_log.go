package store

import (
	"context"
	"fmt"
	"slices"

	"github.com/jackc/pgx/v5"
)

// transactionRow is a row of tx, as far as the log and the parked rows are compared with it.
type transactionRow struct {
	state  State
	shards ShardSet
	digest uint64
	logXID uint64
}

const transactionRowsSQL = `
	SELECT t.source_id, t.tx_id, t.state, t.shards, t.digest, t.log_xid
	FROM unnest($1::int[], $2::uuid[]) u (source_id, tx_id) JOIN outbox.tx t ON t.source_id = u.source_id AND t.tx_id = u.tx_id`

// transactionRows reads the rows of these transactions. A key may be given several times.
func (v *verification) transactionRows(ctx context.Context, keys []Key) (map[Key]transactionRow, error) {
	found := make(map[Key]transactionRow, len(keys))
	if len(keys) == 0 {
		return found, nil
	}
	keys = slices.Clone(keys)
	slices.SortFunc(keys, compareKeys)
	keys = slices.Compact(keys)
	sources, ids := make([]int32, len(keys)), make([][16]byte, len(keys))
	for i, k := range keys {
		sources[i], ids[i] = k.Source, k.Transaction
	}
	rows, err := v.tx.Query(ctx, transactionRowsSQL, sources, ids)
	if err != nil {
		return nil, storeError("reading tx", err)
	}
	var k Key
	var t transactionRow
	var shards, digest int64
	_, err = pgx.ForEachRow(rows, []any{&k.Source, (*[16]byte)(&k.Transaction), &t.state, &shards, &digest, &t.logXID}, func() error {
		t.shards, t.digest = ShardSet(shards), uint64(digest) //nolint:gosec // bits
		found[k] = t
		return nil
	})
	return found, storeError("reading tx", err)
}

// log walks over the log, shard by shard.
func (v *verification) log(ctx context.Context) error {
	err := v.each(ctx, InvariantSegment, "shard %v: segment %v/%v, but there are %v shards", `
		SELECT shard, xid, seq, $1::int FROM outbox.log WHERE shard < 0 OR shard >= $1 LIMIT 1000`, v.shardCount)
	if err != nil {
		return err
	}
	for i := range v.checkpoints {
		w := &logWalk{verification: v, c: &v.checkpoints[i], awaited: map[Key]EventPosition{}, at: Position{Seq: -1}}
		if err := w.run(ctx); err != nil {
			return err
		}
	}
	return nil
}

// logWalk is the walk over the log of one shard. It holds one chunk of segments at a time.
type logWalk struct {
	*verification
	c  *checkpoint
	at Position // walked up to here

	// awaited are the transactions that are decided by tx and undecided by what was walked over: their decision must come.
	awaited map[Key]EventPosition
	// undecided is the first event in doubt of each aggregate that has one.
	undecided map[int64]EventPosition
	batch     batchDigests

	// of the chunk:
	transactions map[Key]transactionRow
	setAside     map[EventPosition]bool // parked, or a dead letter
}

// How much of the log is held at once: a chunk of this many segments at most, fewer while they are large.
const (
	maxChunkSegments = 256
	chunkBytes       = 4 << 20
)

const walkSQL = `
	SELECT l.shard, l.xid, l.seq, l.stale, l.body FROM outbox.log l
	WHERE l.shard = $1 AND (l.xid, l.seq) > ($2, $3) ORDER BY l.xid, l.seq LIMIT $4`

func (w *logWalk) run(ctx context.Context) error {
	if err := w.believedUndecided(ctx); err != nil {
		return err
	}
	if err := w.firstUndecided(ctx); err != nil {
		return err
	}
	for limit := maxChunkSegments / 16; ; {
		rows, err := w.tx.Query(ctx, walkSQL, w.c.shard, w.at.XID, w.at.Seq, limit)
		if err != nil {
			return storeError("walking over the log", err)
		}
		chunk, err := pgx.CollectRows(rows, scanLogRow)
		if err != nil {
			return storeError("walking over the log", err)
		}
		if err := w.chunk(ctx, chunk); err != nil {
			return err
		}
		if len(chunk) < limit {
			break
		}
		bytes := 0
		for i := range chunk {
			bytes += len(chunk[i].Body)
		}
		limit = min(max(chunkBytes/(bytes/len(chunk)+1), 4), maxChunkSegments)
	}
	if err := w.finishBatch(ctx); err != nil {
		return err
	}
	for key, at := range w.awaited {
		w.violated(InvariantDecisionReachesShard, "shard %d: %s of source %d transaction %s counts as undecided, tx says otherwise, and no decision follows in the log",
			w.c.shard, at, key.Source, key.Transaction)
	}
	return nil
}

// believedUndecided starts with the events whose decision the holder has not read: those in pend, and the parked ones.
func (w *logWalk) believedUndecided(ctx context.Context) error {
	var keys []Key
	for _, e := range w.c.pend {
		if e.State == Prepared {
			keys = append(keys, e.Key)
		}
	}
	known, err := w.transactionRows(ctx, keys)
	if err != nil {
		return err
	}
	for _, e := range w.c.pend {
		if t, found := known[e.Key]; found && e.State == Prepared && t.state != Prepared {
			w.awaited[e.Key] = e.EventPosition
		}
	}
	rows, err := w.tx.Query(ctx, `
		SELECT p.xid, p.seq, p.record, p.source_id, p.tx_id FROM outbox.parked p JOIN outbox.tx t USING (source_id, tx_id)
		WHERE p.shard = $1 AND p.state = 0 AND t.state <> 0`, w.c.shard)
	if err != nil {
		return storeError("reading parked events", err)
	}
	var at EventPosition
	var k Key
	_, err = pgx.ForEachRow(rows, []any{&at.XID, &at.Seq, &at.Record, &k.Source, (*[16]byte)(&k.Transaction)}, func() error {
		w.awaited[k] = at
		return nil
	})
	return storeError("reading parked events", err)
}

// firstUndecided finds the heads in doubt, by hash: two aggregates with one hash are not worth telling apart here, and the
// walk compares the same way.
func (w *logWalk) firstUndecided(ctx context.Context) error {
	w.undecided = map[int64]EventPosition{}
	rows, err := w.tx.Query(ctx, `
		SELECT p.agg, p.xid, p.seq, p.record FROM outbox.parked p JOIN outbox.tx t USING (source_id, tx_id)
		WHERE p.shard = $1 AND p.state = 0 AND t.state = 0`, w.c.shard)
	if err != nil {
		return storeError("reading events in doubt", err)
	}
	var agg int64
	var at EventPosition
	_, err = pgx.ForEachRow(rows, []any{&agg, &at.XID, &at.Seq, &at.Record}, func() error {
		if first, found := w.undecided[agg]; !found || at.Compare(first) < 0 {
			w.undecided[agg] = at
		}
		return nil
	})
	return storeError("reading events in doubt", err)
}

// chunk checks some segments, in order.
func (w *logWalk) chunk(ctx context.Context, chunk []Segment) (err error) {
	if len(chunk) == 0 {
		return nil
	}
	var keys []Key
	for i := range chunk {
		// What does not decode is reported when its turn comes.
		_ = chunk[i].Records(func(r *Record) bool {
			keys = append(keys, r.Key)
			return true
		})
	}
	if w.transactions, err = w.transactionRows(ctx, keys); err != nil {
		return err
	}
	last := chunk[len(chunk)-1].Position
	if w.setAside, err = w.setAsideBetween(ctx, chunk[0].Position, last); err != nil {
		return err
	}
	for i := range chunk {
		s := &chunk[i]
		if s.XID != w.batch.xid {
			if err := w.finishBatch(ctx); err != nil {
				return err
			}
			w.batch = batchDigests{xid: s.XID}
			if s.Stale != nil {
				if err := w.stale(ctx, s); err != nil {
					return err
				}
			}
		}
		err := s.Records(func(r *Record) bool {
			at := EventPosition{Position: s.Position, Record: r.Number}
			if r.IsDecision {
				w.decision(at, r)
			} else {
				w.event(at, r)
			}
			return true
		})
		if err != nil {
			w.violated(InvariantSegment, "%v", err)
		}
	}
	w.at = last
	return nil
}

func (w *logWalk) setAsideBetween(ctx context.Context, first, last Position) (map[EventPosition]bool, error) {
	rows, err := w.tx.Query(ctx, `
		SELECT xid, seq, record FROM outbox.parked WHERE shard = $1 AND (xid, seq) >= ($2, $3) AND (xid, seq) <= ($4, $5)
		UNION ALL
		SELECT xid, seq, record FROM outbox.dead_letter WHERE shard = $1 AND (xid, seq) >= ($2, $3) AND (xid, seq) <= ($4, $5)`,
		w.c.shard, first.XID, first.Seq, last.XID, last.Seq)
	if err != nil {
		return nil, storeError("reading what is set aside", err)
	}
	found := map[EventPosition]bool{}
	var at EventPosition
	_, err = pgx.ForEachRow(rows, []any{&at.XID, &at.Seq, &at.Record}, func() error {
		found[at] = true
		return nil
	})
	return found, storeError("reading what is set aside", err)
}

// event checks one valid event of the log.
func (w *logWalk) event(at EventPosition, r *Record) {
	pending := w.c.pending(at)
	needed := at.Position.Compare(w.c.Position) > 0 || pending != nil
	t, known := w.transactions[r.Key]
	where := func() string {
		return fmt.Sprintf("shard %d: event %s/%d of source %d transaction %s", w.c.shard, at.Position, at.Record, r.Key.Source, r.Key.Transaction)
	}
	switch {
	case !known && !needed:
		return // purged
	case !known:
		w.violated(InvariantEventHasTransaction, "%s is needed, and tx does not know it", where())
		return
	case t.logXID != at.XID && !needed && t.logXID > at.XID:
		return // it was purged, and its id came once more
	case t.logXID != at.XID:
		w.violated(InvariantEventHasTransaction, "%s is a second copy: tx names batch %d", where(), t.logXID)
		return
	case !t.shards.Has(w.c.shard):
		w.violated(InvariantEventHasTransaction, "%s is not in a shard that tx names (%x)", where(), uint64(t.shards))
	}
	w.batch.add(w.c.shard, r, t)
	if r.State == Committed && t.state != Committed {
		w.violated(InvariantDecisionAgrees, "%s came by Publish, tx says %s", where(), t.state)
	}
	if needed {
		if r.State == Prepared && t.state != Prepared && (pending == nil || pending.State == Prepared) {
			w.awaited[r.Key] = at
		}
		return
	}
	if w.setAside[at] {
		return
	}
	if t.state == Prepared {
		w.violated(InvariantUndecidedKept, "%s is done, tx says PREPARED", where())
	}
	if t.state == Committed {
		hash := aggregateHash(Aggregate{Source: r.Key.Source, Type: r.Event.AggregateType, ID: r.Event.AggregateID})
		if first, found := w.undecided[hash]; found && first.Compare(at) < 0 {
			w.violated(InvariantOrderKept, "%s is done, and %s/%d before it is undecided", where(), first.Position, first.Record)
		}
	}
}

// decision checks one valid decision of the log. One whose transaction was purged decided events that are gone.
func (w *logWalk) decision(at EventPosition, r *Record) {
	after := at.Position.Compare(w.c.Position) > 0
	if after {
		delete(w.awaited, r.Key)
	}
	t, known := w.transactions[r.Key]
	if !known || t.logXID > at.XID && !after {
		return
	}
	where := func() string {
		return fmt.Sprintf("shard %d: decision %s/%d of source %d transaction %s", w.c.shard, at.Position, at.Record, r.Key.Source, r.Key.Transaction)
	}
	if t.logXID >= at.XID {
		w.violated(InvariantDecisionAfterEvents, "%s is not after the events, which are in batch %d", where(), t.logXID)
		return
	}
	if t.state != r.State {
		w.violated(InvariantDecisionAgrees, "%s is %s, tx says %s", where(), r.State, t.state)
	}
	if !t.shards.Has(w.c.shard) {
		w.violated(InvariantDecisionAgrees, "%s is not in a shard that tx names (%x)", where(), uint64(t.shards))
	}
}

// stale checks the losers of a batch, once per batch: in the first shard that it wrote to.
func (w *logWalk) stale(ctx context.Context, s *Segment) error {
	segments, err := w.segmentsOf(ctx, s.XID, ^ShardSet(0))
	if err != nil || segments[0].Shard != w.c.shard {
		return err
	}
	requests := map[int64]bool{}
	for i := range segments {
		segments[i].ordinals(func(o int64) { requests[o] = true })
		if !slices.Equal(segments[i].Stale, s.Stale) {
			w.violated(InvariantStale, "batch %d: its segments in shards %d and %d name other losers: %v and %v",
				s.XID, s.Shard, segments[i].Shard, s.Stale, segments[i].Stale)
		}
	}
	seen := map[int32]bool{}
	for _, o := range s.Stale {
		if seen[o] || !requests[int64(o)] {
			w.violated(InvariantStale, "batch %d: loser %d is named twice, or is no request of the batch", s.XID, o)
		}
		seen[o] = true
	}
	return nil
}

// ordinals calls yield for each record that can be read, stale or not.
func (s *Segment) ordinals(yield func(int64)) {
	d := decoder{b: s.Body}
	d.byte()
	var r Record
	for ordinal := int64(0); d.left() > 0 && d.record(&r, &ordinal); {
		yield(ordinal)
	}
}

// segmentsOf reads what a batch wrote to some shards, by shard and position.
func (v *verification) segmentsOf(ctx context.Context, xid uint64, shards ShardSet) ([]Segment, error) {
	rows, err := v.tx.Query(ctx, `
		SELECT l.shard, l.xid, l.seq, l.stale, l.body FROM unnest($1::smallint[]) u (shard) JOIN outbox.log l ON l.shard = u.shard AND l.xid = $2`,
		shards.list(), xid)
	if err != nil {
		return nil, storeError("reading a batch", err)
	}
	found, err := pgx.CollectRows(rows, scanLogRow)
	slices.SortFunc(found, func(a, b Segment) int {
		if a.Shard != b.Shard {
			return int(a.Shard) - int(b.Shard)
		}
		return a.Position.Compare(b.Position)
	})
	return found, storeError("reading a batch", err)
}
