package resolver

import (
	"context"
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"

	outboxv1 "github.com/outbox-platform/outbox/gen/go/outbox/v1"
	"github.com/outbox-platform/outbox/store"
	"github.com/outbox-platform/outbox/store/storetest"
)

func TestVerdicts(t *testing.T) {
	w := newWorld(t)
	s := w.source("orders", w.sourceDatabase(), "")
	done := s.begin().commit()
	f := done.judge(s.conn)
	says(t, f, committed, "")
	var evidence map[string]any
	if err := json.Unmarshal([]byte(f.evidence), &evidence); err != nil || evidence["marked"] != true || evidence["timeline"] != 1.0 || evidence["snapshot"] == "" || f.naiveWrong {
		t.Errorf("evidence %s", f.evidence)
	}
	running := s.begin()
	says(t, running.judge(s.conn), inProgress, "")
	running.die()
	storetest.Eventually(t, 10e9, func() bool { return running.judge(s.conn).outcome == aborted })

	// Two-phase commit: it runs until it is decided.
	twoPhase := s.begin()
	twoPhase.exec("PREPARE TRANSACTION 'g'")
	twoPhase.die()
	says(t, twoPhase.judge(s.conn), inProgress, "")
	s.exec("COMMIT PREPARED 'g'")
	says(t, twoPhase.judge(s.conn), committed, "")

	// A savepoint's marker goes with the savepoint, although pg_xact_status says committed.
	savepoint := &attempt{s: s, key: storetest.Key(s.row.ID)}
	conn, err := pgx.Connect(t.Context(), s.dsn)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close(context.WithoutCancel(t.Context())) //nolint:errcheck // the test ends
	savepoint.conn = conn
	savepoint.exec("BEGIN")
	savepoint.exec("CREATE TABLE kept ()")
	savepoint.exec("SAVEPOINT s")
	savepoint.at = s.mark(conn, savepoint.key)
	savepoint.exec("ROLLBACK TO s")
	savepoint.exec("COMMIT")
	if f := savepoint.judge(s.conn); f.outcome != aborted || !f.naiveWrong {
		t.Errorf("%+v, want ABORTED, and the naive check wrong", f)
	}
}

// Not seeing the marker proves nothing in another server, database or table, or behind a policy that hides rows.
func TestVerdictInTheWrongPlace(t *testing.T) {
	w := newWorld(t)
	s := w.source("orders", w.sourceDatabase(), "")
	a := s.begin()
	a.exec("ROLLBACK")
	says(t, a.judge(s.conn), aborted, "")
	says(t, a.judge(s.conn, func(d *store.DatabaseTransaction) { d.SystemIdentifier++ }), unknown, "another database server")
	says(t, a.judge(s.conn, func(d *store.DatabaseTransaction) { d.DatabaseOID++ }), unknown, "another database of the server")
	says(t, a.judge(s.conn, func(d *store.DatabaseTransaction) { d.MarkerOID++ }), unknown, "another marker table")
	says(t, a.judge(s.conn, func(d *store.DatabaseTransaction) { d.Timeline++ }), unknown, "timeline")
	says(t, a.judge(s.conn, func(d *store.DatabaseTransaction) { d.Mode = store.ModeClientOnly }), unknown, "operator")
	// A marker is proof wherever it is found.
	b := s.begin().commit()
	says(t, b.judge(s.conn, func(d *store.DatabaseTransaction) { d.SystemIdentifier, d.Timeline, d.MarkerOID = 1, 9, 9 }), committed, "")

	empty, err := pgxpool.New(t.Context(), w.sourceDatabase().DSN)
	if err != nil {
		t.Fatal(err)
	}
	defer empty.Close()
	says(t, a.judge(empty), unknown, "outbox_marker")

	s.exec("CREATE ROLE reader LOGIN; GRANT USAGE ON SCHEMA public TO reader; GRANT SELECT ON outbox_marker TO reader")
	cfg, err := pgxpool.ParseConfig(s.dsn)
	if err != nil {
		t.Fatal(err)
	}
	cfg.ConnConfig.RuntimeParams["role"] = "reader"
	reader, err := pgxpool.NewWithConfig(t.Context(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	defer reader.Close()
	says(t, b.judge(reader), committed, "") // a role without privileges can resolve
	says(t, a.judge(reader), aborted, "")
	s.exec("ALTER TABLE outbox_marker ENABLE ROW LEVEL SECURITY")
	says(t, b.judge(reader), unknown, "row security")
	s.exec("ALTER TABLE outbox_marker DISABLE ROW LEVEL SECURITY; DROP OWNED BY reader; DROP ROLE reader")
}

func TestFencedVerdicts(t *testing.T) {
	w := newWorld(t)
	s := w.source("orders", w.sourceDatabase(), "")
	fenced := func(d *store.DatabaseTransaction) { d.Mode = store.ModeXIDFenced }
	a := s.begin()
	says(t, a.judge(s.conn, fenced), inProgress, "")
	a.commit()
	says(t, a.judge(s.conn, fenced), committed, "")
	b := s.begin()
	b.exec("ROLLBACK")
	says(t, b.judge(s.conn, fenced), aborted, "")
	says(t, a.judge(s.conn, fenced, func(d *store.DatabaseTransaction) { d.Timeline++ }), unknown, "another server or timeline")
	says(t, a.judge(s.conn, fenced, func(d *store.DatabaseTransaction) { d.SystemIdentifier++ }), unknown, "another server or timeline")
	says(t, a.judge(s.conn, fenced, func(d *store.DatabaseTransaction) { d.XID = 1 << 62 }), inProgress, "")
	if f, _ := ruleFenced(&a.at, &sighting{system: a.at.SystemIdentifier, timeline: a.at.Timeline, ended: true}); f.outcome != unknown {
		t.Errorf("a forgotten status: %+v", f)
	}
	// It needs no table.
	s.exec("DROP TABLE outbox_marker")
	says(t, a.judge(s.conn, fenced), committed, "")
}

// The database crashes with the transaction open. Its xid is handed to a stranger, who commits: pg_xact_status alone would
// publish events of a transaction that never was.
func TestXIDIsLostAndGivenOutAgain(t *testing.T) {
	cluster := storetest.NewCluster(t)
	w := newWorld(t)
	s := w.source("orders", cluster.New(t, storetest.WithoutSchema()), "")
	s.exec("CREATE TABLE stranger (n int)")
	for range 5 {
		s.exec("CHECKPOINT")
		a := s.begin()
		cluster.Kill()
		a.die()
		cluster.Restart(t)
		s.conn.Reset()
		var next uint64
		if err := s.conn.QueryRow(t.Context(), "SELECT pg_snapshot_xmax(pg_current_snapshot())::text::bigint").Scan(&next); err != nil {
			t.Fatal(err)
		}
		if next > a.at.XID {
			says(t, a.judge(s.conn), aborted, "")
			continue // its xid was written to disk in time
		}
		says(t, a.judge(s.conn), aborted, "lost in a crash")
		stranger := takeXID(t, s, a.at.XID)
		// While the stranger runs it delays the verdict; it cannot change it.
		says(t, a.judge(s.conn), inProgress, "")
		if _, err := stranger.Exec(t.Context(), "COMMIT"); err != nil {
			t.Fatal(err)
		}
		var naive string
		if err := s.conn.QueryRow(t.Context(), "SELECT pg_xact_status($1::text::xid8)", strconv.FormatUint(a.at.XID, 10)).Scan(&naive); err != nil || naive != "committed" {
			t.Fatalf("the naive check says %q (%v): this test proves nothing", naive, err)
		}
		if f := a.judge(s.conn); f.outcome != aborted || !f.naiveWrong {
			t.Errorf("%+v, want ABORTED, and the naive check wrong", f)
		}
		return
	}
	t.Fatal("the xid was never lost: this test proves nothing")
}

// takeXID opens a transaction that gets an xid.
func takeXID(t *testing.T, s *source, xid uint64) *pgx.Conn {
	t.Helper()
	conn, err := pgx.Connect(t.Context(), s.dsn)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close(context.WithoutCancel(t.Context())) })
	for got := uint64(0); got < xid; {
		if got != 0 {
			if _, err := conn.Exec(t.Context(), "COMMIT"); err != nil {
				t.Fatal(err)
			}
		}
		if _, err := conn.Exec(t.Context(), "BEGIN; INSERT INTO stranger VALUES (1)"); err != nil {
			t.Fatal(err)
		}
		if err := conn.QueryRow(t.Context(), "SELECT pg_current_xact_id()::text::bigint").Scan(&got); err != nil {
			t.Fatal(err)
		}
		if got > xid {
			t.Fatalf("the stranger's xid is %d, not %d", got, xid)
		}
	}
	return conn
}

// beStandby restarts a server as a standby of nobody, with the same data.
func beStandby(t *testing.T, cluster *storetest.Cluster) {
	t.Helper()
	dir := cluster.Server().DataDir()
	signal := filepath.Join(dir, "standby.signal")
	if err := os.WriteFile(signal, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	info, err := os.Stat(dir)
	if err != nil {
		t.Fatal(err)
	}
	// PostgreSQL removes it at promotion, so it must own it.
	owner, ok := info.Sys().(*syscall.Stat_t)
	if !ok {
		t.Fatal("no owner in the file's information")
	}
	if err := os.Chown(signal, int(owner.Uid), int(owner.Gid)); err != nil {
		t.Fatal(err)
	}
	cluster.Restart(t)
}

// A transaction that was prepared for two phases survives the failover of its database and may commit on the new primary:
// confirming that the old primary is fenced must not abort it.
func TestTwoPhaseTransactionSurvivesFailover(t *testing.T) {
	cluster := storetest.NewCluster(t)
	w := newWorld(t)
	s := w.direct("orders", cluster.New(t, storetest.WithoutSchema()))
	kept, dropped := s.begin().prepare(), s.begin().prepare()
	kept.exec("PREPARE TRANSACTION 'kept'")
	dropped.exec("PREPARE TRANSACTION 'dropped'")
	kept.die()
	dropped.die()
	w.park()
	beStandby(t, cluster)
	s.conn.Reset()
	if _, err := s.conn.Exec(t.Context(), "SELECT pg_promote()"); err != nil {
		t.Fatal(err)
	}
	r, _ := w.resolver(&switchable{}, func(c *Config) { c.UnknownBackoff, c.RunningBackoff = 100e6, 100e6 })
	says(t, kept.judge(s.conn), inProgress, "")
	confirm := func() (aborted, undecided int64) {
		resp, err := r.ConfirmFailover(t.Context(), s.row, "default", 1, "ops", "the old machine is switched off", false)
		if err != nil {
			t.Fatal(err)
		}
		return resp.GetAborted(), resp.GetUndecided()
	}
	if a, u := confirm(); a != 0 || u != 2 {
		t.Fatalf("%d aborted and %d undecided while they are open", a, u)
	}
	for _, sql := range []string{"COMMIT PREPARED 'kept'", "ROLLBACK PREPARED 'dropped'"} {
		if _, err := s.conn.Exec(t.Context(), sql); err != nil {
			t.Fatal(err)
		}
	}
	kept.becomes(store.Committed, 20e9)
	if a, _ := confirm(); a != 1 || dropped.state().State != store.Aborted {
		t.Errorf("%d aborted, %s", a, dropped.state().State)
	}
}

// A standby is not asked; after its promotion a missing marker proves nothing until an operator says that the old primary
// is fenced. Then the whole timeline is decided at once.
func TestStandbyFailoverAndConfirmation(t *testing.T) {
	cluster := storetest.NewCluster(t)
	w := newWorld(t)
	s := w.direct("orders", cluster.New(t, storetest.WithoutSchema()))
	done, gone := s.begin().prepare().commit(), s.begin().prepare()
	gone.exec("ROLLBACK")
	done.die()
	gone.die()
	w.park()
	beStandby(t, cluster)
	s.conn.Reset()
	says(t, done.judge(s.conn), unknown, "standby")
	says(t, gone.judge(s.conn), unknown, "standby")
	sessions := &switchable{}
	r, reg := w.resolver(sessions, func(c *Config) { c.UnknownBackoff = 100e6 })
	confirm := func(timeline uint32, only bool) (c, a, u int64, err error) {
		resp, err := r.ConfirmFailover(t.Context(), s.row, "default", timeline, "ops", "the old machine is switched off", only)
		return resp.GetCommitted(), resp.GetAborted(), resp.GetUndecided(), err
	}
	if c, a, u, err := confirm(1, false); c != 0 || a != 0 || u != 2 || err != nil {
		t.Fatalf("while it is a standby: %d, %d, %d, %v", c, a, u, err)
	}
	if _, err := s.conn.Exec(t.Context(), "SELECT pg_promote()"); err != nil {
		t.Fatal(err)
	}
	tx := done.becomes(store.Committed, 20e9)
	if tx.DecidedBy != methodDirect {
		t.Errorf("decided by %s", tx.DecidedBy)
	}
	says(t, gone.judge(s.conn), unknown, "timeline 2, not 1")
	if _, a, _, err := confirm(7, false); a != 0 || err != nil {
		t.Errorf("another timeline: %d, %v", a, err)
	}
	if _, a, _, err := confirm(1, true); a != 1 || err != nil || gone.state().State != store.Prepared {
		t.Errorf("counting: %d, %v, %s", a, err, gone.state().State)
	}
	if _, a, _, err := confirm(1, false); a != 1 || err != nil {
		t.Fatalf("%d, %v", a, err)
	}
	if tx := gone.state(); tx.State != store.Aborted || tx.DecidedBy != methodOperator || !strings.Contains(string(tx.Evidence), "switched off") || !strings.Contains(string(tx.Evidence), "snapshot") {
		t.Errorf("%s by %s: %s", tx.State, tx.DecidedBy, tx.Evidence)
	}
	if n := metric(t, reg, "outbox_resolved_transactions_total", "method", "operator", "state", "aborted"); n != 1 {
		t.Errorf("%v counted", n)
	}
	// Without a way in and without a session there is nothing to confirm.
	other := w.source("indirect", cluster.New(t, storetest.WithoutSchema()), "")
	there, missing := other.begin().prepare(), other.begin().prepare()
	for _, a := range []*attempt{there, missing} {
		a.exec("ROLLBACK")
		at := a.at
		at.Timeline = 1 // prepared before the failover
		a.at = at
	}
	other.exec("INSERT INTO outbox_marker (id) VALUES ($1)", [16]byte(there.key.Transaction))
	ask := r.askSessions("indirect", "default")
	concerned := []store.Parked{there.parked(), missing.parked()}
	var unfit *PreconditionError
	resp := &outboxv1.ConfirmFailoverResponse{}
	if err := r.failOver(t.Context(), ask, concerned, 1, "ops", "r", false, resp); !errors.As(err, &unfit) || !strings.Contains(err.Error(), "dsn_ref") {
		t.Errorf("%v", err)
	}
	// With a session it is asked instead.
	sessions.on.Store(&instance{source: other})
	if err := r.failOver(t.Context(), ask, concerned, 1, "ops", "the old machine is scrapped", false, resp); err != nil || resp.GetCommitted() != 1 || resp.GetAborted() != 1 {
		t.Errorf("%v, %v", resp, err)
	}
	if tx := there.state(); tx.State != store.Committed || tx.DecidedBy != methodCheckBack {
		t.Errorf("%s by %s", tx.State, tx.DecidedBy)
	}
	if tx := missing.state(); tx.State != store.Aborted || tx.DecidedBy != methodOperator || !strings.Contains(string(tx.Evidence), "scrapped") || !strings.Contains(string(tx.Evidence), "snapshot") {
		t.Errorf("%s by %s: %s", tx.State, tx.DecidedBy, tx.Evidence)
	}
}

// Asked in a transaction whose snapshot is older than the commit, the rules do not take "no marker" for ABORTED.
func TestOldSnapshot(t *testing.T) {
	w := newWorld(t)
	s := w.source("orders", w.sourceDatabase(), "")
	a := s.begin()
	tx, err := s.conn.BeginTx(t.Context(), pgx.TxOptions{IsoLevel: pgx.RepeatableRead})
	if err != nil {
		t.Fatal(err)
	}
	defer tx.Rollback(context.WithoutCancel(t.Context())) //nolint:errcheck // it changed nothing
	if _, err := tx.Exec(t.Context(), "SELECT count(*) FROM outbox_marker"); err != nil {
		t.Fatal(err)
	}
	a.commit()
	says(t, a.judge(tx), inProgress, "just now")
	says(t, a.judge(s.conn), committed, "")
}
