package store

import "context"

// Violation is an invariant of the stored state that does not hold.
type Violation struct {
	Invariant string // short name
	Detail    string
}

// Verify checks every invariant of the stored state in one snapshot. It changes nothing.
func (s *Store) Verify(ctx context.Context) ([]Violation, error) { return s.verify(ctx) }
