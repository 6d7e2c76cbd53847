package kafka

import (
	"sync"
	"time"
)

// Bounds of a wave: larger ones gain nothing.
const (
	maxWaveRecords = 5_000
	maxWaveBytes   = 16 << 20
)

// minWaveBytes is how small waves are made at the least: the rest of what a transaction costs does not depend on its size.
const minWaveBytes = 256 << 10

// waveSize adapts how much waves carry to what the cluster, its quotas and the way there let through within the time of a
// transaction, or the same waves would be aborted again and again. It is the same for all shards, as they share all that. Safe
// for concurrent use.
type waveSize struct {
	mu    sync.Mutex
	bound int64 // bytes; 0: maxWaveBytes
}

// current is how much the next wave may carry, in bytes.
func (z *waveSize) current() int64 {
	z.mu.Lock()
	defer z.mu.Unlock()
	return z.currentLocked()
}

func (z *waveSize) currentLocked() int64 {
	if z.bound == 0 {
		return maxWaveBytes
	}
	return z.bound
}

// took learns from how long a wave took, whether it was committed or not, and reports whether the next ones are smaller. Waves
// that were taken under another bound than the present one, as those of other shards at the same time, say nothing.
func (z *waveSize) took(w *wave, took, timeout time.Duration) (smaller bool) {
	z.mu.Lock()
	defer z.mu.Unlock()
	switch before := z.currentLocked(); {
	case w.bound != before:
	case took > timeout/2 && w.bytes > minWaveBytes:
		z.bound = max(min(w.bytes, before)/2, minWaveBytes)
		return z.bound < before
	case took < timeout/8 && w.committed && w.bytes > before/2:
		z.bound = min(2*before, maxWaveBytes)
	}
	return false
}
