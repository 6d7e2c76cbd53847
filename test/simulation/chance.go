package simulation

import "math/rand/v2"

// chance decides everything that is left open. A schedule is nothing but its answers.
type chance interface {
	// n returns a number from 0 to limit-1.
	n(limit int) int
}

// seeded is a chance that a seed determines.
type seeded struct{ r *rand.Rand }

func newSeeded(seed uint64) chance {
	return seeded{rand.New(rand.NewPCG(seed, 0x6f7574626f78))} //nolint:gosec // not a secret
}

func (s seeded) n(limit int) int { return s.r.IntN(limit) }
