package relay

import (
	"context"
	"time"
)

// bar is what keeps a shard from delivering although its lease is trusted, with a sink that fences.
type bar int

const (
	barNone    bar = iota
	barFence       // former holders are being cut off
	barProof       // they are; whether the lease was still ours then is not known yet
	barLooking     // what they delivered is being read
)

// startFence cuts former holders of a shard off. Then the lease is proven: by a renewal that began after the fence, so that
// a relay that slept in between delivers nothing. Whoever takes the shard later fences later, and ends us the same way.
func (r *Relay) startFence(s *shard) {
	s.phase, s.bar = phaseTail, barFence
	var ctx context.Context
	ctx, s.endFence = context.WithCancel(r.takeovers)
	r.tryFence(ctx, s, 0)
}

// tryFence tries, until the tenure ends.
func (r *Relay) tryFence(ctx context.Context, s *shard, tried int) {
	number, epoch := s.number, s.epoch
	r.accessWith(ctx, func(ctx context.Context) func() {
		attempt, cancel := context.WithTimeout(ctx, r.cfg.TakeoverTailTimeout)
		defer cancel()
		err := r.fencer.Fence(attempt, number, epoch)
		if err != nil {
			select {
			case <-r.after(min(r.cfg.RetryMin<<min(tried, 6), r.cfg.RetryMax)):
			case <-ctx.Done():
			}
		}
		return func() { r.fenceTried(ctx, s, tried, err) }
	})
}

// fenceTried takes the outcome. While the cluster is away the shard is read and parked as ever; only deliveries wait.
func (r *Relay) fenceTried(ctx context.Context, s *shard, tried int, err error) {
	if s.phase != phaseTail && !s.barredAtWork() {
		return
	}
	if err == nil {
		r.log.Info("former holders cut off", "shard", s.number, "epoch", s.epoch)
		s.bar, s.fencedAt = barProof, r.now()
		s.renewAt = s.fencedAt
		return
	}
	if tried == 0 {
		r.log.Warn("former holders of a shard cannot be cut off: nothing of it is delivered until they are", "shard", s.number,
			"epoch", s.epoch, "error", err)
	}
	if s.phase == phaseTail {
		r.core.start(s, nil, r.now())
		s.bar = barFence
	}
	r.tryFence(ctx, s, tried+1)
}

// proven takes note that the lease was ours at a time.
func (r *Relay) proven(s *shard, at time.Time) {
	if s.bar != barProof || at.Before(s.fencedAt) || s.phase != phaseTail && s.phase != phaseActive {
		return
	}
	s.bar = barLooking
	r.startTailRead(s)
}

// cutOff ends a tenure whose producer broke down or was cut off: what became of its last records is known only to who fences
// next. The shard is given back, and taken anew like any other.
func (r *Relay) cutOff(s *shard, now time.Time) {
	if r.fencer == nil || s.phase != phaseActive {
		return
	}
	r.log.Warn("cut off from the cluster: the shard is given up, to be taken anew", "shard", s.number, "epoch", s.epoch)
	r.drain(s, now)
}

// barredAtWork reports whether a shard works but for its deliveries.
func (s *shard) barredAtWork() bool { return s.phase == phaseActive && s.bar != barNone }

// stopFence ends what is under way to cut former holders off.
func (s *shard) stopFence() {
	if s.endFence != nil {
		s.endFence()
	}
}
