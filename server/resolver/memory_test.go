package resolver

import (
	"context"
	"strings"
	"testing"
	"time"

	"github.com/outbox-platform/outbox/store"
	"github.com/outbox-platform/outbox/store/storetest"
)

// failOver: the store's server goes on as a standby of nobody and is promoted. What it had not heard of is lost.
func (w *world) failOver(cluster *storetest.Cluster) {
	w.t.Helper()
	beStandby(w.t, cluster)
	if !storetest.Query[bool](w.t, w.db, "SELECT pg_promote()")[0] {
		w.t.Fatal("the standby was not promoted")
	}
	// Whoever connects records it; a writer does before it writes.
	storetest.Eventually(w.t, soon, func() bool {
		reader, err := w.db.Store.OpenReader(w.t.Context())
		if err != nil {
			return false
		}
		return reader.Close(w.t.Context()) == nil
	})
}

// The store fails over and has lost a Commit that it had acknowledged. The service has deleted the marker, as it may. Now "ended,
// not marked" says nothing about a transaction that was prepared before, and the answer must not drop its events. It still says
// everything about a young one, whose marker cannot be gone, and about one that was prepared since.
func TestStoreFailedOver(t *testing.T) {
	cluster := storetest.NewCluster(t)
	db := cluster.New(t)
	w := &world{t: t, db: db, writer: db.Writer(t, store.WriterConfig{}), log: &lockedLog{}}
	s := w.direct("orders", w.sourceDatabase())
	lost := s.begin().prepare().commit() // and the Commit that the store forgets
	young := s.begin().prepare()
	young.exec("ROLLBACK")
	kept := s.begin().prepare().commit() // its marker is still there
	s.exec("DELETE FROM outbox_marker WHERE id = $1", [16]byte(lost.key.Transaction))
	age := func(a *attempt) {
		t.Helper()
		if n := db.Exec(t, "UPDATE outbox.tx SET prepared_at = now() - interval '31 minutes' WHERE tx_id = $1", [16]byte(a.key.Transaction)); n != 1 {
			t.Fatalf("%d rows", n)
		}
	}
	age(lost)
	age(kept)
	w.failOver(cluster)

	var since *attempt
	storetest.Eventually(t, soon, func() bool {
		since = s.begin()
		at := since.at
		_, err := w.writer.Do(t.Context(), &store.Request{Kind: store.KindPrepare, Key: since.key, Database: &at, Events: []store.Event{storetest.Event("t", "order", "1", "{}")}})
		return err == nil
	})
	since.exec("ROLLBACK")
	age(since)

	r, _ := w.resolver(nobody{})
	r.SessionBroke("orders", "pod", []store.Parked{lost.parked(), young.parked(), kept.parked(), since.parked()})
	young.becomes(store.Aborted, soon)
	since.becomes(store.Aborted, soon)
	kept.becomes(store.Committed, soon)
	resp, err := r.Check(t.Context(), lost.parked())
	if err != nil || resp.GetOutcome() != unknown || !strings.Contains(resp.GetReason(), "the store failed over") {
		t.Errorf("%v, %v", resp, err)
	}
	storetest.Eventually(t, soon, func() bool { return r.queued() == 0 })
	if st := lost.state().State; st != store.Prepared {
		t.Fatalf("a committed transaction is %s", st)
	}
	// A failover of its database as well, and an operator who says that the old primary is fenced: no proof either.
	answers := r.remember(t.Context(), []store.Parked{lost.parked()}, []answer{{key: lost.key, method: methodOperator, outcome: aborted}})
	if answers[0].outcome != unknown {
		t.Errorf("%+v", answers[0])
	}
	// A store that does not answer is no proof.
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if a := r.remember(ctx, []store.Parked{young.parked()}, []answer{{key: young.key, outcome: aborted}}); a[0].outcome != unknown {
		t.Errorf("%+v", a[0])
	}
	if bad, err := db.Store.Verify(t.Context()); err != nil || len(bad) != 0 {
		t.Errorf("verify: %v, %v", bad, err)
	}
}

// The verdict's snapshot and the write of the decision are two moments, and between them the store may fail over. What is on
// record as decided when it is looked at after the verdict is not written again.
func TestDecidedIsNotWrittenAgain(t *testing.T) {
	w := newWorld(t)
	s := w.direct("orders", w.sourceDatabase())
	r, reg := w.resolver(nobody{}, func(c *Config) { c.Interval = time.Hour })
	a := s.begin().prepare().commit()
	if _, err := w.writer.Do(t.Context(), &store.Request{Kind: store.KindCommit, Key: a.key}); err != nil {
		t.Fatal(err)
	}
	s.exec("DELETE FROM outbox_marker")
	r.SessionBroke("orders", "pod", []store.Parked{a.parked()})
	storetest.Eventually(t, soon, func() bool { return r.queued() == 0 })
	if resp, err := r.Check(t.Context(), a.parked()); err != nil || resp.GetOutcome() != aborted {
		t.Errorf("%v, %v", resp, err)
	}
	if a.state().State != store.Committed || metric(t, reg, "outbox_resolver_contradictions_total") != 0 {
		t.Errorf("%s", a.state().State)
	}
}

// A source that was registered a moment ago is asked at once: nobody waits until the sources are read again.
func TestNewSource(t *testing.T) {
	w := newWorld(t)
	w.source("first", w.sourceDatabase(), "")
	back := &switchable{}
	r, _ := w.resolver(back, func(c *Config) { c.Interval = time.Hour })
	s := w.source("second", w.sourceDatabase(), "")
	back.on.Store(&instance{source: s})
	a := s.begin().prepare().commit()
	r.SessionBroke("second", "pod", []store.Parked{a.parked()})
	a.becomes(store.Committed, soon) // the sources are read again in an hour
}
