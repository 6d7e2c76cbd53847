package store

import (
	"context"
	"slices"
	"time"

	"github.com/jackc/pgx/v5"
)

// ClaimInDoubt returns up to limit transactions that are parked undecided and due to be asked about, one entry each,
// longest due first, and keeps other claimers away from them for lease. Bodies are not read.
func (s *Store) ClaimInDoubt(ctx context.Context, limit int, lease time.Duration) ([]Parked, error) {
	ctx, cancel := s.bound(ctx)
	defer cancel()
	// Of the rows of a transaction only the first one is due: so that it is claimed once. Those locked are being claimed, or
	// changed by their shard's holder.
	rows, err := s.pool.Query(ctx, `
		UPDATE outbox.parked p SET check_at = now() + $2, checks = p.checks + 1
		FROM (SELECT shard, xid, seq, record FROM outbox.parked p
		      WHERE p.state = 0 AND p.check_at <= now() AND NOT EXISTS (
		        SELECT 1 FROM outbox.parked q WHERE q.source_id = p.source_id AND q.tx_id = p.tx_id AND q.state = 0
		        AND (q.shard, q.xid, q.seq, q.record) < (p.shard, p.xid, p.seq, p.record))
		      ORDER BY p.check_at LIMIT $1 FOR UPDATE SKIP LOCKED) due
		WHERE p.shard = due.shard AND p.xid = due.xid AND p.seq = due.seq AND p.record = due.record
		RETURNING `+parkedColumns+`, NULL::bytea`, limit, lease)
	if err != nil {
		return nil, storeError("claiming in-doubt transactions", err)
	}
	found, err := pgx.CollectRows(rows, scanParked)
	if err != nil {
		return nil, storeError("claiming in-doubt transactions", err)
	}
	// A decision that the holder of the shard has not read yet leaves nothing to ask.
	return slices.DeleteFunc(found, func(p Parked) bool { return p.State != Prepared }), nil
}

// RecordAnswer notes what was answered about transactions that are still undecided, and that they are to be asked about
// again after next.
func (s *Store) RecordAnswer(ctx context.Context, keys []Key, answer string, next time.Duration) error {
	ctx, cancel := s.bound(ctx)
	defer cancel()
	sources, ids := splitKeys(keys)
	_, err := s.pool.Exec(ctx, `
		UPDATE outbox.parked p SET last_answer = $3, check_at = now() + $4
		FROM unnest($1::int[], $2::uuid[]) k(s, i) WHERE p.source_id = k.s AND p.tx_id = k.i AND p.state = 0`, sources, ids, answer, next)
	return storeError("recording an answer", err)
}
