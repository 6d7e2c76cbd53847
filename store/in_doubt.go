package store

import (
	"bytes"
	"context"
	"slices"
	"time"

	"github.com/jackc/pgx/v5"
)

// ClaimInDoubt returns up to limit transactions that are parked undecided and due to be asked about, one entry each,
// longest due first, and keeps other claimers away from them for lease. Bodies are not read.
func (s *Store) ClaimInDoubt(ctx context.Context, limit int, lease time.Duration) ([]Parked, error) {
	const doing = "claiming in-doubt transactions"
	var found []Parked
	// Of the rows of a transaction only the first one is due: so that it is claimed once. Those locked are being claimed, or
	// changed by their shard's holder. The others are found by transaction: without the cast and the sum PostgreSQL may compare
	// with all rows of the table instead.
	err := s.byIndex(ctx, doing, func(ctx context.Context, tx pgx.Tx) error {
		rows, err := tx.Query(ctx, `
		UPDATE outbox.parked p SET check_at = now() + $2, checks = p.checks + 1
		FROM (SELECT shard, xid, seq, record FROM outbox.parked p
		      WHERE p.state = 0 AND p.check_at <= now() AND NOT EXISTS (
		        SELECT 1 FROM outbox.parked q WHERE q.source_id = p.source_id AND q.tx_id = p.tx_id AND q.state + 0 = 0
		        AND (q.shard::int, q.xid, q.seq, q.record) < (p.shard::int, p.xid, p.seq, p.record))
		      ORDER BY p.check_at LIMIT $1 FOR UPDATE SKIP LOCKED) due
		WHERE p.shard = due.shard AND p.xid = due.xid AND p.seq = due.seq AND p.record = due.record
		RETURNING `+parkedColumns+`, NULL::bytea`, limit, lease)
		if err != nil {
			return err
		}
		found, err = pgx.CollectRows(rows, scanParked)
		return err
	})
	if err != nil {
		return nil, err
	}
	// A decision that the holder of the shard has not read yet leaves nothing to ask.
	return slices.DeleteFunc(found, func(p Parked) bool { return p.State != Prepared }), nil
}

// HurryInDoubt claims transactions that are in doubt for a source database although their time has not come: it can be asked
// again. It takes up to limit of those after a transaction, in the order of their ids, keeps other claimers away from them for
// lease, and begins the count of their checks anew. last is where to go on; zero: there are no more. Those that were hurried
// and have not been asked about since, by whomever, are left out, and so are those that are due: ClaimInDoubt returns them.
func (s *Store) HurryInDoubt(ctx context.Context, source int32, database string, after TransactionID, limit int, lease time.Duration) (found []Parked, last TransactionID, err error) {
	const doing = "hurrying in-doubt transactions"
	// The index gives the order: a page must not cost as much as all that are left, which a sort would look at.
	err = s.byIndex(ctx, doing, func(ctx context.Context, tx pgx.Tx) error {
		if _, err := tx.Exec(ctx, `SET LOCAL enable_sort = off; SET LOCAL enable_bitmapscan = off`, pgx.QueryExecModeSimpleProtocol); err != nil {
			return err
		}
		rows, err := tx.Query(ctx, `
		UPDATE outbox.parked p SET check_at = now() + $5, checks = 0
		FROM (SELECT shard, xid, seq, record FROM outbox.parked p
		      WHERE p.source_id = $1 AND p.tx_id > $3 AND p.database = $2 AND p.state + 0 = 0 AND p.check_at > now() AND p.checks > 0 AND NOT EXISTS (
		        SELECT 1 FROM outbox.parked q WHERE q.source_id = p.source_id AND q.tx_id = p.tx_id AND q.state + 0 = 0
		        AND (q.shard::int, q.xid, q.seq, q.record) < (p.shard::int, p.xid, p.seq, p.record))
		      ORDER BY p.tx_id LIMIT $4 FOR UPDATE SKIP LOCKED) due
		WHERE p.shard = due.shard AND p.xid = due.xid AND p.seq = due.seq AND p.record = due.record
		RETURNING `+parkedColumns+`, NULL::bytea`, source, database, [16]byte(after), limit, lease)
		if err != nil {
			return err
		}
		found, err = pgx.CollectRows(rows, scanParked)
		return err
	})
	if err != nil {
		return nil, after, err
	}
	if len(found) == limit {
		for i := range found {
			if id := found[i].Key.Transaction; bytes.Compare(id[:], last[:]) > 0 {
				last = id
			}
		}
	}
	return slices.DeleteFunc(found, func(p Parked) bool { return p.State != Prepared }), last, nil
}

// RecordAnswer notes what was answered about transactions that are still undecided, and that they are to be asked about
// again after next.
func (s *Store) RecordAnswer(ctx context.Context, keys []Key, answer string, next time.Duration) error {
	sources, ids := splitKeys(keys)
	return s.byIndex(ctx, "recording an answer", func(ctx context.Context, tx pgx.Tx) error {
		_, err := tx.Exec(ctx, `
			UPDATE outbox.parked p SET last_answer = $3, check_at = now() + $4
			FROM unnest($1::int[], $2::uuid[]) k(s, i) WHERE p.source_id = k.s AND p.tx_id = k.i AND p.state = 0`, sources, ids, answer, next)
		return err
	})
}

// AskSooner lets transactions be asked about now that are due later than most from now. No pause is as long: the server's clock
// was put back since, and may take hours to get there. It returns how many rows that were.
func (s *Store) AskSooner(ctx context.Context, most time.Duration) (int64, error) {
	var rows int64
	err := s.byIndex(ctx, "asking sooner", func(ctx context.Context, tx pgx.Tx) error {
		tag, err := tx.Exec(ctx, `UPDATE outbox.parked SET check_at = now() WHERE state = 0 AND check_at > now() + $1::interval`, most)
		rows = tag.RowsAffected()
		return err
	})
	return rows, err
}

// byIndex runs fn in a transaction whose statements find their rows by index, whatever the planner thinks of a table that was
// empty a moment ago: ten thousand parked events that are compared with each other take a whole core for seconds.
func (s *Store) byIndex(ctx context.Context, doing string, fn func(context.Context, pgx.Tx) error) error {
	ctx, cancel := s.bound(ctx)
	defer cancel()
	return s.transact(ctx, doing, func(tx pgx.Tx) error {
		_, err := tx.Exec(ctx, snapshotSettings, pgx.QueryExecModeSimpleProtocol)
		if err == nil {
			err = fn(ctx, tx)
		}
		return storeError(doing, err)
	})
}
