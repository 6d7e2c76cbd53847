package store

import (
	"context"
	"fmt"
	"time"

	"github.com/jackc/pgx/v5"
)

// Place is where an event is, numbered as outbox.v1.EventStatus.Place.
type Place int32

// The places.
const (
	PlaceInDoubt    Place = 1
	PlaceQueued     Place = 2
	PlaceWaiting    Place = 3
	PlaceBlocked    Place = 4
	PlacePublished  Place = 5
	PlaceDeadLetter Place = 6
	PlaceDropped    Place = 7
)

// EventStatus says where an event is, and why it is not out.
type EventStatus struct {
	Event       Event
	Shard       int16
	Place       Place
	Explanation string // for a person; empty only for an event that is published
}

// place says where an event is, and the exact reason when it is not published. A parked or dead-letter row comes first;
// else the checkpoint tells: everything at or before it that is not in pend is done.
func (l *whereabouts) place(e *located) (Place, string) {
	c := l.checkpoint(e.shard)
	agg := l.aggregates[l.aggregate(e)]
	switch {
	case l.State == Aborted && e.parked != nil:
		return PlaceDropped, "its transaction was aborted; the holder of the shard has not removed it yet" + c.holderMissing()
	case l.State == Aborted:
		return PlaceDropped, "its transaction was aborted"
	case e.dead != nil:
		return PlaceDeadLetter, fmt.Sprintf("set aside after %s: %s", attempts(e.dead.Attempts), e.dead.Error)
	case l.State == Prepared:
		return PlaceInDoubt, l.whyUndecided(e, c, agg)
	case e.parked != nil:
		return l.placeParked(e, c, agg)
	case e.Position.Compare(c.Position) <= 0 && c.pending(e.EventPosition) == nil:
		if agg.discarded != 0 {
			return PlacePublished, fmt.Sprintf("published, unless it is one of the events that operation %d discarded", agg.discarded)
		}
		return PlacePublished, ""
	}
	return l.placeQueued(e, c, agg)
}

// whyUndecided explains an event of a PREPARED transaction.
func (l *whereabouts) whyUndecided(e *located, c *checkpoint, agg *aggregateState) string {
	why := "its transaction is undecided: nobody has told the decision yet"
	if p := e.parked; p != nil {
		if p.checks > 0 {
			why += fmt.Sprintf("; source database %q was asked %s, the last answer was %q", p.database, times(p.checks), p.lastAnswer)
		}
		if agg.head != nil && agg.head.key != l.Key {
			why += "; it also waits behind " + agg.head.explain()
		}
		return why
	}
	if e.Position.Compare(c.Position) <= 0 && c.pending(e.EventPosition) == nil {
		return why + "; the shard's checkpoint has passed it and it is neither parked nor pending: run `outbox verify`"
	}
	return why + c.holderMissing()
}

// placeParked explains a parked event of a COMMITTED transaction.
func (l *whereabouts) placeParked(e *located, c *checkpoint, agg *aggregateState) (Place, string) {
	p := e.parked
	if agg.head != nil && agg.head.EventPosition != p.EventPosition {
		why := "waits behind " + agg.head.explain()
		if p.cause == CauseRedriven {
			why = "put back by an operator; " + why
		}
		return PlaceWaiting, why + c.holderMissing()
	}
	switch {
	case p.cause == CauseRecord:
		return PlaceBlocked, fmt.Sprintf("Kafka refused it after %s: %s; an operator must redrive, skip or discard it", attempts(p.attempts), p.err)
	case p.cause == CauseTopic:
		return PlaceBlocked, fmt.Sprintf("topic %q cannot be written: %s; %s", e.record.Event.Topic, p.err, p.nextTryText()) + c.holderMissing()
	case p.state == Prepared:
		return PlaceQueued, "committed, but the holder of the shard has not read the decision yet" + c.holderMissing()
	case p.cause == CauseRedriven:
		return PlaceQueued, "put back by an operator, and the next of its aggregate to be delivered" + c.holderMissing()
	}
	return PlaceQueued, "the next of its aggregate to be delivered" + c.holderMissing()
}

// placeQueued explains a COMMITTED event that is in the log only.
func (l *whereabouts) placeQueued(e *located, c *checkpoint, agg *aggregateState) (Place, string) {
	if h := agg.head; h != nil && h.EventPosition.Compare(e.EventPosition) < 0 {
		return PlaceWaiting, "waits behind " + h.explain() + c.holderMissing()
	}
	if agg.deadQueue {
		return PlaceWaiting, "its aggregate has dead letters and is in park policy: it follows them until a redrive" + c.holderMissing()
	}
	if h, found := l.undecided[l.aggregate(e)]; found && h.EventPosition.Compare(e.EventPosition) < 0 {
		return PlaceWaiting, fmt.Sprintf("waits behind transaction %s of the same aggregate, which is undecided", h.key.Transaction) + c.holderMissing()
	}
	if c.pending(e.EventPosition) != nil {
		return PlaceQueued, "the relay has read it, and Kafka has not acknowledged it yet" + c.holderMissing()
	}
	return PlaceQueued, fmt.Sprintf("at %s, after checkpoint %s of shard %d: the relay has not read it yet, or Kafka has not acknowledged it",
		e.Position, c.Position, c.shard) + c.holderMissing()
}

// explain names a head and says why it does not go.
func (p *parkedRow) explain() string {
	who := fmt.Sprintf("transaction %s of the same aggregate, which ", p.key.Transaction)
	switch {
	case p.state == Prepared:
		return who + "is undecided"
	case p.cause == CauseRecord:
		return who + "Kafka refused: " + p.err
	case p.cause == CauseTopic:
		return who + "waits for its topic: " + p.err + "; " + p.nextTryText()
	}
	return who + "is about to be delivered"
}

func (p *parkedRow) nextTryText() string {
	if p.nextTry == nil {
		return "not tried again before an operator says"
	}
	return "next try at " + p.nextTry.UTC().Format(time.RFC3339)
}

// holderMissing is added when nobody works on the shard.
func (c *checkpoint) holderMissing() string {
	if c.live {
		return ""
	}
	return fmt.Sprintf("; nobody holds shard %d: is a relay running?", c.shard)
}

func attempts(n int32) string {
	if n == 1 {
		return "1 attempt"
	}
	return fmt.Sprintf("%d attempts", n)
}

func times(n int32) string {
	if n == 1 {
		return "once"
	}
	return fmt.Sprintf("%d times", n)
}

func (l *whereabouts) aggregate(e *located) Aggregate {
	return Aggregate{Source: l.Key.Source, Type: e.record.Event.AggregateType, ID: e.record.Event.AggregateID}
}

func (l *whereabouts) checkpoint(shard int16) *checkpoint {
	for i := range l.checkpoints {
		if l.checkpoints[i].shard == shard {
			return &l.checkpoints[i]
		}
	}
	return &checkpoint{shard: shard}
}

// surroundings reads what may stand in the way of the events: checkpoints, what is parked of their aggregates, and for
// COMMITTED events that are in the log only, the undecided ones before them.
func (l *whereabouts) surroundings(ctx context.Context) (err error) {
	if l.checkpoints, err = readCheckpoints(ctx, l.tx); err != nil {
		return err
	}
	if err := l.readAggregates(ctx); err != nil {
		return err
	}
	return l.readUndecided(ctx)
}

// One index probe each for every aggregate of the transaction.
const (
	aggregateHeadsSQL = `
	SELECT u.n, h.* FROM unnest($1::smallint[], $2::bigint[], $3::text[], $4::text[]) WITH ORDINALITY u (shard, agg, type, id, n),
	LATERAL (
	  SELECT ` + parkedRowColumns + ` FROM outbox.parked p
	  WHERE p.shard = u.shard AND p.agg = u.agg AND p.source_id = $5 AND p.aggregate_type = u.type AND p.aggregate_id = u.id
	  ORDER BY p.xid, p.seq, p.record LIMIT 1) h`
	aggregateFlagsSQL = `
	SELECT u.n,
	       EXISTS (SELECT FROM outbox.dead_letter d WHERE d.shard = u.shard AND d.agg = u.agg AND d.queue
	               AND d.source_id = $5 AND d.aggregate_type = u.type AND d.aggregate_id = u.id),
	       coalesce((SELECT max(o.operation_id) FROM outbox.operation o WHERE o.done_at >= $6 AND o.events > 0 AND o.action = 3
	               AND o.source_id = $5 AND o.aggregate_type = u.type AND o.aggregate_id = u.id), 0)
	FROM unnest($1::smallint[], $2::bigint[], $3::text[], $4::text[]) WITH ORDINALITY u (shard, agg, type, id, n)`
)

func (l *whereabouts) readAggregates(ctx context.Context) error {
	l.aggregates = map[Aggregate]*aggregateState{}
	var order []*aggregateState
	var shards []int16
	var hashes []int64
	var types, ids []string
	for i := range l.events {
		a := l.aggregate(&l.events[i])
		if l.aggregates[a] != nil {
			continue
		}
		state := &aggregateState{}
		l.aggregates[a] = state
		order = append(order, state)
		shards, hashes = append(shards, l.events[i].shard), append(hashes, aggregateHash(a))
		types, ids = append(types, a.Type), append(ids, a.ID)
	}
	const doing = "reading what the aggregates of a transaction wait for"
	rows, err := l.tx.Query(ctx, aggregateHeadsSQL, shards, hashes, types, ids, l.Key.Source)
	if err != nil {
		return storeError(doing, err)
	}
	var n int
	var p parkedRow
	_, err = pgx.ForEachRow(rows, append([]any{&n}, p.columns()...), func() error {
		head := p
		order[n-1].head = &head
		return nil
	})
	if err != nil {
		return storeError(doing, err)
	}
	rows, err = l.tx.Query(ctx, aggregateFlagsSQL, shards, hashes, types, ids, l.Key.Source, l.PreparedAt)
	if err != nil {
		return storeError(doing, err)
	}
	var deadQueue bool
	var discarded int64
	_, err = pgx.ForEachRow(rows, []any{&n, &deadQueue, &discarded}, func() error {
		order[n-1].deadQueue, order[n-1].discarded = deadQueue, discarded
		return nil
	})
	return storeError(doing, err)
}

// maxUndecidedRead bounds how many undecided events before one are read to see whether they are of its aggregate. They are
// younger than the time after which a relay parks them, so there are few.
const maxUndecidedRead = 256

const segmentsAtSQL = `
	SELECT l.shard, l.xid, l.seq, l.stale, l.body
	FROM unnest($1::xid8[], $2::int[]) u (xid, seq) JOIN outbox.log l ON l.shard = $3 AND l.xid = u.xid AND l.seq = u.seq`

// readUndecided finds the first undecided event in pend of each aggregate that a committed event of the transaction is
// waiting in.
func (l *whereabouts) readUndecided(ctx context.Context) error {
	l.undecided = map[Aggregate]pendHead{}
	if l.State != Committed {
		return nil
	}
	last := map[int16]EventPosition{} // of each shard: the last event that may be waiting
	for i := range l.events {
		e := &l.events[i]
		if e.parked != nil || e.dead != nil {
			continue
		}
		if c := l.checkpoint(e.shard); e.Position.Compare(c.Position) > 0 || c.pending(e.EventPosition) != nil {
			last[e.shard] = e.EventPosition
		}
	}
	for shard, before := range last {
		if err := l.readUndecidedOf(ctx, l.checkpoint(shard), before); err != nil {
			return err
		}
	}
	return nil
}

func (l *whereabouts) readUndecidedOf(ctx context.Context, c *checkpoint, before EventPosition) error {
	var xids []uint64
	var seqs []int32
	entries := map[EventPosition]Key{}
	for _, e := range c.pend {
		if e.State != Prepared || e.EventPosition.Compare(before) >= 0 || e.Key == l.Key {
			continue
		}
		entries[e.EventPosition] = e.Key
		if n := len(xids); n == 0 || xids[n-1] != e.XID || seqs[n-1] != e.Seq {
			xids, seqs = append(xids, e.XID), append(seqs, e.Seq)
		}
		if len(xids) == maxUndecidedRead {
			break
		}
	}
	if len(xids) == 0 {
		return nil
	}
	rows, err := l.tx.Query(ctx, segmentsAtSQL, xids, seqs, c.shard)
	if err != nil {
		return storeError("reading undecided events", err)
	}
	segments, err := pgx.CollectRows(rows, scanLogRow)
	if err != nil {
		return storeError("reading undecided events", err)
	}
	for i := range segments {
		err := segments[i].Records(func(r *Record) bool {
			at := EventPosition{Position: segments[i].Position, Record: r.Number}
			if key, found := entries[at]; found && !r.IsDecision && r.Key == key {
				a := Aggregate{Source: r.Key.Source, Type: r.Event.AggregateType, ID: r.Event.AggregateID}
				if first, known := l.undecided[a]; !known || at.Compare(first.EventPosition) < 0 {
					l.undecided[a] = pendHead{EventPosition: at, key: key}
				}
			}
			return true
		})
		if err != nil {
			return err
		}
	}
	return nil
}
