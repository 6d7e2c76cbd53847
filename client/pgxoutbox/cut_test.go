package pgxoutbox_test

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
	"google.golang.org/grpc/codes"

	"github.com/outbox-platform/outbox/client"
	"github.com/outbox-platform/outbox/client/internal/fakeplatform"
	"github.com/outbox-platform/outbox/client/internal/sourcedb"
	"github.com/outbox-platform/outbox/client/pgxoutbox"
	"github.com/outbox-platform/outbox/store/storetest"
)

// cuttable is a pool whose connections break where the test wants.
func (w *world) cuttable() (*pgxpool.Pool, *storetest.Cut) {
	w.t.Helper()
	cut := storetest.NewCut(w.t, w.dsn)
	return w.connect(cut.DSN), cut
}

// everywhere runs step again and again with a connection that breaks at its first statement, its second, and so on, until none is
// left to break.
func everywhere(t *testing.T, cut *storetest.Cut, step func(n int) error) {
	t.Helper()
	for n := 0; ; n++ {
		cut.After(n)
		err := step(n)
		switch broken := cut.Done(); {
		case !broken && err != nil:
			t.Fatalf("nothing broke, and step %d failed: %v", n, err)
		case !broken:
			return
		case n == 100:
			t.Fatal("it never ends")
		}
	}
}

// TestConnectionsBreakAtEveryStatement: wherever the connection breaks, a transaction that InTx did not report as committed is not
// there, and nothing of it is published.
func TestConnectionsBreakAtEveryStatement(t *testing.T) {
	for name, o := range map[string]pgxoutbox.Options{
		"marker": {Mode: client.ModeMarker}, "fenced": {Mode: client.ModeXIDFenced},
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t, options{detached: true}) // not registered: its identity is read every time
			pool, cut := w.cuttable()
			ctx := t.Context()
			everywhere(t, cut, func(n int) error {
				id := fmt.Sprint("order-", n)
				err := pgxoutbox.InTx(ctx, pool, w.c, o, func(tx *pgxoutbox.Tx) error {
					if err := nested(ctx, tx, id, true); err != nil {
						return err
					}
					return nested(ctx, tx, "not "+id, false)
				})
				there := value[bool](w, "SELECT EXISTS (SELECT FROM orders WHERE id = $1)", id)
				if there != (err == nil) {
					t.Errorf("cut at statement %d: the order is there: %v, and the error is %v", n, there, err)
				}
				if err == nil {
					w.published(id, "kept")
				} else if got := w.p.Published(id); len(got) != 0 {
					t.Errorf("cut at statement %d: published %q", n, got)
				}
				return err
			})
			if n := value[int](w, "SELECT count(*) FROM orders WHERE id LIKE 'not %'"); n != 0 {
				t.Errorf("%d orders of savepoints that were rolled back", n)
			}
		})
	}
}

// nested inserts an order and publishes an event in a savepoint, which is kept or not.
func nested(ctx context.Context, tx *pgxoutbox.Tx, id string, kept bool) error {
	sp, err := tx.Begin(ctx)
	if err != nil {
		return err
	}
	err = upsert(ctx, sp, id)
	switch {
	case err != nil:
	case kept:
		if err = tx.Publish(event(id, "kept")); err == nil {
			err = sp.Commit(ctx)
		}
	default:
		if err = tx.Publish(event(id, "not kept")); err == nil {
			err = sp.Rollback(ctx)
		}
	}
	return err
}

// TestASavepointEndsOnce: ending it again is refused, and leaves the transaction as it is.
func TestASavepointEndsOnce(t *testing.T) {
	w := newWorld(t, options{})
	ctx := t.Context()
	err := pgxoutbox.InTx(ctx, w.pool, w.c, pgxoutbox.Options{}, func(tx *pgxoutbox.Tx) error {
		sp, err := tx.Begin(ctx)
		if err != nil {
			return err
		}
		if err := errors.Join(upsert(ctx, sp, "1"), tx.Publish(event("1", "a")), sp.Commit(ctx)); err != nil {
			return err
		}
		for _, again := range []error{sp.Commit(ctx), sp.Rollback(ctx)} {
			if !errors.Is(again, pgx.ErrTxClosed) {
				t.Errorf("ended again: %v", again)
			}
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	w.published("1", "a")
}

// TestTheCallerGivesUpWhileSpilledRequestsAreLookedFor: that is his error, and no reason to spill.
func TestTheCallerGivesUpWhileSpilledRequestsAreLookedFor(t *testing.T) {
	w := newWorld(t, options{})
	tx, err := w.pool.BeginTx(t.Context(), pgx.TxOptions{IsoLevel: pgx.RepeatableRead})
	if err != nil {
		t.Fatal(err)
	}
	defer tx.Rollback(context.WithoutCancel(t.Context())) //nolint:errcheck // nothing depends on it
	a, err := pgxoutbox.Mark(t.Context(), tx, w.c, pgxoutbox.Options{})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := a.Prepare(ctx, event("1", "a")); !errors.Is(err, context.Canceled) || !strings.Contains(err.Error(), "spilled") {
		t.Errorf("error %v", err)
	}
}

// upkept is a database that the test looks after itself, over connections that break.
func (w *world) upkept() (*sourcedb.Database, *storetest.Cut) {
	w.t.Helper()
	pool, cut := w.cuttable()
	d, err := sourcedb.New(w.c, "", pgxoutbox.NewPool(pool), client.Upkeep{})
	if err != nil {
		w.t.Fatal(err)
	}
	return d, cut
}

// unlocked waits until the server has noticed that whoever did the upkeep is gone: else it leaves the work to him.
func (w *world) unlocked() {
	w.t.Helper()
	w.p.Wait(w.t, "the lock", func() bool {
		return value[int](w, "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND database = (SELECT oid FROM pg_database WHERE datname = current_database())") == 0
	})
}

func noRetries(cfg *client.Config) { cfg.DisableRetries = true }

// TestDrainingBreaksAtEveryStatement: what is spilled is published once and in order, and what is refused is kept with the reason.
func TestDrainingBreaksAtEveryStatement(t *testing.T) {
	w := newWorld(t, options{detached: true, config: noRetries})
	w.p.SetFault(func(call fakeplatform.Call) fakeplatform.Fault {
		if call.Name == "publish" && call.Events[0].GetTopic() == "forbidden" {
			return fakeplatform.Fault{Err: fakeplatform.Error(codes.PermissionDenied, "TOPIC_DENIED", 0, nil)}
		}
		return fakeplatform.Fault{}
	})
	d, cut := w.upkept()
	w.spill("1", "refused", func(e *client.Event) { e.Topic = "forbidden" })
	var want []string
	everywhere(t, cut, func(n int) error {
		w.unlocked()
		w.spill("1", fmt.Sprint(n))
		want = append(want, fmt.Sprint(n))
		_, err := d.DrainOnce(t.Context())
		return err
	})
	w.published("1", want...)
	if n := w.spilled(); n != 0 {
		t.Errorf("%d are left", n)
	}
	if n := value[int](w, "SELECT count(*) FROM outbox_marker WHERE refused LIKE '%TOPIC_DENIED%'"); n != 1 {
		t.Errorf("%d are marked as refused", n)
	}
}

// TestTidyingBreaksAtEveryStatement: markers of decided transactions go in the end, and those that the platform cannot be asked
// about stay.
func TestTidyingBreaksAtEveryStatement(t *testing.T) {
	w := newWorld(t, options{detached: true, config: noRetries})
	d, cut := w.upkept()
	w.p.SetHorizon(time.Now().Add(-2 * time.Hour)) // what is older and not known was forgotten in due time
	silent := w.oldMarker()
	w.p.SetFault(func(call fakeplatform.Call) fakeplatform.Fault {
		if call.Name == "get" && call.ID == silent {
			return fakeplatform.Fault{Err: fakeplatform.Error(codes.Internal, "INTERNAL", 0, nil)}
		}
		return fakeplatform.Fault{}
	})
	everywhere(t, cut, func(int) error {
		w.unlocked()
		w.oldMarker()
		_, _, err := d.TidyOnce(t.Context(), uuid.Nil)
		return err
	})
	if n := w.markers(); n != 1 || !value[bool](w, "SELECT EXISTS (SELECT FROM outbox_marker WHERE id = $1)", silent) {
		t.Errorf("%d markers are left", n)
	}
}
