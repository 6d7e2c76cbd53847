package resolver

import (
	"context"
	"encoding/json"
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/prometheus/client_golang/prometheus"

	"github.com/outbox-platform/outbox/store"
	"github.com/outbox-platform/outbox/store/storetest"
)

// soon is how long a decision may take on a loaded machine; the goal of a second is measured, not asserted.
const soon = 20 * time.Second

// What is parked is decided as the source's database says, with evidence, directly.
func TestParkedAreDecidedDirectly(t *testing.T) {
	w := newWorld(t)
	s := w.direct("orders", w.sourceDatabase())
	done, gone, running := s.begin().prepare().commit(), s.begin().prepare(), s.begin().prepare()
	gone.die()
	w.park()
	r, reg := w.resolver(nobody{})
	tx := done.becomes(store.Committed, soon)
	var evidence map[string]any
	if err := json.Unmarshal(tx.Evidence, &evidence); err != nil || evidence["marked"] != true || tx.DecidedBy != methodDirect {
		t.Errorf("decided by %s: %s", tx.DecidedBy, tx.Evidence)
	}
	gone.becomes(store.Aborted, soon)
	if st := running.state().State; st != store.Prepared {
		t.Fatalf("the running one is %s", st)
	}
	running.commit()
	running.becomes(store.Committed, soon)
	if n := metric(t, reg, "outbox_resolved_transactions_total", "method", "direct", "state", "committed"); n != 2 {
		t.Errorf("%v counted as committed", n)
	}
	if bad, err := w.db.Store.Verify(t.Context()); err != nil || len(bad) != 0 {
		t.Errorf("verify: %v, %v", bad, err)
	}
	if err := r.countInDoubt(t.Context()); err != nil {
		t.Error(err)
	}
}

// Of a page that was full some may be decided already: it is not taken for the last one, and an empty one is.
func TestAPageThatIsNotQuiteFullIsNotTheLast(t *testing.T) {
	w := newWorld(t)
	s := w.direct("orders", w.sourceDatabase())
	decided := s.begin().prepare()
	for range 3 {
		s.begin().prepare()
	}
	w.park()
	if _, err := w.writer.Do(t.Context(), &store.Request{Kind: store.KindCommit, Key: decided.key}); err != nil {
		t.Fatal(err)
	}
	r, err := New(Config{ClaimLimit: 4}, w.db.Store, w.writer, nobody{}, slog.New(slog.DiscardHandler), prometheus.NewRegistry())
	if err != nil {
		t.Fatal(err)
	}
	for look, want := range []bool{true, false} {
		if more, err := r.RunOnce(t.Context(), true); err != nil || more != want {
			t.Errorf("look %d: more %t, %v; want %t", look, more, err, want)
		}
	}
}

// The same through a live session of the source.
func TestParkedAreDecidedByCheckBack(t *testing.T) {
	w := newWorld(t)
	s := w.source("orders", w.sourceDatabase(), "")
	done, gone := s.begin().prepare().commit(), s.begin().prepare()
	gone.die()
	w.park()
	w.resolver(instance{source: s})
	if tx := done.becomes(store.Committed, soon); tx.DecidedBy != methodCheckBack || !strings.Contains(string(tx.Evidence), "snapshot") {
		t.Errorf("decided by %s: %s", tx.DecidedBy, tx.Evidence)
	}
	gone.becomes(store.Aborted, soon)
}

// A broken session's transactions are asked about at once: they are not even parked.
func TestBrokenSession(t *testing.T) {
	w := newWorld(t)
	s := w.direct("orders", w.sourceDatabase())
	r, _ := w.resolver(nobody{}, func(c *Config) { c.Interval = time.Hour })
	done, gone := s.begin().prepare().commit(), s.begin().prepare()
	done.die()
	gone.die()
	r.SessionBroke("orders", "pod-1", []store.Parked{done.parked(), gone.parked()})
	done.becomes(store.Committed, soon)
	gone.becomes(store.Aborted, soon)
}

// How long it takes from the death of a service to the decision.
func TestTimeToDecision(t *testing.T) {
	w := newWorld(t)
	s := w.direct("orders", w.sourceDatabase())
	r, _ := w.resolver(nobody{})
	var took []time.Duration
	for i := range 40 {
		a := s.begin().prepare()
		want := store.Aborted
		if i%2 == 0 {
			a.commit()
			want = store.Committed
		}
		began := time.Now()
		a.die()
		r.SessionBroke("orders", "pod", []store.Parked{a.parked()})
		a.becomes(want, soon)
		took = append(took, time.Since(began))
	}
	slices.Sort(took)
	t.Logf("from death to decision: p50 %s, max %s", took[len(took)/2], took[len(took)-1])
	if p50 := took[len(took)/2]; p50 > time.Second {
		t.Errorf("half of them took longer than %s", p50)
	}
}

// A source database that is away costs others nothing, decides nothing, and resolves by itself when it returns.
func TestDatabaseAwayAndBack(t *testing.T) {
	cluster := storetest.NewCluster(t)
	w := newWorld(t)
	away := w.direct("away", cluster.New(t, storetest.WithoutSchema()))
	here := w.direct("here", w.sourceDatabase())
	stuck := []*attempt{away.begin().prepare().commit(), away.begin().prepare()}
	stuck[1].exec("ROLLBACK")
	w.park()
	cluster.Kill()
	_, reg := w.resolver(nobody{})
	storetest.Eventually(t, soon, func() bool { return metric(t, reg, "outbox_check_failures_total", "method", "direct") > 0 })
	other := here.begin().prepare().commit()
	w.park()
	other.becomes(store.Committed, soon)
	list, _, err := w.db.Store.InDoubtTransactions(t.Context(), "away", "", 0)
	if err != nil || len(list) != 2 {
		t.Fatalf("%v, %v", list, err)
	}
	for _, a := range stuck {
		if st := a.state().State; st != store.Prepared {
			t.Fatalf("decided although nobody could be asked: %s", st)
		}
	}
	cluster.Restart(t)
	stuck[0].becomes(store.Committed, soon)
	stuck[1].becomes(store.Aborted, soon)
	if !strings.Contains(w.log.String(), "cannot be asked") || !strings.Contains(w.log.String(), "answers again") {
		t.Errorf("log: %s", w.log.String())
	}
}

// Those that wait a long time for the next question are asked about at once when a session of the source comes back.
func TestReturnOfASession(t *testing.T) {
	w := newWorld(t)
	s := w.source("orders", w.sourceDatabase(), "")
	a := s.begin().prepare().commit()
	w.park()
	back := &switchable{}
	r, _ := w.resolver(back, func(c *Config) { c.UnknownBackoff = time.Hour })
	// Only what was asked about can be put off.
	storetest.Eventually(t, soon, func() bool { return storetest.Query[int](t, w.db, `SELECT checks FROM outbox.parked`)[0] > 0 })
	if err := w.db.Store.RecordAnswer(t.Context(), []store.Key{a.key}, "nobody", time.Hour); err != nil {
		t.Fatal(err)
	}
	back.on.Store(&instance{source: s})
	r.SessionOpened("orders", []string{"default"})
	r.SessionOpened("unknown", []string{"default"})
	a.becomes(store.Committed, soon)
}

// A decision that came first stays: losing to it is normal, and only a marker of an ABORTED transaction is an alarm.
func TestRaces(t *testing.T) {
	w := newWorld(t)
	s := w.direct("orders", w.sourceDatabase())
	r, reg := w.resolver(nobody{}, func(c *Config) { c.Interval = time.Hour })
	decide := func(a *attempt, kind store.Kind) {
		t.Helper()
		if _, err := w.writer.Do(t.Context(), &store.Request{Kind: kind, Key: a.key}); err != nil {
			t.Fatal(err)
		}
	}
	cleaned := s.begin().prepare().commit() // its Commit was acknowledged, and its marker deleted
	decide(cleaned, store.KindCommit)
	s.exec("DELETE FROM outbox_marker")
	contradicted := s.begin().prepare().commit() // somebody aborted it, although its marker is there
	decide(contradicted, store.KindAbort)
	never := s.begin().commit() // never prepared
	told := s.begin().prepare().commit()
	decide(told, store.KindCommit)
	r.SessionBroke("orders", "pod", []store.Parked{cleaned.parked(), contradicted.parked(), never.parked(), told.parked()})
	storetest.Eventually(t, soon, func() bool { return metric(t, reg, "outbox_resolver_contradictions_total") == 1 })
	storetest.Eventually(t, soon, func() bool { return r.queued() == 0 })
	if cleaned.state().State != store.Committed || contradicted.state().State != store.Aborted {
		t.Errorf("%s, %s", cleaned.state().State, contradicted.state().State)
	}
	if strings.Count(w.log.String(), "disagree about history") != 1 {
		t.Errorf("log: %s", w.log.String())
	}
}

// queued is how many transactions the lanes have.
func (r *Resolver) queued() (n int) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, l := range r.lanes {
		n += l.size()
	}
	return n
}

// Many in doubt of one source are decided in a few rounds, while another source is served.
func TestManyInDoubt(t *testing.T) {
	w := newWorld(t)
	s := w.direct("orders", w.sourceDatabase())
	const n = 3000
	conn, err := pgx.Connect(t.Context(), s.dsn)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close(context.WithoutCancel(t.Context())) //nolint:errcheck // the test ends
	if _, err := conn.Exec(t.Context(), "BEGIN"); err != nil {
		t.Fatal(err)
	}
	var all []*attempt
	answers := make(chan error, n)
	first := s.mark(conn, storetest.Key(s.row.ID))
	for i := range n {
		a := &attempt{s: s, key: storetest.Key(s.row.ID), at: first}
		if i%2 == 0 {
			if _, err := conn.Exec(t.Context(), "INSERT INTO outbox_marker (id) VALUES ($1)", a.key.Transaction.String()); err != nil {
				t.Fatal(err)
			}
		}
		at := a.at
		err := w.writer.Submit(&store.Request{Kind: store.KindPrepare, Key: a.key, Database: &at,
			Events: []store.Event{storetest.Event("t", "order", a.key.Transaction.String(), "{}")},
			Done:   func(_ *store.Request, ans store.Answer) { answers <- ans.Err }})
		if err != nil {
			t.Fatal(err)
		}
		all = append(all, a)
	}
	for range n {
		if err := <-answers; err != nil {
			t.Fatal(err)
		}
	}
	if _, err := conn.Exec(t.Context(), "COMMIT"); err != nil {
		t.Fatal(err)
	}
	w.park()
	began := time.Now()
	_, reg := w.resolver(nobody{})
	decided := func() float64 {
		return metric(t, reg, "outbox_resolved_transactions_total", "method", "direct", "state", "committed") +
			metric(t, reg, "outbox_resolved_transactions_total", "method", "direct", "state", "aborted")
	}
	storetest.Eventually(t, time.Minute, func() bool { return decided() == n })
	t.Logf("%d in-doubt transactions in %s", n, time.Since(began))
	for i, a := range []*attempt{all[0], all[1], all[n-2], all[n-1]} {
		want := store.Committed
		if i%2 == 1 {
			want = store.Aborted
		}
		if got := a.state().State; got != want {
			t.Errorf("%d is %s", i, got)
		}
	}
}

// An operator can ask about one transaction now.
func TestCheck(t *testing.T) {
	w := newWorld(t)
	s := w.direct("orders", w.sourceDatabase())
	r, _ := w.resolver(nobody{}, func(c *Config) { c.Interval = time.Hour })
	a := s.begin().prepare()
	resp, err := r.Check(t.Context(), a.parked())
	if err != nil || resp.GetOutcome() != inProgress || resp.GetMethod() != methodDirect {
		t.Fatalf("%v, %v", resp, err)
	}
	a.commit()
	resp, err = r.Check(t.Context(), a.parked())
	if err != nil || resp.GetOutcome() != committed || a.state().State != store.Committed {
		t.Fatalf("%v, %v, %s", resp, err, a.state().State)
	}
	// Again, when it is decided already.
	if resp, err = r.Check(t.Context(), a.parked()); err != nil || resp.GetOutcome() != committed {
		t.Fatalf("%v, %v", resp, err)
	}
	mute := w.source("mute", w.sourceDatabase(), "")
	b := mute.begin().prepare().commit()
	if resp, err = r.Check(t.Context(), b.parked()); err != nil || resp.GetOutcome() != unknown || resp.GetMethod() != "" || !strings.Contains(resp.GetReason(), "nobody") {
		t.Fatalf("%v, %v", resp, err)
	}
	if _, err := r.Check(t.Context(), store.Parked{Key: a.key}); err == nil {
		t.Error("a transaction without a database transaction can be asked about")
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := r.Check(ctx, a.parked()); !errors.Is(err, context.Canceled) {
		t.Errorf("%v", err)
	}
}

// Nobody is asked about CLIENT_ONLY, and that is recorded.
func TestClientOnly(t *testing.T) {
	w := newWorld(t)
	s := w.source("orders", w.sourceDatabase(), "")
	a := s.begin()
	a.at.Mode = store.ModeClientOnly
	a.prepare().commit()
	w.park()
	w.resolver(instance{source: s})
	storetest.Eventually(t, soon, func() bool {
		list, _, err := w.db.Store.InDoubtTransactions(t.Context(), "", "", 0)
		return err == nil && len(list) == 1 && strings.Contains(list[0].Head.LastAnswer, "operator")
	})
	if st := a.state().State; st != store.Prepared {
		t.Errorf("it is %s", st)
	}
}

// A resolver that does not run takes nothing and says so; a lane without work ends.
func TestLifecycle(t *testing.T) {
	w := newWorld(t)
	s := w.direct("orders", w.sourceDatabase())
	r, _ := w.resolver(nobody{})
	a := s.begin().prepare().commit()
	r.SessionBroke("orders", "pod", []store.Parked{a.parked()})
	a.becomes(store.Committed, soon)
	storetest.Eventually(t, soon, func() bool { return r.queued() == 0 })
	r.mu.Lock()
	l := r.lanes[laneKey{source: s.row.ID, database: "default"}]
	r.mu.Unlock()
	if l == nil {
		t.Fatal("no lane")
	}
	l.add([]store.Parked{{Key: storetest.Key(1), Database: &store.DatabaseTransaction{Mode: store.ModeClientOnly}}}, time.Now().Add(time.Hour))
	if r.retire(l) {
		t.Error("a lane with work is retired")
	}
	r.mu.Lock()
	r.ctx = nil
	r.mu.Unlock()
	if _, err := r.Check(t.Context(), a.parked()); !errors.Is(err, store.ErrUnavailable) {
		t.Errorf("%v", err)
	}
}

func TestReadDSN(t *testing.T) {
	file := filepath.Join(t.TempDir(), "dsn")
	if err := os.WriteFile(file, []byte(" postgres://x \n"), 0o600); err != nil {
		t.Fatal(err)
	}
	empty := filepath.Join(t.TempDir(), "empty")
	if err := os.WriteFile(empty, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	t.Setenv("OUTBOX_TEST_READ_DSN", "postgres://y")
	for ref, want := range map[string]string{"file:" + file: "postgres://x", "env:OUTBOX_TEST_READ_DSN": "postgres://y"} {
		if got, err := readDSN(ref); err != nil || got != want {
			t.Errorf("%s: %q, %v", ref, got, err)
		}
	}
	for _, ref := range []string{"env:OUTBOX_TEST_NOT_SET", "file:/does/not/exist", "file:" + empty, "postgres://z", ""} {
		if got, err := readDSN(ref); err == nil {
			t.Errorf("%s: %q", ref, got)
		}
	}
	t.Setenv("OUTBOX_TEST_READ_DSN", "postgres://user:secret@:::/")
	if _, err := openDatabase(t.Context(), "env:OUTBOX_TEST_READ_DSN", time.Second); err == nil || strings.Contains(err.Error(), "secret") {
		t.Errorf("%v", err)
	}
}

func TestConfig(t *testing.T) {
	if err := (Config{}).Validate(); err != nil {
		t.Error(err)
	}
	if err := (Config{Interval: -1}).Validate(); err == nil || !strings.Contains(err.Error(), "-1") {
		t.Errorf("%v", err)
	}
	if c := (Config{}).withDefaults(); c.Interval != 50*time.Millisecond || c.ClaimLimit != 64 || c.UnknownBackoff != 30*time.Second {
		t.Errorf("%+v", c)
	}
}

// What the store brings again while it is being put off stays in the lane: its claim keeps every server from asking.
func TestClaimedAgainWhilePutOff(t *testing.T) {
	l := &lane{resolver: &Resolver{cfg: Config{MaxQueued: 10}}, wake: make(chan struct{}, 1), items: make(map[store.Key]*item)}
	parked := []store.Parked{{Key: storetest.Key(1)}, {Key: storetest.Key(2)}}
	l.add(parked, time.Now())
	putOff, _ := l.due(time.Now())
	l.add(parked[:1], time.Now())
	l.leave(putOff)
	left, _ := l.due(time.Now())
	if len(left) != 1 || left[0].parked.Key != parked[0].Key {
		t.Fatalf("%d are due, want the one that was claimed again", len(left))
	}
	if l.leave(left); l.size() != 0 {
		t.Error("it was kept a second time")
	}
}
