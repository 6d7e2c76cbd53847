package bench

import (
	"testing"
	"time"
)

// history feeds a ledger: each step is one event of aggregate 0.
type step struct {
	version  uint64
	aborted  bool
	arrivals int
}

func run(t *testing.T, steps []step, order []int, last uint64) Tally {
	t.Helper()
	l := newLedger(1)
	numbers := make([]uint64, len(steps))
	for i, s := range steps {
		numbers[i] = l.open()
		if s.aborted {
			l.aborted(numbers[i])
		} else {
			l.committed(numbers[i], time.Now())
		}
	}
	if order == nil {
		for i := range steps {
			order = append(order, i)
		}
	}
	for _, i := range order {
		for range steps[i].arrivals {
			l.arrived(numbers[i], 0, steps[i].version, time.Now())
		}
	}
	return l.verdict([]uint64{last})
}

func TestLedgerFindsEveryKindOfFault(t *testing.T) {
	for name, c := range map[string]struct {
		steps []step
		order []int
		last  uint64
		want  Tally
	}{
		"all is well":   {steps: []step{{1, false, 1}, {2, false, 1}, {3, true, 0}, {3, false, 1}}, last: 3},
		"lost at end":   {steps: []step{{1, false, 1}, {2, false, 0}}, last: 2, want: Tally{Lost: 1}},
		"lost between":  {steps: []step{{1, false, 1}, {2, false, 0}, {3, false, 1}}, last: 3, want: Tally{Lost: 1}},
		"phantom":       {steps: []step{{1, false, 1}, {2, true, 1}}, last: 1, want: Tally{Phantom: 1}},
		"made up":       {steps: []step{{1, false, 1}, {2, false, 1}}, last: 1, want: Tally{Phantom: 1}},
		"reordered":     {steps: []step{{1, false, 1}, {2, false, 1}, {3, false, 1}}, order: []int{0, 2, 1}, last: 3, want: Tally{Reordered: 1}},
		"twice":         {steps: []step{{1, false, 2}, {2, false, 1}}, last: 2, want: Tally{Duplicates: 1}},
		"ahead, twice":  {steps: []step{{1, false, 1}, {2, false, 1}, {3, false, 2}}, order: []int{0, 2, 1}, last: 3, want: Tally{Duplicates: 1, Reordered: 1}},
		"never arrived": {steps: []step{{1, false, 0}}, last: 1, want: Tally{Lost: 1}},
	} {
		t.Run(name, func(t *testing.T) {
			if got := run(t, c.steps, c.order, c.last); got != c.want {
				t.Errorf("verdict %+v, want %+v", got, c.want)
			}
		})
	}
}

func TestLedgerRefusesNumbersThatWereNeverGivenOut(t *testing.T) {
	l := newLedger(1)
	l.arrived(7, 0, 1, time.Now())
	l.arrived(0, 9, 1, time.Now())
	if got := l.verdict([]uint64{0}); got != (Tally{Phantom: 2}) {
		t.Errorf("verdict %+v, want 2 phantoms", got)
	}
}

func TestLedgerGrows(t *testing.T) {
	l := newLedger(1)
	for range chunkSize + 10 {
		l.open()
	}
	l.committed(chunkSize+5, time.Now().Add(-time.Second))
	l.arrived(chunkSize+5, 0, 1, time.Now())
	since, _ := l.latencies(0)
	if q := quantile(since, 0.5); q < 900 || q > 60_000 {
		t.Errorf("latency %v ms, want about a second", q)
	}
}

func TestRollbacksAreSpreadEvenly(t *testing.T) {
	for _, share := range []float64{0, 0.1, 0.25, 0.5} {
		n := 0
		for i := 1; i <= 1000; i++ {
			if isRollback(i, share) {
				n++
			}
		}
		if n != int(1000*share) {
			t.Errorf("share %g: %d of 1000 rolled back", share, n)
		}
	}
}
