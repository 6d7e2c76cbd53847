package store_test

import (
	"errors"
	"testing"

	"github.com/outbox-platform/outbox/store"
	"github.com/outbox-platform/outbox/store/storetest"
)

func TestAddDeadLetter(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	k := storetest.Key(w.src.ID)
	event := storetest.Event("not a topic", "order", "7", "{")
	for range 2 { // the second is a repetition
		if err := w.Store.AddDeadLetter(t.Context(), k, &event, "invalid JSON", 5, "import"); err != nil {
			t.Fatal(err)
		}
	}
	other := event
	other.Payload = []byte("other")
	if err := w.Store.AddDeadLetter(t.Context(), k, &other, "invalid JSON", 0, "import"); !errors.Is(err, store.ErrReused) {
		t.Errorf("other content under the same id: %v", err)
	}

	found, _, err := w.Store.DeadLetters(t.Context(), "shop", "", 10)
	if err != nil || len(found) != 1 {
		t.Fatalf("%d dead letters, %v", len(found), err)
	}
	d := found[0]
	if d.Key != k || d.Error != "invalid JSON" || d.Attempts != 5 || d.Queue || d.Aggregate.ID != "7" {
		t.Errorf("%+v", d)
	}
	record, err := store.DecodeEvent(d.Body)
	if err != nil || record.Event.Topic != "not a topic" || string(record.Event.Payload) != "{" || record.State != store.Committed {
		t.Errorf("%+v, %v", record, err)
	}
	// A Publish of the same event under the same id is found to be a repetition, too.
	w.do(&store.Request{Kind: store.KindPublish, Key: k, Events: []store.Event{event}})
	tx, err := w.Store.Transaction(t.Context(), k)
	if err != nil || tx.State != store.Committed || len(tx.Events) != 1 || tx.Events[0].Place != store.PlaceDeadLetter {
		t.Errorf("%+v, %v", tx, err)
	}
	// The segment that holds its place is read like any other, and has nothing in it.
	reader, err := w.Store.OpenReader(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := reader.Close(t.Context()); err != nil {
			t.Error(err)
		}
	}()
	segments, err := reader.Read(t.Context(), []store.Cursor{{Shard: d.Shard, Position: store.Position{Seq: -1}}}, 10)
	if err != nil || len(segments) != 1 || segments[0].Position != d.Position {
		t.Fatalf("%+v, %v", segments, err)
	}
	if err := segments[0].Records(func(r *store.Record) bool { t.Errorf("a record: %+v", r); return true }); err != nil {
		t.Error(err)
	}
	w.sound()
}

// TestAddDeadLetterLongAfterwards: an import that was killed is run again, days after an operator has dealt with its dead letters.
func TestAddDeadLetterLongAfterwards(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	k, event := storetest.Key(w.src.ID), events("a")[0]
	add := func() {
		t.Helper()
		if err := w.Store.AddDeadLetter(t.Context(), k, &event, "why", 0, "import"); err != nil {
			t.Fatal(err)
		}
	}
	add()
	w.Exec(t, `DELETE FROM outbox.dead_letter`) // discarded
	ordinary := w.publish("a")                  // at the end of the shard's log, and gone when retention has run
	w.later()
	if _, err := w.Store.Transaction(t.Context(), ordinary); !errors.Is(err, store.ErrUnknown) {
		t.Fatalf("retention has not run: %v", err)
	}
	add()
	if n := w.one(`SELECT count(*) FROM outbox.dead_letter`); n != 0 {
		t.Error("it is there again")
	}
	w.sound()
}

func TestAddDeadLetterAfterAnAbort(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	k := w.prepare("a")
	w.decide(k, store.KindAbort)
	event := events("a")[0]
	var decided *store.DecidedError
	if err := w.Store.AddDeadLetter(t.Context(), k, &event, "why", 0, "import"); !errors.As(err, &decided) && !errors.Is(err, store.ErrReused) {
		t.Errorf("%v", err)
	}
}
