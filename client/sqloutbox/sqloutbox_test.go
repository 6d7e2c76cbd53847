package sqloutbox_test

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/jackc/pgx/v5/pgconn"
	_ "github.com/jackc/pgx/v5/stdlib" // the driver "pgx"

	"github.com/outbox-platform/outbox/client"
	"github.com/outbox-platform/outbox/client/internal/fakeplatform"
	"github.com/outbox-platform/outbox/client/sqloutbox"
	"github.com/outbox-platform/outbox/store/storetest"
)

func TestMain(m *testing.M) { storetest.Main(m) }

// world is a service with its database and a platform.
type world struct {
	t  *testing.T
	p  *fakeplatform.Platform
	c  *client.Client
	db *sql.DB
}

func newWorld(t *testing.T) *world {
	t.Helper()
	w := &world{t: t, p: fakeplatform.Start(t)}
	var err error
	if w.db, err = sql.Open("pgx", storetest.New(t, storetest.WithoutSchema()).DSN); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = w.db.Close() })
	w.exec("CREATE TABLE orders (id text PRIMARY KEY, state text NOT NULL)")
	w.exec(client.MarkerDDL)
	w.c, err = client.New(client.Config{
		Target: w.p.Addr(), Source: "orders", Plaintext: true, PrepareTimeout: 200 * time.Millisecond,
		MaxReconnectDelay: 20 * time.Millisecond,
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { w.c.Close() })
	err = sqloutbox.Register(w.c, "", w.db, sqloutbox.Upkeep{DrainInterval: 20 * time.Millisecond, MarkerRetention: 100 * time.Millisecond})
	if err != nil {
		t.Fatal(err)
	}
	return w
}

func (w *world) exec(query string, args ...any) {
	w.t.Helper()
	if _, err := w.db.ExecContext(w.t.Context(), query, args...); err != nil {
		w.t.Fatal(err)
	}
}

func value[T any](w *world, query string, args ...any) T {
	w.t.Helper()
	var v T
	if err := w.db.QueryRowContext(w.t.Context(), query, args...).Scan(&v); err != nil {
		w.t.Fatal(err)
	}
	return v
}

func event(id, payload string) client.Event {
	return client.Event{Topic: "orders", AggregateType: "order", AggregateID: id, Type: "order.changed.v1", Payload: []byte(payload)}
}

func (w *world) place(o sqloutbox.Options, id, payload string) error {
	return sqloutbox.InTx(w.t.Context(), w.db, w.c, o, func(tx *sqloutbox.Tx) error {
		_, err := tx.ExecContext(w.t.Context(), "INSERT INTO orders (id, state) VALUES ($1, 'new')", uuid.NewString())
		return errors.Join(err, tx.Publish(event(id, payload)))
	})
}

func (w *world) published(id string, payloads ...string) {
	w.t.Helper()
	want := fmt.Sprint(payloads)
	w.p.Wait(w.t, "published "+want, func() bool { return fmt.Sprint(w.p.Published(id)) == want })
}

func TestInTx(t *testing.T) {
	w := newWorld(t)
	for i, o := range []sqloutbox.Options{
		{}, {TxOptions: &sql.TxOptions{Isolation: sql.LevelRepeatableRead}}, {TxOptions: &sql.TxOptions{Isolation: sql.LevelSerializable}},
	} {
		if err := w.place(o, "1", fmt.Sprint(i)); err != nil {
			t.Fatal(err)
		}
	}
	w.published("1", "0", "1", "2")
	oops := errors.New("oops")
	err := sqloutbox.InTx(t.Context(), w.db, w.c, sqloutbox.Options{}, func(tx *sqloutbox.Tx) error {
		return errors.Join(tx.Publish(event("1", "never")), tx.Commit(), tx.Rollback(), oops)
	})
	if !errors.Is(err, oops) || !errors.Is(err, client.ErrManaged) {
		t.Errorf("error: %v", err)
	}
	func() {
		defer func() { _ = recover() }()
		_ = sqloutbox.InTx(t.Context(), w.db, w.c, sqloutbox.Options{}, func(*sqloutbox.Tx) error { panic("business") })
	}()
	if err := sqloutbox.InTx(t.Context(), w.db, w.c, sqloutbox.Options{}, func(tx *sqloutbox.Tx) error { return tx.Publish() }); err != nil {
		t.Error(err)
	}
	err = sqloutbox.InTx(t.Context(), w.db, w.c, sqloutbox.Options{}, func(tx *sqloutbox.Tx) error { return tx.Publish(client.Event{}) })
	if !client.IsInvalid(err) {
		t.Error(err)
	}
	if n := len(w.p.Transactions()); n != 3 {
		t.Errorf("%d transactions", n)
	}
	w.p.Wait(t, "old markers to go", func() bool { return value[int](w, "SELECT count(*) FROM outbox_marker") == 0 })
	if n := w.db.Stats().InUse; n > 2 { // the upkeep may hold some
		t.Errorf("%d connections are not given back", n)
	}
}

func TestUnsafeTransactionsAreRefused(t *testing.T) {
	w := newWorld(t)
	ctx := t.Context()
	for statement, want := range map[string]error{
		"SAVEPOINT s": client.ErrSavepoint, "SET LOCAL synchronous_commit = off": client.ErrAsyncCommit,
	} {
		err := sqloutbox.InTx(ctx, w.db, w.c, sqloutbox.Options{}, func(tx *sqloutbox.Tx) error {
			_, err := tx.ExecContext(ctx, statement)
			return errors.Join(err, tx.Publish(event("1", "a")))
		})
		if !errors.Is(err, want) {
			t.Errorf("%s: %v", statement, err)
		}
	}
	cancelled, cancel := context.WithCancel(ctx)
	cancel()
	if err := sqloutbox.InTx(cancelled, w.db, w.c, sqloutbox.Options{}, func(*sqloutbox.Tx) error { return nil }); err == nil {
		t.Error("a context that has ended")
	}
}

// TestFailedCommit: PostgreSQL itself says that COMMIT failed; that is no unknown outcome.
func TestFailedCommit(t *testing.T) {
	w := newWorld(t)
	w.exec("ALTER TABLE orders ADD UNIQUE (state) DEFERRABLE INITIALLY DEFERRED")
	w.exec("INSERT INTO orders (id, state) VALUES ('0', 'new')")
	err := w.place(sqloutbox.Options{}, "1", "a")
	var pg *pgconn.PgError
	var unknown *client.OutcomeUnknownError
	if !errors.As(err, &pg) || pg.Code != "23505" || errors.As(err, &unknown) {
		t.Errorf("error: %v", err)
	}
	w.p.Wait(t, "the abort", func() bool {
		txs := w.p.Transactions()
		return len(txs) == 1 && txs[0].State == fakeplatform.Aborted
	})
}

func TestSpillAndDrain(t *testing.T) {
	w := newWorld(t)
	if err := w.place(sqloutbox.Options{}, "1", "0"); err != nil {
		t.Fatal(err)
	}
	w.p.Stop()
	for i := 1; i < 5; i++ {
		if err := w.place(sqloutbox.Options{}, "1", fmt.Sprint(i)); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.place(sqloutbox.Options{Spill: sqloutbox.SpillNever}, "1", "no"); err == nil {
		t.Error("spilled without permission")
	}
	w.p.Restart()
	w.p.Wait(t, "the spilled ones", func() bool { return len(w.p.Published("1")) >= 4 })
	w.p.Wait(t, "the markers to be cleared", func() bool { return value[int](w, "SELECT count(*) FROM outbox_marker WHERE spilled IS NOT NULL") == 0 })
	w.published("1", "0", "1", "2", "3", "4")
}

func TestExplicitPiecesAndCheckBack(t *testing.T) {
	w := newWorld(t)
	ctx := t.Context()
	tx, err := w.db.BeginTx(ctx, nil)
	if err != nil {
		t.Fatal(err)
	}
	a, err := sqloutbox.Mark(ctx, tx, w.c, sqloutbox.Options{})
	if err != nil {
		t.Fatal(err)
	}
	if err := a.Prepare(ctx, event("1", "a")); err != nil {
		t.Fatal(err)
	}
	ask := func() string {
		answers := w.p.Ask(t, "default", w.p.Transaction(a.ID()).Question())
		return answers[0].GetOutcome().String()
	}
	if got := ask(); got != "OUTCOME_IN_PROGRESS" {
		t.Error(got)
	}
	if err := tx.Commit(); err != nil {
		t.Fatal(err)
	}
	if got := ask(); got != "OUTCOME_COMMITTED" {
		t.Error(got)
	}
	d := w.p.Transaction(a.ID()).Database
	v := sqloutbox.Verdicts(ctx, w.db, []client.CheckTransaction{{ID: client.NewID(), Database: client.DatabaseTransaction{
		XID: d.GetXid(), SystemIdentifier: d.GetSystemIdentifier(), Timeline: d.GetTimeline(), DatabaseOID: d.GetDatabaseOid(),
		MarkerOID: d.GetMarkerOid(), Mode: client.ModeMarker,
	}}})
	// Ended, and no marker of that id: aborted, although pg_xact_status says committed.
	if v[0].Outcome != client.OutcomeAborted || !v[0].NaiveWrong {
		t.Errorf("%+v", v)
	}
	a.AfterCommit()
	w.published("1", "a")

	if tx, err = w.db.BeginTx(ctx, nil); err != nil {
		t.Fatal(err)
	}
	if a, err = sqloutbox.Mark(ctx, tx, w.c, sqloutbox.Options{}); err != nil {
		t.Fatal(err)
	}
	if err := a.Prepare(ctx, event("1", "b")); err != nil {
		t.Fatal(err)
	}
	if err := tx.Rollback(); err != nil {
		t.Fatal(err)
	}
	a.AfterRollback()
	w.p.Wait(t, "the abort", func() bool { return w.p.Transaction(a.ID()).State == fakeplatform.Aborted })
	if _, err := sqloutbox.Mark(ctx, tx, w.c, sqloutbox.Options{}); err == nil {
		t.Error("Mark in a transaction that is over")
	}
}
