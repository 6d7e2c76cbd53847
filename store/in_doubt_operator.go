package store

import (
	"context"
	"time"

	"github.com/jackc/pgx/v5"
)

// InDoubtTransaction is an undecided transaction whose events are parked.
type InDoubtTransaction struct {
	Source    string
	Shard     int16  // of its first parked event
	Head      Parked // its first parked event, without body
	NextCheck time.Time
	Events    int64 // its own parked events
	Waiting   int64 // events of the aggregates of its events that are parked behind them
}

// inDoubtSQL: of the rows of a transaction only the first one. $1 source or empty, $2 limit, $3… the row after which the
// page begins, or NULL.
const inDoubtSQL = `
	WITH head AS (
	  SELECT p.*, src.name AS source_name
	  FROM outbox.parked p JOIN outbox.source src USING (source_id)
	  WHERE p.state = 0
	    AND ($1 = '' OR src.name = $1 AND src.deleted_at IS NULL)
	    AND ($3::timestamptz IS NULL OR (p.since, p.shard, p.xid, p.seq, p.record) > ($3::timestamptz, $4::smallint, $5::xid8, $6::int, $7::int))
	    AND NOT EXISTS (
	      SELECT FROM outbox.parked q WHERE q.source_id = p.source_id AND q.tx_id = p.tx_id AND q.state + 0 = 0
	        AND (q.shard::int, q.xid, q.seq, q.record) < (p.shard::int, p.xid, p.seq, p.record))
	  ORDER BY p.since, p.shard, p.xid, p.seq, p.record LIMIT $2)
	SELECT p.source_name, p.shard, coalesce(nullif(p.check_at, 'infinity'), p.since),
	       (SELECT count(*) FROM outbox.parked q WHERE q.source_id = p.source_id AND q.tx_id = p.tx_id),
	       (SELECT count(*) FROM outbox.parked own JOIN outbox.parked q
	          ON q.shard = own.shard AND q.agg = own.agg AND q.source_id = own.source_id
	         AND q.aggregate_type = own.aggregate_type AND q.aggregate_id = own.aggregate_id
	         AND (q.xid, q.seq, q.record) > (own.xid, own.seq, own.record) AND q.tx_id <> own.tx_id
	        WHERE own.source_id = p.source_id AND own.tx_id = p.tx_id),
	       ` + parkedColumns + `, NULL::bytea
	FROM head p ORDER BY p.since, p.shard, p.xid, p.seq, p.record`

// InDoubtTransactions returns a page, parked longest first. source "": of all. page "": the first page. limit 0: 100, and
// never more than 1,000. next "": the last page. A page that this function did not return for this source is ErrInvalid.
// Those decided meanwhile, whose decision their shard's holder has not read yet, are left out.
func (s *Store) InDoubtTransactions(ctx context.Context, source, page string, limit int) (found []InDoubtTransaction, next string, err error) {
	const doing = "listing in-doubt transactions"
	token, err := decodePageToken(page, "in-doubt transactions", source)
	if err != nil {
		return nil, "", err
	}
	limit = pageLimit(limit)
	var all []InDoubtTransaction
	err = s.byIndex(ctx, doing, snapshotSettings, func(ctx context.Context, tx pgx.Tx) error {
		rows, err := tx.Query(ctx, inDoubtSQL, token.arguments(source, limit+1)...)
		if err != nil {
			return err
		}
		all, err = pgx.CollectRows(rows, func(row pgx.CollectableRow) (d InDoubtTransaction, err error) {
			d.Head, err = scanParked(leading{row, []any{&d.Source, &d.Shard, &d.NextCheck, &d.Events, &d.Waiting}})
			return d, err
		})
		return err
	})
	if err != nil {
		return nil, "", err
	}
	if len(all) > limit {
		last := all[limit-1]
		next = pageToken{since: last.Head.Since, shard: last.Shard, at: last.Head.EventPosition}.encode("in-doubt transactions", source)
		all = all[:limit]
	}
	for _, d := range all {
		if d.Head.State == Prepared {
			found = append(found, d)
		}
	}
	return found, next, nil
}

// leading is a row whose first columns go elsewhere.
type leading struct {
	pgx.CollectableRow
	first []any
}

func (l leading) Scan(dest ...any) error { return l.CollectableRow.Scan(append(l.first, dest...)...) }

// InDoubtCount is what is in doubt of one source.
type InDoubtCount struct {
	Source       string
	Transactions int64
	Oldest       time.Duration // since the oldest was parked, by the database's clock
}

// InDoubtCounts returns the sources that have transactions in doubt.
func (s *Store) InDoubtCounts(ctx context.Context) ([]InDoubtCount, error) {
	rows, err := s.pool.Query(ctx, `
		SELECT src.name, count(DISTINCT p.tx_id), extract(epoch FROM now() - min(p.since))::float8
		FROM outbox.parked p JOIN outbox.source src USING (source_id) WHERE p.state = 0 GROUP BY src.name ORDER BY src.name`)
	if err != nil {
		return nil, storeError("counting in-doubt transactions", err)
	}
	found, err := pgx.CollectRows(rows, func(row pgx.CollectableRow) (c InDoubtCount, err error) {
		var seconds float64
		err = row.Scan(&c.Source, &c.Transactions, &seconds)
		c.Oldest = time.Duration(seconds * float64(time.Second))
		return c, err
	})
	return found, storeError("counting in-doubt transactions", err)
}

// Audit records an administrative action that changes nothing in the store by itself, or is about to. Those that do change
// something write their audit row in the same transaction.
func (s *Store) Audit(ctx context.Context, actor, action, subject, reason string, detail map[string]any) error {
	return s.transact(ctx, "recording "+action, func(tx pgx.Tx) error {
		return audit(ctx, tx, actor, action, subject, reason, detail)
	})
}
