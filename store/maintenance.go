package store

import (
	"context"
	"time"
)

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
