package store

import (
	"context"

	"github.com/jackc/pgx/v5"
)

// VerifyIn is Verify in a transaction of the test, so that a corruption can be rolled back.
func VerifyIn(ctx context.Context, s *Store, tx pgx.Tx) ([]Violation, error) {
	return s.verifyIn(ctx, tx)
}
