package store

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/jackc/pgx/v5"
)

// Transaction is what the store knows about one transaction.
type Transaction struct {
	Key        Key
	State      State
	PreparedAt time.Time
	DecidedAt  time.Time // zero while PREPARED
	DecidedBy  string    // "client", "check-back", "direct", "operator"; "" while PREPARED
	Evidence   []byte    // JSON, or nil
	Database   *DatabaseTransaction
	// Events by position. An event that was published or dropped is listed as long as its log generation is kept.
	Events []EventStatus
}

// Transaction looks a transaction up, with its events and where each is now, in one snapshot. ErrUnknown: not known, or
// past retention.
func (s *Store) Transaction(ctx context.Context, k Key) (found *Transaction, err error) {
	err = s.snapshot(ctx, "looking up a transaction", func(tx pgx.Tx) error {
		l := whereabouts{tx: tx, Transaction: Transaction{Key: k}}
		if err := l.row(ctx); err != nil {
			return err
		}
		if err := l.find(ctx); err != nil {
			return err
		}
		if err := l.surroundings(ctx); err != nil {
			return err
		}
		for i := range l.events {
			e := &l.events[i]
			if l.Database == nil {
				l.Database = e.record.Database
			}
			place, explanation := l.place(e)
			l.Events = append(l.Events, EventStatus{Event: e.record.Event, Shard: e.shard, Place: place, Explanation: explanation})
		}
		found = &l.Transaction
		return nil
	})
	if err != nil {
		return nil, err
	}
	return found, nil
}

// snapshotSettings: what is looked at is found by index, whatever the planner thinks of partitions that happen to be empty.
// They are set without a query, which would take the snapshot already.
const snapshotSettings = `SET LOCAL enable_seqscan = off; SET LOCAL enable_hashjoin = off; SET LOCAL enable_mergejoin = off`

// snapshot runs fn in a read-only transaction that sees one state of the store throughout, from fn's first query on. It owns
// no xid, so no relay waits for it.
func (s *Store) snapshot(ctx context.Context, doing string, fn func(pgx.Tx) error) error {
	tx, err := s.pool.BeginTx(ctx, pgx.TxOptions{IsoLevel: pgx.RepeatableRead, AccessMode: pgx.ReadOnly})
	if err != nil {
		return storeError(doing, err)
	}
	defer tx.Rollback(ctx) //nolint:errcheck // it changed nothing
	if _, err := tx.Exec(ctx, snapshotSettings, pgx.QueryExecModeSimpleProtocol); err != nil {
		return storeError(doing, err)
	}
	return fn(tx)
}

// RetentionHorizon is the time from which on transactions are certain to be known, by the database's clock: one prepared
// then or later that Transaction does not find was never stored, or the store lost it.
func (s *Store) RetentionHorizon(ctx context.Context) (time.Time, error) {
	var t time.Time
	err := s.pool.QueryRow(ctx, `SELECT tx_known_since FROM outbox.control`).Scan(&t)
	return t, storeError("reading the retention horizon", err)
}

// whereabouts collects what place needs to say where each event of a transaction is.
type whereabouts struct {
	tx pgx.Tx
	Transaction

	shards ShardSet
	logXID uint64

	events      []located
	checkpoints []checkpoint                  // by shard number
	aggregates  map[Aggregate]*aggregateState // of the events
	undecided   map[Aggregate]pendHead
}

// located is one event of the transaction, with its row of parked or dead_letter if it has one.
type located struct {
	EventPosition
	shard  int16
	record Record
	parked *parkedRow
	dead   *DeadLetter
}

// parkedRow is what explains a parked event.
type parkedRow struct {
	EventPosition
	key        Key
	cause      Cause
	state      State
	since      time.Time
	database   string
	checks     int32
	lastAnswer string
	attempts   int32
	err        string
	nextTry    *time.Time // nil: not before an operator says
}

// aggregateState is what stands in the way of an aggregate's events.
type aggregateState struct {
	head      *parkedRow // its first parked event
	deadQueue bool       // its events follow others to the dead letters
	discarded int64      // the last operation that discarded events of it since the transaction was prepared; 0: none
}

// pendHead is the first undecided event of an aggregate that the holder has in memory.
type pendHead struct {
	EventPosition
	key Key
}

// row reads the transaction's own row and its resolution.
func (l *whereabouts) row(ctx context.Context) error {
	var decidedAt *time.Time
	var method *string
	var shards int64
	err := l.tx.QueryRow(ctx, `
		SELECT t.state, t.prepared_at, t.decided_at, t.shards, t.log_xid, r.method, r.evidence
		FROM outbox.tx t LEFT JOIN outbox.resolution r USING (source_id, tx_id)
		WHERE t.source_id = $1 AND t.tx_id = $2`, l.Key.Source, [16]byte(l.Key.Transaction)).
		Scan(&l.State, &l.PreparedAt, &decidedAt, &shards, &l.logXID, &method, &l.Evidence)
	if errors.Is(err, pgx.ErrNoRows) {
		return fmt.Errorf("transaction %s: %w", l.Key.Transaction, ErrUnknown)
	}
	if err != nil {
		return storeError("reading a transaction", err)
	}
	l.shards = ShardSet(shards) //nolint:gosec // a bitmap
	if decidedAt != nil {
		l.DecidedAt = *decidedAt
	}
	switch {
	case method != nil:
		l.DecidedBy = *method
	case l.State != Prepared:
		l.DecidedBy = "client"
	}
	return nil
}

// find collects the events from the log, from parked and from dead_letter.
func (l *whereabouts) find(ctx context.Context) error {
	type address struct {
		shard int16
		EventPosition
	}
	at := map[address]int{}
	shards := l.shards.list()
	add := func(shard int16, p EventPosition, r *Record) *located {
		i, known := at[address{shard, p}]
		if !known {
			i = len(l.events)
			at[address{shard, p}] = i
			l.events = append(l.events, located{EventPosition: p, shard: shard, record: *r})
		}
		return &l.events[i]
	}
	segments, err := l.segments(ctx, shards)
	if err != nil {
		return err
	}
	for i := range segments {
		s := &segments[i]
		err := s.Records(func(r *Record) bool {
			if r.Key == l.Key && !r.IsDecision {
				add(s.Shard, EventPosition{Position: s.Position, Record: r.Number}, r)
			}
			return true
		})
		if err != nil {
			return err
		}
	}
	if err := l.findParked(ctx, add); err != nil {
		return err
	}
	if err := l.findDead(ctx, shards, add); err != nil {
		return err
	}
	slices.SortFunc(l.events, func(a, b located) int {
		return cmp.Or(a.EventPosition.Compare(b.EventPosition), cmp.Compare(a.shard, b.shard))
	})
	return nil
}

// segments reads what the batch that stored the transaction wrote to these shards.
func (l *whereabouts) segments(ctx context.Context, shards []int16) ([]Segment, error) {
	rows, err := l.tx.Query(ctx, `SELECT shard, xid, seq, stale, body FROM outbox.log WHERE shard = ANY($1) AND xid = $2`, shards, l.logXID)
	if err != nil {
		return nil, storeError("reading a transaction's segments", err)
	}
	found, err := pgx.CollectRows(rows, scanLogRow)
	return found, storeError("reading a transaction's segments", err)
}

func scanLogRow(row pgx.CollectableRow) (s Segment, err error) {
	err = row.Scan(&s.Shard, &s.XID, &s.Seq, &s.Stale, &s.Body)
	return s, err
}

func (l *whereabouts) findParked(ctx context.Context, add func(int16, EventPosition, *Record) *located) error {
	rows, err := l.tx.Query(ctx, `
		SELECT shard, body, `+parkedRowColumns+` FROM outbox.parked WHERE source_id = $1 AND tx_id = $2`,
		l.Key.Source, [16]byte(l.Key.Transaction))
	if err != nil {
		return storeError("reading a transaction's parked events", err)
	}
	var shard int16
	var body []byte
	var p parkedRow
	_, err = pgx.ForEachRow(rows, append([]any{&shard, &body}, p.columns()...), func() error {
		record, err := DecodeEvent(body)
		if err != nil {
			return err
		}
		parked := p
		add(shard, p.EventPosition, record).parked = &parked
		body = nil
		return nil
	})
	return storeError("reading a transaction's parked events", err)
}

// parkedRowColumns are what parkedRow.columns scans.
const parkedRowColumns = `xid, seq, record, source_id, tx_id, cause, state, since, coalesce(database, ''), checks, coalesce(last_answer, ''),
	attempts, error, nullif(next_try, 'infinity')`

func (p *parkedRow) columns() []any {
	return []any{&p.XID, &p.Seq, &p.Record, &p.key.Source, (*[16]byte)(&p.key.Transaction), &p.cause, &p.state, &p.since, &p.database,
		&p.checks, &p.lastAnswer, &p.attempts, &p.err, &p.nextTry}
}

func (l *whereabouts) findDead(ctx context.Context, shards []int16, add func(int16, EventPosition, *Record) *located) error {
	rows, err := l.tx.Query(ctx, `
		SELECT shard, xid, seq, record, body, error, attempts, queue FROM outbox.dead_letter
		WHERE shard = ANY($1) AND xid = $2 AND source_id = $3 AND tx_id = $4`,
		shards, l.logXID, l.Key.Source, [16]byte(l.Key.Transaction))
	if err != nil {
		return storeError("reading a transaction's dead letters", err)
	}
	var d DeadLetter
	_, err = pgx.ForEachRow(rows, []any{&d.Shard, &d.XID, &d.Seq, &d.Record, &d.Body, &d.Error, &d.Attempts, &d.Queue}, func() error {
		record, err := DecodeEvent(d.Body)
		if err != nil {
			return err
		}
		dead := d
		add(d.Shard, d.EventPosition, record).dead = &dead
		d.Body = nil
		return nil
	})
	return storeError("reading a transaction's dead letters", err)
}

// list returns the shards of the set, ascending.
func (s ShardSet) list() []int16 {
	shards := []int16{}
	for shard := range int16(64) {
		if s.Has(shard) {
			shards = append(shards, shard)
		}
	}
	return shards
}
