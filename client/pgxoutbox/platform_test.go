package pgxoutbox_test

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/grpc"
	"google.golang.org/grpc/resolver"
	"google.golang.org/grpc/resolver/manual"

	"github.com/outbox-platform/outbox/client"
	"github.com/outbox-platform/outbox/client/pgxoutbox"
	"github.com/outbox-platform/outbox/server"
	"github.com/outbox-platform/outbox/store"
	"github.com/outbox-platform/outbox/store/storetest"
)

// realServer runs the platform's server on a store. stop drains it as SIGTERM would and returns when it has stopped.
func realServer(t *testing.T, db *storetest.Database) (addr string, stop func()) {
	t.Helper()
	cfg, err := server.DefaultConfig()
	if err != nil {
		t.Fatal(err)
	}
	cfg.GRPCListen, cfg.HTTPListen = "127.0.0.1:0", "127.0.0.1:0"
	s, err := server.New(cfg, db.Store, db.Writer(t, store.WriterConfig{}), slog.New(slog.DiscardHandler), prometheus.NewRegistry())
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.WithoutCancel(t.Context()))
	done := make(chan error, 1)
	go func() { done <- s.Serve(ctx) }()
	stop = sync.OnceFunc(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	t.Cleanup(stop)
	return s.GRPCAddr(), stop
}

// TestAgainstTheRealServer: the whole SDK with the platform's own server and store: transactions under load while one of
// two servers drains; then every committed transaction is known as committed, every rolled back one as aborted or not at all.
func TestAgainstTheRealServer(t *testing.T) {
	platform := storetest.New(t)
	source := platform.Source(t, "orders")
	addrA, stopA := realServer(t, platform)
	addrB, _ := realServer(t, platform)
	servers := manual.NewBuilderWithScheme("both")
	servers.InitialState(resolver.State{Addresses: []resolver.Address{{Addr: addrA}, {Addr: addrB}}})

	w := newWorld(t, options{detached: true})
	c, err := client.New(client.Config{
		Target: "both:///", Source: source.Name, Plaintext: true, Sessions: 4, DialOptions: []grpc.DialOption{grpc.WithResolvers(servers)},
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	if err := pgxoutbox.Register(c, "", w.pool, pgxoutbox.Upkeep{}); err != nil {
		t.Fatal(err)
	}
	if err := c.Connect(t.Context()); err != nil {
		t.Fatal(err)
	}

	var (
		mu        sync.Mutex
		committed []uuid.UUID
		done      atomic.Int32
		wg        sync.WaitGroup
	)
	stop := make(chan struct{})
	for g := range 8 {
		wg.Go(func() {
			for i := 0; ; i++ {
				select {
				case <-stop:
					return
				default:
				}
				id, err := oneOrder(t.Context(), w.pool, c, fmt.Sprint(g), i%10 == 9)
				switch {
				case err == nil:
					mu.Lock()
					committed = append(committed, id)
					mu.Unlock()
					done.Add(1)
				case !errors.Is(err, errRollback):
					t.Error(err)
				}
			}
		})
	}
	storetest.Eventually(t, 30*time.Second, func() bool { return done.Load() > 40 })
	stopA()
	before := done.Load()
	storetest.Eventually(t, 30*time.Second, func() bool { return done.Load() > before+40 })
	close(stop)
	wg.Wait()
	for _, id := range committed {
		storetest.Eventually(t, 20*time.Second, func() bool {
			tx, err := c.GetTransaction(t.Context(), id)
			if err != nil {
				t.Fatal(err)
			}
			return tx.State == client.StateCommitted && len(tx.Events) == 1
		})
	}
	count := func(s store.State) int {
		return int(storetest.Query[int64](t, platform, "SELECT count(*) FROM outbox.tx WHERE state = $1", int16(s))[0])
	}
	if n := count(store.Committed); n != len(committed) {
		t.Errorf("%d are committed, want %d", n, len(committed))
	}
	// Aborts of what was rolled back are on their way; nothing stays undecided.
	storetest.Eventually(t, 20*time.Second, func() bool { return count(store.Prepared) == 0 })
	realErrors(t, c)
}

// TestDrainedAgainAfterRetention: the platform has a spilled request, its OK gets lost, and it is drained again when the platform
// has forgotten what clients do not keep. It is not stored a second time, whether or not its Prepare had arrived.
func TestDrainedAgainAfterRetention(t *testing.T) {
	platform := storetest.New(t)
	source := platform.Source(t, "orders")
	addr, _ := realServer(t, platform)
	w := newWorld(t, options{detached: true})
	c, err := client.New(client.Config{Target: addr, Source: source.Name, Plaintext: true})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	var requests []*client.Request
	for range 2 {
		r, err := c.Encode(t.Context(), client.NewID(), client.DatabaseTransaction{XID: 1, Mode: client.ModeClientOnly}, event("1", "spilled"))
		if err != nil {
			t.Fatal(err)
		}
		requests = append(requests, r)
		w.exec("INSERT INTO outbox_marker (id) VALUES ($1)", r.ID())
	}
	if _, err := c.PrepareRequest(t.Context(), requests[1], false); err != nil {
		t.Fatal(err)
	}
	if err := pgxoutbox.Register(c, "", w.pool, spillable); err != nil {
		t.Fatal(err)
	}
	drain := func() {
		t.Helper()
		for _, r := range requests {
			w.exec("UPDATE outbox_marker SET spilled = $2 WHERE id = $1", r.ID(), r.Bytes())
		}
		storetest.Eventually(t, 20*time.Second, func() bool { return w.spilled() == 0 })
		for _, r := range requests {
			if tx, err := c.GetTransaction(t.Context(), r.ID()); err != nil || tx.State != client.StateCommitted {
				t.Fatalf("%+v, %v", tx, err)
			}
		}
	}
	drain()
	ordinary := client.NewID()
	if err := c.Publish(t.Context(), ordinary, event("1", "not kept")); err != nil {
		t.Fatal(err)
	}
	segments := func() int64 { return storetest.Query[int64](t, platform, "SELECT count(*) FROM outbox.log")[0] }
	before := segments()

	// An hour later, and everything is published.
	platform.Exec(t, "UPDATE outbox.control SET tx_known_since = now() - '2 h'::interval")
	platform.Exec(t, "UPDATE outbox.tx SET prepared_at = prepared_at - '1 h'::interval, decided_at = decided_at - '1 h'::interval")
	platform.Exec(t, "UPDATE outbox.resolution SET resolved_at = resolved_at - '1 h'::interval")
	platform.Exec(t, "UPDATE outbox.shard SET (xid, seq, oldest) = (SELECT xid, 2147483647, xid FROM outbox.log ORDER BY xid DESC LIMIT 1)")
	if _, err := platform.Store.MaintainOnce(t.Context(), store.MaintenanceConfig{}); err != nil {
		t.Fatal(err)
	}
	if _, err := c.GetTransaction(t.Context(), ordinary); !client.IsUnknownTransaction(err) {
		t.Fatalf("retention has not run: %v", err)
	}
	drain() // the rows are as they were: nobody had cleared them
	if after := segments(); after != before {
		t.Errorf("%d segments in the log, before the second time %d: stored twice", after, before)
	}
	if s := c.Stats(); s.Drained != 4 || s.Refused != 0 {
		t.Errorf("stats %+v", s)
	}
}

// oneOrder runs a transaction and returns the id under which it was prepared.
func oneOrder(ctx context.Context, pool *pgxpool.Pool, c *client.Client, order string, rollback bool) (uuid.UUID, error) {
	tx, err := pool.Begin(ctx)
	if err != nil {
		return uuid.Nil, err
	}
	if err := upsert(ctx, tx, order); err != nil {
		return uuid.Nil, errors.Join(err, tx.Rollback(ctx))
	}
	a, err := pgxoutbox.Mark(ctx, tx, c, pgxoutbox.Options{})
	if err != nil {
		return uuid.Nil, errors.Join(err, tx.Rollback(ctx))
	}
	if err := a.Prepare(ctx, event(order, "x")); err != nil {
		return uuid.Nil, errors.Join(err, tx.Rollback(ctx))
	}
	if rollback {
		if err := tx.Rollback(ctx); err != nil {
			return uuid.Nil, err
		}
		a.AfterRollback()
		return uuid.Nil, errRollback
	}
	if err := tx.Commit(ctx); err != nil {
		return uuid.Nil, err
	}
	a.AfterCommit()
	return a.ID(), nil
}

// realErrors meets the errors of the real server.
func realErrors(t *testing.T, c *client.Client) {
	t.Helper()
	ctx := t.Context()
	id, e := client.NewID(), event("1", "a")
	e.ID, e.OccurredAt = client.NewID(), time.Unix(1e9, 0)
	for range 2 {
		if err := c.Publish(ctx, id, e); err != nil {
			t.Error(err)
		}
	}
	// A spilled request whose Prepare had arrived after all is the same transaction to the real server, in either order.
	for _, prepareFirst := range []bool{true, false} {
		spilled, err := c.Encode(ctx, client.NewID(), client.DatabaseTransaction{XID: 1, Mode: client.ModeClientOnly}, event("1", "spilled"))
		if err != nil {
			t.Fatal(err)
		}
		publish := func() error { return c.PublishSpilled(ctx, spilled.Bytes()) }
		prepare := func() error { _, err := c.PrepareRequest(ctx, spilled, true); return err }
		if prepareFirst {
			err = errors.Join(prepare(), publish())
		} else {
			err = errors.Join(publish(), prepare())
		}
		if err != nil {
			t.Errorf("prepare first %v: %v", prepareFirst, err)
		}
		if tx, err := c.GetTransaction(ctx, spilled.ID()); err != nil || tx.State != client.StateCommitted {
			t.Errorf("prepare first %v: %+v, %v", prepareFirst, tx, err)
		}
	}
	if err := c.Publish(ctx, id, event("1", "other")); !client.HasReason(err, client.ReasonIDReused) {
		t.Errorf("reused: %v", err)
	}
	if err := c.Abort(ctx, id, nil); !client.IsAlreadyDecided(err) {
		t.Errorf("decided: %v", err)
	}
	if _, err := c.GetTransaction(ctx, client.NewID()); !client.IsUnknownTransaction(err) {
		t.Errorf("unknown: %v", err)
	} else {
		var ce *client.Error
		if !errors.As(err, &ce) || ce.Metadata["retention_horizon"] == "" {
			t.Errorf("the janitor needs the horizon: %v", err)
		} else if _, err := time.Parse(time.RFC3339Nano, ce.Metadata["retention_horizon"]); err != nil {
			t.Error(err)
		}
	}
}
