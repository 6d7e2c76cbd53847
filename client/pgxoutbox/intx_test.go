package pgxoutbox_test

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"google.golang.org/grpc/codes"

	"github.com/outbox-platform/outbox/client"
	"github.com/outbox-platform/outbox/client/internal/fakeplatform"
	"github.com/outbox-platform/outbox/client/pgxoutbox"
)

func TestCommitPublishesAndRollbackDoesNot(t *testing.T) {
	w := newWorld(t, options{})
	ctx := t.Context()
	w.place("1", "a")
	oops := errors.New("oops")
	err := pgxoutbox.InTx(ctx, w.pool, w.c, pgxoutbox.Options{}, func(tx *pgxoutbox.Tx) error {
		if err := ordered(ctx, "1", "never")(tx); err != nil {
			return err
		}
		return oops
	})
	if !errors.Is(err, oops) {
		t.Errorf("error: %v", err)
	}
	err = pgxoutbox.InTx(ctx, w.pool, w.c, pgxoutbox.Options{}, func(tx *pgxoutbox.Tx) error {
		if err := upsert(ctx, tx, "1"); err != nil {
			return err
		}
		return errors.Join(tx.Publish(event("1", "b"), event("1", "c")), tx.Publish(), tx.Publish(event("2", "d")))
	})
	if err != nil {
		t.Error(err)
	}
	w.published("1", "a", "b", "c")
	w.published("2", "d")
	if n := len(w.p.Transactions()); n != 2 {
		t.Errorf("%d transactions: one Prepare for each with events, none for what was rolled back before", n)
	}
	if v := value[int](w, "SELECT version FROM orders WHERE id = '1'"); v != 1 {
		t.Errorf("version %d", v)
	}
}

func TestWithoutEventsThereIsNoMarker(t *testing.T) {
	w := newWorld(t, options{})
	err := pgxoutbox.InTx(t.Context(), w.pool, w.c, pgxoutbox.Options{}, func(tx *pgxoutbox.Tx) error { return upsert(t.Context(), tx, "1") })
	if err != nil {
		t.Error(err)
	}
	if n := value[int](w, "SELECT count(*) FROM outbox_marker"); n != 0 {
		t.Errorf("%d markers", n)
	}
	if n := value[int](w, "SELECT count(*) FROM orders"); n != 1 {
		t.Errorf("%d orders", n)
	}
}

// TestPrepareCarriesTheDatabaseTransaction: what a resolver needs travels with Prepare and is true.
func TestPrepareCarriesTheDatabaseTransaction(t *testing.T) {
	w := newWorld(t, options{})
	w.place("1", "a")
	tx := w.p.Transactions()[0]
	d := tx.Database
	if d.GetXid() != uint64(value[int64](w, "SELECT xmin::text::bigint FROM outbox_marker")) ||
		d.GetSystemIdentifier() != uint64(value[int64](w, "SELECT system_identifier FROM pg_control_system()")) ||
		d.GetTimeline() != 1 ||
		d.GetDatabaseOid() != uint32(value[int64](w, "SELECT oid::bigint FROM pg_database WHERE datname = current_database()")) ||
		d.GetMarkerOid() != uint32(value[int64](w, "SELECT 'outbox_marker'::regclass::oid::bigint")) {
		t.Errorf("%v", d)
	}
	if value[uuid.UUID](w, "SELECT id FROM outbox_marker") != tx.ID {
		t.Error("the marker has another id")
	}
}

func TestTheTransactionIsInTxsToEnd(t *testing.T) {
	w := newWorld(t, options{})
	err := pgxoutbox.InTx(t.Context(), w.pool, w.c, pgxoutbox.Options{}, func(tx *pgxoutbox.Tx) error {
		if err := tx.Commit(t.Context()); !errors.Is(err, client.ErrManaged) {
			t.Error(err)
		}
		return tx.Rollback(t.Context())
	})
	if !errors.Is(err, client.ErrManaged) {
		t.Error(err)
	}
}

func TestPanicRollsBack(t *testing.T) {
	w := newWorld(t, options{detached: true})
	func() {
		defer func() {
			if recover() == nil {
				t.Error("the panic was swallowed")
			}
		}()
		_ = pgxoutbox.InTx(t.Context(), w.pool, w.c, pgxoutbox.Options{}, func(tx *pgxoutbox.Tx) error {
			_ = ordered(t.Context(), "1", "a")(tx)
			panic("business")
		})
	}()
	if n := value[int](w, "SELECT count(*) FROM orders"); n != 0 {
		t.Errorf("%d orders", n)
	}
	if s := w.pool.Stat(); s.AcquiredConns() != 0 {
		t.Errorf("%d connections are not given back", s.AcquiredConns())
	}
}

// TestUnsafeTransactionsAreRefused: before anything was prepared, with errors that say what to do.
func TestUnsafeTransactionsAreRefused(t *testing.T) {
	w := newWorld(t, options{})
	ctx := t.Context()
	cases := []struct {
		name, sql string
		want      error
	}{
		{"savepoint", "SAVEPOINT s", client.ErrSavepoint},
		{"synchronous_commit", "SET LOCAL synchronous_commit = off", client.ErrAsyncCommit},
	}
	for _, tc := range cases {
		t.Run(tc.name, func(t *testing.T) {
			err := pgxoutbox.InTx(ctx, w.pool, w.c, pgxoutbox.Options{}, func(tx *pgxoutbox.Tx) error {
				if _, err := tx.Exec(ctx, tc.sql); err != nil {
					return err
				}
				return ordered(ctx, "1", "a")(tx)
			})
			if !errors.Is(err, tc.want) {
				t.Errorf("error: %v", err)
			}
		})
	}
	t.Run("nested", func(t *testing.T) {
		tx, err := w.pool.Begin(ctx)
		if err != nil {
			t.Fatal(err)
		}
		defer tx.Rollback(ctx)
		nested, err := tx.Begin(ctx)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := pgxoutbox.Mark(ctx, nested, w.c, pgxoutbox.Options{}); !errors.Is(err, client.ErrSavepoint) {
			t.Errorf("error: %v", err)
		}
	})
	t.Run("savepoint that is over", func(t *testing.T) {
		err := pgxoutbox.InTx(ctx, w.pool, w.c, pgxoutbox.Options{}, func(tx *pgxoutbox.Tx) error {
			nested, err := tx.Begin(ctx)
			if err != nil {
				return err
			}
			if err := upsert(ctx, nested, "2"); err != nil {
				return err
			}
			return errors.Join(nested.Commit(ctx), tx.Publish(event("2", "fine")))
		})
		if err != nil {
			t.Error(err)
		}
		w.published("2", "fine")
	})
	t.Run("savepoints that were rolled back", func(t *testing.T) {
		err := pgxoutbox.InTx(ctx, w.pool, w.c, pgxoutbox.Options{}, func(tx *pgxoutbox.Tx) error {
			nested, err := tx.Begin(ctx)
			if err != nil {
				return err
			}
			if err := tx.Publish(event("4", "rolled back")); err != nil {
				return err
			}
			inner, err := nested.Begin(ctx)
			if err != nil {
				return err
			}
			if _, err := inner.Exec(ctx, "SELECT 1/0"); err == nil {
				t.Error("it does not fail")
			}
			if err := errors.Join(inner.Rollback(ctx), upsert(ctx, nested, "4"), nested.Rollback(ctx)); err != nil {
				return err
			}
			if err := nested.Rollback(ctx); !errors.Is(err, pgx.ErrTxClosed) {
				t.Errorf("rolled back twice: %v", err)
			}
			return errors.Join(upsert(ctx, tx, "3"), tx.Publish(event("3", "fine")))
		})
		if err != nil {
			t.Fatal(err)
		}
		w.published("3", "fine")
		if got := w.p.Published("4"); len(got) != 0 {
			t.Errorf("published of what was rolled back: %v", got)
		}
	})
	for name, bad := range map[string]client.Event{"topic": {Topic: "__x"}, "empty": {}} {
		t.Run(name, func(t *testing.T) {
			err := pgxoutbox.InTx(ctx, w.pool, w.c, pgxoutbox.Options{}, func(tx *pgxoutbox.Tx) error { return tx.Publish(bad) })
			if !client.IsInvalid(err) {
				t.Errorf("error: %v", err)
			}
		})
	}
	if n := len(w.p.Calls("prepare")); n != 2 {
		t.Errorf("%d were prepared", n)
	}
	if n := value[int](w, "SELECT count(*) FROM orders"); n != 2 {
		t.Errorf("%d orders", n)
	}
}

func TestMissingMarkerTable(t *testing.T) {
	w := newWorld(t, options{detached: true})
	w.exec("DROP TABLE outbox_marker")
	err := pgxoutbox.InTx(t.Context(), w.pool, w.c, pgxoutbox.Options{}, ordered(t.Context(), "1", "a"))
	var pg *pgconn.PgError
	if err == nil || !errors.As(err, &pg) || pg.Code != "42P01" {
		t.Error(err)
	}
}

// TestRefusedPrepareRollsBackAndAborts: what the platform refuses fails the transaction, and a failure that leaves it
// open whether the request arrived is followed by Abort, because the rollback is certain.
func TestRefusedPrepareRollsBackAndAborts(t *testing.T) {
	w := newWorld(t, options{config: func(cfg *client.Config) { cfg.PrepareTimeout = 100 * time.Millisecond }})
	ctx := t.Context()
	w.p.SetFault(func(call fakeplatform.Call) fakeplatform.Fault {
		if call.Name != "prepare" {
			return fakeplatform.Fault{}
		}
		switch string(call.Events0()) {
		case "denied":
			return fakeplatform.Fault{Err: fakeplatform.Error(codes.PermissionDenied, "TOPIC_DENIED", 0, nil)}
		case "lost":
			return fakeplatform.Fault{LoseAnswer: true}
		}
		return fakeplatform.Fault{}
	})
	err := pgxoutbox.InTx(ctx, w.pool, w.c, pgxoutbox.Options{}, ordered(ctx, "1", "denied"))
	if !client.IsDenied(err) || !client.HasReason(err, client.ReasonTopicDenied) {
		t.Errorf("error: %v", err)
	}
	err = pgxoutbox.InTx(ctx, w.pool, w.c, pgxoutbox.Options{Spill: pgxoutbox.SpillNever}, ordered(ctx, "1", "lost"))
	if !client.IsUnavailable(err) {
		t.Errorf("error: %v", err)
	}
	w.p.Wait(t, "the abort", func() bool {
		txs := w.p.Transactions()
		return len(txs) == 1 && txs[0].State == fakeplatform.Aborted
	})
	if n := value[int](w, "SELECT count(*) FROM orders"); n != 0 {
		t.Errorf("%d orders", n)
	}
}

// TestTheCallersContextEndsDuringPrepare: the transaction is rolled back, not spilled, and the events are aborted.
func TestTheCallersContextEndsDuringPrepare(t *testing.T) {
	w := newWorld(t, options{})
	ctx, cancel := context.WithCancel(t.Context())
	w.p.SetFault(func(call fakeplatform.Call) fakeplatform.Fault {
		if call.Name == "prepare" {
			cancel()
			return fakeplatform.Fault{LoseAnswer: true}
		}
		return fakeplatform.Fault{}
	})
	err := pgxoutbox.InTx(ctx, w.pool, w.c, pgxoutbox.Options{}, ordered(ctx, "1", "a"))
	if !errors.Is(err, context.Canceled) {
		t.Errorf("error: %v", err)
	}
	w.p.Wait(t, "the abort", func() bool {
		txs := w.p.Transactions()
		return len(txs) == 1 && txs[0].State == fakeplatform.Aborted
	})
}

// TestRetryLoop: every attempt has a new id, so that the verdict on one never touches another.
func TestRetryLoop(t *testing.T) {
	w := newWorld(t, options{})
	ctx := t.Context()
	w.place("1", "start")
	ids := map[uuid.UUID]bool{}
	attempts := 0
	for {
		attempts++
		err := pgxoutbox.InTx(ctx, w.pool, w.c, pgxoutbox.Options{TxOptions: pgx.TxOptions{IsoLevel: pgx.Serializable}}, func(tx *pgxoutbox.Tx) error {
			if _, err := tx.Exec(ctx, "SELECT count(*) FROM orders"); err != nil {
				return err
			}
			if _, err := tx.Exec(ctx, "INSERT INTO orders (id, state) VALUES ($1, 'new')", uuid.NewString()); err != nil {
				return err
			}
			if attempts == 1 {
				// A rival that makes this attempt fail at its COMMIT, after its Prepare.
				if err := w.rival(); err != nil {
					return err
				}
			}
			return tx.Publish(event("1", fmt.Sprint("attempt ", attempts)))
		})
		var pg *pgconn.PgError
		if errors.As(err, &pg) && pg.Code == "40001" {
			continue
		}
		if err != nil {
			t.Fatal(err)
		}
		break
	}
	if attempts != 2 {
		t.Errorf("%d attempts", attempts)
	}
	w.published("1", "start", "rival", "attempt 2")
	for _, tx := range w.p.Transactions() {
		ids[tx.ID] = true
	}
	if len(ids) != len(w.p.Transactions()) {
		t.Error("an id was used twice")
	}
	w.p.Wait(t, "the failed attempt to be aborted", func() bool {
		return !slices.ContainsFunc(w.p.Transactions(), func(tx fakeplatform.Transaction) bool { return tx.State == fakeplatform.Prepared })
	})
}

// rival commits a serializable transaction that conflicts with everybody who counts orders and inserts one.
func (w *world) rival() error {
	ctx := w.t.Context()
	return pgxoutbox.InTx(ctx, w.pool, w.c, pgxoutbox.Options{TxOptions: pgx.TxOptions{IsoLevel: pgx.Serializable}}, func(tx *pgxoutbox.Tx) error {
		if _, err := tx.Exec(ctx, "SELECT count(*) FROM orders"); err != nil {
			return err
		}
		if _, err := tx.Exec(ctx, "INSERT INTO orders (id, state) VALUES ('rival', 'new')"); err != nil {
			return err
		}
		return tx.Publish(event("1", "rival"))
	})
}

// TestDeferredConstraint: PostgreSQL itself says that COMMIT failed; that is no unknown outcome.
func TestDeferredConstraint(t *testing.T) {
	w := newWorld(t, options{})
	ctx := t.Context()
	w.exec("ALTER TABLE orders ADD UNIQUE (state) DEFERRABLE INITIALLY DEFERRED")
	w.exec("INSERT INTO orders (id, state) VALUES ('0', 'new')")
	err := pgxoutbox.InTx(ctx, w.pool, w.c, pgxoutbox.Options{}, func(tx *pgxoutbox.Tx) error {
		if _, err := tx.Exec(ctx, "INSERT INTO orders (id, state) VALUES ('1', 'new')"); err != nil {
			return err
		}
		return tx.Publish(event("1", "a"))
	})
	var pg *pgconn.PgError
	var unknown *client.OutcomeUnknownError
	if !errors.As(err, &pg) || pg.Code != "23505" || errors.As(err, &unknown) {
		t.Errorf("error: %v", err)
	}
	w.p.Wait(t, "the abort", func() bool { return w.p.Transactions()[0].State == fakeplatform.Aborted })
}

// TestOrderUnderContention: many transactions of few aggregates; what is published is what was committed, in the order of
// the row locks.
func TestOrderUnderContention(t *testing.T) {
	w := newWorld(t, options{})
	ctx := t.Context()
	var wg sync.WaitGroup
	var failed atomic.Int32
	for g := range 16 {
		wg.Go(func() {
			for i := range 20 {
				id := fmt.Sprint((g + i) % 3)
				err := pgxoutbox.InTx(ctx, w.pool, w.c, pgxoutbox.Options{}, func(tx *pgxoutbox.Tx) error {
					if err := upsert(ctx, tx, id); err != nil {
						return err
					}
					var version int
					if err := tx.QueryRow(ctx, "SELECT version FROM orders WHERE id = $1", id).Scan(&version); err != nil {
						return err
					}
					if (g+i)%10 == 0 {
						failed.Add(1)
						return errRollback
					}
					return tx.Publish(event(id, fmt.Sprint(version)))
				})
				if err != nil && !errors.Is(err, errRollback) {
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
	for id := range 3 {
		last := value[int](w, "SELECT version FROM orders WHERE id = $1", fmt.Sprint(id))
		want := make([]string, last+1)
		for v := range want {
			want[v] = fmt.Sprint(v)
		}
		w.published(fmt.Sprint(id), want...)
	}
}

var errRollback = errors.New("changed my mind")
