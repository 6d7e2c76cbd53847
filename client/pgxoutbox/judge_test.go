package pgxoutbox_test

import (
	"context"
	"errors"
	"strings"
	"testing"

	"github.com/google/uuid"
	"github.com/jackc/pgx/v5"

	"github.com/outbox-platform/outbox/client"
	"github.com/outbox-platform/outbox/client/internal/sourcedb"
	"github.com/outbox-platform/outbox/client/pgxoutbox"
)

// between is the real database, with a test that acts between two statements of a verdict.
type between struct {
	sourcedb.Queryer
	before []func() error // before the first, second, … statement; an error is the statement's
	asked  int
	from   string // what of the statements is to be another thing, and which
	to     string
}

func (b *between) act() error {
	b.asked++
	if b.asked > len(b.before) || b.before[b.asked-1] == nil {
		return nil
	}
	return b.before[b.asked-1]()
}

func (b *between) Query(ctx context.Context, sql string, args ...any) (sourcedb.Rows, error) {
	if err := b.act(); err != nil {
		return nil, err
	}
	return b.Queryer.Query(ctx, b.changed(sql), args...)
}

func (b *between) QueryRow(ctx context.Context, sql string, args ...any) sourcedb.Row {
	if err := b.act(); err != nil {
		return failed{err}
	}
	return b.Queryer.QueryRow(ctx, b.changed(sql), args...)
}

func (b *between) changed(sql string) string {
	if b.from == "" {
		return sql
	}
	return strings.Replace(sql, b.from, b.to, 1)
}

type failed struct{ err error }

func (f failed) Scan(...any) error { return f.err }

// race is a transaction whose verdict is asked for while things happen.
type race struct {
	t    *testing.T
	w    *world
	id   uuid.UUID
	d    client.DatabaseTransaction
	conn *pgx.Conn
}

func newRace(t *testing.T, w *world) *race {
	t.Helper()
	r := &race{t: t, w: w, id: client.NewID(), d: client.DatabaseTransaction{
		SystemIdentifier: uint64(value[int64](w, "SELECT system_identifier FROM pg_control_system()")), Timeline: 1,
		DatabaseOID: uint32(value[int64](w, "SELECT oid::bigint FROM pg_database WHERE datname = current_database()")),
		MarkerOID:   uint32(value[int64](w, "SELECT 'outbox_marker'::regclass::oid::bigint")), Mode: client.ModeMarker,
	}}
	var err error
	if r.conn, err = pgx.Connect(t.Context(), w.dsn); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = r.conn.Close(context.WithoutCancel(t.Context())) })
	return r
}

func (r *race) run(sql string) error {
	_, err := r.conn.Exec(r.t.Context(), sql)
	return err
}

// begin opens a transaction with a marker and an xid.
func (r *race) begin() {
	r.t.Helper()
	if err := r.run("BEGIN"); err != nil {
		r.t.Fatal(err)
	}
	const mark = `INSERT INTO outbox_marker (id) VALUES ($1) RETURNING pg_current_xact_id()::text::bigint`
	if err := r.conn.QueryRow(r.t.Context(), mark, r.id).Scan(&r.d.XID); err != nil {
		r.t.Fatal(err)
	}
}

// lost gives the transaction an xid that the database has not given out: as after a crash.
func (r *race) lost(ahead int64) {
	r.d.XID = uint64(value[int64](r.w, "SELECT pg_snapshot_xmax(pg_current_snapshot())::text::bigint") + ahead)
}

// TestVerdictRaces: what happens between the statements of a verdict may delay it and never makes it wrong.
func TestVerdictRaces(t *testing.T) {
	stranger := func(r *race) func() error {
		return func() error { return r.run("BEGIN; SELECT pg_current_xact_id()") }
	}
	over := func(r *race, sql string) func() error { return func() error { return r.run(sql) } }
	marker := func(r *race) func() error {
		return func() error {
			_, err := r.conn.Exec(r.t.Context(), "INSERT INTO outbox_marker (id) VALUES ($1)", r.id)
			return err
		}
	}
	cut := func() error { return errors.New("the connection is cut") }
	// Statements: look, status, look again, status again.
	for _, tc := range []struct {
		name   string
		set    func(r *race) []func() error
		want   client.Outcome
		reason string
		asked  int
	}{
		{"runs", func(r *race) []func() error { r.begin(); return nil }, client.OutcomeInProgress, "", 2},
		{"cut", func(r *race) []func() error { r.begin(); return []func() error{cut} }, client.OutcomeUnknown, "cut", 1},
		{"status is cut", func(r *race) []func() error { r.begin(); return []func() error{nil, cut} }, client.OutcomeUnknown, "cut", 2},
		{"rolls back", func(r *race) []func() error { r.begin(); return []func() error{nil, over(r, "ROLLBACK")} }, client.OutcomeAborted, "", 3},
		{"commits", func(r *race) []func() error { r.begin(); return []func() error{nil, over(r, "COMMIT")} }, client.OutcomeCommitted, "", 3},
		{"lost", func(r *race) []func() error { r.lost(1000); return nil }, client.OutcomeAborted, "lost in a crash", 4},
		{"lost, cut", func(r *race) []func() error { r.lost(1000); return []func() error{nil, nil, cut} }, client.OutcomeUnknown, "cut", 3},
		{"lost, a stranger takes it", func(r *race) []func() error {
			r.lost(0)
			return []func() error{nil, nil, nil, stranger(r)}
		}, client.OutcomeInProgress, "", 4},
		{"lost, a stranger takes it and commits", func(r *race) []func() error {
			r.lost(0)
			return []func() error{nil, nil, over(r, "SELECT pg_current_xact_id()")}
		}, client.OutcomeAborted, "", 3},
		{"lost, a stranger commits at the last moment", func(r *race) []func() error {
			r.lost(0)
			return []func() error{nil, nil, nil, over(r, "SELECT pg_current_xact_id()")}
		}, client.OutcomeInProgress, "just now", 4},
		{"the marker appears", func(r *race) []func() error {
			r.lost(0)
			return []func() error{nil, nil, marker(r)}
		}, client.OutcomeCommitted, "", 3},
		{"failed over, status is cut", func(r *race) []func() error {
			r.begin()
			r.d.Timeline++
			return []func() error{nil, cut}
		}, client.OutcomeUnknown, "cut", 2},
		{"failed over, and runs here", func(r *race) []func() error {
			r.begin()
			r.d.Timeline++
			return nil
		}, client.OutcomeInProgress, "", 2},
		{"failed over, and ends here at the last moment", func(r *race) []func() error {
			r.begin()
			r.d.Timeline++
			return []func() error{nil, over(r, "COMMIT")}
		}, client.OutcomeInProgress, "just now", 2},
		{"the table is gone", func(r *race) []func() error {
			r.lost(1000)
			return []func() error{nil, nil, over(r, "ALTER TABLE outbox_marker RENAME TO elsewhere")}
		}, client.OutcomeUnknown, "does not exist", 3},
	} {
		t.Run(tc.name, func(t *testing.T) {
			// A server of many tests gives out xids all the time: try again when somebody else took ours.
			for attempt := 0; ; attempt++ {
				w := newWorld(t, options{detached: true})
				r := newRace(t, w)
				before := tc.set(r)
				q := &between{Queryer: pgxoutbox.NewQueryer(w.pool), before: before}
				v := sourcedb.Verdicts(t.Context(), q, []client.CheckTransaction{{ID: r.id, Database: r.d}})[0]
				if v.Outcome == tc.want && strings.Contains(v.Reason, tc.reason) && q.asked == tc.asked {
					return
				}
				if attempt == 3 {
					t.Fatalf("%s (%s) after %d statements, want %s (%s) after %d", v.Outcome, v.Reason, q.asked, tc.want, tc.reason, tc.asked)
				}
			}
		})
	}
}

// TestOddAnswers: what a database that behaves says never, or no more, decides nothing.
func TestOddAnswers(t *testing.T) {
	w := newWorld(t, options{detached: true})
	r := newRace(t, w)
	r.begin()
	for _, tc := range []struct{ from, to, why string }{
		{"pg_xact_status($1::text::xid8)", "nullif($1::text, $1::text)", "forgotten"},
		{"AS p(id, xid)", "AS p(id, xid) WHERE false", "did not answer for it"},
		{"SELECT p.id", "SELECT 'no id'", "asking the database"},
	} {
		q := &between{Queryer: pgxoutbox.NewQueryer(w.pool), from: tc.from, to: tc.to}
		w.says(sourcedb.Verdicts(t.Context(), q, []client.CheckTransaction{{ID: r.id, Database: r.d}})[0], client.OutcomeUnknown, tc.why)
	}
}

// TestFencedTransactions: without a marker the xid decides, on the server and timeline where it was made durable.
func TestFencedTransactions(t *testing.T) {
	w := newWorld(t, options{detached: true})
	ask := func(r *race) client.Verdict {
		return pgxoutbox.Verdicts(t.Context(), w.pool, []client.CheckTransaction{{ID: r.id, Database: r.d}})[0]
	}
	for end, want := range map[string]client.Outcome{"COMMIT": client.OutcomeCommitted, "ROLLBACK": client.OutcomeAborted} {
		r := newRace(t, w)
		r.d.Mode = client.ModeXIDFenced
		r.begin()
		w.says(ask(r), client.OutcomeInProgress, "")
		if err := r.run(end); err != nil {
			t.Fatal(err)
		}
		w.says(ask(r), want, "")
		r.d.Timeline++
		w.says(ask(r), client.OutcomeUnknown, "timeline")
	}
}
