package simulation

import (
	"flag"
	"fmt"
	"runtime"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

var (
	schedules = flag.Int("schedules", 2000, "how many schedules TestSchedules runs")
	firstSeed = flag.Uint64("seed", 1, "the seed of the first one; the others follow")
	eventsOf  = flag.Int("events", 300, "how many events happen in each before everything heals")
	traced    = flag.Bool("story", false, "print what happens in the first schedule, and run no other")
)

// runSeed runs one schedule and returns what was violated, or "".
func runSeed(seed uint64, events int, trace func(string, ...any)) (*world, string) {
	w := newWorld(newSeeded(seed))
	if trace != nil {
		w.trace, w.store.note = trace, w.note
	}
	defer w.close()
	w.run(events)
	return w, w.failure
}

func TestSchedules(t *testing.T) {
	if *traced {
		if _, failure := runSeed(*firstSeed, *eventsOf, t.Logf); failure != "" {
			t.Fatal(failure)
		}
		return
	}
	var next, failed atomic.Int64
	var mu sync.Mutex
	total := map[string]int{}
	started := time.Now()
	var workers sync.WaitGroup
	for range runtime.GOMAXPROCS(0) {
		workers.Go(func() {
			own := map[string]int{}
			for failed.Load() < 10 {
				n := next.Add(1)
				if n > int64(*schedules) {
					break
				}
				seed := *firstSeed + uint64(n) - 1
				w, failure := runSeed(seed, *eventsOf, nil)
				if failure != "" {
					failed.Add(1)
					t.Errorf("seed %d: %s\nrepeat: go test ./test/simulation -run TestSchedules -v -story -seed %d -events %d", seed, failure, seed, *eventsOf)
				}
				for what, n := range w.count {
					own[what] += n
				}
			}
			mu.Lock()
			defer mu.Unlock()
			for what, n := range own {
				total[what] += n
			}
		})
	}
	workers.Wait()
	took := time.Since(started)
	fmt.Printf("%d schedules in %.1f s (%.0f/s): %v\n", min(next.Load(), int64(*schedules)), took.Seconds(), float64(min(next.Load(), int64(*schedules)))/took.Seconds(), total)
}
