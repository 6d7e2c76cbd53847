package main

import (
	"testing"

	"github.com/outbox-platform/outbox/test/robustness/check"
)

// TestTotalsOfPace: latencies are the worst run's, recoveries are taken together, and a run that nobody watched adds nothing.
func TestTotalsOfPace(t *testing.T) {
	sum := newTotals()
	for _, p := range []*check.Pace{
		{Prepare: check.Spread{N: 10, P50: 1, P99: 5, Max: 6}, Recovery: map[string][]float64{"kill-relay": {4, 1}}},
		nil,
		{Prepare: check.Spread{N: 20, P50: 2, P99: 3, Max: 9}, Recovery: map[string][]float64{"kill-relay": {2}, "kill-server": {0}}},
	} {
		sum.add(verdict{Verdict: "valid", Summary: check.Summary{Pace: p}})
	}
	sum.recovered()
	if got, want := sum.Pace["prepare"], (check.Spread{N: 30, P50: 2, P99: 5, Max: 9}); got != want {
		t.Errorf("Prepare: %+v", got)
	}
	if got, want := sum.Recovery["kill-relay"], (check.Spread{N: 3, P50: 2, P99: 4, Max: 4}); got != want || sum.Recovery["kill-server"].N != 1 {
		t.Errorf("recovery: %+v", sum.Recovery)
	}
}
