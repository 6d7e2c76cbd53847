package store

import (
	"context"
	"time"
)

// Config says how to reach the store. The zero value of a field means its default.
type Config struct {
	DSN string // libpq connection string or URL
	// Unsafe allows fsync=off and synchronous_commit=off. For tests and benchmarks of something else.
	Unsafe bool
	// MaxConns of the pool for everything but the writers and readers, which have their own connections. Default 8.
	MaxConns int32
	// StatementTimeout of every connection; also the grace after which a closed generation has no straggler. Default 5 s.
	StatementTimeout time.Duration
	// ApplicationName as pg_stat_activity shows it. Default "outbox".
	ApplicationName string
}

// Store is a PostgreSQL database with the platform's schema. Safe for concurrent use.
type Store struct{ store }

// Open connects, and refuses a store that may lose commits (fsync or synchronous_commit off, unless Unsafe), a standby,
// and a schema revision that this binary does not accept: the error names the command to run.
func Open(ctx context.Context, cfg Config) (*Store, error) { return open(ctx, cfg) }

// Close closes the pool.
func (s *Store) Close() { s.store.close() }

// ShardCount is the number of shards, fixed when the schema was made.
func (s *Store) ShardCount() int { return s.shardCount }

// Ping reports whether the store answers and is writable.
func (s *Store) Ping(ctx context.Context) error { return s.ping(ctx) }

// MaintenanceConfig sets up maintenance. The zero value of a field means its default.
type MaintenanceConfig struct {
	Interval            time.Duration // between passes. Default 1 s
	GenerationBytes     int64         // size at which a log generation is closed. Default 512 MiB
	LogRetention        time.Duration // how long published events stay readable. Default 1 h
	TxRetention         time.Duration // how long tx rows decided by the client are kept. Default 15 min
	ResolutionRetention time.Duration // … decided by anybody else. Default 7 days
}

// MaintenanceReport says what a pass did and saw.
type MaintenanceReport struct {
	Leader     bool // false: another process holds the maintenance lock; nothing was done
	Rotated    bool
	Truncated  int
	Purged     int64
	RingFull   bool  // the next generation cannot be reused yet: a shard is behind
	LogBytes   int64 // all generations
	Unreleased int   // generations that are not empty
}

// MaintainOnce makes one pass: rotates and truncates the log ring, purges tx in chunks. One process at a time does it
// (advisory lock); any may call it.
func (s *Store) MaintainOnce(ctx context.Context, cfg MaintenanceConfig) (MaintenanceReport, error) {
	return s.maintainOnce(ctx, cfg)
}
