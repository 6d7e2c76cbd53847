package client_test

import (
	"fmt"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/outbox-platform/outbox/client"
	"github.com/outbox-platform/outbox/client/internal/fakeplatform"
)

// BenchmarkSession measures calls of 1 KiB events against a server that does next to nothing: what the SDK and gRPC cost. The
// server's share is in it.
func BenchmarkSession(b *testing.B) { benchmark(b, client.TransportSession) }

// BenchmarkUnary is the same without a session.
func BenchmarkUnary(b *testing.B) { benchmark(b, client.TransportUnary) }

func benchmark(b *testing.B, tr client.Transport) {
	for _, callers := range []int{1, 16, 256} {
		b.Run(fmt.Sprint("callers=", callers), func(b *testing.B) {
			p := fakeplatform.Start(b)
			p.Instant()
			c := newClient(b, p, func(cfg *client.Config) { cfg.Transport = tr })
			if tr == client.TransportSession {
				connected(b, c)
			}
			e := event("aggregate", string(make([]byte, 1024)))
			b.ReportAllocs()
			b.ResetTimer()
			before := cpuTime(b)
			var left atomic.Int64
			left.Store(int64(b.N))
			var wg sync.WaitGroup
			for range callers {
				wg.Go(func() {
					for left.Add(-1) >= 0 {
						if _, err := c.Prepare(b.Context(), client.NewID(), client.DatabaseTransaction{XID: 1}, e); err != nil {
							b.Error(err)
							return
						}
					}
				})
			}
			wg.Wait()
			b.StopTimer()
			// On a machine that does other things too, the processor's time says more than the clock's.
			b.ReportMetric(float64((cpuTime(b)-before).Microseconds())/float64(b.N), "cpu-µs/op")
			b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "calls/s")
			if s := c.Stats(); s.Messages > 0 {
				b.ReportMetric(float64(s.Calls)/float64(s.Messages), "calls/message")
			}
		})
	}
}

// cpuTime is what this process has used so far.
func cpuTime(b *testing.B) time.Duration {
	b.Helper()
	var r syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &r); err != nil {
		b.Fatal(err)
	}
	return time.Duration(r.Utime.Nano() + r.Stime.Nano())
}
