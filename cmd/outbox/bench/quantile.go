package bench

import (
	"slices"
	"time"
)

// quantile returns the q-quantile (0…1) of samples in nanoseconds, as milliseconds. It sorts samples in place.
func quantile(samples []int64, q float64) float64 {
	if len(samples) == 0 {
		return 0
	}
	slices.Sort(samples)
	i := min(int(q*float64(len(samples))), len(samples)-1)
	return float64(samples[i]) / float64(time.Millisecond)
}
