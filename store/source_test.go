package store_test

import (
	"errors"
	"fmt"
	"reflect"
	"sync"
	"testing"

	"github.com/outbox-platform/outbox/store"
	"github.com/outbox-platform/outbox/store/storetest"
)

func someSource(name string) store.Source {
	return store.Source{
		Name: name, Topics: []string{"orders.*", "audit"}, RecordProfile: 2, FailurePolicy: 3, CloudEventsSource: "/shop",
		Databases: []store.SourceDatabase{{Name: "default", Mode: store.ModeMarker, DSNRef: "env:SHOP_DSN"}, {Name: "old", Mode: store.ModeClientOnly}},
	}
}

func TestApplySource(t *testing.T) {
	t.Parallel()
	db := storetest.New(t)
	st := db.Store
	now, before, err := st.ApplySource(t.Context(), someSource("shop"), "ann", "new service")
	if err != nil || before != nil {
		t.Fatalf("create: before %v, error %v", before, err)
	}
	want := someSource("shop")
	want.ID, want.Revision, want.CreatedAt, want.UpdatedAt = now.ID, 1, now.CreatedAt, now.UpdatedAt
	if !reflect.DeepEqual(*now, want) || now.ID == 0 || now.CreatedAt.IsZero() {
		t.Fatalf("created %+v, want %+v", *now, want)
	}
	got, err := st.Source(t.Context(), "shop")
	if err != nil || !reflect.DeepEqual(got, now) {
		t.Fatalf("read %+v, %v", got, err)
	}

	same, before, err := st.ApplySource(t.Context(), someSource("shop"), "ann", "again")
	if err != nil || !reflect.DeepEqual(same, now) || !reflect.DeepEqual(before, now) {
		t.Fatalf("apply without a change: %+v, %+v, %v", same, before, err)
	}

	changed := someSource("shop")
	changed.Topics, changed.Databases, changed.Revision = nil, nil, 1
	changedNow, before, err := st.ApplySource(t.Context(), changed, "bob", "narrower")
	if err != nil || !reflect.DeepEqual(before, now) || changedNow.Revision != 2 || changedNow.ID != now.ID || len(changedNow.Topics) != 0 {
		t.Fatalf("change: %+v, before %+v, %v", changedNow, before, err)
	}

	changed.FailurePolicy = 1
	if _, _, err := st.ApplySource(t.Context(), changed, "bob", "too late"); !errors.Is(err, store.ErrRevision) {
		t.Fatalf("old revision: %v", err)
	}
	unknown := someSource("nobody")
	unknown.Revision = 4
	if _, _, err := st.ApplySource(t.Context(), unknown, "bob", ""); !errors.Is(err, store.ErrRevision) {
		t.Fatalf("revision of a source that does not exist: %v", err)
	}
	nul := someSource("nul")
	nul.CloudEventsSource = "\x00"
	if _, _, err := st.ApplySource(t.Context(), nul, "bob", ""); !errors.Is(err, store.ErrInvalid) {
		t.Fatalf("NUL in text: %v", err)
	}

	audit := storetest.Query[string](t, db, `
		SELECT format('%s %s %s %s %s>%s', actor, action, subject, reason, detail->'before'->>'Revision', detail->'after'->>'Revision')
		FROM outbox.audit ORDER BY audit_id`)
	wantAudit := []string{"ann source.create shop new service >1", "bob source.update shop narrower 1>2"}
	if !reflect.DeepEqual(audit, wantAudit) {
		t.Fatalf("audit %q, want %q", audit, wantAudit)
	}
}

func TestApplySourceAtOnce(t *testing.T) {
	t.Parallel()
	db := storetest.New(t)
	var wg sync.WaitGroup
	errs := make([]error, 8)
	for i := range errs {
		wg.Go(func() {
			src := someSource("shop")
			src.CloudEventsSource = fmt.Sprint("/", i)
			_, _, errs[i] = db.Store.ApplySource(t.Context(), src, "ann", "")
		})
	}
	wg.Wait()
	if err := errors.Join(errs...); err != nil {
		t.Fatal(err)
	}
	src, err := db.Store.Source(t.Context(), "shop")
	if err != nil || src.Revision != int64(len(errs)) {
		t.Fatalf("after %d changes: %+v, %v", len(errs), src, err)
	}
}

func TestSources(t *testing.T) {
	t.Parallel()
	db := storetest.New(t)
	for _, name := range []string{"c", "a", "b", "gone"} {
		db.Source(t, name)
	}
	if err := db.Store.DeleteSource(t.Context(), "gone", "ann", ""); err != nil {
		t.Fatal(err)
	}
	for _, test := range []struct {
		after string
		limit int
		want  []string
	}{{"", 0, []string{"a", "b", "c"}}, {"", 2, []string{"a", "b"}}, {"b", 2, []string{"c"}}, {"c", 0, nil}} {
		found, err := db.Store.Sources(t.Context(), test.after, test.limit)
		if err != nil {
			t.Fatal(err)
		}
		var names []string
		for _, s := range found {
			names = append(names, s.Name)
		}
		if !reflect.DeepEqual(names, test.want) {
			t.Errorf("after %q limit %d: %v, want %v", test.after, test.limit, names, test.want)
		}
	}
}

func TestDeleteSource(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	refused := func(why string) {
		t.Helper()
		err := w.Store.DeleteSource(t.Context(), "shop", "ann", "")
		if !errors.Is(err, store.ErrInUse) {
			t.Fatalf("with %s: %v, want ErrInUse", why, err)
		}
	}
	k := w.prepare("a")
	refused("an undecided transaction")
	w.decide(k, store.KindCommit)
	refused("a committed event that nobody has read")
	w.checkpoint(map[store.Key]store.State{k: store.Committed})
	refused("a pending event")
	w.checkpoint(nil)
	w.park(k, store.CauseTopic, store.Committed)
	refused("a parked event")
	w.Exec(t, `DELETE FROM outbox.parked`)
	w.bury(k, false)
	refused("a dead letter")
	w.Exec(t, `DELETE FROM outbox.dead_letter`)
	// The checkpoint is in the middle of the batch.
	w.Exec(t, `UPDATE outbox.shard SET seq = -1 WHERE xid > '0'`)
	w.Exec(t, `DELETE FROM outbox.log WHERE xid > (SELECT log_xid FROM outbox.tx)`)
	w.Exec(t, `UPDATE outbox.shard SET xid = (SELECT log_xid FROM outbox.tx) WHERE xid > '0'`)
	refused("a segment of the checkpoint's batch that nobody has read")
	w.checkpoint(nil)

	if err := w.Store.DeleteSource(t.Context(), "shop", "ann", "no longer used"); err != nil {
		t.Fatal(err)
	}
	if _, err := w.Store.Source(t.Context(), "shop"); !errors.Is(err, store.ErrUnknown) {
		t.Fatalf("after deletion: %v", err)
	}
	if err := w.Store.DeleteSource(t.Context(), "shop", "ann", ""); !errors.Is(err, store.ErrUnknown) {
		t.Fatalf("deleted twice: %v", err)
	}
	again := w.Source(t, "shop")
	if again.ID == w.src.ID || again.Revision != 1 {
		t.Fatalf("registered again as %+v, was %+v", again, w.src)
	}
	if n := storetest.Query[int](t, w.Database, `SELECT count(*) FROM outbox.audit WHERE action = 'source.delete' AND reason = 'no longer used'`)[0]; n != 1 {
		t.Fatalf("%d audit rows of the deletion", n)
	}
}

func TestTopics(t *testing.T) {
	t.Parallel()
	db := storetest.New(t)
	put := func(topics ...store.Topic) {
		t.Helper()
		if err := db.Store.PutTopics(t.Context(), topics); err != nil {
			t.Fatal(err)
		}
	}
	put()
	put(store.Topic{Name: "b", Partitions: 3, MaxMessageBytes: 1000}, store.Topic{Name: "a", Partitions: 1, MaxMessageBytes: 10},
		store.Topic{Name: "a", Partitions: 2, MaxMessageBytes: 20})
	put(store.Topic{Name: "b", Partitions: 6, MaxMessageBytes: 2000})
	got, err := db.Store.Topics(t.Context())
	want := []store.Topic{{Name: "a", Partitions: 2, MaxMessageBytes: 20}, {Name: "b", Partitions: 6, MaxMessageBytes: 2000}}
	if err != nil || !reflect.DeepEqual(got, want) {
		t.Fatalf("got %v, %v, want %v", got, err, want)
	}
}

func TestAdministrationWithoutAStore(t *testing.T) {
	t.Parallel()
	db := storetest.New(t)
	st := db.Open(t)
	st.Close()
	ctx := t.Context()
	for name, err := range map[string]error{
		"Sources":           second(st.Sources(ctx, "", 0)),
		"Source":            second(st.Source(ctx, "x")),
		"ApplySource":       third(st.ApplySource(ctx, someSource("x"), "", "")),
		"DeleteSource":      st.DeleteSource(ctx, "x", "", ""),
		"PutTopics":         st.PutTopics(ctx, []store.Topic{{Name: "x"}}),
		"Topics":            second(st.Topics(ctx)),
		"Transaction":       second(st.Transaction(ctx, storetest.Key(1))),
		"RetentionHorizon":  second(st.RetentionHorizon(ctx)),
		"Shards":            second(st.Shards(ctx)),
		"BlockedAggregates": third(st.BlockedAggregates(ctx, "", "", 0)),
		"DeadLetters":       third(st.DeadLetters(ctx, "", "", 0)),
		"RequestOperation":  second(st.RequestOperation(ctx, store.Aggregate{}, store.ActionSkip, "", "")),
		"OperationByID":     second(st.OperationByID(ctx, 1)),
		"MaintainOnce":      second(st.MaintainOnce(ctx, store.MaintenanceConfig{})),
		"Verify":            second(st.Verify(ctx)),
	} {
		if !errors.Is(err, store.ErrUnavailable) {
			t.Errorf("%s: %v, want ErrUnavailable", name, err)
		}
	}
}

func second[A any](_ A, err error) error { return err }

func third[A, B any](_ A, _ B, err error) error { return err }
