package store

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/outbox-platform/outbox/internal/fault"
)

// Step is one fenced write of a shard's holder: its checkpoint together with every change of parked, dead_letter and
// operation rows that belongs to it, in one database transaction. It also renews the lease.
type Step struct {
	Shard      int16
	Epoch      int64
	Checkpoint Checkpoint
	Park       []Parked         // insert, or replace the row at the same position
	Decide     []ParkedDecision // set the state of all parked rows of these transactions
	Unpark     []EventPosition  // delete from parked
	Bury       []DeadLetter     // insert into dead_letter
	Exhume     []EventPosition  // delete from dead_letter
	Operations []OperationOutcome
	// Flush: the renewal must survive a crash of PostgreSQL, because the last one that does is old.
	Flush bool
}

// Steps writes the steps of several shards and renews their leases for ttl, in one transaction. It returns the shards that
// are fenced: nothing of their steps was written. An error means that the outcome of all is unknown; repeating is safe. A
// checkpoint that would move backwards is an error, and nothing is written.
//
// What changed rows is flushed when Steps returns: a holder forgets what it knows to be a row. Checkpoints alone are not
// (synchronous_commit=off), unless a step says Flush: a crash of PostgreSQL may take the last ones back, in order, which
// repeats deliveries but loses none. It also takes back the renewals in them.
func (s *Store) Steps(ctx context.Context, ttl time.Duration, steps []Step) (fenced []int16, err error) {
	ctx, cancel := s.bound(ctx)
	defer cancel()
	var written map[int16]bool
	if slices.ContainsFunc(steps, func(st Step) bool { return st.changesRows() }) {
		written, err = s.stepsWithRows(ctx, ttl, steps)
	} else {
		written, err = s.plainSteps(ctx, ttl, steps)
	}
	if err != nil {
		return nil, err
	}
	for i := range steps {
		if n := steps[i].Shard; !written[n] {
			fenced = append(fenced, n)
		}
	}
	return fenced, nil
}

func (st *Step) changesRows() bool {
	return len(st.Park)+len(st.Decide)+len(st.Unpark)+len(st.Bury)+len(st.Exhume)+len(st.Operations) > 0
}

// checkpointSQL writes checkpoints and renews leases. A row is missing in the answer if another epoch holds the shard, or
// nobody; backwards says that the checkpoint did not move because it would have moved back, and that for this reason none did.
const checkpointSQL = `
WITH u AS (
  SELECT * FROM unnest($1::smallint[], $2::bigint[], $3::xid8[], $4::int[], $5::xid8[], $6::bytea[], $7::bytea[])
    u(shard, epoch, xid, seq, oldest, pend, offsets)),
b AS (
  SELECT s.shard FROM outbox.shard s JOIN u ON s.shard = u.shard AND s.epoch = u.epoch
  WHERE s.holder <> '' AND (u.xid, u.seq) < (s.xid, s.seq)),
w AS (
  UPDATE outbox.shard s SET xid = u.xid, seq = u.seq, oldest = u.oldest, pend = u.pend, offsets = u.offsets, lease_until = now() + $8
  FROM u WHERE s.shard = u.shard AND s.epoch = u.epoch AND s.holder <> '' AND (u.xid, u.seq) >= (s.xid, s.seq) AND NOT EXISTS (SELECT FROM b)
  RETURNING s.shard)
SELECT w.shard, false AS backwards FROM w
UNION ALL
SELECT b.shard, true FROM b`

// stepSettings hold for the transaction of a step: its statements find rows by index.
const stepSettings = `SELECT set_config('enable_seqscan', 'off', true), set_config('enable_hashjoin', 'off', true),
	set_config('enable_mergejoin', 'off', true)`

// rowSettings are stepSettings for statements about rows of parked and dead_letter. They are planned anew each time: of an empty
// table any index is as good as another, and a plan kept from then may look through a whole shard for each row.
const rowSettings = stepSettings + `, set_config('plan_cache_mode', 'force_custom_plan', true)`

// unflushedSettings are stepSettings for what a crash may take back.
const unflushedSettings = stepSettings + `, set_config('synchronous_commit', 'off', true)`

func (s *Store) plainSteps(ctx context.Context, ttl time.Duration, steps []Step) (written map[int16]bool, err error) {
	settings := unflushedSettings
	if slices.ContainsFunc(steps, func(st Step) bool { return st.Flush }) {
		settings = stepSettings
	}
	var b pgx.Batch // one implicit transaction
	b.Queue(settings)
	written = make(map[int16]bool, len(steps))
	queueCheckpoints(&b, ttl, steps, written)
	return written, storeError("writing checkpoints", s.pool.SendBatch(ctx, &b).Close())
}

// queueCheckpoints adds checkpointSQL for steps to b.
func queueCheckpoints(b *pgx.Batch, ttl time.Duration, steps []Step, written map[int16]bool) {
	n := len(steps)
	shards, epochs := make([]int16, n), make([]int64, n)
	xids, seqs, oldest := make([]uint64, n), make([]int32, n), make([]uint64, n)
	pend, offsets := make([][]byte, n), make([][]byte, n)
	for i := range steps {
		st := &steps[i]
		c := &st.Checkpoint
		shards[i], epochs[i] = st.Shard, st.Epoch
		xids[i], seqs[i], oldest[i] = c.Position.XID, c.Position.Seq, c.Oldest
		pend[i], offsets[i] = notNil(c.Pend), notNil(c.Offsets)
	}
	sql := checkpointSQL
	if fault.Mutant("M4") { // whoever writes is believed
		sql = strings.ReplaceAll(sql, " AND s.epoch = u.epoch AND s.holder <> '' AND (u.xid, u.seq) >= (s.xid, s.seq)", "") // what is left of b is empty
		sql = strings.ReplaceAll(sql, "(u.xid, u.seq) < (s.xid, s.seq)", "false")
	}
	b.Queue(sql, shards, epochs, xids, seqs, oldest, pend, offsets, ttl).Query(func(rows pgx.Rows) error {
		var shard int16
		var backwards bool
		_, err := pgx.ForEachRow(rows, []any{&shard, &backwards}, func() error {
			if backwards {
				return fmt.Errorf("the checkpoint of shard %d would move backwards", shard)
			}
			written[shard] = true
			return nil
		})
		return err
	})
}

// notNil: NULL is not an empty bytea.
func notNil(b []byte) []byte {
	if b == nil {
		return []byte{}
	}
	return b
}

// stepsWithRows writes steps of which some change rows. The fence comes first and keeps the shards' rows locked until the
// end, so that nobody can acquire one of them between the two round trips.
func (s *Store) stepsWithRows(ctx context.Context, ttl time.Duration, steps []Step) (written map[int16]bool, err error) {
	written = make(map[int16]bool, len(steps))
	err = pgx.BeginFunc(ctx, s.pool, func(tx pgx.Tx) error {
		var fence pgx.Batch
		fence.Queue(rowSettings)
		queueCheckpoints(&fence, ttl, steps, written)
		if err := tx.SendBatch(ctx, &fence).Close(); err != nil {
			return err
		}
		var rows pgx.Batch
		queueRows(&rows, slices.DeleteFunc(slices.Clone(steps), func(st Step) bool { return !written[st.Shard] }))
		if rows.Len() == 0 {
			return nil
		}
		return tx.SendBatch(ctx, &rows).Close()
	})
	return written, storeError(fmt.Sprintf("writing steps of %d shards", len(steps)), err)
}

// queueRows adds the row changes of steps. What leaves a table and what is decided goes together, whatever its shard: a batch of
// decisions concerns a row or two of each of many shards. New rows come before the decisions that may concern them, and what
// leaves dead_letter before what enters it. What leaves parked goes before the decisions too: mostly it is what was decided, and
// a row that is deleted need not be changed first.
func queueRows(b *pgx.Batch, steps []Step) {
	for i := range steps {
		if st := &steps[i]; len(st.Park) > 0 {
			queuePark(b, st.Shard, st.Park)
		}
	}
	queueDelete(b, "outbox.parked", steps, func(st *Step) []EventPosition { return st.Unpark })
	queueDecisions(b, steps)
	queueDelete(b, "outbox.dead_letter", steps, func(st *Step) []EventPosition { return st.Exhume })
	for i := range steps {
		st := &steps[i]
		if len(st.Bury) > 0 {
			queueBury(b, st.Shard, st.Bury)
		}
		for _, o := range st.Operations {
			b.Queue(`UPDATE outbox.operation SET done_at = now(), outcome = $3, events = $4 WHERE operation_id = $2 AND shard = $1 AND done_at IS NULL`,
				st.Shard, o.ID, o.Outcome, o.Events)
		}
	}
}

// queueDecisions sets the states of parked rows. Only the shard's own: the holder of another shard reads the decision in its
// own log.
func queueDecisions(b *pgx.Batch, steps []Step) {
	var (
		shards, states []int16
		sources        []int32
		ids            [][16]byte
	)
	for i := range steps {
		for _, d := range steps[i].Decide {
			shards, states = append(shards, steps[i].Shard), append(states, int16(d.State))
			sources, ids = append(sources, d.Key.Source), append(ids, d.Key.Transaction)
		}
	}
	if len(shards) == 0 {
		return
	}
	b.Queue(`UPDATE outbox.parked p SET state = u.state, check_at = NULL
		FROM unnest($1::smallint[], $2::int[], $3::uuid[], $4::smallint[]) u(shard, source_id, tx_id, state)
		WHERE p.source_id = u.source_id AND p.tx_id = u.tx_id AND p.shard = u.shard`, shards, sources, ids, states)
}

// queueDelete deletes rows of parked or dead_letter by position.
func queueDelete(b *pgx.Batch, table string, steps []Step, of func(*Step) []EventPosition) {
	var (
		shards        []int16
		xids          []uint64
		seqs, records []int32
	)
	for i := range steps {
		for _, at := range of(&steps[i]) {
			shards = append(shards, steps[i].Shard)
			xids, seqs, records = append(xids, at.XID), append(seqs, at.Seq), append(records, at.Record)
		}
	}
	if len(shards) == 0 {
		return
	}
	b.Queue(`DELETE FROM `+table+` t USING unnest($1::smallint[], $2::xid8[], $3::int[], $4::int[]) u(shard, xid, seq, record)
		WHERE t.shard = u.shard AND t.xid = u.xid AND t.seq = u.seq AND t.record = u.record`, shards, xids, seqs, records)
}

func positions(n int, at func(int) EventPosition) (xids []uint64, seqs, records []int32) {
	xids, seqs, records = make([]uint64, n), make([]int32, n), make([]int32, n)
	for i := range n {
		p := at(i)
		xids[i], seqs[i], records[i] = p.XID, p.Seq, p.Record
	}
	return xids, seqs, records
}

// States returns the states of the transactions that tx still knows.
func (s *Store) States(ctx context.Context, keys []Key) (map[Key]State, error) {
	ctx, cancel := s.bound(ctx)
	defer cancel()
	states := make(map[Key]State, len(keys))
	sources, ids := splitKeys(keys)
	rows, err := s.pool.Query(ctx, `
		SELECT k.s, k.i, t.state FROM unnest($1::int[], $2::uuid[]) k(s, i),
		LATERAL (SELECT state FROM outbox.tx t WHERE t.source_id = k.s AND t.tx_id = k.i OFFSET 0) t`, sources, ids)
	if err == nil {
		var k Key
		var state State
		_, err = pgx.ForEachRow(rows, []any{&k.Source, (*[16]byte)(&k.Transaction), &state}, func() error {
			states[k] = state
			return nil
		})
	}
	if err != nil {
		return nil, storeError("reading states", err)
	}
	return states, nil
}

func splitKeys(keys []Key) (sources []int32, ids [][16]byte) {
	sources, ids = make([]int32, len(keys)), make([][16]byte, len(keys))
	for i, k := range keys {
		sources[i], ids[i] = k.Source, k.Transaction
	}
	return sources, ids
}

// Action is what an operator wants done with an aggregate.
type Action int16

// The actions, numbered as in outbox.v1.AggregateAction.
const (
	ActionRedrive Action = 1
	ActionSkip    Action = 2
	ActionDiscard Action = 3
)

// Operation is an operator's request that the holder of the aggregate's shard executes under its epoch.
type Operation struct {
	ID        int64
	Shard     int16
	Aggregate Aggregate
	Action    Action
	Done      bool
	Outcome   string // in words, once done
	Events    int64
}

// OperationOutcome marks an operation as done.
type OperationOutcome struct {
	ID      int64
	Outcome string
	Events  int64
}

// PendingOperations returns the operations of these shards that are not done, by id.
func (s *Store) PendingOperations(ctx context.Context, shards []int16) ([]Operation, error) {
	ctx, cancel := s.bound(ctx)
	defer cancel()
	rows, err := s.pool.Query(ctx, `
		SELECT operation_id, shard, source_id, aggregate_type, aggregate_id, action
		FROM outbox.operation WHERE done_at IS NULL AND shard = ANY($1) ORDER BY operation_id`, shards)
	if err != nil {
		return nil, storeError("reading pending operations", err)
	}
	found, err := pgx.CollectRows(rows, func(row pgx.CollectableRow) (o Operation, err error) {
		return o, row.Scan(&o.ID, &o.Shard, &o.Aggregate.Source, &o.Aggregate.Type, &o.Aggregate.ID, &o.Action)
	})
	return found, storeError("reading pending operations", err)
}
