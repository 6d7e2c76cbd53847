package pgxoutbox_test

import (
	"errors"
	"fmt"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
	"google.golang.org/grpc/codes"

	"github.com/outbox-platform/outbox/client"
	"github.com/outbox-platform/outbox/client/internal/fakeplatform"
	"github.com/outbox-platform/outbox/client/pgxoutbox"
)

func brisk(cfg *client.Config) {
	cfg.PrepareTimeout, cfg.CallTimeout, cfg.MaxReconnectDelay = 200*time.Millisecond, time.Second, 20*time.Millisecond
}

// spillable is upkeep that looks often.
var spillable = pgxoutbox.Upkeep{DrainInterval: 20 * time.Millisecond}

func (w *world) spilled() int {
	return value[int](w, "SELECT count(*) FROM outbox_marker WHERE spilled IS NOT NULL AND refused IS NULL")
}

func (w *world) down() {
	w.t.Helper()
	w.p.Stop()
	w.p.Wait(w.t, "the link to be down", func() bool { link, _ := w.c.Link(); return link == client.LinkDown })
}

// TestOutage: while the platform is away, every business transaction commits, without delay once the client knows it; when it
// is back, all events arrive in order, and nothing is there twice.
func TestOutage(t *testing.T) {
	w := newWorld(t, options{config: brisk, upkeep: spillable})
	ctx := t.Context()
	w.place("1", "0")
	w.published("1", "0")
	w.down()
	start := time.Now()
	for i := 1; i <= 50; i++ {
		w.place("1", fmt.Sprint(i))
		w.place("2", fmt.Sprint(i))
	}
	if d := time.Since(start) / 100; d > 100*time.Millisecond {
		t.Errorf("%v per transaction", d)
	}
	if n := w.spilled(); n != 100 {
		t.Errorf("%d spilled", n)
	}
	w.p.Restart()
	for i := 51; i <= 60; i++ { // while the drainer works
		w.place("1", fmt.Sprint(i))
	}
	want := make([]string, 61)
	for i := range want {
		want[i] = fmt.Sprint(i)
	}
	w.published("1", want...)
	w.published("2", want[1:51]...)
	w.p.Wait(t, "the markers to be cleared", func() bool { return w.spilled() == 0 })
	w.place("1", "direct")
	w.published("1", append(want, "direct")...)
	w.p.Wait(t, "all to be counted", func() bool { s := w.c.Stats(); return s.Spilled >= 100 && s.Drained == s.Spilled })
	if s := w.c.Stats(); s.Refused != 0 {
		t.Errorf("stats %+v", s)
	}
	if err := pgxoutbox.InTx(ctx, w.pool, w.c, pgxoutbox.Options{}, ordered(ctx, "1", "last")); err != nil {
		t.Error(err)
	}
}

// TestLostPrepareAnswers: a Prepare that arrived and was not answered in time is spilled under the same id. It is published once.
func TestLostPrepareAnswers(t *testing.T) {
	w := newWorld(t, options{config: brisk, upkeep: spillable})
	var lose atomic.Bool
	lose.Store(true)
	w.p.SetFault(func(call fakeplatform.Call) fakeplatform.Fault {
		return fakeplatform.Fault{LoseAnswer: call.Name == "prepare" && lose.Load(), Silent: call.Name == "publish" && lose.Load()}
	})
	w.place("1", "a")
	if n := w.spilled(); n != 1 {
		t.Fatalf("%d spilled", n)
	}
	id := w.p.Transactions()[0].ID
	w.resolve(id, "COMMITTED") // the resolver is faster than the drainer
	lose.Store(false)
	w.p.Wait(t, "the drainer", func() bool { return w.spilled() == 0 })
	w.published("1", "a")
	if n := len(w.p.Transactions()); n != 1 {
		t.Errorf("%d transactions", n)
	}
}

// TestLaterTransactionsSpillToo: as long as spilled requests wait, nothing overtakes them, under every isolation level, also
// when the platform is there again.
func TestLaterTransactionsSpillToo(t *testing.T) {
	for _, level := range []pgx.TxIsoLevel{pgx.ReadCommitted, pgx.RepeatableRead, pgx.Serializable} {
		t.Run(string(level), func(t *testing.T) {
			w := newWorld(t, options{config: brisk, upkeep: pgxoutbox.Upkeep{DrainInterval: time.Hour}})
			ctx := t.Context()
			w.p.SetFault(func(call fakeplatform.Call) fakeplatform.Fault { // nothing is drained
				if call.Name == "publish" {
					return fakeplatform.Fault{Err: fakeplatform.Error(codes.Internal, "INTERNAL", 0, nil)}
				}
				return fakeplatform.Fault{}
			})
			// The first statement of this transaction sees a database in which nothing is spilled.
			o := pgxoutbox.Options{TxOptions: pgx.TxOptions{IsoLevel: level}}
			err := pgxoutbox.InTx(ctx, w.pool, w.c, o, func(tx *pgxoutbox.Tx) error {
				if _, err := tx.Exec(ctx, "SELECT count(*) FROM orders"); err != nil {
					return err
				}
				w.spill("1", "first") // another transaction, of another instance
				if err := upsert(ctx, tx, "2"); err != nil {
					return err
				}
				return tx.Publish(event("1", "second"))
			})
			if err != nil {
				t.Fatal(err)
			}
			if n := w.spilled(); n != 2 {
				t.Errorf("%d spilled: the later one overtook the earlier", n)
			}
			if n := len(w.p.Calls("prepare")); n != 0 {
				t.Errorf("%d prepared", n)
			}
		})
	}
}

// spill stores a spilled request as a transaction of another instance would have.
func (w *world) spill(aggregate, payload string, change ...func(*client.Event)) uuid.UUID {
	w.t.Helper()
	id := client.NewID()
	e := event(aggregate, payload)
	for _, f := range change {
		f(&e)
	}
	r, err := w.c.Encode(w.t.Context(), id, client.DatabaseTransaction{}, e)
	if err != nil {
		w.t.Fatal(err)
	}
	w.exec("INSERT INTO outbox_marker (id, spilled) VALUES ($1, $2)", id, r.Bytes())
	return id
}

func TestOtherIsolationLevelsNeedARegisteredDatabase(t *testing.T) {
	w := newWorld(t, options{detached: true})
	o := pgxoutbox.Options{TxOptions: pgx.TxOptions{IsoLevel: pgx.RepeatableRead}}
	err := pgxoutbox.InTx(t.Context(), w.pool, w.c, o, ordered(t.Context(), "1", "a"))
	if err == nil || !strings.Contains(err.Error(), "registered") {
		t.Error(err)
	}
}

// TestNoSpill: without permission the transaction fails: when the platform is away, and when it would overtake.
func TestNoSpill(t *testing.T) {
	for name, o := range map[string]struct {
		world options
		tx    pgxoutbox.Options
	}{
		"never":          {options{config: brisk, upkeep: pgxoutbox.Upkeep{DrainInterval: time.Hour}}, pgxoutbox.Options{Spill: pgxoutbox.SpillNever}},
		"not registered": {options{config: brisk, detached: true}, pgxoutbox.Options{}},
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t, o.world)
			ctx := t.Context()
			w.place("0", "connects")
			w.down()
			if err := pgxoutbox.InTx(ctx, w.pool, w.c, o.tx, ordered(ctx, "1", "a")); !client.IsUnavailable(err) {
				t.Errorf("away: %v", err)
			}
			w.spill("1", "earlier")
			w.p.Restart()
			if err := pgxoutbox.InTx(ctx, w.pool, w.c, o.tx, ordered(ctx, "1", "a")); !errors.Is(err, client.ErrMustSpill) {
				t.Errorf("would overtake: %v", err)
			}
			if n := value[int](w, "SELECT count(*) FROM orders WHERE id = '1'"); n != 0 {
				t.Errorf("%d orders", n)
			}
		})
	}
}

// TestRefusedSpilledRequest: it is kept with the reason, it raises the alarm, and it stops nobody.
func TestRefusedSpilledRequest(t *testing.T) {
	w := newWorld(t, options{config: brisk, upkeep: spillable})
	w.p.SetFault(func(call fakeplatform.Call) fakeplatform.Fault {
		if call.Name == "publish" && call.Events[0].GetTopic() == "forbidden" {
			return fakeplatform.Fault{Err: fakeplatform.Error(codes.PermissionDenied, "TOPIC_DENIED", 0, nil)}
		}
		return fakeplatform.Fault{}
	})
	w.down()
	bad := w.spill("1", "refused", func(e *client.Event) { e.Topic = "forbidden" })
	w.spill("1", "behind it")
	old := w.spill("1", "too old")
	w.exec("UPDATE outbox_marker SET created_at = now() - interval '8 days' WHERE id = $1", old)
	garbage := client.NewID()
	w.exec("INSERT INTO outbox_marker (id, spilled) VALUES ($1, '\\xff')", garbage)
	aborted := w.spill("2", "aborted")
	again := sameEvent(w, aborted) // before the drainer clears the row
	w.p.Restart()
	if err := w.c.Publish(t.Context(), aborted, again); err != nil {
		t.Fatal(err)
	}
	w.published("1", "behind it")
	w.p.Wait(t, "three alarms", func() bool { return w.alarmed(client.AlarmRefused) == 3 })
	for id, want := range map[uuid.UUID]string{bad: "TOPIC_DENIED", old: "older than", garbage: "cannot be read"} {
		if why := value[*string](w, "SELECT refused FROM outbox_marker WHERE id = $1 AND spilled IS NOT NULL", id); why == nil || !strings.Contains(*why, want) {
			t.Errorf("%s: %v", want, why)
		}
	}
	w.place("1", "and the world goes on")
	w.published("1", "behind it", "and the world goes on")
	w.p.Wait(t, "three to be counted", func() bool { return w.c.Stats().Refused == 3 })
}

// sameEvent returns the event of a spilled request with its id and time, to publish the same content.
func sameEvent(w *world, id uuid.UUID) client.Event {
	w.t.Helper()
	e, err := w.c.SpilledEvents(value[[]byte](w, "SELECT spilled FROM outbox_marker WHERE id = $1", id))
	if err != nil {
		w.t.Fatal(err)
	}
	return e[0]
}

// TestContradictedSpill: the platform holds a spilled, committed transaction for aborted. That is history in dispute.
func TestContradictedSpill(t *testing.T) {
	w := newWorld(t, options{config: brisk, upkeep: pgxoutbox.Upkeep{DrainInterval: time.Hour}})
	w.p.SetFault(func(call fakeplatform.Call) fakeplatform.Fault {
		return fakeplatform.Fault{LoseAnswer: call.Name == "prepare", Silent: call.Name == "publish"}
	})
	w.place("1", "a")
	if err := w.p.Decide(w.p.Transactions()[0].ID, fakeplatform.Aborted); err != nil {
		t.Fatal(err)
	}
	w.p.SetFault(nil)
	w.p.Break() // the drainer wakes with the session
	w.p.Wait(t, "the alarm", func() bool { return w.alarmed(client.AlarmContradiction) == 1 })
}

// TestDrainKeepsOrderThroughFailures: a request that fails for now holds back the later ones of its aggregate, and no others.
func TestDrainKeepsOrderThroughFailures(t *testing.T) {
	w := newWorld(t, options{config: func(cfg *client.Config) { brisk(cfg); cfg.DisableRetries = true }, upkeep: spillable})
	var fail atomic.Bool
	fail.Store(true)
	w.p.SetFault(func(call fakeplatform.Call) fakeplatform.Fault {
		if call.Name == "publish" && fail.Load() && string(call.Events0()) == "a0" {
			return fakeplatform.Fault{Err: fakeplatform.Error(codes.Internal, "INTERNAL", 0, nil)}
		}
		return fakeplatform.Fault{}
	})
	w.down()
	for i := range 3 {
		w.spill("a", fmt.Sprint("a", i))
		w.spill("b", fmt.Sprint("b", i))
	}
	w.p.Restart()
	w.published("b", "b0", "b1", "b2")
	w.published("a")
	fail.Store(false)
	w.published("a", "a0", "a1", "a2")
}

// TestManyInstancesDrainOnce: several instances, one outage; order is kept and nothing is published twice.
func TestManyInstancesDrainOnce(t *testing.T) {
	w := newWorld(t, options{config: brisk, upkeep: spillable})
	w.down()
	for i := range 200 {
		w.spill("1", fmt.Sprint(i))
	}
	for range 3 {
		w.register(w.client(brisk), spillable)
	}
	w.p.Restart()
	want := make([]string, 200)
	for i := range want {
		want[i] = fmt.Sprint(i)
	}
	w.published("1", want...)
	if n := len(w.p.Calls("publish")); n != 200 {
		t.Errorf("%d publishes", n)
	}
}

// TestConcurrentOutages: the platform comes and goes under load. No business transaction fails, and order holds.
func TestConcurrentOutages(t *testing.T) {
	w := newWorld(t, options{config: brisk, upkeep: spillable})
	ctx := t.Context()
	var wg sync.WaitGroup
	stop := make(chan struct{})
	for g := range 8 {
		wg.Go(func() {
			for i := 0; ; i++ {
				select {
				case <-stop:
					return
				default:
				}
				id := fmt.Sprint((g + i) % 5)
				err := pgxoutbox.InTx(ctx, w.pool, w.c, pgxoutbox.Options{}, func(tx *pgxoutbox.Tx) error {
					if err := upsert(ctx, tx, id); err != nil {
						return err
					}
					var version int
					if err := tx.QueryRow(ctx, "SELECT version FROM orders WHERE id = $1", id).Scan(&version); err != nil {
						return err
					}
					return tx.Publish(event(id, fmt.Sprint(version)))
				})
				if err != nil {
					t.Errorf("a business transaction failed: %v", err)
				}
			}
		})
	}
	for range 3 {
		before := value[int](w, "SELECT coalesce(sum(version), 0) FROM orders")
		w.p.Wait(t, "traffic", func() bool { return value[int](w, "SELECT coalesce(sum(version), 0) FROM orders") > before+30 })
		w.p.Stop()
		w.p.Wait(t, "spilling", func() bool { return w.spilled() > 20 })
		w.p.Restart()
		w.p.Wait(t, "a session", func() bool { return w.p.Sessions() > 0 })
	}
	close(stop)
	wg.Wait()
	for id := range 5 {
		last := value[int](w, "SELECT version FROM orders WHERE id = $1", fmt.Sprint(id))
		want := make([]string, last+1)
		for v := range want {
			want[v] = fmt.Sprint(v)
		}
		w.settle(fmt.Sprint(id), want)
	}
}

// settle waits for the events of an aggregate; transactions whose Commit got lost in an outage are resolved on the way.
func (w *world) settle(id string, want []string) {
	w.t.Helper()
	w.p.Wait(w.t, "all events of "+id, func() bool { return fmt.Sprint(w.p.Published(id)) == fmt.Sprint(want) })
}

// TestNoSecondConnection: when nobody can say whether spilled requests wait, spilling is the answer that keeps the order. It
// also ends the wait of transactions that hold all connections of the pool and each want a second one.
func TestNoSecondConnection(t *testing.T) {
	w := newWorld(t, options{config: brisk, detached: true})
	cfg := w.pool.Config().Copy()
	cfg.MaxConns = 2
	small, err := pgxpool.NewWithConfig(t.Context(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(small.Close)
	c := w.client(brisk)
	if err := pgxoutbox.Register(c, "", small, pgxoutbox.Upkeep{DrainInterval: time.Hour, JanitorInterval: time.Hour}); err != nil {
		t.Fatal(err)
	}
	o := pgxoutbox.Options{TxOptions: pgx.TxOptions{IsoLevel: pgx.RepeatableRead}}
	w.p.SetFault(func(call fakeplatform.Call) fakeplatform.Fault {
		return fakeplatform.Fault{Silent: call.Name == "publish"}
	})
	both := make(chan struct{})
	var arrived atomic.Int32
	var wg sync.WaitGroup
	for i := range 2 {
		wg.Go(func() {
			err := pgxoutbox.InTx(t.Context(), small, c, o, func(tx *pgxoutbox.Tx) error {
				if err := upsert(t.Context(), tx, fmt.Sprint(i)); err != nil {
					return err
				}
				if arrived.Add(1) == 2 {
					close(both)
				}
				<-both
				return tx.Publish(event(fmt.Sprint(i), "a"))
			})
			if err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	if n := value[int](w, "SELECT count(*) FROM orders"); n != 2 {
		t.Errorf("%d orders", n)
	}
	if n := value[int](w, "SELECT count(*) FROM outbox_marker WHERE spilled IS NOT NULL"); n == 0 {
		t.Error("nobody spilled")
	}
}

// TestSpillFails: the transaction fails with both reasons, and is rolled back.
func TestSpillFails(t *testing.T) {
	for name, body := range map[string]string{"refuses": "RAISE EXCEPTION 'no room'", "ignores": "RETURN NULL"} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t, options{config: brisk, upkeep: pgxoutbox.Upkeep{DrainInterval: time.Hour}})
			w.place("0", "connects")
			w.exec("CREATE FUNCTION no_room() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN " + body + "; END $$; " +
				"CREATE TRIGGER no_room BEFORE UPDATE ON outbox_marker FOR EACH ROW EXECUTE FUNCTION no_room()")
			w.down()
			err := pgxoutbox.InTx(t.Context(), w.pool, w.c, pgxoutbox.Options{}, ordered(t.Context(), "1", "a"))
			if err == nil || !strings.Contains(err.Error(), "spilling") {
				t.Errorf("error: %v", err)
			}
			if name == "refuses" && !client.IsUnavailable(err) {
				t.Errorf("the first reason is lost: %v", err)
			}
			if n := value[int](w, "SELECT count(*) FROM orders WHERE id = '1'"); n != 0 {
				t.Errorf("%d orders", n)
			}
		})
	}
}

// TestOtherExecModes: with a pooler in transaction mode pgx must not use prepared statements. The protocol works without.
func TestOtherExecModes(t *testing.T) {
	for _, mode := range []string{"simple_protocol", "exec", "cache_describe"} {
		t.Run(mode, func(t *testing.T) {
			w := newWorld(t, options{config: brisk, detached: true})
			w.pool = w.connect(w.dsn + "&default_query_exec_mode=" + mode)
			w.register(w.c, pgxoutbox.Upkeep{DrainInterval: 20 * time.Millisecond, MarkerRetention: 200 * time.Millisecond})
			w.place("1", "a")
			id := w.p.Transactions()[0].ID
			if outcome, why := w.verdict(id); outcome != "COMMITTED" {
				t.Errorf("%s (%s)", outcome, why)
			}
			w.down()
			w.place("1", "b")
			w.p.Restart()
			w.published("1", "a", "b")
			w.p.Wait(t, "the markers to go", func() bool { return w.markers() == 0 })
		})
	}
}
