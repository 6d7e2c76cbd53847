package store

import (
	"bytes"
	"cmp"
	"context"
	"fmt"
	"slices"

	"github.com/jackc/pgx/v5"
)

func compareKeys(a, b Key) int {
	return cmp.Or(cmp.Compare(a.Source, b.Source), bytes.Compare(a.Transaction[:], b.Transaction[:]))
}

// pend checks what the checkpoints list as pending against the log, parked and dead_letter.
func (v *verification) pend(ctx context.Context) error {
	for i := range v.checkpoints {
		c := &v.checkpoints[i]
		for rest := c.pend; len(rest) > 0; {
			n := min(len(rest), maxChunkSegments/4)
			if err := v.pendChunk(ctx, c, rest[:n]); err != nil {
				return err
			}
			rest = rest[n:]
		}
	}
	return nil
}

func (v *verification) pendChunk(ctx context.Context, c *checkpoint, entries []PendEntry) error {
	xids, seqs, records := make([]uint64, len(entries)), make([]int32, len(entries)), make([]int32, len(entries))
	keys := make([]Key, len(entries))
	for i, e := range entries {
		xids[i], seqs[i], records[i], keys[i] = e.XID, e.Seq, e.Record, e.Key
	}
	inLog, err := v.eventsAt(ctx, c.shard, xids, seqs)
	if err != nil {
		return err
	}
	known, err := v.transactionRows(ctx, keys)
	if err != nil {
		return err
	}
	for _, e := range entries {
		t, found := known[e.Key]
		var problem string
		switch {
		case e.Position.Compare(c.Position) > 0:
			problem = fmt.Sprintf("is after checkpoint %s", c.Position)
		case e.XID < c.oldest:
			problem = fmt.Sprintf("is before oldest %d", c.oldest)
		case inLog[e.EventPosition] != e.Key:
			problem = "is not a valid event of this transaction in the log"
		case e.State == Prepared && !found:
			problem = "is undecided, and tx does not know it"
		case e.State != Prepared && found && t.state != e.State:
			problem = fmt.Sprintf("is %s, tx says %s", e.State, t.state)
		default:
			continue
		}
		v.violated(InvariantPend, "shard %d: pending %s/%d of source %d transaction %s %s", c.shard, e.Position, e.Record, e.Key.Source, e.Key.Transaction, problem)
	}
	return v.each(ctx, InvariantPend, "shard %v: pending %v/%v/%v is %v too", `
		SELECT $1::smallint, u.xid, u.seq, u.record, k.kind
		FROM unnest($2::xid8[], $3::int[], $4::int[]) u (xid, seq, record), LATERAL (
		  SELECT 'parked' AS kind FROM outbox.parked p WHERE p.shard = $1 AND p.xid = u.xid AND p.seq = u.seq AND p.record = u.record
		  UNION ALL
		  SELECT 'a dead letter' FROM outbox.dead_letter d WHERE d.shard = $1 AND d.xid = u.xid AND d.seq = u.seq AND d.record = u.record) k`,
		c.shard, xids, seqs, records)
}

// eventsAt reads the segments at these positions and returns the transactions of their valid events. A position may be
// given several times.
func (v *verification) eventsAt(ctx context.Context, shard int16, xids []uint64, seqs []int32) (map[EventPosition]Key, error) {
	rows, err := v.tx.Query(ctx, `
		SELECT l.shard, l.xid, l.seq, l.stale, l.body
		FROM (SELECT DISTINCT a.xid, a.seq FROM unnest($1::xid8[], $2::int[]) a (xid, seq)) u
		JOIN outbox.log l ON l.shard = $3 AND l.xid = u.xid AND l.seq = u.seq`, xids, seqs, shard)
	if err != nil {
		return nil, storeError("reading segments", err)
	}
	segments, err := pgx.CollectRows(rows, scanLogRow)
	if err != nil {
		return nil, storeError("reading segments", err)
	}
	found := map[EventPosition]Key{}
	for i := range segments {
		// What does not decode is reported by the walk over the log.
		_ = segments[i].Records(func(r *Record) bool {
			if !r.IsDecision {
				found[EventPosition{Position: segments[i].Position, Record: r.Number}] = r.Key
			}
			return true
		})
	}
	return found, nil
}

// transactions checks the rows of tx, some pages at a time.
func (v *verification) transactions(ctx context.Context) error {
	var pages int64
	err := v.tx.QueryRow(ctx, `SELECT pg_relation_size('outbox.tx') / current_setting('block_size')::bigint`).Scan(&pages)
	if err != nil {
		return storeError("reading the size of tx", err)
	}
	const slice = 512
	for from := int64(0); from < pages; from += slice {
		if err := v.transactionRowsBetween(ctx, from, from+slice); err != nil {
			return err
		}
		if err := v.keptBetween(ctx, from, from+slice); err != nil {
			return err
		}
	}
	return nil
}

func (v *verification) transactionRowsBetween(ctx context.Context, from, upTo int64) error {
	foreign := int64(0)
	if v.shardCount < 64 {
		foreign = ^(1<<uint(v.shardCount) - 1)
	}
	return v.each(ctx, InvariantTransactionRow, "source %v transaction %v: state %v, decided %v, shards %x, batch %v, source known %v", `
		SELECT t.source_id, t.tx_id::text, t.state, t.decided_at IS NOT NULL, t.shards, t.log_xid, s.source_id IS NOT NULL
		FROM outbox.tx t LEFT JOIN outbox.source s USING (source_id)
		WHERE t.ctid >= $1 AND t.ctid < $2
		  AND (t.state NOT IN (0, 1, 2) OR (t.state = 0) <> (t.decided_at IS NULL) OR t.shards = 0 OR t.shards & $3 <> 0
		    OR t.log_xid >= $4 OR s.source_id IS NULL)`, pageStart(from), pageStart(upTo), foreign, v.nextXID)
}

// keptBetween finds transactions that the walk over the log cannot miss because there is nothing there to see: their
// segments are gone although they are after the checkpoint, or they are undecided and kept nowhere. The look at parked has a
// LIMIT because an EXISTS under OR may be answered by hashing the whole table.
func (v *verification) keptBetween(ctx context.Context, from, upTo int64) error {
	rows, err := v.tx.Query(ctx, `
		SELECT t.source_id, t.tx_id, t.log_xid, s.shard
		FROM outbox.tx t JOIN outbox.shard s ON (t.shards >> s.shard) & 1 = 1
		WHERE t.ctid >= $1 AND t.ctid < $2 AND (t.state = 0 OR t.log_xid > s.xid)
		  AND NOT EXISTS (SELECT FROM outbox.log l WHERE l.shard = s.shard AND l.xid = t.log_xid AND (l.xid, l.seq) > (s.xid, s.seq))
		  AND (t.log_xid > s.xid OR (SELECT true FROM outbox.parked p
		    WHERE p.shard = s.shard AND p.xid = t.log_xid AND p.source_id = t.source_id AND p.tx_id = t.tx_id LIMIT 1) IS NULL)`,
		pageStart(from), pageStart(upTo))
	if err != nil {
		return storeError("looking for the events of transactions", err)
	}
	var k Key
	var logXID uint64
	var shard int16
	_, err = pgx.ForEachRow(rows, []any{&k.Source, (*[16]byte)(&k.Transaction), &logXID, &shard}, func() error {
		c := v.checkpoint(shard)
		switch {
		case logXID > c.XID:
			v.violated(InvariantUnreadInLog, "shard %d: source %d transaction %s is after checkpoint %s, and batch %d is not in the log",
				shard, k.Source, k.Transaction, c.Position, logXID)
		case !c.hasPending(k):
			v.violated(InvariantUndecidedKept, "shard %d: source %d transaction %s is PREPARED, and its events in batch %d are neither pending, nor parked, nor to be read",
				shard, k.Source, k.Transaction, logXID)
		}
		return nil
	})
	return storeError("looking for the events of transactions", err)
}

// checkpoint returns that of a shard that has a row.
func (v *verification) checkpoint(shard int16) *checkpoint {
	i := slices.IndexFunc(v.checkpoints, func(c checkpoint) bool { return c.shard == shard })
	return &v.checkpoints[i]
}

func (c *checkpoint) hasPending(k Key) bool {
	for i := range c.pend {
		if c.pend[i].Key == k {
			return true
		}
	}
	return false
}

// setAsideRow is a row of parked or dead_letter, with the row of tx that it refers to.
type setAsideRow struct {
	EventPosition
	shard     int16
	agg       int64
	key       Key
	state     State // of parked only
	aggregate Aggregate
	topic     string
	body      []byte
	askable   bool // of parked only: carries what the resolver needs

	txState  *State
	txLogXID *uint64
}

func (r *setAsideRow) String() string {
	return fmt.Sprintf("shard %d: %s/%d of source %d transaction %s", r.shard, r.Position, r.Record, r.key.Source, r.key.Transaction)
}

func (v *verification) parkedRows(ctx context.Context) error {
	return v.setAside(ctx, "parked", "p.state, p.database IS NOT NULL AND p.mode IS NOT NULL", func(r *setAsideRow) {
		switch {
		case r.txState == nil:
			v.violated(InvariantParkedTransaction, "%s is parked, and tx does not know it", r)
		case *r.txLogXID != r.XID:
			v.violated(InvariantParkedTransaction, "%s is parked, and tx names batch %d", r, *r.txLogXID)
		case r.state != Prepared && r.state != *r.txState:
			v.violated(InvariantParkedTransaction, "%s is parked as %s, tx says %s", r, r.state, *r.txState)
		case r.state == Prepared && !r.askable:
			v.violated(InvariantParkedTransaction, "%s is parked as PREPARED without its source database", r)
		}
	})
}

func (v *verification) deadLetterRows(ctx context.Context) error {
	return v.setAside(ctx, "dead_letter", "1::smallint, true", func(r *setAsideRow) {
		switch {
		case r.txState == nil:
			v.violated(InvariantDeadLetterCommitted, "%s is a dead letter, and tx does not know it", r)
		case *r.txState != Committed || *r.txLogXID != r.XID:
			v.violated(InvariantDeadLetterCommitted, "%s is a dead letter, tx says %s in batch %d", r, *r.txState, *r.txLogXID)
		}
	})
}

// setAside checks the rows of a table, a chunk at a time.
func (v *verification) setAside(ctx context.Context, table, columns string, check func(*setAsideRow)) error {
	sql := `
		SELECT p.shard, p.xid, p.seq, p.record, p.agg, p.source_id, p.tx_id, p.aggregate_type, p.aggregate_id, p.topic, p.body, ` + columns + `,
		       t.state, t.log_xid
		FROM outbox.` + table + ` p LEFT JOIN outbox.tx t USING (source_id, tx_id)
		WHERE (p.shard, p.xid, p.seq, p.record) > ($1, $2, $3, $4)
		ORDER BY p.shard, p.xid, p.seq, p.record LIMIT $5`
	last := setAsideRow{shard: -1 << 15, EventPosition: EventPosition{Position: Position{Seq: -1 << 31}, Record: -1 << 31}}
	const limit = 64
	for {
		rows, err := v.tx.Query(ctx, sql, last.shard, last.XID, last.Seq, last.Record, limit)
		if err != nil {
			return storeError("reading "+table, err)
		}
		found, err := pgx.CollectRows(rows, scanSetAside)
		if err != nil {
			return storeError("reading "+table, err)
		}
		for i := range found {
			v.rowMatchesBody(table, &found[i])
			check(&found[i])
		}
		if len(found) < limit {
			return nil
		}
		last = found[limit-1]
	}
}

func scanSetAside(row pgx.CollectableRow) (r setAsideRow, err error) {
	err = row.Scan(&r.shard, &r.XID, &r.Seq, &r.Record, &r.agg, &r.key.Source, (*[16]byte)(&r.key.Transaction),
		&r.aggregate.Type, &r.aggregate.ID, &r.topic, &r.body, &r.state, &r.askable, &r.txState, &r.txLogXID)
	r.aggregate.Source = r.key.Source
	return r, err
}

func (v *verification) rowMatchesBody(table string, r *setAsideRow) {
	if want := ShardOf(r.aggregate, v.shardCount); r.shard != want || r.agg != aggregateHash(r.aggregate) {
		v.violated(InvariantRowMatchesBody, "%s, in %s under hash %d: its aggregate is in shard %d under hash %d", r, table, r.agg, want, aggregateHash(r.aggregate))
	}
	record, err := DecodeEvent(r.body)
	if err != nil {
		v.violated(InvariantRowMatchesBody, "%s, in %s: %v", r, table, err)
		return
	}
	e := &record.Event
	if record.Key != r.key || e.AggregateType != r.aggregate.Type || e.AggregateID != r.aggregate.ID || e.Topic != r.topic {
		v.violated(InvariantRowMatchesBody, "%s, in %s: its body is of source %d transaction %s, aggregate %s %q, topic %q",
			r, table, record.Key.Source, record.Key.Transaction, e.AggregateType, e.AggregateID, e.Topic)
	}
}

func (v *verification) parkedOrDead(ctx context.Context) error {
	return v.each(ctx, InvariantParkedOrDead, "shard %v: %v/%v/%v is parked and a dead letter", `
		SELECT p.shard, p.xid, p.seq, p.record FROM outbox.parked p JOIN outbox.dead_letter d USING (shard, xid, seq, record)`)
}
