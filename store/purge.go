package store

import (
	"context"

	"github.com/jackc/pgx/v5/pgtype"
)

// Purging walks over the pages of tx like the hand of a clock, a slice at a time. It does not search by time: space that
// was freed is written again, so after a while old and new rows lie side by side everywhere, and a block range index over
// prepared_at excludes nothing. A slice costs the reading of its pages, whatever the size of the table.
const (
	purgeSlicePages = 64    // 8 KiB each: some 5,000 rows
	purgeChunk      = 2_000 // rows deleted in one transaction; it holds an xid, for which every relay waits
	// purgeSweeps is how often the hand goes round within TxRetention: a row is kept a quarter longer at most.
	purgeSweeps   = 4
	purgeMinPages = 16 * purgeSlicePages // a pass looks at no less
)

// purgeSQL deletes up to $4 rows of the pages from $1 up to $2, and with each the resolution that belongs to it. A row is
// kept while its shards' checkpoints have not passed its events, and while parked or dead_letter refer to it.
//
// $3 retention, $5 retention of rows with a resolution. The rows are found by their address, which a scan of a range of
// pages serves. The inner looks have a LIMIT because an EXISTS under OR may be answered by hashing the whole table.
const purgeSQL = `
WITH bound AS MATERIALIZED (
  SELECT s.shard,
         CASE WHEN s.pend <> '' OR s.oldest < s.xid THEN s.oldest
              WHEN EXISTS (SELECT FROM outbox.log l WHERE l.shard = s.shard AND l.xid = s.xid AND l.seq > s.seq) THEN s.xid
              ELSE (s.xid::text::numeric + 1)::text::xid8 END AS needed
  FROM outbox.shard s),
purged AS (
  DELETE FROM outbox.tx WHERE ctid = ANY (ARRAY(
    SELECT t.ctid FROM outbox.tx t
    WHERE t.ctid >= $1::tid AND t.ctid < $2::tid
      AND t.state <> 0 AND t.decided_at < least(now() - $3::interval, (SELECT c.tx_known_since FROM outbox.control c))
      AND NOT EXISTS (
        SELECT FROM bound b WHERE (t.shards >> b.shard) & 1 = 1
          AND (t.log_xid >= b.needed
            OR (SELECT true FROM outbox.parked p
                WHERE p.shard = b.shard AND p.xid = t.log_xid AND p.source_id = t.source_id AND p.tx_id = t.tx_id LIMIT 1) IS NOT NULL
            OR (SELECT true FROM outbox.dead_letter d
                WHERE d.shard = b.shard AND d.xid = t.log_xid AND d.source_id = t.source_id AND d.tx_id = t.tx_id LIMIT 1) IS NOT NULL))
      AND NOT EXISTS (
        SELECT FROM outbox.resolution r WHERE r.source_id = t.source_id AND r.tx_id = t.tx_id AND r.resolved_at >= now() - $5::interval)
    LIMIT $4))
  RETURNING source_id, tx_id),
resolutions AS (
  DELETE FROM outbox.resolution r USING purged p WHERE r.source_id = p.source_id AND r.tx_id = p.tx_id)
SELECT count(*) FROM purged`

// purge deletes tx rows that are past retention, in its share of the table.
func (m *maintenance) purge(ctx context.Context) error {
	if err := m.moveHorizon(ctx); err != nil {
		return err
	}
	var pages int64
	err := m.conn.QueryRow(ctx, `SELECT pg_relation_size('outbox.tx') / current_setting('block_size')::bigint`).Scan(&pages)
	if err != nil {
		return storeError("reading the size of tx", err)
	}
	share := float64(m.cfg.Interval) / float64(m.cfg.TxRetention) * purgeSweeps
	budget := min(pages, max(purgeMinPages, int64(share*float64(pages))+1))
	for hand := &m.store.maintenance.page; budget > 0; {
		if *hand >= pages {
			*hand = 0
		}
		upTo := min(*hand+purgeSlicePages, pages)
		if err := m.purgeSlice(ctx, *hand, upTo); err != nil {
			return err
		}
		budget -= upTo - *hand
		*hand = upTo
	}
	return nil
}

// moveHorizon records from when on every transaction is known, before the first one older than that is deleted. Another
// process with a longer retention does not move it back: what was deleted stays deleted.
func (m *maintenance) moveHorizon(ctx context.Context) error {
	// A second's step is enough for everybody who asks, and keeps the row quiet.
	_, err := m.conn.Exec(ctx, `UPDATE outbox.control SET tx_known_since = now() - $1::interval WHERE tx_known_since < now() - $1::interval - '1 s'::interval`,
		m.cfg.TxRetention)
	return storeError("moving the retention horizon", err)
}

func (m *maintenance) purgeSlice(ctx context.Context, from, upTo int64) error {
	const doing = "purging transactions"
	for {
		var purged int64
		err := m.conn.QueryRow(ctx, purgeSQL, pageStart(from), pageStart(upTo), m.cfg.TxRetention, purgeChunk, m.cfg.ResolutionRetention).Scan(&purged)
		if err != nil {
			return storeError(doing, err)
		}
		m.report.Purged += purged
		if purged < purgeChunk {
			return nil
		}
		if err := ctx.Err(); err != nil {
			return storeError(doing, err)
		}
	}
}

// pageStart is an address before the first row of a page.
func pageStart(page int64) pgtype.TID {
	return pgtype.TID{BlockNumber: uint32(page), Valid: true} //nolint:gosec // a table has fewer than 2³² pages
}
