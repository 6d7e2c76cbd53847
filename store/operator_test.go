package store_test

import (
	"encoding/base64"
	"errors"
	"fmt"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/outbox-platform/outbox/store"
	"github.com/outbox-platform/outbox/store/storetest"
)

func TestShards(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	k := w.publish("a")
	e := w.eventsOf(k)[0]
	w.checkpoint(nil)
	for range 3 {
		w.publish("a")
	}
	w.park(w.prepare("b"), store.CauseInDoubt, store.Prepared)
	w.Exec(t, `UPDATE outbox.shard SET holder = 'relay-1', epoch = 7, lease_until = now() + '1 h' WHERE shard = $1`, e.shard)
	w.Exec(t, `UPDATE outbox.log SET written_at = now() - '1 min'::interval WHERE xid = (SELECT min(xid) FROM outbox.log WHERE xid > $1)`, e.XID)
	before := storetest.Query[time.Time](t, w.Database, `SELECT lease_until FROM outbox.shard WHERE shard = $1`, e.shard)[0]

	shards, err := w.Store.Shards(t.Context())
	if err != nil || len(shards) != 16 {
		t.Fatalf("%d shards, %v", len(shards), err)
	}
	got := shards[e.shard]
	if got.OldestAge < time.Minute || got.OldestAge > 10*time.Minute {
		t.Errorf("the oldest segment is %s old, want a minute", got.OldestAge)
	}
	got.OldestAge = 0
	want := store.ShardStatus{Shard: e.shard, Holder: "relay-1", Epoch: 7, LeaseUntil: before, Position: e.Position, LagSegments: 3}
	if !reflect.DeepEqual(got, want) {
		t.Errorf("got %+v, want %+v", got, want)
	}
	parked := int64(0)
	for i, s := range shards {
		if int(s.Shard) != i {
			t.Errorf("shard %d at index %d", s.Shard, i)
		}
		parked += s.Parked
		if s.Shard != e.shard && (!s.LeaseUntil.IsZero() || s.Holder != "" || s.Position != store.Position{Seq: -1}) {
			t.Errorf("a shard that was never held: %+v", s)
		}
	}
	if parked != 1 {
		t.Errorf("%d parked, want 1", parked)
	}
	w.Exec(t, `UPDATE outbox.shard SET lease_until = now() - '1 s'::interval`)
	if shards, err = w.Store.Shards(t.Context()); err != nil || shards[e.shard].Holder != "" {
		t.Errorf("after the lease has run out: %+v, %v", shards[e.shard], err)
	}
}

func TestBlockedAggregates(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	other := w.Source(t, "other")
	inDoubt := w.prepare("a")
	w.park(inDoubt, store.CauseInDoubt, store.Prepared)
	for range 2 {
		w.park(w.publish("a"), store.CauseFollower, store.Committed)
	}
	record := w.publish("b")
	w.park(record, store.CauseRecord, store.Committed)
	topic := storetest.Key(other.ID)
	w.do(&store.Request{Kind: store.KindPublish, Key: topic, Events: events("a")})
	w.park(topic, store.CauseTopic, store.Committed)
	w.park(w.publish("redriven"), store.CauseRedriven, store.Committed)
	w.park(w.publish("decided"), store.CauseInDoubt, store.Committed)
	// Not the head of its aggregate, whatever its cause.
	w.park(w.publish("b"), store.CauseRecord, store.Committed)
	w.Exec(t, `UPDATE outbox.parked SET since = since - '1 h'::interval, attempts = 4, error = 'too large' WHERE tx_id = $1`, [16]byte(record.Transaction))
	w.Exec(t, `UPDATE outbox.parked SET next_try = '2026-11-24 10:00:00+00' WHERE tx_id = $1`, [16]byte(topic.Transaction))

	got, next, err := w.Store.BlockedAggregates(t.Context(), "", "", 0)
	if err != nil || next != "" || len(got) != 3 {
		t.Fatalf("%+v, next %q, %v", got, next, err)
	}
	e := w.eventsOf(record)[0]
	first := got[0]
	since := first.Head.Since
	want := store.BlockedAggregate{
		Source: "shop", Aggregate: e.aggregate(), Shard: e.shard, Topic: "orders", Waiting: 2,
		Head: store.Parked{EventPosition: e.EventPosition, Key: record, Aggregate: e.aggregate(), State: store.Committed, Cause: store.CauseRecord,
			Since: since, Attempts: 4, Error: "too large"},
	}
	if !reflect.DeepEqual(first, want) {
		t.Errorf("got %+v, want %+v", first, want)
	}
	if time.Since(since) < 50*time.Minute {
		t.Errorf("blocked since %s", since)
	}
	if got[1].Head.Key != inDoubt || got[1].Waiting != 3 || got[1].Head.State != store.Prepared || !got[1].Head.NextTry.IsZero() {
		t.Errorf("second: %+v", got[1])
	}
	if got[2].Source != "other" || got[2].Head.Cause != store.CauseTopic || got[2].Head.NextTry.UTC() != time.Date(2026, 11, 24, 10, 0, 0, 0, time.UTC) {
		t.Errorf("third: %+v", got[2])
	}

	var walked []store.BlockedAggregate
	for page := ""; ; {
		part, next, err := w.Store.BlockedAggregates(t.Context(), "", page, 1)
		if err != nil || len(part) != 1 {
			t.Fatalf("%d on a page, %v", len(part), err)
		}
		walked = append(walked, part...)
		if page = next; next == "" {
			break
		}
	}
	if !reflect.DeepEqual(walked, got) {
		t.Errorf("page by page: %+v, want %+v", walked, got)
	}
	if part, _, err := w.Store.BlockedAggregates(t.Context(), "other", "", 10); err != nil || !reflect.DeepEqual(part, got[2:]) {
		t.Errorf("of one source: %+v, %v", part, err)
	}
	if part, _, err := w.Store.BlockedAggregates(t.Context(), "nobody", "", 10); err != nil || len(part) != 0 {
		t.Errorf("of an unknown source: %+v, %v", part, err)
	}
}

func TestDeadLetters(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.Source(t, "other")
	for i := range 5 {
		k := w.publish(fmt.Sprint("a", i))
		w.bury(k, i%2 == 0)
		w.Exec(t, `UPDATE outbox.dead_letter SET since = to_timestamp($2) WHERE tx_id = $1`, [16]byte(k.Transaction), 1_700_000_000+int64(i/2))
	}
	got, next, err := w.Store.DeadLetters(t.Context(), "", "", 0)
	if err != nil || next != "" || len(got) != 5 {
		t.Fatalf("%d, next %q, %v", len(got), next, err)
	}
	for i, d := range got {
		e := w.eventsOf(d.Key)[0]
		want := store.DeadLetter{
			EventPosition: e.EventPosition, Shard: e.shard, Key: d.Key, Aggregate: e.aggregate(), Body: store.EncodeEvent(nil, &e.record),
			Error: "MSG_SIZE_TOO_LARGE", Attempts: 3, Queue: d.Aggregate.ID == "a0" || d.Aggregate.ID == "a2" || d.Aggregate.ID == "a4", Since: d.Since,
		}
		if !reflect.DeepEqual(d, want) {
			t.Errorf("got %+v, want %+v", d, want)
		}
		if i > 0 && d.Since.Before(got[i-1].Since) {
			t.Error("not in order")
		}
	}
	var walked []store.DeadLetter
	for page := ""; ; {
		part, next, err := w.Store.DeadLetters(t.Context(), "shop", page, 2)
		if err != nil {
			t.Fatal(err)
		}
		walked = append(walked, part...)
		if page = next; next == "" {
			break
		}
	}
	if !reflect.DeepEqual(walked, got) {
		t.Errorf("page by page: %+v", walked)
	}
	if part, _, err := w.Store.DeadLetters(t.Context(), "other", "", 10); err != nil || len(part) != 0 {
		t.Errorf("of another source: %+v, %v", part, err)
	}
}

func TestPageTokens(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	for i := range 2 {
		k := w.publish(fmt.Sprint(i))
		w.bury(k, false)
		w.park(w.publish(fmt.Sprint("p", i)), store.CauseTopic, store.Committed)
	}
	_, dead, err := w.Store.DeadLetters(t.Context(), "shop", "", 1)
	if err != nil || dead == "" {
		t.Fatal(dead, err)
	}
	_, blocked, err := w.Store.BlockedAggregates(t.Context(), "shop", "", 1)
	if err != nil || blocked == "" {
		t.Fatal(blocked, err)
	}
	flipped, err := base64.RawURLEncoding.DecodeString(dead)
	if err != nil {
		t.Fatal(err)
	}
	flipped[5]++
	for name, page := range map[string]string{
		"garbage": "garbage", "not base64": "!", "of the other list": blocked, "cut": dead[:len(dead)-2], "longer": dead + "AAAA",
		"changed": base64.RawURLEncoding.EncodeToString(flipped), "SQL": "' OR 1=1 --", "NUL": "\x00", "long": strings.Repeat("A", 100_000),
	} {
		if _, _, err := w.Store.DeadLetters(t.Context(), "shop", page, 1); !errors.Is(err, store.ErrInvalid) {
			t.Errorf("%s: %v, want ErrInvalid", name, err)
		}
	}
	if _, _, err := w.Store.DeadLetters(t.Context(), "", dead, 1); !errors.Is(err, store.ErrInvalid) {
		t.Errorf("of another filter: %v, want ErrInvalid", err)
	}
	if _, _, err := w.Store.BlockedAggregates(t.Context(), "shop", dead, 1); !errors.Is(err, store.ErrInvalid) {
		t.Errorf("of the other list: %v, want ErrInvalid", err)
	}
	if _, _, err := w.Store.DeadLetters(t.Context(), "a\x00b", "", 1); !errors.Is(err, store.ErrInvalid) {
		t.Errorf("NUL in the source: %v, want ErrInvalid", err)
	}
	// Whoever can compute the checksum gets rows or none, never an error of another class.
	for _, forged := range store.ForgedPageTokens("dead letters", "shop") {
		if _, _, err := w.Store.DeadLetters(t.Context(), "shop", forged, 1); err != nil && !errors.Is(err, store.ErrInvalid) {
			t.Errorf("forged %q: %v", forged, err)
		}
	}
}

func FuzzPageToken(f *testing.F) {
	for _, token := range store.ForgedPageTokens("dead letters", "shop") {
		f.Add(token)
	}
	f.Add("")
	f.Add("garbage")
	f.Fuzz(func(t *testing.T, token string) {
		again, err := store.RecodePageToken(token, "dead letters", "shop")
		if err != nil {
			if !errors.Is(err, store.ErrInvalid) {
				t.Fatal(err)
			}
			return
		}
		if again != token {
			t.Fatalf("%q was accepted, but is written %q", token, again)
		}
	})
}

func TestOperations(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	a := store.Aggregate{Source: w.src.ID, Type: "order", ID: "a"}
	request := func(a store.Aggregate, action store.Action) (*store.Operation, error) {
		return w.Store.RequestOperation(t.Context(), a, action, "ann", "it is fixed")
	}
	if _, err := request(a, store.ActionRedrive); !errors.Is(err, store.ErrUnknown) {
		t.Fatalf("nothing there: %v", err)
	}
	k := w.publish("a")
	w.park(k, store.CauseRecord, store.Committed)
	op, err := request(a, store.ActionSkip)
	if err != nil {
		t.Fatal(err)
	}
	want := &store.Operation{ID: op.ID, Shard: w.eventsOf(k)[0].shard, Aggregate: a, Action: store.ActionSkip}
	if !reflect.DeepEqual(op, want) || op.ID == 0 {
		t.Fatalf("got %+v, want %+v", op, want)
	}
	if read, err := w.Store.OperationByID(t.Context(), op.ID); err != nil || !reflect.DeepEqual(read, want) {
		t.Fatalf("read %+v, %v", read, err)
	}
	w.Exec(t, `UPDATE outbox.operation SET done_at = now(), outcome = 'skipped', events = 1`)
	want.Done, want.Outcome, want.Events = true, "skipped", 1
	if read, err := w.Store.OperationByID(t.Context(), op.ID); err != nil || !reflect.DeepEqual(read, want) {
		t.Fatalf("read %+v, %v", read, err)
	}
	w.Exec(t, `DELETE FROM outbox.parked`)
	w.bury(k, true)
	w.Exec(t, `DELETE FROM outbox.source`)
	for _, action := range []store.Action{store.ActionRedrive, store.ActionDiscard} {
		if _, err := request(a, action); err != nil {
			t.Fatal(err)
		}
	}
	for _, action := range []store.Action{0, 4} {
		if _, err := request(a, action); !errors.Is(err, store.ErrInvalid) {
			t.Fatalf("action %d: %v", action, err)
		}
	}
	if _, err := request(store.Aggregate{Source: w.src.ID, Type: "order\x00", ID: "a"}, store.ActionSkip); !errors.Is(err, store.ErrInvalid) {
		t.Fatalf("NUL: %v", err)
	}
	if _, err := w.Store.OperationByID(t.Context(), 999); !errors.Is(err, store.ErrUnknown) {
		t.Fatalf("unknown operation: %v", err)
	}
	audit := storetest.Query[string](t, w.Database, `SELECT action || ' ' || subject FROM outbox.audit WHERE action LIKE 'aggregate.%' ORDER BY audit_id`)
	wantAudit := []string{"aggregate.skip shop/order/a", "aggregate.redrive /order/a", "aggregate.discard /order/a"}
	if !reflect.DeepEqual(audit, wantAudit) {
		t.Fatalf("audit %q, want %q", audit, wantAudit)
	}
}
