package store_test

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"testing"
	"time"

	"github.com/outbox-platform/outbox/store"
	"github.com/outbox-platform/outbox/store/storetest"
)

// small closes a generation with every pass that finds something in it.
var small = store.MaintenanceConfig{GenerationBytes: 1}

func (w *world) maintain(cfg store.MaintenanceConfig) store.MaintenanceReport {
	w.t.Helper()
	report, err := w.Store.MaintainOnce(w.t.Context(), cfg)
	if err != nil {
		w.t.Fatal(err)
	}
	if !report.Leader {
		w.t.Fatal("somebody else leads")
	}
	return report
}

func (w *world) one(sql string, args ...any) int64 {
	w.t.Helper()
	return storetest.Query[int64](w.t, w.Database, sql, args...)[0]
}

// closedLongAgo makes the closed generations old enough that no statement can still write to them.
func (w *world) closedLongAgo() {
	w.t.Helper()
	w.Exec(w.t, `UPDATE outbox.generation SET closed_at = closed_at - '1 min'::interval`)
}

func TestRotation(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	if r := w.maintain(small); r.Rotated || r.Unreleased != 0 || r.RingFull {
		t.Fatalf("an empty generation: %+v", r)
	}
	w.Exec(t, `UPDATE outbox.control SET gen_since = now() - '1 h'::interval`)
	if r := w.maintain(store.MaintenanceConfig{}); r.Rotated {
		t.Fatalf("an old and empty generation: %+v", r)
	}
	w.publish("a")
	r := w.maintain(store.MaintenanceConfig{LogRetention: 7 * time.Hour})
	if r.Rotated || r.Unreleased != 1 || r.LogBytes == 0 {
		t.Fatalf("neither large nor old: %+v", r)
	}
	if r := w.maintain(store.MaintenanceConfig{}); !r.Rotated {
		t.Fatalf("old: %+v", r)
	}
	w.publish("b")
	if r := w.maintain(small); !r.Rotated || r.Unreleased != 2 {
		t.Fatalf("large: %+v", r)
	}
	big := events("big")
	big[0].Payload = make([]byte, 1<<20)
	_, _ = rand.Read(big[0].Payload) // so that it does not get smaller
	w.do(&store.Request{Kind: store.KindPublish, Key: storetest.Key(w.src.ID), Events: big})
	if r := w.maintain(store.MaintenanceConfig{GenerationBytes: 1 << 20}); !r.Rotated {
		t.Fatalf("large because of an event that is stored out of line: %+v", r)
	}
	w.publish("c")
	if n := w.one(`SELECT count(*) FROM outbox.log WHERE gen = (SELECT gen FROM outbox.control)`); n != 1 || w.one(`SELECT gen FROM outbox.control`) != 3 {
		t.Fatal("the writer does not write to the open generation")
	}
	w.sound()
}

func TestTruncation(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	retention := store.MaintenanceConfig{GenerationBytes: 1, LogRetention: time.Minute}
	pending := w.publish("a")
	inDoubt := w.prepare("b")
	w.park(inDoubt, store.CauseInDoubt, store.Prepared)
	last := w.publish("c")
	w.maintain(retention) // closes generation 0
	w.publish("a")
	w.checkpoint(map[store.Key]store.State{pending: store.Committed})

	w.Exec(t, `UPDATE outbox.generation SET closed_at = now() - '59 s'::interval WHERE gen = 0`)
	notYet := func(why string) {
		t.Helper()
		if r := w.maintain(retention); r.Truncated != 0 {
			t.Fatalf("truncated although %s", why)
		}
		w.sound()
	}
	notYet("it is within retention")
	w.Exec(t, `UPDATE outbox.generation SET closed_at = now() - '61 s'::interval WHERE gen = 0`)
	notYet("an event in it is pending")
	w.checkpoint(nil)
	e := w.eventsOf(last)[0]
	w.Exec(t, `UPDATE outbox.shard SET seq = seq - 1 WHERE shard = $1`, e.shard)
	notYet("a shard has not read its last segment")
	w.Exec(t, `UPDATE outbox.shard SET seq = seq + 1, oldest = (oldest::text::bigint - 1)::text::xid8 WHERE shard = $1`, e.shard)
	notYet("a holder may go back to an older xid")
	w.checkpoint(nil)
	w.Exec(t, `UPDATE outbox.generation SET closed_at = now() - '9 s'::interval WHERE gen = 0`)
	short := retention
	short.LogRetention = time.Second
	if r := w.maintain(short); r.Truncated != 0 {
		t.Fatal("truncated although a statement may still write to it")
	}
	w.closedLongAgo()
	if r := w.maintain(retention); r.Truncated == 0 {
		t.Fatalf("not truncated: %+v", r)
	}
	if n := w.one(`SELECT count(*) FROM outbox.log WHERE gen = 0`); n != 0 {
		t.Fatalf("%d segments left", n)
	}
	if used := storetest.Query[bool](t, w.Database, `SELECT used OR closed_at IS NOT NULL FROM outbox.generation WHERE gen = 0`)[0]; used {
		t.Fatal("the truncated generation is not free")
	}
	w.sound()
	w.where(inDoubt, store.PlaceInDoubt, "undecided")
}

func TestFullRing(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	for i := range 7 {
		w.publish("a")
		if r := w.maintain(small); !r.Rotated || r.RingFull {
			t.Fatalf("generation %d: %+v", i, r)
		}
	}
	w.publish("a")
	stays := func(why string) {
		t.Helper()
		if r := w.maintain(small); !r.RingFull || r.Rotated || r.Truncated != 0 || w.one(`SELECT gen FROM outbox.control`) != 7 {
			t.Fatalf("%s: %+v", why, r)
		}
	}
	stays("generation 0 was closed just now")
	w.closedLongAgo()
	stays("no shard has read generation 0")
	w.publish("a")
	w.checkpoint(nil)
	// Only what the ring needs is emptied before its retention is over.
	if r := w.maintain(small); !r.Rotated || r.RingFull || r.Truncated != 1 {
		t.Fatalf("after the checkpoint: %+v", r)
	}
	w.publish("a")
	if n := w.one(`SELECT count(*) FROM outbox.log WHERE gen = 0`); n != 1 {
		t.Fatalf("%d segments in the reopened generation", n)
	}
	w.sound()
}

// TestTruncationDoesNotStandInTheWay: whoever reads the log for long keeps its generation, and nobody waits for that.
func TestTruncationDoesNotStandInTheWay(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	retention := store.MaintenanceConfig{GenerationBytes: 1, LogRetention: time.Second}
	w.publish("a")
	w.maintain(retention)
	w.checkpoint(nil)
	w.closedLongAgo()
	tx, err := w.Connect(t).Begin(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if _, err := tx.Exec(t.Context(), `SELECT FROM outbox.log`); err != nil {
		t.Fatal(err)
	}
	if r := w.maintain(retention); r.Truncated != 0 {
		t.Fatal("truncated under a reader")
	}
	if err := tx.Rollback(t.Context()); err != nil {
		t.Fatal(err)
	}
	if r := w.maintain(retention); r.Truncated != 0 {
		t.Fatal("tried again at once")
	}
	// Another process may try at once.
	w.Store = w.Open(t)
	if r := w.maintain(retention); r.Truncated != 1 {
		t.Fatal("not truncated after the reader is gone")
	}
}

// TestRingUnderLoad rotates and truncates all the time while writers write.
func TestRingUnderLoad(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	ctx, stop := context.WithCancel(t.Context())
	done := make(chan int)
	for i := range 4 {
		go func() {
			n := 0
			for ; ctx.Err() == nil; n++ {
				r := &store.Request{Kind: store.KindPublish, Key: storetest.Key(w.src.ID), Events: events(fmt.Sprint(i))}
				if _, err := w.w.Do(context.WithoutCancel(ctx), r); err != nil {
					t.Error(err)
					break
				}
			}
			done <- n
		}()
	}
	truncated := 0
	storetest.Eventually(t, time.Minute, func() bool {
		r := w.maintain(small)
		truncated += r.Truncated
		w.closedLongAgo()
		w.checkpoint(nil)
		return truncated >= 10
	})
	stop()
	published := 0
	for range 4 {
		published += <-done
	}
	if n := w.one(`SELECT count(*) FROM outbox.tx`); n != int64(published) {
		t.Errorf("%d transactions, want %d", n, published)
	}
	w.sound()
}

func TestOneProcessMaintains(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	conn := w.Connect(t)
	if _, err := conn.Exec(t.Context(), `SELECT pg_advisory_lock(8031453476610927988)`); err != nil {
		t.Fatal(err)
	}
	if n := w.one(`SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND (classid::bigint << 32 | objid::bigint) = $1`, int64(store.MaintenanceLock)); n != 1 {
		t.Fatal("the test holds another lock than maintenance takes")
	}
	w.publish("a")
	if r, err := w.Store.MaintainOnce(t.Context(), small); err != nil || r.Leader || r.Rotated {
		t.Fatalf("beside another leader: %+v, %v", r, err)
	}
	if _, err := conn.Exec(t.Context(), `SELECT pg_advisory_unlock_all()`); err != nil {
		t.Fatal(err)
	}
	w.maintain(small)
	// The lock is given back, and so are the settings of the connection.
	other := w.Open(t)
	if r, err := other.MaintainOnce(t.Context(), small); err != nil || !r.Leader {
		t.Fatalf("after a pass of another process: %+v, %v", r, err)
	}
	cancelled, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := other.MaintainOnce(cancelled, small); !errors.Is(err, store.ErrUnavailable) {
		t.Fatalf("cancelled: %v", err)
	}
}

func TestPurge(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	old := func(k store.Key) store.Key {
		t.Helper()
		w.Exec(t, `UPDATE outbox.tx SET prepared_at = prepared_at - '1 h'::interval, decided_at = decided_at - '1 h'::interval WHERE tx_id = $1`, [16]byte(k.Transaction))
		return k
	}
	w.Exec(t, `UPDATE outbox.control SET tx_known_since = now() - '2 h'::interval`)
	committed := old(w.publish("a"))
	aborted := w.prepare("b")
	w.decide(aborted, store.KindAbort)
	old(aborted)
	undecided := old(w.prepare("c"))
	w.park(undecided, store.CauseInDoubt, store.Prepared)
	decidedLate := old(w.prepare("d"))
	w.decide(decidedLate, store.KindCommit)
	young := w.publish("e")
	parked := old(w.publish("f"))
	w.park(parked, store.CauseRecord, store.Committed)
	dead := old(w.publish("g"))
	w.bury(dead, true)
	pending := old(w.publish("h"))
	resolved, resolvedLongAgo := w.prepare("i"), w.prepare("i")
	for _, k := range []store.Key{resolved, resolvedLongAgo} {
		w.resolve(k, store.KindCommit)
		old(k)
	}
	w.Exec(t, `UPDATE outbox.resolution SET resolved_at = now() - '8 days'::interval WHERE tx_id = $1`, [16]byte(resolvedLongAgo.Transaction))
	w.checkpoint(map[store.Key]store.State{pending: store.Committed})
	unread := old(w.publish("j"))

	r := w.maintain(store.MaintenanceConfig{})
	gone := map[store.Key]string{committed: "committed", aborted: "aborted", resolvedLongAgo: "resolved long ago"}
	kept := map[store.Key]string{
		undecided: "undecided", decidedLate: "decided late", young: "young", parked: "parked", dead: "a dead letter", pending: "pending",
		resolved: "resolved", unread: "unread",
	}
	if r.Purged != int64(len(gone)) {
		t.Errorf("purged %d, want %d", r.Purged, len(gone))
	}
	for k, what := range gone {
		if _, err := w.Store.Transaction(t.Context(), k); !errors.Is(err, store.ErrUnknown) {
			t.Errorf("%s: %v, want ErrUnknown", what, err)
		}
	}
	for k, what := range kept {
		if _, err := w.Store.Transaction(t.Context(), k); err != nil {
			t.Errorf("%s: %v", what, err)
		}
	}
	if n := w.one(`SELECT count(*) FROM outbox.resolution`); n != 1 {
		t.Errorf("%d resolutions, want 1", n)
	}
	w.sound()

	horizon, err := w.Store.RetentionHorizon(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if age := time.Since(horizon); age < 14*time.Minute || age > 16*time.Minute {
		t.Errorf("the horizon is %s ago, want 15 min", age)
	}
	// A longer retention does not make anything known again.
	w.maintain(store.MaintenanceConfig{TxRetention: time.Hour})
	again, err := w.Store.RetentionHorizon(t.Context())
	if err != nil || !again.Equal(horizon) {
		t.Errorf("the horizon moved back from %s to %s, %v", horizon, again, err)
	}
	// The checkpoint in the middle of a batch does not let go of it.
	w.checkpoint(nil)
	w.Exec(t, `UPDATE outbox.shard SET seq = seq - 1 WHERE shard = $1`, w.eventsOf(unread)[0].shard)
	w.maintain(store.MaintenanceConfig{})
	if _, err := w.Store.Transaction(t.Context(), unread); err != nil {
		t.Errorf("half read: %v", err)
	}
	if _, err := w.Store.Transaction(t.Context(), pending); !errors.Is(err, store.ErrUnknown) {
		t.Errorf("no longer pending: %v, want ErrUnknown", err)
	}
	w.sound()
}

// TestPurgeOfALargeTable: the hand goes round, a share at a time, in chunks.
func TestPurgeOfALargeTable(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.Exec(t, `UPDATE outbox.control SET tx_known_since = now() - '2 h'::interval`)
	const rows = 150_000
	w.fill(rows, time.Hour)
	cfg := store.MaintenanceConfig{Interval: time.Millisecond}
	first := w.maintain(cfg)
	if first.Purged == 0 || first.Purged >= rows {
		t.Fatalf("the first pass purged %d of %d", first.Purged, rows)
	}
	purged, passes := first.Purged, 1
	for purged < rows && passes < 10 {
		purged += w.maintain(cfg).Purged
		passes++
	}
	if left := w.one(`SELECT count(*) FROM outbox.tx`); left != 0 || purged != rows {
		t.Fatalf("after %d passes %d are purged and %d are left", passes, purged, left)
	}
	// And round again.
	w.fill(10, time.Hour)
	for range passes + 1 {
		w.maintain(cfg)
	}
	if left := w.one(`SELECT count(*) FROM outbox.tx`); left != 0 {
		t.Fatalf("%d are left after the next round", left)
	}
}

// fill adds decided transactions to tx that are that old, as if they had come and gone.
func (w *world) fill(rows int, age time.Duration) {
	w.t.Helper()
	w.Exec(w.t, `
		INSERT INTO outbox.tx (source_id, tx_id, state, shards, digest, log_xid, prepared_at, decided_at)
		SELECT $1, gen_random_uuid(), 1, 1, i, '0', now() - $3::interval, now() - $3::interval FROM generate_series(1, $2::int) i`, w.src.ID, rows, age)
}

func TestCleaningUp(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.Exec(t, `INSERT INTO outbox.operation (shard, source_id, aggregate_type, aggregate_id, action, actor, reason, requested_at, done_at)
		SELECT 0, 1, 'a', 'b', 1, '', '', now() - '3 d'::interval, d FROM unnest(ARRAY[now() - '25 h'::interval, now() - '23 h'::interval, NULL]) d`)
	w.Exec(t, `INSERT INTO outbox.relay (instance, live_until) VALUES ('gone', now() - '25 h'::interval), ('late', now() - '1 h'::interval)`)
	w.maintain(store.MaintenanceConfig{})
	if n := w.one(`SELECT count(*) FROM outbox.operation`); n != 2 {
		t.Errorf("%d operations, want 2", n)
	}
	if n := w.one(`SELECT count(*) FROM outbox.relay`); n != 1 {
		t.Errorf("%d relay instances, want 1", n)
	}
}

// TestMaintenanceOfADamagedStore: what cannot be understood is an error, not a guess.
func TestMaintenanceOfADamagedStore(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.Exec(t, `UPDATE outbox.control SET gen = 9`)
	if _, err := w.Store.MaintainOnce(t.Context(), small); err == nil {
		t.Error("a generation that does not exist is maintained")
	}
}
