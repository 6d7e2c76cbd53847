package store_test

import (
	"fmt"
	"sync"
	"testing"

	"github.com/outbox-platform/outbox/store"
	"github.com/outbox-platform/outbox/store/storetest"
)

// BenchmarkReader is a relay that catches up: it reads and decodes events of 1 KiB, one to a transaction, with their
// decisions.
func BenchmarkReader(b *testing.B) {
	db := storetest.New(b)
	w := runWriter(b, db.Store, store.WriterConfig{})
	const events = 20_000
	payload := make([]byte, 1024)
	var callers sync.WaitGroup
	for c := range 200 {
		callers.Go(func() {
			ev := order(fmt.Sprint(c))
			ev.Payload = payload
			for range events / 200 {
				k := storetest.Key(1)
				a, err := w.Do(b.Context(), prepare(k, ev))
				if err == nil {
					_, err = w.Do(b.Context(), commit(k, a.Shards))
				}
				if err != nil {
					b.Error(err)
					return
				}
			}
		})
	}
	callers.Wait()
	r := openReader(b, db.Store)
	b.ReportAllocs()
	b.ResetTimer()
	n := 0
	for range b.N {
		cursors := cursorsAtStart(db.Store)
		for {
			segments := read(b, r, cursors)
			if len(segments) == 0 {
				break
			}
			for i := range segments {
				cursors[segments[i].Shard].Position = segments[i].Position
				if err := segments[i].Records(func(rec *store.Record) bool {
					if !rec.IsDecision {
						n++
					}
					return true
				}); err != nil {
					b.Fatal(err)
				}
			}
		}
	}
	b.ReportMetric(float64(n)/b.Elapsed().Seconds(), "events/s")
}
