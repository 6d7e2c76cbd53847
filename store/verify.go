package store

import (
	"context"
	"fmt"
	"slices"

	"github.com/jackc/pgx/v5"
)

// Violation is an invariant of the stored state that does not hold.
type Violation struct {
	Invariant string // one of the Invariant names
	Detail    string // which row, and what is wrong with it
}

// The invariants. "Done" means: at or before its shard's checkpoint, and neither pending, nor parked, nor a dead letter.
// "Needed" means: after the checkpoint, or pending.
const (
	// InvariantGeneration: one generation of the log ring is open, closed ones say since when, empty ones are empty.
	InvariantGeneration = "generation"
	// InvariantLease: a running lease has a holder and an epoch.
	InvariantLease = "lease"
	// InvariantCheckpoint: every shard has one; it is not ahead of the log, oldest is not after it, pend and offsets can be read.
	InvariantCheckpoint = "checkpoint"
	// InvariantPend: what is pending is at or before the checkpoint and not before oldest, is a valid event of that
	// transaction in the log, is not parked or a dead letter too, and carries the state of its transaction or PREPARED.
	InvariantPend = "pend"
	// InvariantSegment: every row of the log belongs to a shard that exists, and its body can be read.
	InvariantSegment = "segment"
	// InvariantStale: all segments of a batch name the same losers, each once, and each is a request of the batch.
	InvariantStale = "stale"
	// InvariantEventHasTransaction: a valid event that is needed has a row in tx, which names its batch and its shard. No
	// transaction has a second valid copy of its events later in the log.
	InvariantEventHasTransaction = "event-has-transaction"
	// InvariantDecisionAgrees: a valid decision in the log, and a publish, agrees with tx.
	InvariantDecisionAgrees = "decision-agrees"
	// InvariantDecisionAfterEvents: a valid decision comes after the events it decides.
	InvariantDecisionAfterEvents = "decision-after-events"
	// InvariantDecisionReachesShard: for every event that the holder still believes undecided, while tx says otherwise, the
	// decision is still to come in the log of its shard.
	InvariantDecisionReachesShard = "decision-reaches-shard"
	// InvariantDigest: the digest of the events in the log is the one that tx compares repeated Prepares with.
	InvariantDigest = "digest"
	// InvariantUnreadInLog: the events of a transaction that are after the checkpoint are in the log: no generation was
	// truncated too early.
	InvariantUnreadInLog = "unread-in-log"
	// InvariantUndecidedKept: the events of a PREPARED transaction are needed or parked: not lost.
	InvariantUndecidedKept = "undecided-kept"
	// InvariantOrderKept: no committed event is done while an earlier event of its aggregate is undecided.
	InvariantOrderKept = "order-kept"
	// InvariantRowMatchesBody: a row of parked or dead_letter is in the shard of its aggregate, under its hash, and says what
	// its body says.
	InvariantRowMatchesBody = "row-matches-body"
	// InvariantParkedTransaction: tx knows the transaction of a parked event under its batch; the row carries its state, or
	// PREPARED while the decision is still to be read; and while PREPARED, what the resolver needs to ask.
	InvariantParkedTransaction = "parked-transaction"
	// InvariantDeadLetterCommitted: tx knows the transaction of a dead letter, and it is COMMITTED.
	InvariantDeadLetterCommitted = "dead-letter-committed"
	// InvariantParkedOrDead: no event is parked and a dead letter.
	InvariantParkedOrDead = "parked-or-dead"
	// InvariantTransactionRow: a row of tx has a state, a time of decision exactly if it is decided, shards that exist, a
	// registered source and a batch that was written.
	InvariantTransactionRow = "transaction-row"
	// InvariantResolutionAgrees: evidence belongs to a transaction that is decided as it says.
	InvariantResolutionAgrees = "resolution-agrees"
	// InvariantOperationShard: an operation is addressed to the holder of its aggregate.
	InvariantOperationShard = "operation-shard"
)

// Invariants are all of them.
var Invariants = []string{
	InvariantGeneration,
	InvariantLease,
	InvariantCheckpoint,
	InvariantPend,
	InvariantSegment,
	InvariantStale,
	InvariantEventHasTransaction,
	InvariantDecisionAgrees,
	InvariantDecisionAfterEvents,
	InvariantDecisionReachesShard,
	InvariantDigest,
	InvariantUnreadInLog,
	InvariantUndecidedKept,
	InvariantOrderKept,
	InvariantRowMatchesBody,
	InvariantParkedTransaction,
	InvariantDeadLetterCommitted,
	InvariantParkedOrDead,
	InvariantTransactionRow,
	InvariantResolutionAgrees,
	InvariantOperationShard,
}

// maxViolations is how many violations of one invariant are listed; the rest is counted.
const maxViolations = 100

// Verify checks every invariant of the stored state in one snapshot. It changes nothing, needs little memory whatever the
// size of the store, and may run beside everything else; only truncation of the log waits for it. An invariant that fails
// very often is listed 100 times, and then once with the number of the others.
func (s *Store) Verify(ctx context.Context) (found []Violation, err error) {
	err = s.snapshot(ctx, "verifying", func(tx pgx.Tx) error {
		found, err = s.verifyIn(ctx, tx)
		return err
	})
	return found, err
}

// verifyIn is Verify in a transaction that is open already.
func (s *Store) verifyIn(ctx context.Context, tx pgx.Tx) ([]Violation, error) {
	v := &verification{tx: tx, shardCount: s.shardCount, more: map[string]int{}}
	for _, check := range []func(context.Context) error{
		v.begin, v.generations, v.checkpointRows, v.pend, v.log, v.transactions, v.parkedRows, v.deadLetterRows, v.parkedOrDead,
		v.resolutions, v.operations,
	} {
		if err := check(ctx); err != nil {
			return nil, fmt.Errorf("verifying: %w", err)
		}
	}
	return v.result(), nil
}

// verification is one run of Verify.
type verification struct {
	tx          pgx.Tx
	shardCount  int
	checkpoints []checkpoint
	nextXID     uint64 // the snapshot's xmax: no batch that is seen has this one or a later one
	found       []Violation
	more        map[string]int // by invariant: how often it was violated
}

func (v *verification) violated(invariant, format string, args ...any) {
	v.more[invariant]++
	if v.more[invariant] <= maxViolations {
		v.found = append(v.found, Violation{Invariant: invariant, Detail: fmt.Sprintf(format, args...)})
	}
}

func (v *verification) result() []Violation {
	for invariant, n := range v.more {
		if n > maxViolations {
			v.found = append(v.found, Violation{Invariant: invariant, Detail: fmt.Sprintf("… and %d more", n-maxViolations)})
		}
	}
	slices.SortStableFunc(v.found, func(a, b Violation) int {
		switch {
		case a.Invariant < b.Invariant:
			return -1
		case a.Invariant > b.Invariant:
			return 1
		}
		return 0
	})
	return v.found
}

// begin takes the snapshot. The lock comes first: TRUNCATE does not respect snapshots, and a generation that vanished
// meanwhile would look like lost events.
func (v *verification) begin(ctx context.Context) error {
	const doing = "taking a snapshot"
	// Each statement is short, but not always as short as a server's are.
	const settings = `SET LOCAL statement_timeout = 0; SET LOCAL idle_in_transaction_session_timeout = 0; LOCK TABLE outbox.log IN ACCESS SHARE MODE`
	if _, err := v.tx.Exec(ctx, settings, pgx.QueryExecModeSimpleProtocol); err != nil {
		return storeError(doing, err)
	}
	if err := v.tx.QueryRow(ctx, `SELECT pg_snapshot_xmax(pg_current_snapshot())`).Scan(&v.nextXID); err != nil {
		return storeError(doing, err)
	}
	var err error
	v.checkpoints, err = readCheckpointsOfAll(ctx, v.tx)
	return err
}

// each reports a violation for every row of a query; describe gets the row's values as text.
func (v *verification) each(ctx context.Context, invariant, format, sql string, args ...any) error {
	rows, err := v.tx.Query(ctx, sql, args...)
	if err != nil {
		return storeError("checking "+invariant, err)
	}
	defer rows.Close()
	for rows.Next() {
		values, err := rows.Values()
		if err != nil {
			return storeError("checking "+invariant, err)
		}
		v.violated(invariant, format, values...)
	}
	return storeError("checking "+invariant, rows.Err())
}

func (v *verification) generations(ctx context.Context) error {
	err := v.each(ctx, InvariantGeneration, "generation %v: open %v, in use %v, closed %v", `
		SELECT g.gen, c.gen = g.gen, g.used, g.closed_at IS NOT NULL FROM outbox.generation g, outbox.control c
		WHERE CASE WHEN c.gen = g.gen THEN NOT g.used OR g.closed_at IS NOT NULL ELSE g.used <> (g.closed_at IS NOT NULL) END
		ORDER BY g.gen`)
	if err != nil {
		return err
	}
	err = v.each(ctx, InvariantGeneration, "generation %v is open, but it does not exist", `
		SELECT c.gen FROM outbox.control c WHERE NOT EXISTS (SELECT FROM outbox.generation g WHERE g.gen = c.gen)`)
	if err != nil {
		return err
	}
	return v.each(ctx, InvariantGeneration, "generation %v is empty by its row, but there are segments in it", `
		SELECT g.gen FROM outbox.generation g, LATERAL (SELECT FROM outbox.log l WHERE l.gen = g.gen AND l.shard > -32768 LIMIT 1) found
		WHERE NOT g.used ORDER BY g.gen`)
}

func (v *verification) checkpointRows(context.Context) error {
	if len(v.checkpoints) != v.shardCount {
		v.violated(InvariantCheckpoint, "%d of %d shards have a row", len(v.checkpoints), v.shardCount)
	}
	for i := range v.checkpoints {
		c := &v.checkpoints[i]
		if int(c.shard) < 0 || int(c.shard) >= v.shardCount {
			v.violated(InvariantCheckpoint, "shard %d has a row, but there are %d shards", c.shard, v.shardCount)
		}
		if c.live && (c.holder == "" || c.epoch <= 0) {
			v.violated(InvariantLease, "shard %d has a running lease with holder %q and epoch %d", c.shard, c.holder, c.epoch)
		}
		if c.XID >= v.nextXID {
			v.violated(InvariantCheckpoint, "shard %d: checkpoint %s is ahead of the log, whose next xid is %d", c.shard, c.Position, v.nextXID)
		}
		if c.oldest > c.XID {
			v.violated(InvariantCheckpoint, "shard %d: oldest %d is after checkpoint %s", c.shard, c.oldest, c.Position)
		}
		if c.pendErr != nil {
			v.violated(InvariantCheckpoint, "shard %d: %v", c.shard, c.pendErr)
		}
		if _, err := DecodeOffsets(c.offsets); err != nil {
			v.violated(InvariantCheckpoint, "shard %d: %v", c.shard, err)
		}
	}
	return nil
}

func (v *verification) resolutions(ctx context.Context) error {
	return v.each(ctx, InvariantResolutionAgrees, "source %v transaction %v was resolved with state %v, tx says %v", `
		SELECT r.source_id, r.tx_id::text, r.state, coalesce(t.state::text, 'nothing')
		FROM outbox.resolution r LEFT JOIN outbox.tx t USING (source_id, tx_id) WHERE t.state IS DISTINCT FROM r.state`)
}

func (v *verification) operations(ctx context.Context) error {
	rows, err := v.tx.Query(ctx, `SELECT operation_id, shard, source_id, aggregate_type, aggregate_id FROM outbox.operation ORDER BY operation_id`)
	if err != nil {
		return storeError("checking operations", err)
	}
	var id int64
	var shard int16
	var a Aggregate
	_, err = pgx.ForEachRow(rows, []any{&id, &shard, &a.Source, &a.Type, &a.ID}, func() error {
		if want := ShardOf(a, v.shardCount); shard != want {
			v.violated(InvariantOperationShard, "operation %d is addressed to shard %d, its aggregate is in %d", id, shard, want)
		}
		return nil
	})
	return storeError("checking operations", err)
}
