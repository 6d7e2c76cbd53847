package store

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/cespare/xxhash/v2"
	"github.com/jackc/pgx/v5"
)

// addDeadLetterSQL stores a dead letter as if it had come by Publish and been set aside at once: its transaction is
// COMMITTED, and an empty segment in the log holds its place, so that checkpoints, retention and Verify find everything
// where they look for it. Nothing is left for the holder of the shard to do, and nothing of what it keeps in memory changes:
// a dead letter that is set aside alone blocks nobody.
//
// $1 source, $2 transaction, $3 shards, $4 digest, $5 shard, $6 body of the segment, $7 hash of the aggregate, $8 its type,
// $9 its id, $10 topic, $11 error, $12 attempts, $13 body, $14–$16 method, evidence, actor: whoever adds it keeps what it is
// made of, as in KeptByCaller.
const addDeadLetterSQL = `
WITH p AS (
  INSERT INTO outbox.tx (source_id, tx_id, state, shards, digest, log_xid, decided_at)
  VALUES ($1, $2, 1, $3, $4, pg_current_xact_id(), now())
  ON CONFLICT (source_id, tx_id) DO NOTHING
  RETURNING log_xid),
l AS (
  INSERT INTO outbox.log (shard, seq, gen, stale, body)
  SELECT $5::smallint, 0, (SELECT gen FROM outbox.control), NULL, $6::bytea FROM p),
r AS (
  INSERT INTO outbox.resolution (source_id, tx_id, state, method, evidence, actor)
  SELECT $1, $2, 1, $14, $15::jsonb, $16 FROM p)
INSERT INTO outbox.dead_letter (xid, agg, seq, record, shard, queue, source_id, tx_id, aggregate_type, aggregate_id, topic, error, attempts, body)
SELECT p.log_xid, $7, 0, 0, $5, false, $1, $2, $8, $9, $10, $11, $12, $13 FROM p`

// AddDeadLetter stores an event as a dead letter that nobody has tried to publish. It is durable when it returns, and
// idempotent by k like a Publish: nil too when the transaction is there with the same content already. ErrReused: it has other
// content. Later events of the aggregate do not follow it.
func (s *Store) AddDeadLetter(ctx context.Context, k Key, e *Event, reason string, attempts int32, actor string) error {
	const doing = "adding a dead letter"
	a := Aggregate{Source: k.Source, Type: e.AggregateType, ID: e.AggregateID}
	shard := ShardOf(a, s.shardCount)
	digest := xxhash.Sum64(appendEvent(nil, e))
	kept := KeptByCaller(actor)
	body := EncodeEvent(nil, &Record{Key: k, State: Committed, Event: *e, PreparedAt: time.Now().UnixNano()})
	return s.transact(ctx, doing, func(tx pgx.Tx) error {
		tag, err := tx.Exec(ctx, addDeadLetterSQL, k.Source, [16]byte(k.Transaction), int64(ShardSet(0).Add(shard)), //nolint:gosec // a bitmap
			int64(digest), shard, []byte{segmentFormat}, aggregateHash(a), a.Type, a.ID, e.Topic, reason, attempts, body, //nolint:gosec // bits
			kept.Method, kept.Evidence, kept.Actor)
		switch {
		case err != nil:
			return storeError(doing, err)
		case tag.RowsAffected() == 0:
			return sameContent(ctx, tx, k, digest)
		}
		return audit(ctx, tx, actor, "deadletter.add", k.Transaction.String(), reason, map[string]any{
			"source_id": k.Source, "aggregate_type": a.Type, "aggregate_id": a.ID, "topic": e.Topic, "shard": shard,
		})
	})
}

// sameContent finds out whether the transaction that was in the way is the same.
func sameContent(ctx context.Context, tx pgx.Tx, k Key, digest uint64) error {
	var state State
	var stored int64
	err := tx.QueryRow(ctx, `SELECT state, digest FROM outbox.tx WHERE source_id = $1 AND tx_id = $2`, k.Source, [16]byte(k.Transaction)).Scan(&state, &stored)
	switch {
	case errors.Is(err, pgx.ErrNoRows): // purged meanwhile
		return fmt.Errorf("transaction %s: %w", k.Transaction, ErrContention)
	case err != nil:
		return storeError("looking a transaction up", err)
	case uint64(stored) != digest: //nolint:gosec // bits
		return ErrReused
	case state != Committed:
		return &DecidedError{State: state}
	}
	return nil
}
