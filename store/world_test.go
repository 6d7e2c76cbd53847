package store_test

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"testing"

	"github.com/jackc/pgx/v5"

	"github.com/outbox-platform/outbox/store"
	"github.com/outbox-platform/outbox/store/storetest"
)

// world is a store that tests fill through the writer, and a hand that does by SQL what a relay does, so that a test can
// bring about any state.
type world struct {
	*storetest.Database
	t   testing.TB
	w   *store.Writer
	src *store.Source
	tx  pgx.Tx // if set, everything that does not go through the store is done in it
}

// Exec runs one statement.
func (w *world) Exec(t testing.TB, sql string, args ...any) int64 {
	t.Helper()
	if w.tx == nil {
		return w.Database.Exec(t, sql, args...)
	}
	tag, err := w.tx.Exec(t.Context(), sql, args...)
	if err != nil {
		t.Fatalf("%s: %v", sql, err)
	}
	return tag.RowsAffected()
}

func newWorld(t testing.TB, opts ...storetest.Option) *world {
	t.Helper()
	db := storetest.New(t, opts...)
	return &world{Database: db, t: t, w: db.Writer(t, store.WriterConfig{}), src: db.Source(t, "shop")}
}

// do sends one request and waits.
func (w *world) do(r *store.Request) {
	w.t.Helper()
	if _, err := w.w.Do(w.t.Context(), r); err != nil {
		w.t.Fatalf("request of kind %d: %v", r.Kind, err)
	}
}

// events makes one event for each aggregate id.
func events(aggregates ...string) []store.Event {
	all := make([]store.Event, len(aggregates))
	for i, id := range aggregates {
		all[i] = storetest.Event("orders", "order", id, "payload of "+id)
	}
	return all
}

func (w *world) prepare(aggregates ...string) store.Key {
	w.t.Helper()
	k := storetest.Key(w.src.ID)
	w.do(&store.Request{Kind: store.KindPrepare, Key: k, Events: events(aggregates...), Database: storetest.DatabaseTransaction(77)})
	return k
}

func (w *world) publish(aggregates ...string) store.Key {
	w.t.Helper()
	k := storetest.Key(w.src.ID)
	w.do(&store.Request{Kind: store.KindPublish, Key: k, Events: events(aggregates...)})
	return k
}

func (w *world) decide(k store.Key, kind store.Kind) {
	w.t.Helper()
	w.do(&store.Request{Kind: kind, Key: k})
}

func (w *world) resolve(k store.Key, kind store.Kind) {
	w.t.Helper()
	w.do(&store.Request{Kind: kind, Key: k, Resolution: &store.Resolution{Method: "check-back", Evidence: []byte(`{"marked": true}`), Actor: "server-1"}})
}

// placed is an event or a decision in the log.
type placed struct {
	store.EventPosition
	shard  int16
	record store.Record
}

func (p placed) aggregate() store.Aggregate {
	return store.Aggregate{Source: p.record.Key.Source, Type: p.record.Event.AggregateType, ID: p.record.Event.AggregateID}
}

// log returns all valid records of the log.
func (w *world) log() []placed {
	w.t.Helper()
	type row struct {
		Shard int16
		XID   uint64
		Seq   int32
		Stale []int32
		Body  []byte
	}
	var conn interface {
		Query(ctx context.Context, sql string, args ...any) (pgx.Rows, error)
	} = w.tx
	if w.tx == nil {
		c := w.Connect(w.t)
		defer c.Close(w.t.Context()) //nolint:errcheck // nothing depends on it
		conn = c
	}
	rows, err := conn.Query(w.t.Context(), `SELECT shard, xid, seq, stale, body FROM outbox.log ORDER BY shard, xid, seq`)
	if err != nil {
		w.t.Fatal(err)
	}
	defer rows.Close()
	var all []placed
	for rows.Next() {
		var r row
		if err := rows.Scan(&r.Shard, &r.XID, &r.Seq, &r.Stale, &r.Body); err != nil {
			w.t.Fatal(err)
		}
		s := store.Segment{Shard: r.Shard, Position: store.Position{XID: r.XID, Seq: r.Seq}, Stale: r.Stale, Body: r.Body}
		err := s.Records(func(rec *store.Record) bool {
			all = append(all, placed{store.EventPosition{Position: s.Position, Record: rec.Number}, s.Shard, *rec})
			return true
		})
		if err != nil {
			w.t.Fatal(err)
		}
	}
	if rows.Err() != nil {
		w.t.Fatal(rows.Err())
	}
	return all
}

// eventsOf returns the events of a transaction in the log.
func (w *world) eventsOf(k store.Key) []placed {
	w.t.Helper()
	found := slices.DeleteFunc(w.log(), func(p placed) bool { return p.record.Key != k || p.record.IsDecision })
	if len(found) == 0 {
		w.t.Fatalf("no events of %s in the log", k.Transaction)
	}
	return found
}

// park copies the events of a transaction to parked.
func (w *world) park(k store.Key, cause store.Cause, state store.State) {
	w.t.Helper()
	for _, p := range w.eventsOf(k) {
		var database, mode any
		if d := p.record.Database; d != nil {
			database, mode = d.Database, int16(d.Mode)
		}
		w.Exec(w.t, `
			INSERT INTO outbox.parked (shard, xid, seq, record, agg, cause, state, source_id, tx_id, aggregate_type, aggregate_id, topic, body, database, mode)
			VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14, $15)`,
			p.shard, p.XID, p.Seq, p.Record, int64(p.aggregate().Hash()), int16(cause), int16(state), k.Source, [16]byte(k.Transaction),
			p.record.Event.AggregateType, p.record.Event.AggregateID, p.record.Event.Topic, store.EncodeEvent(nil, &p.record), database, mode)
	}
}

// bury copies the events of a transaction to dead_letter.
func (w *world) bury(k store.Key, queue bool) {
	w.t.Helper()
	for _, p := range w.eventsOf(k) {
		w.Exec(w.t, `
			INSERT INTO outbox.dead_letter (shard, xid, seq, record, agg, queue, source_id, tx_id, aggregate_type, aggregate_id, topic, error, attempts, body)
			VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, 'MSG_SIZE_TOO_LARGE', 3, $12)`,
			p.shard, p.XID, p.Seq, p.Record, int64(p.aggregate().Hash()), queue, k.Source, [16]byte(k.Transaction),
			p.record.Event.AggregateType, p.record.Event.AggregateID, p.record.Event.Topic, store.EncodeEvent(nil, &p.record))
	}
}

// checkpoint moves the checkpoints of all shards to the end of the log. The events of pending stay listed in pend, with
// the state given.
func (w *world) checkpoint(pending map[store.Key]store.State) {
	w.t.Helper()
	ends := map[int16]store.Position{}
	pend := map[int16][]store.PendEntry{}
	for _, p := range w.log() {
		ends[p.shard] = p.Position
		if state, listed := pending[p.record.Key]; listed && !p.record.IsDecision {
			pend[p.shard] = append(pend[p.shard], store.PendEntry{EventPosition: p.EventPosition, Key: p.record.Key, State: state})
		}
	}
	for _, shard := range slices.Sorted(maps.Keys(ends)) {
		oldest := ends[shard].XID
		if entries := pend[shard]; len(entries) > 0 {
			oldest = entries[0].XID
		}
		encoded := store.EncodePend(pend[shard])
		if encoded == nil {
			encoded = []byte{}
		}
		w.Exec(w.t, `UPDATE outbox.shard SET xid = $2, seq = $3, oldest = $4, pend = $5 WHERE shard = $1`,
			shard, ends[shard].XID, ends[shard].Seq, oldest, encoded)
	}
}

// hold gives all shards to a relay.
func (w *world) hold() {
	w.t.Helper()
	w.Exec(w.t, `UPDATE outbox.shard SET holder = 'relay-1', epoch = epoch + 1, lease_until = now() + '1 h'`)
}

// sound fails the test if Verify finds something.
func (w *world) sound() {
	w.t.Helper()
	violations, err := w.Store.Verify(w.t.Context())
	if err != nil {
		w.t.Fatal(err)
	}
	for _, v := range violations {
		w.t.Errorf("violation of %s: %s", v.Invariant, v.Detail)
	}
}

// twoShards returns two aggregate ids of the source that are in different shards, and a third one in the first's shard.
func (w *world) twoShards() (a, b, besideA string) {
	shard := func(id string) int16 {
		return store.ShardOf(store.Aggregate{Source: w.src.ID, Type: "order", ID: id}, w.Store.ShardCount())
	}
	a = "a"
	for i := 0; b == "" || besideA == ""; i++ {
		id := fmt.Sprint("id-", i)
		if shard(id) != shard(a) {
			b = id
		} else {
			besideA = id
		}
	}
	return a, b, besideA
}
