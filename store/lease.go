package store

import (
	"context"
	"time"

	"github.com/jackc/pgx/v5"
)

// Lease is the right to publish a shard until a time, by the database's clock, with what the last holder left.
type Lease struct {
	Shard int16
	Epoch int64 // grows by one at each acquisition: the fencing token
	Checkpoint
}

// Checkpoint is a shard's progress: everything at or before Position is published, dropped, listed in Pend, or in a row
// of parked or dead_letter. Only its holder writes it; it only moves forward.
type Checkpoint struct {
	Position Position
	// Oldest is the smallest xid that the holder may still need to read from the log: of Position or of Pend.
	Oldest uint64
	// Pend and Offsets belong to relay: entries at or before Position that are neither done nor parked, and the Kafka
	// offsets acknowledged so far. The store never looks inside.
	Pend    []byte
	Offsets []byte
}

// Heartbeat records that the relay instance lives for ttl more, and returns how many live instances there are, itself
// included.
func (s *Store) Heartbeat(ctx context.Context, instance string, ttl time.Duration) (int, error) {
	ctx, cancel := s.bound(ctx)
	defer cancel()
	// The count sees the table as it was before the insert: count the others and add one.
	var others int
	err := s.pool.QueryRow(ctx, `
		WITH me AS (INSERT INTO outbox.relay (instance, live_until) VALUES ($1, now() + $2)
		            ON CONFLICT (instance) DO UPDATE SET live_until = excluded.live_until)
		SELECT count(*) FROM outbox.relay WHERE instance <> $1 AND live_until > now() AND live_until <= now() + $3`, instance, ttl, farAhead(ttl)).Scan(&others)
	if err != nil {
		return 0, storeError("recording the heartbeat of a relay", err)
	}
	return others + 1, nil
}

// MaxLeaseTTL is the longest that a lease may be given out for: relays of one store may differ in it, and one that ends later
// than twice that from now is none.
const MaxLeaseTTL = time.Minute

// farAhead is further ahead than a lease can end.
func farAhead(ttl time.Duration) time.Duration { return 2 * max(ttl, MaxLeaseTTL) }

// AcquireShards takes up to limit shards whose lease has run out (SKIP LOCKED), each with its epoch raised by one.
//
// A lease that ends further ahead than any is given out was given out before the server's clock was put back. It counts as run
// out: its holder may be gone, and the clock may take hours to get there. A holder that is there renews it, or is fenced.
//
// It is the one write of a holder that is flushed: an epoch given out twice would let an old holder pass as the new one.
func (s *Store) AcquireShards(ctx context.Context, instance string, ttl time.Duration, limit int) ([]Lease, error) {
	ctx, cancel := s.bound(ctx)
	defer cancel()
	// At random, so that relays that start together do not all want the same shards.
	rows, err := s.pool.Query(ctx, `
		UPDATE outbox.shard s SET epoch = s.epoch + 1, holder = $1, lease_until = now() + $2
		FROM (SELECT shard FROM outbox.shard WHERE lease_until < now() OR lease_until > now() + $4 ORDER BY random() LIMIT $3 FOR UPDATE SKIP LOCKED) free
		WHERE s.shard = free.shard
		RETURNING s.shard, s.epoch, s.xid, s.seq, s.oldest, s.pend, s.offsets`, instance, ttl, limit, farAhead(ttl))
	if err != nil {
		return nil, storeError("acquiring shards", err)
	}
	leases, err := pgx.CollectRows(rows, func(row pgx.CollectableRow) (l Lease, err error) {
		c := &l.Checkpoint
		return l, row.Scan(&l.Shard, &l.Epoch, &c.Position.XID, &c.Position.Seq, &c.Oldest, &c.Pend, &c.Offsets)
	})
	return leases, storeError("acquiring shards", err)
}

// ReleaseShards ends leases early so that others can take them at once. Leases with an old epoch are left alone. Steps
// with a released epoch are fenced.
func (s *Store) ReleaseShards(ctx context.Context, shards []int16, epochs []int64) error {
	ctx, cancel := s.bound(ctx)
	defer cancel()
	_, err := s.pool.Exec(ctx, `
		UPDATE outbox.shard s SET holder = '', lease_until = '-infinity'
		FROM unnest($1::smallint[], $2::bigint[]) u(shard, epoch)
		WHERE s.shard = u.shard AND s.epoch = u.epoch`, shards, epochs)
	return storeError("releasing shards", err)
}
