package relay

import (
	"context"
	"slices"
	"time"

	"github.com/outbox-platform/outbox/internal/fault"
	"github.com/outbox-platform/outbox/store"
)

// leaseLoop counts the relays, and takes or gives up shards so that each relay has its fair share.
type leaseLoop struct {
	beat      every
	instances int
	failing   bool

	loading bool // an inheritance is being loaded
	toLoad  []*tenure
	reader  Reader // for takeovers
}

// tenure is a shard to be taken over.
type tenure struct {
	shard *shard
	lease store.Lease
	tried int
}

// fairShare is how many shards one of n relays is to have.
func fairShare(shards, n int) int { return (shards + n - 1) / max(n, 1) }

// startMembership counts the relays when it is time, then acquires or gives up.
func (r *Relay) startMembership(now time.Time) {
	l := &r.lease
	if !l.beat.due(now) {
		return
	}
	l.beat.running = true
	r.access(func(ctx context.Context) func() {
		ctx, cancel := context.WithTimeout(ctx, ioTimeout)
		defer cancel()
		n, err := r.st.Heartbeat(ctx, r.cfg.Instance, r.cfg.LeaseTTL)
		return func() {
			l.beat.running = false
			l.beat.at = now.Add(r.cfg.RenewEvery)
			if err != nil {
				r.leaseFailed("counting the relays", err)
				return
			}
			r.balance(n)
		}
	})
}

func (r *Relay) leaseFailed(what string, err error) {
	r.metrics.storeErrors.WithLabelValues("lease").Inc()
	if !r.lease.failing {
		r.lease.failing = true
		r.log.Error(what, "error", err)
	}
}

// balance takes shards if this relay has less than its share, and gives up some if it has more.
func (r *Relay) balance(instances int) {
	l := &r.lease
	l.failing = false
	if r.stopping {
		return
	}
	if instances != l.instances {
		r.log.Info("relays counted", "relays", instances)
		l.instances = instances
	}
	share := fairShare(r.st.ShardCount(), instances)
	held := 0
	for _, s := range r.core.shards {
		if s.phase != phaseDraining {
			held++
		}
	}
	now := r.now()
	for i := len(r.core.shards) - 1; i >= 0 && held > share; i-- {
		if s := r.core.shards[i]; s.phase == phaseActive {
			r.log.Info("shard given up: others have less", "shard", s.number, "epoch", s.epoch)
			r.drain(s, now)
			held--
		}
	}
	// Without the sources every event would look like one of an unknown source.
	if held < share && r.core.sourcesRead {
		r.acquire(share - held)
	}
}

// acquire takes up to limit shards that nobody holds.
func (r *Relay) acquire(limit int) {
	l := &r.lease
	l.beat.running = true
	r.access(func(ctx context.Context) func() {
		ctx, cancel := context.WithTimeout(ctx, ioTimeout)
		defer cancel()
		attempt := r.now()
		leases, err := r.st.AcquireShards(ctx, r.cfg.Instance, r.cfg.LeaseTTL, limit)
		return func() {
			l.beat.running = false
			if err != nil {
				r.leaseFailed("acquiring shards", err)
			}
			for i := range leases {
				r.takeOver(leases[i], attempt)
			}
		}
	})
}

// takeOver begins the tenure of a shard.
func (r *Relay) takeOver(lease store.Lease, attempt time.Time) {
	// A lease that ran out is anybody's, also ours again. The tenure before ended with its epoch.
	for _, s := range r.core.shards {
		if s.number == lease.Shard {
			r.fenced(s, r.now())
			break
		}
	}
	s := r.core.acquire(lease.Shard, lease.Epoch, lease.Checkpoint)
	s.trustUntil = attempt.Add(r.cfg.trust())
	s.renewAt = attempt.Add(r.cfg.RenewEvery)
	fault.Point("relay.after-acquire")
	r.log.Info("shard acquired", "shard", s.number, "epoch", s.epoch, "position", lease.Position.String())
	if r.stopping {
		r.drain(s, r.now())
		return
	}
	r.lease.toLoad = append(r.lease.toLoad, &tenure{shard: s, lease: lease})
	r.loadNext()
}

// loadNext loads the next inheritance, one at a time.
func (r *Relay) loadNext() {
	l := &r.lease
	for !l.loading && len(l.toLoad) > 0 {
		t := l.toLoad[0]
		l.toLoad = l.toLoad[1:]
		if t.shard.phase == phaseLoading {
			l.loading = true
			r.startLoadInheritance(t)
		}
	}
}

func (r *Relay) startLoadInheritance(t *tenure) {
	l := &r.lease
	reader := l.reader
	pause := time.Duration(0)
	if t.tried > 0 {
		pause = min(r.cfg.RetryMin<<min(t.tried, 6), r.cfg.RetryMax)
	}
	r.accessWith(r.takeovers, func(ctx context.Context) func() {
		select {
		case <-r.after(pause):
		case <-ctx.Done():
		}
		var h *inheritance
		var err error
		if reader == nil {
			reader, err = r.st.OpenReader(ctx)
		}
		if err == nil {
			h, err = loadInheritance(ctx, r.st, reader, t.lease)
		}
		return func() {
			l.reader = reader
			l.loading = false
			r.inherit(t, h, err)
			r.loadNext()
		}
	})
}

// inherit takes what was loaded.
func (r *Relay) inherit(t *tenure, h *inheritance, err error) {
	s := t.shard
	if s.phase != phaseLoading {
		return
	}
	if err == nil {
		err = r.core.restore(s, h, r.now())
	}
	if err != nil {
		r.metrics.storeErrors.WithLabelValues("takeover").Inc()
		r.log.Error("taking a shard over; trying again", "shard", s.number, "epoch", s.epoch, "tries", t.tried+1, "error", err)
		t.shard, t.tried = r.core.reacquire(s, t.lease, r.now()), t.tried+1
		r.lease.toLoad = append(r.lease.toLoad, t)
		return
	}
	fault.Point("relay.after-takeover")
	r.metrics.takeovers.Inc()
	r.log.Info("shard taken over", "shard", s.number, "epoch", s.epoch, "position", s.cursor.String(),
		"pend", len(h.pend), "parked", len(h.parked), "dead_queues", len(h.deadQueues))
	r.read.at = time.Time{}
}

// drain begins to give a shard up.
func (r *Relay) drain(s *shard, now time.Time) {
	s.drainBy = now.Add(r.cfg.DrainTimeout)
	s.drain()
	s.stopFence()
}

// giveUp ends the tenure of shards that are drained: after a last step, the lease is released. If records are still in
// flight when the time is up, they are purged: the next holder may begin.
func (r *Relay) giveUp(now time.Time) {
	var shards []int16
	var epochs []int64
	for i := 0; i < len(r.core.shards); {
		s := r.core.shards[i]
		late := now.After(s.drainBy)
		if s.phase != phaseDraining || !late && (s.inflight > 0 || s.busy != idle || s.dirty && s.loaded) {
			i++
			continue
		}
		if late && s.inflight > 0 && !s.purged {
			s.purged = true
			s.drainBy = now.Add(r.cfg.DrainTimeout / 2) // the reports are still to come
			r.sink.Purge()
			i++
			continue
		}
		if s.busy != stepping { // else the outcome of a step is unknown: the lease runs out by itself
			shards, epochs = append(shards, s.number), append(epochs, s.epoch)
		}
		r.log.Info("shard released", "shard", s.number, "epoch", s.epoch, "position", s.saved.Position.String())
		r.drop(s, now) // the next one has its place
	}
	if len(shards) > 0 {
		r.release(shards, epochs)
	}
}

// release ends leases early.
func (r *Relay) release(shards []int16, epochs []int64) {
	r.access(func(ctx context.Context) func() {
		ctx, cancel := context.WithTimeout(ctx, ioTimeout)
		defer cancel()
		err := r.st.ReleaseShards(ctx, shards, epochs)
		return func() {
			if err != nil {
				r.leaseFailed("releasing shards", err)
			}
		}
	})
}

// drop forgets a shard. Its records in flight are purged: somebody else may be delivering them.
func (r *Relay) drop(s *shard, now time.Time) {
	flying := s.inflight > 0
	s.stopFence()
	r.core.forget(s, now)
	r.metrics.forget(s.number)
	if flying {
		r.sink.Purge()
	}
}

// fenced drops a shard that somebody else holds. Nothing is written for it any more.
func (r *Relay) fenced(s *shard, now time.Time) {
	r.metrics.fenced.Inc()
	r.log.Warn("fenced: another relay holds the shard", "shard", s.number, "epoch", s.epoch, "in_flight", s.inflight)
	r.drop(s, now)
}

// distrust purges what is in flight of shards whose lease may have run out: somebody else may begin to deliver it. The
// records are delivered again when the lease turns out to be still ours.
//
// A purge takes what is in flight of all shards, also of those whose lease is trusted a little longer: what was not renewed
// with the others, or moments later. Whether that was written is not known. To deliver it again at once would write it twice
// just before the next holder, who can look, takes over: they wait for their renewal too.
func (r *Relay) distrust(now time.Time) {
	if !slices.ContainsFunc(r.core.shards, func(s *shard) bool { return s.purgeable() && !now.Before(s.trustUntil) }) {
		return
	}
	for _, s := range r.core.shards {
		if s.purgeable() {
			s.purged = true
			if now.Before(s.trustUntil) {
				s.trustUntil, s.renewAt = now, now
			}
			r.log.Warn("lease not renewed in time: nothing is delivered until it is", "shard", s.number, "epoch", s.epoch,
				"in_flight", s.inflight)
		}
	}
	r.sink.Purge()
}

// purgeable reports whether a purge would take something of the shard that it works on.
func (s *shard) purgeable() bool { return s.phase == phaseActive && s.inflight > 0 && !s.purged }

// renewed takes note that a lease was renewed by an attempt that began at a time.
func (r *Relay) renewed(s *shard, attempt time.Time) {
	s.trustUntil = attempt.Add(r.cfg.trust())
	s.renewAt = attempt.Add(r.cfg.RenewEvery)
	if s.phase == phaseActive {
		s.purged = false
	}
	r.proven(s, attempt)
}
