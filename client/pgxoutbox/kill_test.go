package pgxoutbox_test

import (
	"context"
	"errors"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/jackc/pgx/v5"

	"github.com/outbox-platform/outbox/client"
	"github.com/outbox-platform/outbox/client/internal/fakeplatform"
	"github.com/outbox-platform/outbox/client/pgxoutbox"
)

// The service dies at each step of the protocol. What dies here is an instance: its connections to the database and to the
// platform break without a word. Another instance answers the platform's question afterwards.

// victim is the instance that dies.
type victim struct {
	w    *world
	c    *client.Client
	conn *pgx.Conn
	tx   pgx.Tx
	a    *pgxoutbox.Attempt
}

func (w *world) victim() *victim {
	w.t.Helper()
	v := &victim{w: w, c: w.client(func(cfg *client.Config) {
		cfg.PrepareTimeout = 200 * time.Millisecond
		cfg.CloseTimeout = time.Millisecond
	})}
	var err error
	if v.conn, err = pgx.Connect(w.t.Context(), w.dsn); err != nil {
		w.t.Fatal(err)
	}
	if v.tx, err = v.conn.Begin(w.t.Context()); err != nil {
		w.t.Fatal(err)
	}
	if err := upsert(w.t.Context(), v.tx, "1"); err != nil {
		w.t.Fatal(err)
	}
	return v
}

func (v *victim) mark() {
	v.w.t.Helper()
	var err error
	if v.a, err = pgxoutbox.Mark(v.w.t.Context(), v.tx, v.c, pgxoutbox.Options{}); err != nil {
		v.w.t.Fatal(err)
	}
}

func (v *victim) prepare() {
	v.w.t.Helper()
	if err := v.a.Prepare(v.w.t.Context(), event("1", "a")); err != nil {
		v.w.t.Fatal(err)
	}
}

// die breaks everything off and waits until the database has noticed.
func (v *victim) die() {
	v.w.t.Helper()
	pid := v.conn.PgConn().PID()
	_ = v.conn.PgConn().Conn().Close()
	v.c.Close()
	v.w.p.Wait(v.w.t, "the backend to be gone", func() bool {
		return value[int](v.w, "SELECT count(*) FROM pg_stat_activity WHERE pid = $1", pid) == 0
	})
}

// resolve does what the platform's resolver would do with the answer.
func (w *world) resolve(id uuid.UUID, want string) {
	w.t.Helper()
	outcome, reason := w.verdict(id)
	if outcome != want {
		w.t.Fatalf("the verdict is %s (%s), want %s", outcome, reason, want)
	}
	state := fakeplatform.Aborted
	if want == "COMMITTED" {
		state = fakeplatform.Committed
	}
	if err := w.p.Decide(id, state); err != nil {
		w.t.Fatal(err)
	}
}

func TestKilledBeforePrepare(t *testing.T) { // K1
	w := newWorld(t, options{})
	v := w.victim()
	v.mark()
	v.die()
	if n := len(w.p.Transactions()); n != 0 {
		t.Errorf("%d transactions", n)
	}
	if n := value[int](w, "SELECT count(*) FROM orders"); n != 0 {
		t.Errorf("%d orders", n)
	}
}

func TestKilledAfterPrepareWasSent(t *testing.T) { // K2
	w := newWorld(t, options{})
	v := w.victim()
	v.mark()
	w.p.SetFault(func(call fakeplatform.Call) fakeplatform.Fault {
		return fakeplatform.Fault{LoseAnswer: call.Name == "prepare"}
	})
	if err := v.a.Prepare(t.Context(), event("1", "a")); !client.IsUnavailable(err) {
		t.Fatal(err)
	}
	if outcome, _ := w.verdict(v.a.ID()); outcome != "IN_PROGRESS" {
		t.Errorf("while it runs: %s", outcome)
	}
	v.die()
	w.resolve(v.a.ID(), "ABORTED")
	w.published("1")
}

func TestKilledAfterPrepare(t *testing.T) { // K3
	w := newWorld(t, options{})
	v := w.victim()
	v.mark()
	v.prepare()
	v.die()
	w.resolve(v.a.ID(), "ABORTED")
	w.published("1")
}

func TestCommitIsCut(t *testing.T) { // K4
	for name, tc := range map[string]struct {
		toxic     string
		committed bool
	}{
		"reply":   {`{"name":"cut","type":"limit_data","stream":"downstream","attributes":{"bytes":0}}`, true},
		"request": {`{"name":"cut","type":"limit_data","stream":"upstream","attributes":{"bytes":0}}`, false},
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t, options{})
			pool, proxy := w.proxy()
			w.p.SetFault(func(call fakeplatform.Call) fakeplatform.Fault {
				if call.Name == "prepare" {
					toxic(t, proxy, tc.toxic) // the next thing on that connection is COMMIT
				}
				return fakeplatform.Fault{}
			})
			err := pgxoutbox.InTx(t.Context(), pool, w.c, pgxoutbox.Options{}, ordered(t.Context(), "1", "a"))
			var unknown *client.OutcomeUnknownError
			if !errors.As(err, &unknown) {
				t.Fatalf("error: %v", err)
			}
			id := w.p.Transactions()[0].ID
			if unknown.TransactionID != id || unknown.Unwrap() == nil {
				t.Errorf("%+v", unknown)
			}
			proxy.Stop()
			w.p.Wait(t, "the database to be done with it", func() bool { outcome, _ := w.verdict(id); return outcome != "IN_PROGRESS" })
			if n := len(w.p.Calls("commit")) + len(w.p.Calls("abort")); n != 0 {
				t.Errorf("%d decisions were sent although the outcome is unknown", n)
			}
			if got := value[int](w, "SELECT count(*) FROM orders") == 1; got != tc.committed {
				t.Fatalf("committed: %v", got)
			}
			if tc.committed {
				w.resolve(id, "COMMITTED")
				w.published("1", "a")
			} else {
				w.resolve(id, "ABORTED")
				w.published("1")
			}
		})
	}
}

func TestKilledAfterCommit(t *testing.T) { // K5
	w := newWorld(t, options{})
	v := w.victim()
	v.mark()
	v.prepare()
	if err := v.tx.Commit(t.Context()); err != nil {
		t.Fatal(err)
	}
	v.die()
	w.resolve(v.a.ID(), "COMMITTED")
	w.published("1", "a")
}

func TestCommitIsLostRepeatedAndLate(t *testing.T) { // K6
	w := newWorld(t, options{})
	w.p.SetFault(func(call fakeplatform.Call) fakeplatform.Fault {
		return fakeplatform.Fault{Silent: call.Name == "commit"}
	})
	w.place("1", "a") // returns although nobody has heard of the commit
	w.p.Wait(t, "the lost commit", func() bool { return len(w.p.Calls("commit")) == 1 })
	w.published("1")
	id := w.p.Transactions()[0].ID
	w.resolve(id, "COMMITTED")
	w.p.SetFault(nil)
	w.p.Break() // the client sends it again, late, after the resolver
	w.p.Wait(t, "the acknowledgement", func() bool { return w.c.Stats().Acknowledged == 1 })
	if err := w.c.Commit(t.Context(), id, nil); err != nil {
		t.Errorf("a repeated commit: %v", err)
	}
	w.published("1", "a")
}

// TestExplicitPieces: what InTx does, by hand, and what must not be done twice.
func TestExplicitPieces(t *testing.T) {
	w := newWorld(t, options{})
	ctx := t.Context()
	v := w.victim()
	v.mark()
	v.prepare()
	if err := v.a.Prepare(ctx, event("1", "b")); err == nil {
		t.Error("prepared twice")
	}
	if err := v.tx.Commit(ctx); err != nil {
		t.Fatal(err)
	}
	v.a.AfterCommit()
	v.a.AfterCommit()
	v.a.AfterRollback() // too late: nothing happens
	w.published("1", "a")
	if n := len(w.p.Calls("commit")); n != 1 {
		t.Errorf("%d commits", n)
	}

	v = w.victim()
	v.mark()
	v.prepare()
	if err := v.tx.Rollback(ctx); err != nil {
		t.Fatal(err)
	}
	v.a.AfterRollback()
	w.p.Wait(t, "the abort", func() bool { return w.p.Transaction(v.a.ID()).State == fakeplatform.Aborted })
	_ = v.conn.Close(ctx)

	v = w.victim()
	v.mark()
	if err := v.a.Prepare(ctx); !client.IsInvalid(err) {
		t.Errorf("without events: %v", err)
	}
	v.die()
}

// TestAfterCommitNothingReachesTheApplication: the platform is gone, the client closed, and COMMIT is all that counts.
func TestAfterCommitNothingReachesTheApplication(t *testing.T) {
	w := newWorld(t, options{})
	c := w.client(func(cfg *client.Config) { cfg.CloseTimeout = time.Millisecond })
	w.p.SetFault(func(call fakeplatform.Call) fakeplatform.Fault {
		if call.Name == "prepare" {
			return fakeplatform.Fault{}
		}
		return fakeplatform.Fault{Silent: call.Name == "commit"}
	})
	err := pgxoutbox.InTx(t.Context(), closing{w, c}, c, pgxoutbox.Options{}, ordered(t.Context(), "1", "a"))
	if err != nil {
		t.Errorf("error: %v", err)
	}
	w.resolve(w.p.Transactions()[0].ID, "COMMITTED")
}

// closing is a database whose COMMIT closes the client before it returns.
type closing struct {
	w *world
	c *client.Client
}

type closingTx struct {
	pgx.Tx
	c *client.Client
}

func (b closing) BeginTx(ctx context.Context, o pgx.TxOptions) (pgx.Tx, error) {
	tx, err := b.w.pool.BeginTx(ctx, o)
	return closingTx{tx, b.c}, err
}

func (tx closingTx) Commit(ctx context.Context) error {
	err := tx.Tx.Commit(ctx)
	tx.c.Close()
	return err
}
