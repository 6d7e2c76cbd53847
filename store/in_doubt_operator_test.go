package store_test

import (
	"errors"
	"testing"
	"time"

	"github.com/outbox-platform/outbox/store"
	"github.com/outbox-platform/outbox/store/storetest"
)

func TestInDoubtForOperators(t *testing.T) {
	t.Parallel()
	db := storetest.New(t, storetest.WithShards(1))
	a, b := db.Source(t, "a"), db.Source(t, "b")
	l := acquire(t, db.Store, "relay", time.Minute, 1, 1)[0]
	first, second, third := storetest.Key(a.ID), storetest.Key(a.ID), storetest.Key(b.ID)
	follower := parkedEvent(at(11, 0, 0), second, "A", store.CauseFollower) // undecided, too
	decided := parkedEvent(at(12, 0, 0), storetest.Key(a.ID), "A", store.CauseFollower)
	decided.State = store.Committed
	parked := []store.Parked{
		parkedEvent(at(10, 0, 0), first, "A", store.CauseInDoubt), parkedEvent(at(10, 0, 1), first, "B", store.CauseInDoubt),
		follower, decided, parkedEvent(at(13, 0, 0), third, "C", store.CauseInDoubt),
	}
	for i := range parked {
		parked[i].Aggregate.Source = parked[i].Key.Source
	}
	step(t, db.Store, store.Step{Epoch: l.Epoch, Checkpoint: store.Checkpoint{Position: store.Position{XID: 20}}, Park: parked})

	list := func(source, page string, limit int) ([]store.InDoubtTransaction, string) {
		t.Helper()
		found, next, err := db.Store.InDoubtTransactions(t.Context(), source, page, limit)
		if err != nil {
			t.Fatal(err)
		}
		return found, next
	}
	found, next := list("", "", 0)
	if len(found) != 3 || next != "" {
		t.Fatalf("%d found, next %q", len(found), next)
	}
	if d := found[0]; d.Head.Key != first || d.Source != "a" || d.Events != 2 || d.Waiting != 2 || d.Head.Database == nil {
		t.Errorf("%+v", d)
	}
	if d := found[1]; d.Head.Key != second || d.Events != 1 || d.Waiting != 1 {
		t.Errorf("%+v", d)
	}
	one, next := list("a", "", 1)
	two, end := list("a", next, 1)
	if len(one) != 1 || len(two) != 1 || one[0].Head.Key != first || two[0].Head.Key != second || end != "" {
		t.Errorf("pages %+v, %+v, %q", one, two, end)
	}
	if _, _, err := db.Store.InDoubtTransactions(t.Context(), "b", next, 1); !errors.Is(err, store.ErrInvalid) {
		t.Errorf("a page of another filter: %v", err)
	}
	counts, err := db.Store.InDoubtCounts(t.Context())
	if err != nil || len(counts) != 2 || counts[0].Source != "a" || counts[0].Transactions != 2 || counts[1].Transactions != 1 || counts[0].Oldest < 0 {
		t.Errorf("%+v, %v", counts, err)
	}

	if err := db.Store.Audit(t.Context(), "ops", "transaction.decide", "a/1", "why", map[string]any{"decision": "ABORTED"}); err != nil {
		t.Fatal(err)
	}
	if n := storetest.Query[int64](t, db, `SELECT count(*) FROM outbox.audit WHERE action = 'transaction.decide' AND detail->>'decision' = 'ABORTED'`); n[0] != 1 {
		t.Errorf("%d audit rows", n[0])
	}
	st := db.Open(t)
	st.Close()
	for name, call := range map[string]func() error{
		"list":   func() error { _, _, err := st.InDoubtTransactions(t.Context(), "", "", 1); return err },
		"counts": func() error { _, err := st.InDoubtCounts(t.Context()); return err },
		"audit":  func() error { return st.Audit(t.Context(), "a", "b", "c", "d", nil) },
	} {
		if err := call(); !errors.Is(err, store.ErrUnavailable) {
			t.Errorf("%s: %v, want ErrUnavailable", name, err)
		}
	}
}
