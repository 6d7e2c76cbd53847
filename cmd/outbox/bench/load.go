package bench

import (
	"context"
	"sync"
	"sync/atomic"
	"time"
)

// caller does one transaction and returns how long the caller waited for it. It belongs to one goroutine.
type caller func(ctx context.Context) (time.Duration, error)

// load is what a phase measured.
type load struct {
	transactions int64
	elapsed      time.Duration
	latency      []int64 // nanoseconds, of all callers
}

// perSecond is the rate of transactions.
func (l load) perSecond() float64 { return float64(l.transactions) / l.elapsed.Seconds() }

// closedLoop runs all callers, each as fast as it gets answers, until the duration is over or so many transactions are
// done (0: no such limit). The first error stops it.
func closedLoop(ctx context.Context, callers []caller, duration time.Duration, transactions int64) (load, error) {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	var (
		wg      sync.WaitGroup
		mu      sync.Mutex
		out     load
		started atomic.Int64
	)
	begin := time.Now()
	for _, call := range callers {
		wg.Go(func() {
			var mine []int64
			for time.Since(begin) < duration || duration == 0 {
				if n := started.Add(1); transactions > 0 && n > transactions {
					break
				}
				took, err := call(context.WithoutCancel(ctx)) // a started transaction is finished, so that its fate is known
				if err != nil {
					cancel(err)
					break
				}
				mine = append(mine, int64(took))
				if ctx.Err() != nil {
					break
				}
			}
			mu.Lock()
			out.latency = append(out.latency, mine...)
			mu.Unlock()
		})
	}
	wg.Wait()
	out.elapsed = time.Since(begin)
	out.transactions = int64(len(out.latency))
	return out, context.Cause(ctx)
}

// alternating runs a and b in turn, as one caller, and keeps their latencies apart.
func alternating(a, b caller, mu *sync.Mutex, ofA, ofB *[]int64) caller {
	turn := false
	return func(ctx context.Context) (time.Duration, error) {
		turn = !turn
		call, into := a, ofA
		if !turn {
			call, into = b, ofB
		}
		took, err := call(ctx)
		mu.Lock()
		*into = append(*into, int64(took))
		mu.Unlock()
		return took, err
	}
}
