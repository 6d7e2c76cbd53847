package pgxoutbox_test

import (
	"context"
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/outbox-platform/outbox/client"
	"github.com/outbox-platform/outbox/client/pgxoutbox"
	"github.com/outbox-platform/outbox/store/storetest"
)

// ask asks the database itself about a prepared transaction. change may alter what Prepare said.
func (w *world) ask(pool *pgxpool.Pool, id uuid.UUID, change ...func(*client.DatabaseTransaction)) client.Verdict {
	w.t.Helper()
	d := w.p.Transaction(id).Database
	t := client.CheckTransaction{ID: id, Database: client.DatabaseTransaction{
		Database: "default", XID: d.GetXid(), SystemIdentifier: d.GetSystemIdentifier(), Timeline: d.GetTimeline(),
		DatabaseOID: d.GetDatabaseOid(), MarkerOID: d.GetMarkerOid(), Mode: client.Mode(d.GetMode()),
	}}
	for _, f := range change {
		f(&t.Database)
	}
	ctx, cancel := context.WithTimeout(w.t.Context(), 10*time.Second)
	defer cancel()
	v := pgxoutbox.Verdicts(ctx, pool, []client.CheckTransaction{t})
	if len(v) != 1 || v[0].ID != id {
		w.t.Fatalf("%d verdicts", len(v))
	}
	return v[0]
}

func (w *world) says(v client.Verdict, outcome client.Outcome, reason string) {
	w.t.Helper()
	if v.Outcome != outcome || !strings.Contains(v.Reason, reason) {
		w.t.Errorf("%s (%s), want %s (%s)", v.Outcome, v.Reason, outcome, reason)
	}
}

// aborted prepares a transaction and rolls it back.
func (w *world) aborted() uuid.UUID {
	w.t.Helper()
	v := w.victim()
	v.mark()
	v.prepare()
	v.die()
	return v.a.ID()
}

func TestVerdicts(t *testing.T) {
	w := newWorld(t, options{})
	w.place("1", "a")
	committed := w.p.Transactions()[0].ID
	v := w.ask(w.pool, committed)
	w.says(v, client.OutcomeCommitted, "")
	var evidence map[string]any
	if err := json.Unmarshal([]byte(v.Evidence), &evidence); err != nil || evidence["marked"] != true || evidence["timeline"] != 1.0 ||
		evidence["snapshot"] == "" || evidence["system_identifier"] == "" || v.NaiveWrong {
		t.Errorf("evidence %s", v.Evidence)
	}

	running := w.victim()
	running.mark()
	running.prepare()
	w.says(w.ask(w.pool, running.a.ID()), client.OutcomeInProgress, "")
	running.die()
	w.says(w.ask(w.pool, running.a.ID()), client.OutcomeAborted, "")

	rolledBack := w.aborted()
	many := make([]client.CheckTransaction, 0, 1500) // more than one statement takes
	for range 750 {
		for _, id := range []uuid.UUID{committed, rolledBack} {
			d := w.p.Transaction(id).Database
			many = append(many, client.CheckTransaction{ID: id, Database: client.DatabaseTransaction{
				XID: d.GetXid(), SystemIdentifier: d.GetSystemIdentifier(), Timeline: 1, DatabaseOID: d.GetDatabaseOid(),
				MarkerOID: d.GetMarkerOid(), Mode: client.ModeMarker,
			}})
		}
	}
	for i, v := range pgxoutbox.Verdicts(t.Context(), w.pool, many) {
		want := client.OutcomeCommitted
		if i%2 == 1 {
			want = client.OutcomeAborted
		}
		if v.Outcome != want || v.ID != many[i].ID {
			t.Fatalf("%d: %+v", i, v)
		}
	}
}

// TestVerdictInTheWrongPlace: not seeing the marker proves nothing in another server, another database, another table, on
// another timeline, or behind a row security policy. Each of these would else look like "ended, not marked".
func TestVerdictInTheWrongPlace(t *testing.T) {
	w := newWorld(t, options{})
	id := w.aborted()
	w.says(w.ask(w.pool, id), client.OutcomeAborted, "")
	w.says(w.ask(w.pool, id, func(d *client.DatabaseTransaction) { d.SystemIdentifier++ }), client.OutcomeUnknown, "another database server")
	w.says(w.ask(w.pool, id, func(d *client.DatabaseTransaction) { d.Timeline++ }), client.OutcomeUnknown, "timeline")
	w.says(w.ask(w.pool, id, func(d *client.DatabaseTransaction) { d.Mode = client.ModeClientOnly }), client.OutcomeUnknown, "operator")

	// Another database of the same server, with a marker table of its own.
	other := newWorld(t, options{detached: true})
	w.says(w.ask(other.pool, id), client.OutcomeUnknown, "another database of the server")

	// Another schema first in the search_path.
	w.exec("CREATE SCHEMA decoy; CREATE TABLE decoy.outbox_marker (LIKE public.outbox_marker)")
	decoy := w.connect(w.dsn + "&search_path=decoy,public")
	w.says(w.ask(decoy, id), client.OutcomeUnknown, "another marker table")

	// No table at all.
	none := w.connect(w.dsn + "&search_path=pg_catalog")
	w.says(w.ask(none, id), client.OutcomeUnknown, "does not exist")

	// Rows hidden by a policy, also the row of a committed transaction.
	w.place("9", "hidden")
	hidden := w.p.Transactions()[len(w.p.Transactions())-1].ID
	w.exec("CREATE ROLE resolver LOGIN PASSWORD 'resolver'; GRANT USAGE ON SCHEMA public TO resolver; GRANT SELECT ON outbox_marker TO resolver")
	t.Cleanup(func() {
		ctx := context.WithoutCancel(t.Context())
		_, _ = w.pool.Exec(ctx, "DROP OWNED BY resolver; DROP ROLE resolver")
	})
	cfg, err := pgxpool.ParseConfig(w.dsn)
	if err != nil {
		t.Fatal(err)
	}
	cfg.ConnConfig.User, cfg.ConnConfig.Password = "resolver", "resolver"
	plain, err := pgxpool.NewWithConfig(t.Context(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	defer plain.Close()
	w.says(w.ask(plain, hidden), client.OutcomeCommitted, "") // an unprivileged role can resolve
	w.exec("ALTER TABLE outbox_marker ENABLE ROW LEVEL SECURITY")
	w.says(w.ask(plain, hidden), client.OutcomeUnknown, "row security")
	w.exec("ALTER TABLE outbox_marker DISABLE ROW LEVEL SECURITY")
	w.says(w.ask(plain, hidden), client.OutcomeCommitted, "")
}

// TestDatabaseIsAway: no answer of the database is no answer about the transaction.
func TestDatabaseIsAway(t *testing.T) {
	w := newWorld(t, options{})
	w.place("1", "a")
	id := w.p.Transactions()[0].ID
	pool, proxy := w.proxy()
	proxy.Stop()
	w.says(w.ask(pool, id), client.OutcomeUnknown, "asking the database")
}

// TestPreparedTransaction: a transaction in the hands of two-phase commit runs until it is decided.
func TestPreparedTransaction(t *testing.T) {
	w := newWorld(t, options{})
	ctx := t.Context()
	v := w.victim()
	v.mark()
	v.prepare()
	if _, err := v.tx.Exec(ctx, "PREPARE TRANSACTION 'g1'"); err != nil {
		t.Fatal(err)
	}
	v.die()
	w.says(w.ask(w.pool, v.a.ID()), client.OutcomeInProgress, "")
	w.exec("COMMIT PREPARED 'g1'")
	w.says(w.ask(w.pool, v.a.ID()), client.OutcomeCommitted, "")
}

// TestXIDIsLostAndGivenOutAgain: the database crashes with the transaction open. Its xid is handed to a stranger, who commits.
// pg_xact_status alone would publish events of a transaction that never was.
func TestXIDIsLostAndGivenOutAgain(t *testing.T) {
	cluster := storetest.NewCluster(t)
	w := newWorld(t, options{cluster: cluster, detached: true})
	w.exec("CREATE TABLE stranger (n int)")
	for attempt := range 5 {
		w.exec("CHECKPOINT")
		v := w.victim()
		v.mark()
		v.prepare()
		id := v.a.ID()
		xid := w.p.Transaction(id).Database.GetXid()
		cluster.Kill()
		v.c.Close()
		_ = v.conn.Close(t.Context())
		cluster.Restart(t)
		w.pool.Reset()

		if next := value[int64](w, "SELECT pg_snapshot_xmax(pg_current_snapshot())::text::bigint"); next > int64(xid) {
			t.Logf("attempt %d: the xid was written to disk in time", attempt)
			w.says(w.ask(w.pool, id), client.OutcomeAborted, "")
			continue
		}
		w.says(w.ask(w.pool, id), client.OutcomeAborted, "lost in a crash")

		// A stranger takes the xid. While it runs it delays the verdict; it cannot change it.
		stranger, err := pgx.Connect(t.Context(), w.dsn)
		if err != nil {
			t.Fatal(err)
		}
		defer stranger.Close(context.WithoutCancel(t.Context()))
		for got := int64(0); got < int64(xid); {
			if got != 0 {
				if _, err := stranger.Exec(t.Context(), "COMMIT"); err != nil {
					t.Fatal(err)
				}
			}
			if _, err := stranger.Exec(t.Context(), "BEGIN"); err != nil {
				t.Fatal(err)
			}
			if _, err := stranger.Exec(t.Context(), "INSERT INTO stranger VALUES (1)"); err != nil {
				t.Fatal(err)
			}
			if err := stranger.QueryRow(t.Context(), "SELECT pg_current_xact_id()::text::bigint").Scan(&got); err != nil {
				t.Fatal(err)
			}
			if got > int64(xid) {
				t.Fatalf("the stranger's xid is %d, not %d", got, xid)
			}
		}
		w.says(w.ask(w.pool, id), client.OutcomeInProgress, "")
		if _, err := stranger.Exec(t.Context(), "COMMIT"); err != nil {
			t.Fatal(err)
		}
		if s := value[string](w, "SELECT pg_xact_status($1::text::xid8)", uintText(xid)); s != "committed" {
			t.Fatalf("the naive check says %s: this test proves nothing", s)
		}
		verdict := w.ask(w.pool, id)
		w.says(verdict, client.OutcomeAborted, "")
		if !verdict.NaiveWrong {
			t.Error("nobody is told that the naive check would have been wrong")
		}
		return
	}
	t.Fatal("the xid was never lost: this test proves nothing")
}

func uintText(n uint64) string {
	b, _ := json.Marshal(n)
	return string(b)
}

// TestStandbyAndFailover: a standby is not asked; after its promotion a missing marker proves nothing, and a marker everything.
func TestStandbyAndFailover(t *testing.T) {
	cluster := storetest.NewCluster(t)
	w := newWorld(t, options{cluster: cluster, detached: true})
	w.place("1", "a")
	committed := w.p.Transactions()[0].ID
	aborted := w.aborted()

	// The server goes on as a standby of nobody, with the same data.
	server := cluster.Server()
	signal := filepath.Join(server.DataDir(), "standby.signal")
	if err := os.WriteFile(signal, nil, 0o644); err != nil {
		t.Fatal(err)
	}
	// PostgreSQL removes it at promotion, so it must own it.
	info, err := os.Stat(server.DataDir())
	if err != nil {
		t.Fatal(err)
	}
	chown(t, signal, info)
	cluster.Restart(t)
	w.pool.Reset()
	w.says(w.ask(w.pool, committed), client.OutcomeUnknown, "standby")
	w.says(w.ask(w.pool, aborted), client.OutcomeUnknown, "standby")

	if !value[bool](w, "SELECT pg_promote()") {
		t.Fatal("the standby was not promoted")
	}
	w.says(w.ask(w.pool, committed), client.OutcomeCommitted, "")
	w.says(w.ask(w.pool, aborted), client.OutcomeUnknown, "timeline 2, not 1")
}
