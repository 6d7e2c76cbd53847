package store

import (
	"context"
	"time"

	"github.com/jackc/pgx/v5"
)

// noteTimeline records that the store has changed its timeline: it failed over, or was restored. Whoever writes has dialed, so
// this happens before anything is written on the new timeline, and every transaction from before has a smaller xid.
func noteTimeline(ctx context.Context, conn *pgx.Conn, timeline string) error {
	_, err := conn.Exec(ctx, `UPDATE outbox.control SET timeline = $1, timeline_xid = pg_current_xact_id() WHERE timeline <> $1`, timeline)
	return storeError("recording the store's new timeline", err)
}

// Memory says what the store may have forgotten about a transaction that its source's database denies.
type Memory int8

// The values.
const (
	Complete  Memory = iota // nothing
	Decided                 // it is decided
	Forgetful               // its decision: it was prepared before the store changed its timeline, and so long ago that its marker may be gone
)

// memorySQL: $3 is how long ago a transaction was prepared whose marker may be gone. A timeline that nobody has recorded yet
// makes everything that old doubtful.
const memorySQL = `
	SELECT t.source_id, t.tx_id, t.state <> 0
	FROM unnest($1::int[], $2::uuid[]) k(s, i) JOIN outbox.tx t ON t.source_id = k.s AND t.tx_id = k.i CROSS JOIN outbox.control c
	WHERE t.state <> 0 OR t.prepared_at < now() - $3::interval AND (
	  t.log_xid < c.timeline_xid OR c.timeline <> substr(pg_walfile_name(pg_current_wal_insert_lsn()), 1, 8))`

// Memories says of transactions for which no marker is found whether that proves anything. A marker is deleted once its Commit
// was acknowledged and it is old enough; a store that failed over may have lost that Commit, and then a missing marker of a
// transaction that was prepared longer ago than age proves nothing. It has to be asked after the source's database: what is
// undecided now had its marker then. Those that are Complete, or not known, are not in the answer.
func (s *Store) Memories(ctx context.Context, keys []Key, age time.Duration) (map[Key]Memory, error) {
	const doing = "asking whether decisions may have been lost"
	sources, ids := splitKeys(keys)
	found := make(map[Key]Memory)
	err := s.byIndex(ctx, doing, snapshotSettings, func(ctx context.Context, tx pgx.Tx) error {
		rows, err := tx.Query(ctx, memorySQL, sources, ids, age)
		if err != nil {
			return err
		}
		var k Key
		var decided bool
		_, err = pgx.ForEachRow(rows, []any{&k.Source, (*[16]byte)(&k.Transaction), &decided}, func() error {
			found[k] = Forgetful
			if decided {
				found[k] = Decided
			}
			return nil
		})
		return err
	})
	return found, err
}
