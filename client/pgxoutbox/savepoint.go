package pgxoutbox

import (
	"context"
	"errors"
	"fmt"

	"github.com/jackc/pgx/v5"
)

// savepoint is a nested transaction of a [Tx]. PostgreSQL keeps a savepoint that was rolled back to, pgx leaves it so, and what
// follows is still inside it: the marker too, which belongs to the top level. So pgx's savepoint lies in one of ours, which is
// released however it ends.
type savepoint struct {
	pgx.Tx
	top    *Tx
	name   string
	events int // published before
	closed bool
}

// Begin begins a nested transaction, a savepoint. Events that are published before it is rolled back share its fate.
func (tx *Tx) Begin(ctx context.Context) (pgx.Tx, error) { return tx.nest(ctx, tx.Tx) }

// Begin begins a savepoint in a savepoint.
func (s *savepoint) Begin(ctx context.Context) (pgx.Tx, error) { return s.top.nest(ctx, s.Tx) }

func (tx *Tx) nest(ctx context.Context, in pgx.Tx) (pgx.Tx, error) {
	tx.savepoints++
	name := fmt.Sprintf("outbox_%d", tx.savepoints)
	if _, err := in.Exec(ctx, "SAVEPOINT "+name); err != nil {
		return nil, fmt.Errorf("outbox: SAVEPOINT: %w", err)
	}
	nested, err := in.Begin(ctx)
	if err != nil {
		return nil, err
	}
	return &savepoint{Tx: nested, top: tx, name: name, events: len(tx.events)}, nil
}

// Commit releases the savepoint.
func (s *savepoint) Commit(ctx context.Context) error {
	return errors.Join(s.Tx.Commit(ctx), s.release(ctx))
}

// Rollback rolls back to the savepoint, forgets what was published since, and releases it.
func (s *savepoint) Rollback(ctx context.Context) error {
	if err := s.Tx.Rollback(ctx); err != nil {
		return err
	}
	clear(s.top.events[min(s.events, len(s.top.events)):])
	s.top.events = s.top.events[:min(s.events, len(s.top.events))]
	return s.release(ctx)
}

// release ends our savepoint, once.
func (s *savepoint) release(ctx context.Context) error {
	if s.closed {
		return nil
	}
	s.closed = true
	if _, err := s.top.Tx.Exec(ctx, "RELEASE SAVEPOINT "+s.name); err != nil {
		return fmt.Errorf("outbox: RELEASE SAVEPOINT: %w", err)
	}
	return nil
}
