package store

import (
	"context"
	"errors"
	"fmt"

	"github.com/jackc/pgx/v5"
)

// String returns the action's word.
func (a Action) String() string {
	switch a {
	case ActionRedrive:
		return "redrive"
	case ActionSkip:
		return "skip"
	case ActionDiscard:
		return "discard"
	}
	return fmt.Sprintf("action %d", int16(a))
}

// aggregateHash is how an aggregate's hash is stored: the same 64 bits, signed.
func aggregateHash(a Aggregate) int64 { return int64(a.Hash()) } //nolint:gosec // bits of a hash

// RequestOperation records an operator's request for the holder and an audit row. ErrUnknown: the aggregate has nothing
// parked and no dead letters. ErrInvalid: no such action. Requests are executed in the order of their ids; one that finds
// nothing left to do says so in its outcome.
func (s *Store) RequestOperation(ctx context.Context, a Aggregate, action Action, actor, reason string) (*Operation, error) {
	if action < ActionRedrive || action > ActionDiscard {
		return nil, fmt.Errorf("requesting %s: %w", action, ErrInvalid)
	}
	op := &Operation{Shard: ShardOf(a, s.shardCount), Aggregate: a, Action: action}
	err := s.transact(ctx, "requesting an operation", func(tx pgx.Tx) error {
		var source *string
		err := tx.QueryRow(ctx, `
			SELECT (SELECT name FROM outbox.source WHERE source_id = $3)
			WHERE EXISTS (SELECT FROM outbox.parked
			              WHERE shard = $1 AND agg = $2 AND source_id = $3 AND aggregate_type = $4 AND aggregate_id = $5)
			   OR EXISTS (SELECT FROM outbox.dead_letter
			              WHERE shard = $1 AND agg = $2 AND source_id = $3 AND aggregate_type = $4 AND aggregate_id = $5)`,
			op.Shard, aggregateHash(a), a.Source, a.Type, a.ID).Scan(&source)
		if errors.Is(err, pgx.ErrNoRows) {
			return fmt.Errorf("aggregate %s %q has nothing parked and no dead letters: %w", a.Type, a.ID, ErrUnknown)
		}
		if err != nil {
			return storeError("looking for the aggregate", err)
		}
		if source == nil {
			source = new(string)
		}
		err = tx.QueryRow(ctx, `
			INSERT INTO outbox.operation (shard, source_id, aggregate_type, aggregate_id, action, actor, reason)
			VALUES ($1, $2, $3, $4, $5, $6, $7) RETURNING operation_id`,
			op.Shard, a.Source, a.Type, a.ID, action, actor, reason).Scan(&op.ID)
		if err != nil {
			return storeError("requesting an operation", err)
		}
		return audit(ctx, tx, actor, "aggregate."+action.String(), *source+"/"+a.Type+"/"+a.ID, reason, map[string]any{
			"operation_id": op.ID, "shard": op.Shard, "source_id": a.Source, "aggregate_type": a.Type, "aggregate_id": a.ID,
		})
	})
	if err != nil {
		return nil, err
	}
	return op, nil
}

// OperationByID returns an operation. ErrUnknown: there is none, or it was done more than a day ago.
func (s *Store) OperationByID(ctx context.Context, id int64) (*Operation, error) {
	op := &Operation{ID: id}
	err := s.pool.QueryRow(ctx, `
		SELECT shard, source_id, aggregate_type, aggregate_id, action, done_at IS NOT NULL, outcome, events
		FROM outbox.operation WHERE operation_id = $1`, id).
		Scan(&op.Shard, &op.Aggregate.Source, &op.Aggregate.Type, &op.Aggregate.ID, &op.Action, &op.Done, &op.Outcome, &op.Events)
	if errors.Is(err, pgx.ErrNoRows) {
		return nil, fmt.Errorf("operation %d: %w", id, ErrUnknown)
	}
	if err != nil {
		return nil, storeError("reading an operation", err)
	}
	return op, nil
}
