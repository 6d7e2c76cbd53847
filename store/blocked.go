package store

import (
	"context"
	"time"

	"github.com/jackc/pgx/v5"
)

// BlockedAggregate is an aggregate whose head is parked for a cause other than waiting its turn.
type BlockedAggregate struct {
	Source    string
	Aggregate Aggregate
	Shard     int16
	Head      Parked // without body
	Topic     string
	Waiting   int64 // parked events of the aggregate, the head included
}

// blockedSQL: the heads first, in their order, then the count for those of the page only. A head in doubt whose decision
// was read is about to go. $1 source or empty, $2 limit, $3… the row after which the page begins, or NULL.
const blockedSQL = `
	WITH head AS (
	  SELECT p.*, src.name
	  FROM outbox.parked p JOIN outbox.source src USING (source_id)
	  WHERE (p.cause IN (3, 4) OR p.cause = 1 AND p.state = 0)
	    AND ($1 = '' OR src.name = $1 AND src.deleted_at IS NULL)
	    AND ($3::timestamptz IS NULL OR (p.since, p.shard, p.xid, p.seq, p.record) > ($3::timestamptz, $4::smallint, $5::xid8, $6::int, $7::int))
	    AND NOT EXISTS (
	      SELECT FROM outbox.parked q
	      WHERE q.shard = p.shard AND q.agg = p.agg AND (q.xid, q.seq, q.record) < (p.xid, p.seq, p.record)
	        AND q.source_id = p.source_id AND q.aggregate_type = p.aggregate_type AND q.aggregate_id = p.aggregate_id)
	  ORDER BY p.since, p.shard, p.xid, p.seq, p.record LIMIT $2)
	SELECT h.name, h.source_id, h.aggregate_type, h.aggregate_id, h.shard, h.xid, h.seq, h.record, h.tx_id, h.state, h.cause, h.since,
	       h.attempts, h.error, nullif(h.next_try, 'infinity'), h.topic,
	       (SELECT count(*) FROM outbox.parked q
	        WHERE q.shard = h.shard AND q.agg = h.agg
	          AND q.source_id = h.source_id AND q.aggregate_type = h.aggregate_type AND q.aggregate_id = h.aggregate_id)
	FROM head h ORDER BY h.since, h.shard, h.xid, h.seq, h.record`

// BlockedAggregates returns a page, longest blocked first. source "": of all. page "": the first page. limit 0: 100, and
// never more than 1,000. next "": the last page. A page that this function did not return for this source is ErrInvalid.
// Events in the log that the holder has not read yet are not counted as waiting.
func (s *Store) BlockedAggregates(ctx context.Context, source, page string, limit int) (found []BlockedAggregate, next string, err error) {
	const doing = "listing blocked aggregates"
	token, err := decodePageToken(page, "blocked aggregates", source)
	if err != nil {
		return nil, "", err
	}
	limit = pageLimit(limit)
	rows, err := s.pool.Query(ctx, blockedSQL, token.arguments(source, limit+1)...)
	if err != nil {
		return nil, "", storeError(doing, err)
	}
	found, err = pgx.CollectRows(rows, func(row pgx.CollectableRow) (b BlockedAggregate, err error) {
		h := &b.Head
		var nextTry *time.Time
		err = row.Scan(&b.Source, &b.Aggregate.Source, &b.Aggregate.Type, &b.Aggregate.ID, &b.Shard, &h.XID, &h.Seq, &h.Record,
			(*[16]byte)(&h.Key.Transaction), &h.State, &h.Cause, &h.Since, &h.Attempts, &h.Error, &nextTry, &b.Topic, &b.Waiting)
		if nextTry != nil {
			h.NextTry = *nextTry
		}
		h.Aggregate, h.Key.Source = b.Aggregate, b.Aggregate.Source
		return b, err
	})
	if err != nil {
		return nil, "", storeError(doing, err)
	}
	if len(found) > limit {
		last := found[limit-1]
		next = pageToken{since: last.Head.Since, shard: last.Shard, at: last.Head.EventPosition}.encode("blocked aggregates", source)
		found = found[:limit]
	}
	return found, next, nil
}

// arguments are those of a paged statement: filter, limit, and the row after which the page begins.
func (p *pageToken) arguments(filter string, limit int) []any {
	if p == nil {
		return []any{filter, limit, nil, nil, nil, nil, nil}
	}
	return []any{filter, limit, p.since, p.shard, p.at.XID, p.at.Seq, p.at.Record}
}
