package kafka

import "time"

// Bounds of a wave: larger ones gain nothing.
const (
	maxWaveRecords = 5_000
	maxWaveBytes   = 16 << 20
)

// minWaveBytes is how small waves are made at the least: the rest of what a transaction costs does not depend on its size.
const minWaveBytes = 256 << 10

// waveSize adapts how much the waves of a shard carry to what the cluster, its quotas and the way there let through within the
// time of a transaction, or the same waves would be aborted again and again. It outlives producers. Not safe for concurrent use.
type waveSize struct {
	bound int64 // bytes
}

// took learns from how long a wave took, whether it was committed or not.
func (z *waveSize) took(w *wave, took, timeout time.Duration) {
	switch {
	case took > timeout/2 && w.bytes > minWaveBytes:
		z.bound = min(z.bound, max(w.bytes/2, minWaveBytes))
	case took < timeout/4 && w.committed && w.bytes > z.bound/2:
		z.bound = min(2*z.bound, maxWaveBytes)
	}
}
