package pgxoutbox_test

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/prometheus/client_golang/prometheus"

	"github.com/outbox-platform/outbox/client"
	"github.com/outbox-platform/outbox/client/pgxoutbox"
	"github.com/outbox-platform/outbox/server"
	"github.com/outbox-platform/outbox/server/resolver"
	"github.com/outbox-platform/outbox/store"
	"github.com/outbox-platform/outbox/store/storetest"
)

// resolvingServer runs the platform's server with its resolver and returns its address.
func resolvingServer(t *testing.T, db *storetest.Database) string {
	t.Helper()
	cfg, err := server.DefaultConfig()
	if err != nil {
		t.Fatal(err)
	}
	cfg.GRPCListen, cfg.HTTPListen = "127.0.0.1:0", "127.0.0.1:0"
	log, w := slog.New(slog.DiscardHandler), db.Writer(t, store.WriterConfig{})
	s, err := server.New(cfg, db.Store, w, log, prometheus.NewRegistry())
	if err != nil {
		t.Fatal(err)
	}
	r, err := resolver.New(resolver.Config{}, db.Store, w, s.Sessions(), log, prometheus.NewRegistry())
	if err != nil {
		t.Fatal(err)
	}
	s.Sessions().Watch(r)
	ctx, cancel := context.WithCancel(context.WithoutCancel(t.Context()))
	done := make(chan error, 2)
	go func() { done <- s.Serve(ctx) }()
	go func() { done <- r.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		for range 2 {
			if err := <-done; err != nil && !errors.Is(err, context.Canceled) {
				t.Error(err)
			}
		}
	})
	return s.GRPCAddr()
}

// TestTheRealResolverAsksAnotherInstance: an instance dies at each step of the protocol; the platform's own resolver asks
// another one, over its session, and the decision is the database's truth. It reports how long that took.
func TestTheRealResolverAsksAnotherInstance(t *testing.T) {
	platform := storetest.New(t)
	source := platform.Source(t, "orders")
	addr := resolvingServer(t, platform)
	w := newWorld(t, options{detached: true})
	instance := func() *client.Client {
		c, err := client.New(client.Config{Target: addr, Source: source.Name, Plaintext: true, CloseTimeout: time.Millisecond})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { c.Close() })
		if err := c.Connect(t.Context()); err != nil {
			t.Fatal(err)
		}
		return c
	}
	survivor := instance()
	if err := pgxoutbox.Register(survivor, "", w.pool, pgxoutbox.Upkeep{}); err != nil {
		t.Fatal(err)
	}
	for step, want := range map[string]client.State{"after Prepare": client.StateAborted, "after COMMIT": client.StateCommitted} {
		var times []time.Duration
		for n := range 10 {
			c := instance()
			conn, err := pgx.Connect(t.Context(), w.dsn)
			if err != nil {
				t.Fatal(err)
			}
			v := &victim{w: w, c: c, conn: conn}
			if v.tx, err = conn.Begin(t.Context()); err != nil {
				t.Fatal(err)
			}
			if err := upsert(t.Context(), v.tx, fmt.Sprint(step, n)); err != nil {
				t.Fatal(err)
			}
			v.mark()
			if err := v.a.Prepare(t.Context(), event(fmt.Sprint(step, n), "a")); err != nil {
				t.Fatal(err)
			}
			if want == client.StateCommitted {
				if err := v.tx.Commit(t.Context()); err != nil {
					t.Fatal(err)
				}
			}
			start := time.Now()
			v.die()
			storetest.Eventually(t, 20*time.Second, func() bool {
				tx, err := survivor.GetTransaction(t.Context(), v.a.ID())
				if err != nil {
					t.Fatal(err)
				}
				if tx.State != client.StatePrepared && (tx.State != want || tx.DecidedBy != "check-back" || tx.Evidence == "") {
					t.Fatalf("%s: %+v", step, tx)
				}
				return tx.State == want
			})
			times = append(times, time.Since(start))
		}
		slices.Sort(times)
		if times[len(times)/2] > time.Second {
			t.Errorf("killed %s: decided only after %v", step, times)
		}
		t.Logf("killed %s: decided after %v (median), %v (slowest of %d)", step, times[len(times)/2], times[len(times)-1], len(times))
	}
	if n := survivor.Stats().Checked; n < 20 {
		t.Errorf("%d check-back answers", n)
	}
}
