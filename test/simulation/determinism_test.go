package simulation

import (
	"fmt"
	"slices"
	"testing"
)

// TestSeedIsTheSchedule: what a seed did once it does again, or a failure could not be repeated.
func TestSeedIsTheSchedule(t *testing.T) {
	tell := func(seed uint64) (story []string) {
		runSeed(seed, 300, func(format string, args ...any) { story = append(story, fmt.Sprintf(format, args...)) })
		return story
	}
	for seed := uint64(1); seed <= 50; seed++ {
		first, second := tell(seed), tell(seed)
		if len(first) < 20 {
			t.Fatalf("seed %d: hardly anything happened", seed)
		}
		if !slices.Equal(first, second) {
			for i := range first {
				if i >= len(second) || first[i] != second[i] {
					t.Fatalf("seed %d: line %d was %q, and then %q", seed, i, first[i], slices.Concat(second, []string{"nothing"})[min(i, len(second))])
				}
			}
			t.Fatalf("seed %d: %d lines, and then %d", seed, len(first), len(second))
		}
	}
}
