package store_test

import (
	"errors"
	"strings"
	"testing"

	"github.com/outbox-platform/outbox/store"
	"github.com/outbox-platform/outbox/store/storetest"
)

// where returns the transaction and fails the test unless each event is at the place with an explanation that contains
// the text; "" means that there is none.
func (w *world) where(k store.Key, place store.Place, explanations ...string) *store.Transaction {
	w.t.Helper()
	tx, err := w.Store.Transaction(w.t.Context(), k)
	if err != nil {
		w.t.Fatal(err)
	}
	if len(tx.Events) == 0 {
		w.t.Fatal("no events")
	}
	for _, e := range tx.Events {
		if e.Place != place {
			w.t.Errorf("event of %s is at place %d (%s), want %d", e.Event.AggregateID, e.Place, e.Explanation, place)
		}
		if len(explanations) == 0 && e.Explanation != "" {
			w.t.Errorf("explanation %q, want none", e.Explanation)
		}
		for _, part := range explanations {
			if !strings.Contains(e.Explanation, part) {
				w.t.Errorf("explanation %q does not contain %q", e.Explanation, part)
			}
		}
	}
	return tx
}

func TestTransaction(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	a, b, _ := w.twoShards()
	k := w.prepare(a, b, a)
	tx := w.where(k, store.PlaceInDoubt, "nobody has told the decision yet", "nobody holds shard")
	if tx.Key != k || tx.State != store.Prepared || tx.PreparedAt.IsZero() || !tx.DecidedAt.IsZero() || tx.DecidedBy != "" || tx.Evidence != nil {
		t.Errorf("undecided: %+v", tx)
	}
	if len(tx.Events) != 3 || tx.Database == nil || *tx.Database != *storetest.DatabaseTransaction(77) {
		t.Errorf("%d events, database %+v", len(tx.Events), tx.Database)
	}
	for _, e := range tx.Events {
		if want := "payload of " + e.Event.AggregateID; string(e.Event.Payload) != want {
			t.Errorf("payload %q, want %q", e.Event.Payload, want)
		}
		if want := store.ShardOf(store.Aggregate{Source: w.src.ID, Type: "order", ID: e.Event.AggregateID}, 16); e.Shard != want {
			t.Errorf("shard %d, want %d", e.Shard, want)
		}
	}
	w.decide(k, store.KindCommit)
	tx = w.where(k, store.PlaceQueued, "has not read it yet", "nobody holds shard")
	if tx.State != store.Committed || tx.DecidedAt.Before(tx.PreparedAt) || tx.DecidedBy != "client" {
		t.Errorf("committed: %+v", tx)
	}
	resolved := w.prepare("r")
	w.resolve(resolved, store.KindAbort)
	tx = w.where(resolved, store.PlaceDropped, "aborted")
	if tx.State != store.Aborted || tx.DecidedBy != "check-back" || string(tx.Evidence) != `{"marked": true}` {
		t.Errorf("resolved: %+v", tx)
	}
	if tx = w.where(w.publish("p"), store.PlaceQueued, "has not read"); tx.Database != nil || tx.DecidedBy != "client" {
		t.Errorf("published: %+v", tx)
	}
	if _, err := w.Store.Transaction(t.Context(), storetest.Key(w.src.ID)); !errors.Is(err, store.ErrUnknown) {
		t.Errorf("unknown: %v", err)
	}
	other := k
	other.Source++
	if _, err := w.Store.Transaction(t.Context(), other); !errors.Is(err, store.ErrUnknown) {
		t.Errorf("of another source: %v", err)
	}
}

func TestPlaceInTheLog(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.hold()
	k := w.publish("a")
	tx := w.where(k, store.PlaceQueued, "has not read it yet, or Kafka has not acknowledged it")
	if strings.Contains(tx.Events[0].Explanation, "nobody holds") {
		t.Error("a held shard is said to be held by nobody")
	}
	w.checkpoint(map[store.Key]store.State{k: store.Committed})
	w.where(k, store.PlaceQueued, "Kafka has not acknowledged it yet")
	w.checkpoint(nil)
	w.where(k, store.PlacePublished)

	undecided := w.prepare("b")
	behind := w.publish("b")
	other := w.publish("c")
	w.checkpoint(map[store.Key]store.State{undecided: store.Prepared, behind: store.Committed})
	w.where(undecided, store.PlaceInDoubt, "nobody has told")
	w.where(behind, store.PlaceWaiting, "behind transaction "+undecided.Transaction.String(), "undecided")
	w.where(other, store.PlacePublished)

	w.checkpoint(nil)
	w.where(undecided, store.PlaceInDoubt, "outbox verify")
	aborted := w.prepare("d")
	w.park(aborted, store.CauseInDoubt, store.Prepared)
	w.decide(aborted, store.KindAbort)
	w.where(aborted, store.PlaceDropped, "has not removed it yet")
}

func TestPlaceInParked(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	head := w.prepare("a")
	follower := w.publish("a")
	w.park(head, store.CauseInDoubt, store.Prepared)
	w.park(follower, store.CauseFollower, store.Committed)
	w.checkpoint(nil)
	unread := w.publish("a")
	undecided := w.prepare("a")
	w.hold()

	w.where(head, store.PlaceInDoubt, "nobody has told")
	w.Exec(t, `UPDATE outbox.parked SET checks = 1, last_answer = 'IN_PROGRESS' WHERE tx_id = $1`, [16]byte(head.Transaction))
	w.where(head, store.PlaceInDoubt, `"default" was asked once, the last answer was "IN_PROGRESS"`)
	w.Exec(t, `UPDATE outbox.parked SET checks = 7, last_answer = 'UNKNOWN' WHERE tx_id = $1`, [16]byte(head.Transaction))
	w.where(head, store.PlaceInDoubt, `was asked 7 times`)
	w.where(follower, store.PlaceWaiting, "behind transaction "+head.Transaction.String(), "is undecided")
	w.where(unread, store.PlaceWaiting, "behind transaction "+head.Transaction.String(), "is undecided")
	w.park(undecided, store.CauseFollower, store.Prepared)
	w.where(undecided, store.PlaceInDoubt, "it also waits behind transaction "+head.Transaction.String())

	w.decide(head, store.KindCommit)
	w.where(head, store.PlaceQueued, "has not read the decision yet")
	set := func(sql string) {
		t.Helper()
		w.Exec(t, `UPDATE outbox.parked SET `+sql+` WHERE tx_id = $1`, [16]byte(head.Transaction))
	}
	set(`state = 1`)
	w.where(head, store.PlaceQueued, "next of its aggregate")
	w.where(follower, store.PlaceWaiting, "is about to be delivered")
	set(`cause = 3, attempts = 1, error = 'MSG_SIZE_TOO_LARGE: 2 MiB'`)
	w.where(head, store.PlaceBlocked, "refused it after 1 attempt: MSG_SIZE_TOO_LARGE: 2 MiB", "redrive, skip or discard")
	w.where(follower, store.PlaceWaiting, "Kafka refused: MSG_SIZE_TOO_LARGE")
	set(`cause = 4, error = 'UNKNOWN_TOPIC'`)
	w.where(head, store.PlaceBlocked, `topic "orders" cannot be written: UNKNOWN_TOPIC`, "before an operator says")
	set(`next_try = '2026-11-24 10:00:00+00'`)
	w.where(follower, store.PlaceWaiting, "waits for its topic", "next try at 2026-11-24T10:00:00Z")
	set(`next_try = 'infinity'`)
	w.where(head, store.PlaceBlocked, "before an operator says")
	set(`cause = 5`)
	w.where(head, store.PlaceQueued, "put back by an operator")
	w.Exec(t, `UPDATE outbox.parked SET cause = 5 WHERE tx_id = $1`, [16]byte(follower.Transaction))
	w.where(follower, store.PlaceWaiting, "put back by an operator; waits behind")
}

func TestPlaceInDeadLetters(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.hold()
	k := w.publish("a")
	discarded := w.publish("z")
	w.bury(k, true)
	w.checkpoint(nil)
	follower := w.publish("a")
	w.where(k, store.PlaceDeadLetter, "after 3 attempts: MSG_SIZE_TOO_LARGE")
	w.where(follower, store.PlaceWaiting, "park policy")
	if _, err := w.Store.RequestOperation(t.Context(), store.Aggregate{Source: w.src.ID, Type: "order", ID: "a"}, store.ActionDiscard, "ann", "test"); err != nil {
		t.Fatal(err)
	}
	w.where(discarded, store.PlacePublished)
	w.Exec(t, `UPDATE outbox.operation SET aggregate_id = 'z', done_at = now(), events = 1`)
	w.where(discarded, store.PlacePublished, "unless it is one of the events that operation 1 discarded")
	// The dead letter outlives its segment.
	w.Exec(t, `TRUNCATE outbox.log`)
	if tx := w.where(k, store.PlaceDeadLetter, "MSG_SIZE"); string(tx.Events[0].Event.Payload) != "payload of a" {
		t.Errorf("payload %q", tx.Events[0].Event.Payload)
	}
	tx, err := w.Store.Transaction(t.Context(), discarded)
	if err != nil || len(tx.Events) != 0 {
		t.Errorf("after truncation: %+v, %v", tx, err)
	}
}

func TestTransactionOfADamagedStore(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	k := w.publish("a")
	w.park(k, store.CauseTopic, store.Committed)
	w.bury(k, false)
	fails := func(sql, undo string) {
		t.Helper()
		w.Exec(t, sql)
		if _, err := w.Store.Transaction(t.Context(), k); err == nil {
			t.Errorf("no error after %s", sql)
		}
		w.Exec(t, undo)
	}
	fails(`UPDATE outbox.shard SET pend = '\xff'`, `UPDATE outbox.shard SET pend = ''`)
	fails(`UPDATE outbox.dead_letter SET body = '\x'`, `DELETE FROM outbox.dead_letter`)
	fails(`UPDATE outbox.parked SET body = '\x'`, `DELETE FROM outbox.parked`)
	fails(`UPDATE outbox.log SET body = '\x'`, `DELETE FROM outbox.log`)
	w.Exec(t, `UPDATE outbox.shard SET pend = '\xff'`)
	if err := w.Store.DeleteSource(t.Context(), "shop", "", ""); err == nil || errors.Is(err, store.ErrInUse) {
		t.Errorf("deleting a source: %v", err)
	}
}
