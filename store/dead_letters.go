package store

import (
	"context"

	"github.com/jackc/pgx/v5"
)

// deadLettersSQL: as blockedSQL.
const deadLettersSQL = `
	SELECT d.source_id, d.tx_id, d.shard, d.xid, d.seq, d.record, d.aggregate_type, d.aggregate_id, d.body, d.error, d.attempts, d.queue, d.since
	FROM outbox.dead_letter d
	WHERE ($1 = '' OR d.source_id = (SELECT source_id FROM outbox.source WHERE name = $1 AND deleted_at IS NULL))
	  AND ($3::timestamptz IS NULL OR (d.since, d.shard, d.xid, d.seq, d.record) > ($3::timestamptz, $4::smallint, $5::xid8, $6::int, $7::int))
	ORDER BY d.since, d.shard, d.xid, d.seq, d.record LIMIT $2`

// DeadLetters returns a page with bodies, oldest first. source "": of all. page "": the first page. limit 0: 100, and never
// more than 1,000. next "": the last page. A page that this function did not return for this source is ErrInvalid.
func (s *Store) DeadLetters(ctx context.Context, source, page string, limit int) (found []DeadLetter, next string, err error) {
	const doing = "listing dead letters"
	token, err := decodePageToken(page, "dead letters", source)
	if err != nil {
		return nil, "", err
	}
	limit = pageLimit(limit)
	rows, err := s.pool.Query(ctx, deadLettersSQL, token.arguments(source, limit+1)...)
	if err != nil {
		return nil, "", storeError(doing, err)
	}
	found, err = pgx.CollectRows(rows, func(row pgx.CollectableRow) (d DeadLetter, err error) {
		err = row.Scan(&d.Key.Source, (*[16]byte)(&d.Key.Transaction), &d.Shard, &d.XID, &d.Seq, &d.Record, &d.Aggregate.Type, &d.Aggregate.ID,
			&d.Body, &d.Error, &d.Attempts, &d.Queue, &d.Since)
		d.Aggregate.Source = d.Key.Source
		return d, err
	})
	if err != nil {
		return nil, "", storeError(doing, err)
	}
	if len(found) > limit {
		last := found[limit-1]
		next = pageToken{since: last.Since, shard: last.Shard, at: last.EventPosition}.encode("dead letters", source)
		found = found[:limit]
	}
	return found, next, nil
}
