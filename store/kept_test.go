package store_test

import (
	"errors"
	"slices"
	"testing"

	"github.com/outbox-platform/outbox/store"
	"github.com/outbox-platform/outbox/store/storetest"
)

// later lets an hour pass: every shard is read to the end of the log, and transactions are forgotten. Retention has run when it
// returns: what is decided and not kept is gone.
func (w *world) later() {
	w.t.Helper()
	w.checkpoint(nil)
	w.Exec(w.t, `UPDATE outbox.control SET tx_known_since = now() - '2 h'::interval`)
	w.Exec(w.t, `UPDATE outbox.tx SET prepared_at = prepared_at - '1 h'::interval, decided_at = decided_at - '1 h'::interval`)
	w.Exec(w.t, `UPDATE outbox.resolution SET resolved_at = resolved_at - '1 h'::interval`)
	w.maintain(store.MaintenanceConfig{})
}

// keep sends a Publish that its caller keeps.
func (w *world) keep(k store.Key, events []store.Event) error {
	w.t.Helper()
	_, err := w.w.Do(w.t.Context(), &store.Request{
		Kind: store.KindPublish, Key: k, Events: slices.Clone(events), Resolution: store.KeptByCaller("shop"),
	})
	return err
}

// TestKeptPublishIsKnownAfterRetention: what its caller keeps and sends again long after its answer was lost is published once,
// however it came to be committed.
func TestKeptPublishIsKnownAfterRetention(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	content := events("a")
	for name, c := range map[string]struct {
		first   func(store.Key)
		decided string
	}{
		"it did not arrive before": {func(store.Key) {}, "client"},
		"its Prepare had arrived": {func(k store.Key) {
			w.do(&store.Request{Kind: store.KindPrepare, Key: k, Events: slices.Clone(content), Database: storetest.DatabaseTransaction(77)})
		}, "client"},
		"its Prepare had arrived, and the resolver was faster": {func(k store.Key) {
			w.do(&store.Request{Kind: store.KindPrepare, Key: k, Events: slices.Clone(content), Database: storetest.DatabaseTransaction(77)})
			w.resolve(k, store.KindCommit)
		}, "check-back"},
	} {
		k := storetest.Key(w.src.ID)
		c.first(k)
		if err := w.keep(k, content); err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		ordinary := w.publish("a") // behind it in the log, and gone when retention has run
		w.later()
		if _, err := w.Store.Transaction(t.Context(), ordinary); !errors.Is(err, store.ErrUnknown) {
			t.Fatalf("%s: retention has not run: %v", name, err)
		}
		tx, err := w.Store.Transaction(t.Context(), k)
		if err != nil || tx.State != store.Committed || tx.DecidedBy != c.decided || len(tx.Evidence) == 0 {
			t.Errorf("%s: %+v, %v", name, tx, err)
		}
		// Again: by a drainer, and by a client of an earlier version, which does not say that it keeps the request.
		if err := w.keep(k, content); err != nil {
			t.Errorf("%s: again: %v", name, err)
		}
		w.do(&store.Request{Kind: store.KindPublish, Key: k, Events: slices.Clone(content)})
		if err := w.keep(k, events("a")); !errors.Is(err, store.ErrReused) {
			t.Errorf("%s: with other content: %v", name, err)
		}
		if n := len(w.eventsOf(k)); n != 1 {
			t.Errorf("%s: its event is in the log %d times", name, n)
		}
		w.sound()
	}
	// The time ends for these, too, and then nothing of them is left.
	w.Exec(t, `UPDATE outbox.resolution SET resolved_at = resolved_at - '7 d'::interval`)
	w.later()
	if n := w.one(`SELECT (SELECT count(*) FROM outbox.tx) + (SELECT count(*) FROM outbox.resolution)`); n != 0 {
		t.Errorf("%d rows are left", n)
	}
}

// TestKeptPublishThatLoses: nothing is noted of a request that decided nothing, and nothing of those that are not kept.
func TestKeptPublishThatLoses(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	content := events("a")
	aborted, published, committed := storetest.Key(w.src.ID), storetest.Key(w.src.ID), w.prepare("c")
	w.do(&store.Request{Kind: store.KindPrepare, Key: aborted, Events: slices.Clone(content), Database: storetest.DatabaseTransaction(77)})
	w.decide(aborted, store.KindAbort)
	w.do(&store.Request{Kind: store.KindPublish, Key: published, Events: slices.Clone(content)})
	w.decide(committed, store.KindCommit)
	var decided *store.DecidedError
	if err := w.keep(aborted, content); !errors.As(err, &decided) || decided.State != store.Aborted {
		t.Errorf("after an Abort: %v", err)
	}
	if err := w.keep(published, content); err != nil {
		t.Error(err)
	}
	if n := w.one(`SELECT count(*) FROM outbox.resolution`); n != 0 {
		t.Errorf("%d resolutions", n)
	}
	w.sound()
}

// TestKeptPublishesOfOneBatch: each of a batch has its own row, and the others of the batch have none.
func TestKeptPublishesOfOneBatch(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	content := events("a", "b")
	prepared := storetest.Key(w.src.ID)
	w.do(&store.Request{Kind: store.KindPrepare, Key: prepared, Events: slices.Clone(content), Database: storetest.DatabaseTransaction(77)})
	requests := []*store.Request{{Kind: store.KindPublish, Key: prepared, Events: slices.Clone(content), Resolution: store.KeptByCaller("shop")}}
	want := []string{prepared.Transaction.String()}
	for i := range 8 {
		r := &store.Request{Kind: store.KindPublish, Key: storetest.Key(w.src.ID), Events: slices.Clone(content)}
		if i%2 == 0 {
			r.Resolution = store.KeptByCaller("shop")
			want = append(want, r.Key.Transaction.String())
		}
		requests = append(requests, r)
	}
	writer := store.NewWriter(w.Store, store.WriterConfig{})
	var p pending
	p.submit(t, writer, requests...) // before Run: one batch
	stopAtEnd(t, writer)
	for r, a := range p.wait() {
		checkAnswer(t, r, a.Err, nil)
	}
	got := storetest.Query[string](t, w.Database, `
		SELECT tx_id::text FROM outbox.resolution
		WHERE state = 1 AND method = 'client' AND actor = 'shop' AND evidence = '{"kept_by_caller": true}'`)
	slices.Sort(got)
	slices.Sort(want)
	if !slices.Equal(got, want) {
		t.Errorf("resolutions of %v, want %v", got, want)
	}
	w.sound()
}
