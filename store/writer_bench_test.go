package store_test

import (
	"fmt"
	"os"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/outbox-platform/outbox/store"
	"github.com/outbox-platform/outbox/store/storetest"
)

// BenchmarkWriter is the write path alone: each caller prepares one event of 1 KiB and commits it, over and over, against
// a PostgreSQL that flushes. OUTBOX_TEST_DSN names a server of one's own, which must be migrated.
func BenchmarkWriter(b *testing.B) {
	for _, callers := range []int{1, 16, 256} {
		b.Run(fmt.Sprintf("callers=%d", callers), func(b *testing.B) { benchmarkWriter(b, callers) })
	}
}

func benchmarkWriter(b *testing.B, callers int) {
	st := benchmarkStore(b)
	var batches, requests, statement atomic.Int64
	w := runWriter(b, st, store.WriterConfig{OnBatch: func(n int, _, d time.Duration) {
		batches.Add(1)
		requests.Add(int64(n))
		statement.Add(int64(d))
	}})
	payload := make([]byte, 1024)
	var left atomic.Int64
	left.Store(int64(b.N))
	b.ReportAllocs()
	b.ResetTimer()
	var all sync.WaitGroup
	for c := range callers {
		all.Go(func() {
			ev := storetest.Event("orders", "order", fmt.Sprint("aggregate-", c), "")
			ev.Payload = payload
			r := &store.Request{Events: []store.Event{ev}, Database: storetest.DatabaseTransaction(1)}
			for left.Add(-1) >= 0 {
				r.Kind, r.Key, r.Shards = store.KindPrepare, storetest.Key(1), 0
				a, err := w.Do(b.Context(), r)
				if err != nil {
					b.Error(err)
					return
				}
				r.Kind, r.Shards = store.KindCommit, a.Shards
				if _, err := w.Do(b.Context(), r); err != nil {
					b.Error(err)
					return
				}
			}
		})
	}
	all.Wait()
	b.StopTimer()
	b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "events/s")
	b.ReportMetric(float64(requests.Load())/float64(max(batches.Load(), 1)), "requests/batch")
	b.ReportMetric(float64(statement.Load())/float64(max(batches.Load(), 1))/1e3, "µs/batch")
}

func benchmarkStore(b *testing.B) *store.Store {
	if dsn := os.Getenv("OUTBOX_TEST_DSN"); dsn != "" {
		st, err := store.Open(b.Context(), store.Config{DSN: dsn})
		if err != nil {
			b.Fatal(err)
		}
		b.Cleanup(st.Close)
		return st
	}
	return storetest.New(b).Store
}
