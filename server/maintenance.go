package server

import (
	"context"
	"time"

	"github.com/outbox-platform/outbox/store"
)

// ringFullRepeat is how often a full ring is logged while it lasts.
const ringFullRepeat = time.Minute

// maintain makes a maintenance pass of the store each interval until ctx ends. Every server tries; the store lets one do
// it at a time.
func (s *Server) maintain(ctx context.Context) {
	tick := time.NewTicker(s.cfg.MaintenanceInterval)
	defer tick.Stop()
	var told time.Time // when a full ring was last logged
	failing := false
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		report, err := s.store.MaintainOnce(ctx, s.cfg.maintenance())
		switch {
		case ctx.Err() != nil:
			return
		case err != nil && !failing:
			s.log.Error("maintaining the store; it is tried again each interval", "error", err)
		}
		failing = err != nil
		if err == nil && report.Leader {
			told = s.maintained(report, told)
		}
	}
}

// maintained tells what a pass did and saw; it returns when a full ring was last logged.
func (s *Server) maintained(r store.MaintenanceReport, told time.Time) time.Time {
	m := s.metrics
	m.logBytes.Set(float64(r.LogBytes))
	m.unreleased.Set(float64(r.Unreleased))
	m.purged.Add(float64(r.Purged))
	m.truncations.Add(float64(r.Truncated))
	if r.Rotated {
		m.rotations.Inc()
	}
	if r.Rotated || r.Truncated > 0 {
		s.log.Info("log maintained", "rotated", r.Rotated, "truncated", r.Truncated, "bytes", r.LogBytes, "generations", r.Unreleased)
	}
	if !r.RingFull {
		m.ringFull.Set(0)
		return time.Time{}
	}
	m.ringFull.Set(1)
	if time.Since(told) < ringFullRepeat {
		return told
	}
	s.log.Error("the log cannot rotate: a shard is behind, and the log grows until it catches up", "bytes", r.LogBytes, "generations", r.Unreleased)
	return time.Now()
}
