package pgxoutbox_test

import (
	"context"
	"fmt"
	"log/slog"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/prometheus/client_golang/prometheus"

	"github.com/outbox-platform/outbox/client"
	"github.com/outbox-platform/outbox/client/pgxoutbox"
	"github.com/outbox-platform/outbox/server"
	"github.com/outbox-platform/outbox/store"
	"github.com/outbox-platform/outbox/store/storetest"
)

// bench is a service with a real server and a real store, all in one PostgreSQL.
type bench struct {
	c    *client.Client
	pool *pgxpool.Pool
}

func newBench(b *testing.B) *bench {
	b.Helper()
	platform := storetest.New(b)
	source := platform.Source(b, "orders")
	cfg, err := server.DefaultConfig()
	if err != nil {
		b.Fatal(err)
	}
	cfg.GRPCListen, cfg.HTTPListen = "127.0.0.1:0", "127.0.0.1:0"
	s, err := server.New(cfg, platform.Store, platform.Writer(b, store.WriterConfig{}), slog.New(slog.DiscardHandler), prometheus.NewRegistry())
	if err != nil {
		b.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.WithoutCancel(b.Context()))
	done := make(chan error, 1)
	go func() { done <- s.Serve(ctx) }()
	b.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			b.Error(err)
		}
	})

	x := &bench{}
	dbConfig, err := pgxpool.ParseConfig(storetest.New(b, storetest.WithoutSchema()).DSN)
	if err != nil {
		b.Fatal(err)
	}
	dbConfig.MaxConns = 70
	if x.pool, err = pgxpool.NewWithConfig(b.Context(), dbConfig); err != nil {
		b.Fatal(err)
	}
	b.Cleanup(x.pool.Close)
	if _, err := x.pool.Exec(b.Context(), schema+client.MarkerDDL); err != nil {
		b.Fatal(err)
	}
	x.c, err = client.New(client.Config{Target: s.GRPCAddr(), Source: source.Name, Plaintext: true})
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { x.c.Close() })
	if err := pgxoutbox.Register(x.c, "", x.pool, pgxoutbox.Upkeep{}); err != nil {
		b.Fatal(err)
	}
	if err := x.c.Connect(b.Context()); err != nil {
		b.Fatal(err)
	}
	return x
}

// BenchmarkInTx measures business transactions with one event of 1 KiB and the same ones bare, interleaved, so that both see
// the same machine. The difference of the medians is what the outbox costs.
func BenchmarkInTx(b *testing.B) {
	payload := string(make([]byte, 1024))
	for _, callers := range []int{1, 16} {
		b.Run(fmt.Sprint("callers=", callers), func(b *testing.B) {
			x := newBench(b)
			var (
				mu    sync.Mutex
				times [2][]time.Duration
				left  atomic.Int64
				wg    sync.WaitGroup
			)
			left.Store(int64(b.N))
			b.ResetTimer()
			for g := range callers {
				wg.Go(func() {
					for left.Add(-1) >= 0 {
						for kind := range 2 {
							start := time.Now()
							err := pgxoutbox.InTx(b.Context(), x.pool, x.c, pgxoutbox.Options{}, func(tx *pgxoutbox.Tx) error {
								if err := upsert(b.Context(), tx, fmt.Sprint(g)); err != nil || kind == 0 {
									return err
								}
								return tx.Publish(event(fmt.Sprint(g), payload))
							})
							if err != nil {
								b.Error(err)
								return
							}
							mu.Lock()
							times[kind] = append(times[kind], time.Since(start))
							mu.Unlock()
						}
					}
				})
			}
			wg.Wait()
			b.StopTimer()
			report(b, "bare", times[0])
			report(b, "with", times[1])
		})
	}
}

// BenchmarkPieces measures the steps of one caller's transaction.
func BenchmarkPieces(b *testing.B) {
	x := newBench(b)
	ctx := b.Context()
	names := []string{"begin", "business", "marker", "prepare", "commit"}
	times := make([][]time.Duration, len(names))
	b.ResetTimer()
	for range b.N {
		var (
			tx  pgx.Tx
			a   *pgxoutbox.Attempt
			err error
		)
		for i, step := range []func() error{
			func() error { tx, err = x.pool.Begin(ctx); return err },
			func() error { return upsert(ctx, tx, "1") },
			func() error { a, err = pgxoutbox.Mark(ctx, tx, x.c, pgxoutbox.Options{}); return err },
			func() error { return a.Prepare(ctx, event("1", uuid.NewString())) },
			func() error { return tx.Commit(ctx) },
		} {
			start := time.Now()
			if err := step(); err != nil {
				b.Fatal(names[i], err)
			}
			times[i] = append(times[i], time.Since(start))
		}
		a.AfterCommit()
	}
	b.StopTimer()
	for i, n := range names {
		report(b, n, times[i])
	}
}

func report(b *testing.B, what string, d []time.Duration) {
	b.Helper()
	slices.Sort(d)
	b.ReportMetric(float64(d[len(d)/2].Microseconds()), what+"-p50-µs")
	b.ReportMetric(float64(d[len(d)*99/100].Microseconds()), what+"-p99-µs")
}

// BenchmarkDrain measures how fast spilled requests of 1 KiB are drained, over so many aggregates. Under load, spilling ends only
// when this is faster than new ones come.
func BenchmarkDrain(b *testing.B) {
	for _, aggregates := range []int{1, 10, 1000} {
		b.Run(fmt.Sprint("aggregates=", aggregates), func(b *testing.B) {
			x := newBench(b)
			rows := make([][]any, b.N)
			for i := range rows {
				id := client.NewID()
				r, err := x.c.Encode(b.Context(), id, client.DatabaseTransaction{}, event(fmt.Sprint(i%aggregates), string(make([]byte, 1024))))
				if err != nil {
					b.Fatal(err)
				}
				rows[i] = []any{id, r.Bytes()}
			}
			b.ResetTimer()
			_, err := x.pool.CopyFrom(b.Context(), pgx.Identifier{"outbox_marker"}, []string{"id", "spilled"}, pgx.CopyFromRows(rows))
			if err != nil {
				b.Fatal(err)
			}
			storetest.Eventually(b, 5*time.Minute, func() bool { return x.c.Stats().Drained == uint64(b.N) })
			b.StopTimer()
			b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "drained/s")
		})
	}
}
