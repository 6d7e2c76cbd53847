package store

import (
	"context"
	"time"

	"github.com/jackc/pgx/v5"
)

// ShardStatus is one shard's lease and progress.
type ShardStatus struct {
	Shard       int16
	Holder      string // "" when the lease has run out
	Epoch       int64
	LeaseUntil  time.Time // zero when nobody ever held it
	Position    Position
	LagSegments int64         // segments after the checkpoint; counted up to MaxLagSegments
	OldestAge   time.Duration // age of the oldest segment after the checkpoint
	Parked      int64
}

// MaxLagSegments is where counting a shard's lag stops: a status must not read a whole backlog.
const MaxLagSegments = 100_000

// shardsSQL: the log's only index serves both looks at it. The lag is counted without the order, so that it stops early.
const shardsSQL = `
	SELECT s.shard, CASE WHEN s.lease_until > now() THEN s.holder ELSE '' END, s.epoch, nullif(s.lease_until, '-infinity'), s.xid, s.seq,
	       (SELECT count(*) FROM (SELECT FROM outbox.log l WHERE l.shard = s.shard AND (l.xid, l.seq) > (s.xid, s.seq) LIMIT $1) behind),
	       coalesce((SELECT greatest(extract(epoch FROM now() - l.written_at), 0)::float8 FROM outbox.log l
	                 WHERE l.shard = s.shard AND (l.xid, l.seq) > (s.xid, s.seq) ORDER BY l.xid, l.seq LIMIT 1), 0),
	       (SELECT count(*) FROM outbox.parked p WHERE p.shard = s.shard)
	FROM outbox.shard s ORDER BY s.shard`

// Shards returns all shards by number.
func (s *Store) Shards(ctx context.Context) (found []ShardStatus, err error) {
	const doing = "reading the shards"
	err = s.snapshot(ctx, doing, func(tx pgx.Tx) error {
		rows, err := tx.Query(ctx, shardsSQL, MaxLagSegments)
		if err != nil {
			return storeError(doing, err)
		}
		found, err = pgx.CollectRows(rows, scanShardStatus)
		return storeError(doing, err)
	})
	return found, err
}

func scanShardStatus(row pgx.CollectableRow) (st ShardStatus, err error) {
	var lease *time.Time
	var age float64
	err = row.Scan(&st.Shard, &st.Holder, &st.Epoch, &lease, &st.Position.XID, &st.Position.Seq, &st.LagSegments, &age, &st.Parked)
	if lease != nil {
		st.LeaseUntil = *lease
	}
	st.OldestAge = time.Duration(age * float64(time.Second))
	return st, err
}
