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
	//
	// The update finds what was locked by its place and not by its key, for which PostgreSQL may take an index that has another
	// column in the middle. A row that was changed between the snapshot and the lock has another place then, and is left out.
	err := s.byIndex(ctx, doing, inOrderSettings, func(ctx context.Context, tx pgx.Tx) error {
		rows, err := tx.Query(ctx, `
		UPDATE outbox.parked p SET check_at = now() + $2, checks = p.checks + 1
		FROM (SELECT ctid FROM outbox.parked p
		      WHERE p.state = 0 AND p.check_at <= now() AND NOT EXISTS (
		        SELECT 1 FROM outbox.parked q WHERE q.source_id = p.source_id AND q.tx_id = p.tx_id AND q.state + 0 = 0
		        AND (q.shard::int, q.xid, q.seq, q.record) < (p.shard::int, p.xid, p.seq, p.record))
		      ORDER BY p.check_at LIMIT $1 FOR UPDATE SKIP LOCKED) due
		WHERE p.ctid = due.ctid
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
// lease, and begins the count of their checks anew. last is where to go on; zero: there were none. Those that were hurried
// and have not been asked about since, by whomever, are left out, and so are those that are due: ClaimInDoubt returns them. So
// are those that somebody else is changing at this moment: he has just heard of them.
func (s *Store) HurryInDoubt(ctx context.Context, source int32, database string, after TransactionID, limit int, lease time.Duration) (found []Parked, last TransactionID, err error) {
	const doing = "hurrying in-doubt transactions"
	// Planned anew each time: with a plan kept from when the table was empty, each row of a page may be compared with all of the
	// source.
	err = s.byIndex(ctx, doing, inOrderSettings+`; SET LOCAL plan_cache_mode = force_custom_plan`, func(ctx context.Context, tx pgx.Tx) error {
		rows, err := tx.Query(ctx, `
		UPDATE outbox.parked p SET check_at = now() + $5, checks = 0
		FROM (SELECT ctid FROM outbox.parked p
		      WHERE p.source_id = $1 AND p.tx_id > $3 AND p.database = $2 AND p.state + 0 = 0 AND p.check_at > now() AND p.checks > 0 AND NOT EXISTS (
		        SELECT 1 FROM outbox.parked q WHERE q.source_id = p.source_id AND q.tx_id = p.tx_id AND q.state + 0 = 0
		        AND (q.shard::int, q.xid, q.seq, q.record) < (p.shard::int, p.xid, p.seq, p.record))
		      ORDER BY p.tx_id LIMIT $4 FOR UPDATE SKIP LOCKED) due
		WHERE p.ctid = due.ctid
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
	// A page that is not full is no sign that it is the last one: rows that are being changed are left out.
	for i := range found {
		if id := found[i].Key.Transaction; bytes.Compare(id[:], last[:]) > 0 {
			last = id
		}
	}
	return slices.DeleteFunc(found, func(p Parked) bool { return p.State != Prepared }), last, nil
}

// RecordAnswer notes what was answered about transactions that are still undecided, and that they are to be asked about
// again after next.
func (s *Store) RecordAnswer(ctx context.Context, keys []Key, answer string, next time.Duration) error {
	sources, ids := splitKeys(keys)
	// Without the sum PostgreSQL may look through all that is in doubt for each of them.
	return s.byIndex(ctx, "recording an answer", snapshotSettings, func(ctx context.Context, tx pgx.Tx) error {
		_, err := tx.Exec(ctx, `
			UPDATE outbox.parked p SET last_answer = $3, check_at = now() + $4
			FROM unnest($1::int[], $2::uuid[]) k(s, i) WHERE p.source_id = k.s AND p.tx_id = k.i AND p.state + 0 = 0`, sources, ids, answer, next)
		return err
	})
}

// AskSooner lets transactions be asked about now that are due later than most from now. No pause is as long: the server's clock
// was put back since, and may take hours to get there. It returns how many rows that were.
func (s *Store) AskSooner(ctx context.Context, most time.Duration) (int64, error) {
	var rows int64
	err := s.byIndex(ctx, "asking sooner", snapshotSettings, func(ctx context.Context, tx pgx.Tx) error {
		tag, err := tx.Exec(ctx, `UPDATE outbox.parked SET check_at = now() WHERE state = 0 AND check_at > now() + $1::interval`, most)
		rows = tag.RowsAffected()
		return err
	})
	return rows, err
}

// inOrderSettings are for statements that take a few rows of many in the order of an index: they must not cost as much as all that
// are left, which a sort or a bitmap would look at.
const inOrderSettings = snapshotSettings + `; SET LOCAL enable_sort = off; SET LOCAL enable_bitmapscan = off`

// byIndex runs fn in a transaction with settings, which are snapshotSettings and perhaps more: its statements find their rows by
// index, whatever the planner thinks of a table that was empty a moment ago. Ten thousand parked events that are compared with
// each other take a whole core for seconds.
func (s *Store) byIndex(ctx context.Context, doing, settings string, fn func(context.Context, pgx.Tx) error) error {
	ctx, cancel := s.bound(ctx)
	defer cancel()
	return s.transact(ctx, doing, func(tx pgx.Tx) error {
		_, err := tx.Exec(ctx, settings, pgx.QueryExecModeSimpleProtocol)
		if err == nil {
			err = fn(ctx, tx)
		}
		return storeError(doing, err)
	})
}
