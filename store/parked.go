package store

import (
	"context"
	"strconv"
	"time"

	"github.com/jackc/pgx/v5"
)

// Parked is one event copied out of the log because it is undecided or blocked, so that nothing waits for it but its own
// aggregate.
type Parked struct {
	EventPosition
	Key       Key
	Aggregate Aggregate
	State     State  // of its transaction
	Body      []byte // EncodeEvent; nil when read without bodies
	Cause     Cause
	// Database: what the resolver needs; nil for published transactions.
	Database *DatabaseTransaction
	Since    time.Time // when it was parked (read only)
	// Read only, of undecided ones: how often their decision was asked for, and the last answer.
	Checks     int32
	LastAnswer string
	// Head of a blocked aggregate only:
	Attempts int32
	Error    string
	NextTry  time.Time // zero: not before an operator says
}

// Cause says why an event is parked.
type Cause int16

// The causes, as stored.
const (
	CauseInDoubt  Cause = 1 // its own transaction is undecided
	CauseFollower Cause = 2 // waits behind an earlier event of its aggregate
	CauseRecord   Cause = 3 // Kafka refused it for good; policy block
	CauseTopic    Cause = 4 // its topic is unknown or not authorised
	CauseRedriven Cause = 5 // put back by an operator, waits for its turn
)

// ParkedDecision is a decision read from the log for a transaction with parked events.
type ParkedDecision struct {
	Key   Key
	State State
}

// DeadLetter is an event set aside after a permanent failure.
type DeadLetter struct {
	EventPosition
	Shard     int16
	Key       Key
	Aggregate Aggregate
	Body      []byte // EncodeEvent
	Error     string
	Attempts  int32
	// Queue: the aggregate is in park policy, later events follow it here until a redrive. False: set aside alone (skip).
	Queue bool
	Since time.Time // read only
}

// queuePark inserts rows, or replaces those at the same position. What the resolver keeps in a row stays. An undecided
// event is asked about at once: whoever parks it has found that it lasts, or that others wait for it.
func queuePark(b *pgx.Batch, shard int16, parked []Parked) {
	n := len(parked)
	xids, seqs, records := positions(n, func(i int) EventPosition { return parked[i].EventPosition })
	var (
		aggs              = make([]int64, n)
		causes, states    = make([]int16, n), make([]int16, n)
		sources, attempts = make([]int32, n), make([]int32, n)
		ids               = make([][16]byte, n)
		types, names      = make([]string, n), make([]string, n)
		topics, errs      = make([]string, n), make([]string, n)
		bodies            = make([][]byte, n)
		next              = make([]*time.Time, n)
		db                = make([]*DatabaseTransaction, n)
	)
	for i := range parked {
		p := &parked[i]
		aggs[i], causes[i], states[i] = int64(p.Aggregate.Hash()), int16(p.Cause), int16(p.State) //nolint:gosec // the same 64 bits
		sources[i], ids[i] = p.Key.Source, p.Key.Transaction
		types[i], names[i] = p.Aggregate.Type, p.Aggregate.ID
		topics[i] = topicOf(p.Body)
		attempts[i], errs[i] = p.Attempts, p.Error
		bodies[i], db[i] = p.Body, p.Database
		if !p.NextTry.IsZero() {
			next[i] = &p.NextTry
		}
	}
	b.Queue(parkSQL, shard, xids, seqs, records, aggs, causes, states, sources, ids, types, names, topics, bodies, attempts, errs, next,
		column(db, func(d *DatabaseTransaction) string { return d.Database }),
		column(db, func(d *DatabaseTransaction) uint64 { return d.XID }),
		column(db, func(d *DatabaseTransaction) string { return strconv.FormatUint(d.SystemIdentifier, 10) }),
		column(db, func(d *DatabaseTransaction) int64 { return int64(d.Timeline) }),
		column(db, func(d *DatabaseTransaction) int64 { return int64(d.DatabaseOID) }),
		column(db, func(d *DatabaseTransaction) int64 { return int64(d.MarkerOID) }),
		column(db, func(d *DatabaseTransaction) int16 { return int16(d.Mode) }))
}

// column returns one field of each, nil where there is no database transaction.
func column[T any](db []*DatabaseTransaction, field func(*DatabaseTransaction) T) []*T {
	out := make([]*T, len(db))
	for i, d := range db {
		if d != nil {
			v := field(d)
			out[i] = &v
		}
	}
	return out
}

// topicOf reads the topic out of an encoded event: rows carry it so that operators can ask for it.
func topicOf(body []byte) string {
	r, err := DecodeEvent(body)
	if err != nil {
		return ""
	}
	return r.Event.Topic
}

const parkSQL = `
INSERT INTO outbox.parked AS p (shard, xid, seq, record, agg, cause, state, source_id, tx_id, aggregate_type, aggregate_id, topic, body,
  attempts, error, next_try, database, db_xid, system_identifier, timeline, database_oid, marker_oid, mode, check_at)
SELECT $1::smallint, u.*, CASE WHEN u.state = 0 THEN now() END
FROM unnest($2::xid8[], $3::int[], $4::int[], $5::bigint[], $6::smallint[], $7::smallint[], $8::int[], $9::uuid[], $10::text[], $11::text[], $12::text[],
  $13::bytea[], $14::int[], $15::text[], $16::timestamptz[], $17::text[], $18::xid8[], $19::numeric[], $20::bigint[], $21::bigint[], $22::bigint[],
  $23::smallint[])
  u(xid, seq, record, agg, cause, state, source_id, tx_id, aggregate_type, aggregate_id, topic, body, attempts, error, next_try,
    database, db_xid, system_identifier, timeline, database_oid, marker_oid, mode)
ON CONFLICT (shard, xid, seq, record) DO UPDATE
SET cause = excluded.cause, state = excluded.state, body = excluded.body, attempts = excluded.attempts, error = excluded.error,
    next_try = excluded.next_try, check_at = CASE WHEN excluded.state = 0 THEN coalesce(p.check_at, now()) END`

// queueBury inserts dead letters, or replaces those at the same position.
func queueBury(b *pgx.Batch, shard int16, dead []DeadLetter) {
	n := len(dead)
	xids, seqs, records := positions(n, func(i int) EventPosition { return dead[i].EventPosition })
	var (
		aggs              = make([]int64, n)
		queues            = make([]bool, n)
		sources, attempts = make([]int32, n), make([]int32, n)
		ids               = make([][16]byte, n)
		types, names      = make([]string, n), make([]string, n)
		topics, errs      = make([]string, n), make([]string, n)
		bodies            = make([][]byte, n)
	)
	for i := range dead {
		d := &dead[i]
		aggs[i], queues[i] = int64(d.Aggregate.Hash()), d.Queue //nolint:gosec // the same 64 bits
		sources[i], ids[i] = d.Key.Source, d.Key.Transaction
		types[i], names[i] = d.Aggregate.Type, d.Aggregate.ID
		topics[i], errs[i] = topicOf(d.Body), d.Error
		attempts[i], bodies[i] = d.Attempts, d.Body
	}
	b.Queue(`
		INSERT INTO outbox.dead_letter (shard, xid, seq, record, agg, queue, source_id, tx_id, aggregate_type, aggregate_id, topic, error, attempts, body)
		SELECT $1::smallint, u.* FROM unnest($2::xid8[], $3::int[], $4::int[], $5::bigint[], $6::bool[], $7::int[], $8::uuid[], $9::text[], $10::text[],
		  $11::text[], $12::text[], $13::int[], $14::bytea[]) u(xid, seq, record, agg, queue, source_id, tx_id, aggregate_type, aggregate_id, topic, error, attempts, body)
		ON CONFLICT (shard, xid, seq, record) DO UPDATE
		SET queue = excluded.queue, error = excluded.error, attempts = excluded.attempts, body = excluded.body`,
		shard, xids, seqs, records, aggs, queues, sources, ids, types, names, topics, errs, attempts, bodies)
}

// parkedColumns are those that scanParked reads. The state is the one that tx knows, if the row's own is not final: the
// decision may have been made while nobody held the shard.
const parkedColumns = `p.xid, p.seq, p.record, p.source_id, p.tx_id, p.aggregate_type, p.aggregate_id, p.cause, p.since, p.attempts, p.error, p.next_try,
	p.checks, coalesce(p.last_answer, ''), p.database, p.db_xid, p.system_identifier::text::xid8, p.timeline, p.database_oid, p.marker_oid, p.mode,
	CASE WHEN p.state <> 0 THEN p.state
	     ELSE coalesce((SELECT t.state FROM outbox.tx t WHERE t.source_id = p.source_id AND t.tx_id = p.tx_id), 0) END`

func scanParked(row pgx.CollectableRow) (p Parked, err error) {
	var (
		next                             *time.Time
		name                             *string
		xid, system                      *uint64
		timeline, databaseOID, markerOID *int64
		mode                             *int16
	)
	err = row.Scan(&p.XID, &p.Seq, &p.Record, &p.Key.Source, (*[16]byte)(&p.Key.Transaction), &p.Aggregate.Type, &p.Aggregate.ID, &p.Cause, &p.Since,
		&p.Attempts, &p.Error, &next, &p.Checks, &p.LastAnswer, &name, &xid, &system, &timeline, &databaseOID, &markerOID, &mode, &p.State, &p.Body)
	p.Aggregate.Source = p.Key.Source
	if next != nil {
		p.NextTry = *next
	}
	if mode != nil {
		p.Database = &DatabaseTransaction{
			Database: value(name), XID: value(xid), SystemIdentifier: value(system), Timeline: uint32(value(timeline)), //nolint:gosec // written from a uint32
			DatabaseOID: uint32(value(databaseOID)), MarkerOID: uint32(value(markerOID)), Mode: Mode(*mode), //nolint:gosec // written from a uint32
		}
	}
	return p, err
}

// value is *p, or zero.
func value[T any](p *T) (v T) {
	if p != nil {
		v = *p
	}
	return v
}

// LoadParked returns all parked rows of a shard in position order, without bodies, for a takeover. States are re-read
// from tx.
func (s *Store) LoadParked(ctx context.Context, shard int16) ([]Parked, error) {
	ctx, cancel := s.bound(ctx)
	defer cancel()
	rows, err := s.pool.Query(ctx, `SELECT `+parkedColumns+`, NULL::bytea FROM outbox.parked p WHERE p.shard = $1 ORDER BY p.xid, p.seq, p.record`, shard)
	if err != nil {
		return nil, storeError("loading parked events", err)
	}
	found, err := pgx.CollectRows(rows, scanParked)
	return found, storeError("loading parked events", err)
}

// ParkedAfter names the parked rows of one aggregate, which is one of the shard's, that come after a position.
type ParkedAfter struct {
	Shard     int16
	Aggregate Aggregate
	After     EventPosition
}

// LoadParkedOf returns up to limit parked rows of each of these aggregates, in the order of the question, and for each in order
// of position, with bodies.
func (s *Store) LoadParkedOf(ctx context.Context, of []ParkedAfter, limit int) ([][]Parked, error) {
	ctx, cancel := s.bound(ctx)
	defer cancel()
	n := len(of)
	shards, aggs, sources := make([]int16, n), make([]int64, n), make([]int32, n)
	types, ids := make([]string, n), make([]string, n)
	for i := range of {
		a := &of[i].Aggregate
		shards[i], aggs[i], sources[i], types[i], ids[i] = of[i].Shard, int64(a.Hash()), a.Source, a.Type, a.ID //nolint:gosec // the same 64 bits
	}
	xids, seqs, records := positions(n, func(i int) EventPosition { return of[i].After })
	found := make([][]Parked, n)
	var b pgx.Batch // one implicit transaction
	b.Queue(rowSettings)
	b.Queue(loadParkedOfSQL, shards, aggs, sources, types, ids, xids, seqs, records, limit).Query(func(rows pgx.Rows) error {
		_, err := pgx.CollectRows(rows, func(row pgx.CollectableRow) (number int64, err error) {
			p, err := scanParked(leading{row, []any{&number}})
			if err == nil {
				found[number-1] = append(found[number-1], p)
			}
			return number, err
		})
		return err
	})
	if err := s.pool.SendBatch(ctx, &b).Close(); err != nil {
		return nil, storeError("loading parked events of aggregates", err)
	}
	return found, nil
}

const loadParkedOfSQL = `
SELECT k.n, p.* FROM unnest($1::smallint[], $2::bigint[], $3::int[], $4::text[], $5::text[], $6::xid8[], $7::int[], $8::int[])
  WITH ORDINALITY k(shard, agg, source_id, type, id, xid, seq, record, n),
LATERAL (
  SELECT ` + parkedColumns + `, p.body FROM outbox.parked p
  WHERE p.shard = k.shard AND p.agg = k.agg AND p.source_id = k.source_id AND p.aggregate_type = k.type AND p.aggregate_id = k.id
    AND (p.xid, p.seq, p.record) > (k.xid, k.seq, k.record)
  ORDER BY p.xid, p.seq, p.record LIMIT $9) p`

// LoadDeadQueues returns the aggregates of a shard that are in park policy: they have dead letters with Queue set.
func (s *Store) LoadDeadQueues(ctx context.Context, shard int16) ([]Aggregate, error) {
	ctx, cancel := s.bound(ctx)
	defer cancel()
	rows, err := s.pool.Query(ctx, `SELECT DISTINCT source_id, aggregate_type, aggregate_id FROM outbox.dead_letter WHERE shard = $1 AND queue`, shard)
	if err != nil {
		return nil, storeError("loading dead queues", err)
	}
	found, err := pgx.CollectRows(rows, func(row pgx.CollectableRow) (a Aggregate, err error) {
		return a, row.Scan(&a.Source, &a.Type, &a.ID)
	})
	return found, storeError("loading dead queues", err)
}

// LoadDeadLettersOf returns up to limit dead letters of one aggregate after a position, in order, with bodies.
func (s *Store) LoadDeadLettersOf(ctx context.Context, shard int16, a Aggregate, after EventPosition, limit int) ([]DeadLetter, error) {
	ctx, cancel := s.bound(ctx)
	defer cancel()
	rows, err := s.pool.Query(ctx, `
		SELECT xid, seq, record, shard, source_id, tx_id, aggregate_type, aggregate_id, body, error, attempts, queue, since FROM outbox.dead_letter
		WHERE shard = $1 AND agg = $2 AND source_id = $3 AND aggregate_type = $4 AND aggregate_id = $5 AND (xid, seq, record) > ($6::xid8, $7, $8)
		ORDER BY xid, seq, record LIMIT $9`,
		shard, int64(a.Hash()), a.Source, a.Type, a.ID, after.XID, after.Seq, after.Record, limit) //nolint:gosec // the same 64 bits
	if err != nil {
		return nil, storeError("loading dead letters of an aggregate", err)
	}
	found, err := pgx.CollectRows(rows, func(row pgx.CollectableRow) (d DeadLetter, err error) {
		err = row.Scan(&d.XID, &d.Seq, &d.Record, &d.Shard, &d.Key.Source, (*[16]byte)(&d.Key.Transaction), &d.Aggregate.Type, &d.Aggregate.ID, &d.Body,
			&d.Error, &d.Attempts, &d.Queue, &d.Since)
		d.Aggregate.Source = d.Key.Source
		return d, err
	})
	return found, storeError("loading dead letters of an aggregate", err)
}
