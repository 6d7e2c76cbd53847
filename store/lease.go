package store

import (
	"context"
	"time"
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
	return s.heartbeat(ctx, instance, ttl)
}

// AcquireShards takes up to limit shards whose lease has run out (SKIP LOCKED), each with its epoch raised by one.
func (s *Store) AcquireShards(ctx context.Context, instance string, ttl time.Duration, limit int) ([]Lease, error) {
	return s.acquireShards(ctx, instance, ttl, limit)
}

// ReleaseShards ends leases early so that others can take them at once. Leases with an old epoch are left alone.
func (s *Store) ReleaseShards(ctx context.Context, shards []int16, epochs []int64) error {
	return s.releaseShards(ctx, shards, epochs)
}
