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

// pacer lets callers begin no more than so many transactions per second, all together.
type pacer struct {
	every time.Duration // 0: no limit

	mu   sync.Mutex
	next time.Time
}

func newPacer(rate float64) *pacer {
	if rate == 0 {
		return &pacer{}
	}
	return &pacer{every: time.Duration(float64(time.Second) / rate)}
}

// all returns callers that wait for their turn before each transaction. What was missed while all were busy is not made up for.
func (p *pacer) all(callers []caller) []caller {
	if p.every == 0 {
		return callers
	}
	paced := make([]caller, len(callers))
	for i, call := range callers {
		paced[i] = func(ctx context.Context) (time.Duration, error) {
			if err := p.wait(ctx); err != nil {
				return 0, err
			}
			return call(ctx)
		}
	}
	return paced
}

func (p *pacer) wait(ctx context.Context) error {
	p.mu.Lock()
	now := time.Now()
	if p.next.Before(now) {
		p.next = now
	}
	turn := p.next
	p.next = turn.Add(p.every)
	p.mu.Unlock()
	timer := time.NewTimer(turn.Sub(now))
	defer timer.Stop()
	select {
	case <-timer.C:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}
