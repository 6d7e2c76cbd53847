package bench

import (
	"encoding/binary"
	"sync"
	"sync/atomic"
	"time"
)

// A payload begins with the event's number in the run, its aggregate and the aggregate's version; the rest is filler.
const payloadHeader = 8 + 4 + 8

func fillPayload(p []byte, number uint64, aggregate uint32, version uint64) {
	binary.BigEndian.PutUint64(p, number)
	binary.BigEndian.PutUint32(p[8:], aggregate)
	binary.BigEndian.PutUint64(p[12:], version)
}

func readPayload(p []byte) (number uint64, aggregate uint32, version uint64, ok bool) {
	if len(p) < payloadHeader {
		return 0, 0, 0, false
	}
	return binary.BigEndian.Uint64(p), binary.BigEndian.Uint32(p[8:]), binary.BigEndian.Uint64(p[12:]), true
}

const chunkSize = 1 << 16

// Fates of an event in the ledger beside a commit time (Unix nanoseconds, > 0).
const (
	fateOpen    = 0
	fateAborted = -1
)

// ledger knows what became of each event of a run: the truth as the callers saw it, and what arrived.
type ledger struct {
	next   atomic.Uint64
	mu     sync.Mutex
	chunks atomic.Pointer[[]*[chunkSize]atomic.Int64]

	arrivals   sync.Mutex
	aggregates []aggregateArrivals
	tally      Tally
	e2e        []int64
}

// aggregateArrivals is what arrived of one aggregate, by version: all below next, and those in ahead.
type aggregateArrivals struct {
	next  uint64
	ahead map[uint64]struct{}
}

// Tally is the verdict over a run.
type Tally struct {
	Lost       int64 `json:"lost"`
	Phantom    int64 `json:"phantom"`
	Reordered  int64 `json:"reordered"`
	Duplicates int64 `json:"duplicates"`
}

func newLedger(aggregates int) *ledger {
	l := &ledger{aggregates: make([]aggregateArrivals, aggregates)}
	for i := range l.aggregates {
		l.aggregates[i].next = 1
	}
	l.chunks.Store(&[]*[chunkSize]atomic.Int64{})
	return l
}

// open gives out the number of a new event.
func (l *ledger) open() uint64 { return l.next.Add(1) - 1 }

func (l *ledger) cell(number uint64) *atomic.Int64 {
	c := int(number / chunkSize) //nolint:gosec // a run has far fewer events
	for {
		chunks := *l.chunks.Load()
		if c < len(chunks) {
			return &chunks[c][number%chunkSize]
		}
		l.mu.Lock()
		if chunks = *l.chunks.Load(); c >= len(chunks) {
			grown := append(append([]*[chunkSize]atomic.Int64{}, chunks...), new([chunkSize]atomic.Int64))
			l.chunks.Store(&grown)
		}
		l.mu.Unlock()
	}
}

// committed notes that the event's transaction is committed.
func (l *ledger) committed(number uint64, at time.Time) { l.cell(number).Store(at.UnixNano()) }

// aborted notes that the event's transaction is rolled back.
func (l *ledger) aborted(number uint64) { l.cell(number).Store(fateAborted) }

// arrived notes a record that a consumer read. Versions of an aggregate count from 1.
func (l *ledger) arrived(number uint64, aggregate uint32, version uint64, at time.Time) {
	fate := int64(fateOpen)
	if number < l.next.Load() {
		fate = l.cell(number).Load()
	}
	l.arrivals.Lock()
	defer l.arrivals.Unlock()
	if int(aggregate) >= len(l.aggregates) || number >= l.next.Load() || fate == fateAborted {
		l.tally.Phantom++
		return
	}
	a := &l.aggregates[aggregate]
	switch {
	case version == a.next:
		a.next++
		for len(a.ahead) > 0 {
			if _, ok := a.ahead[a.next]; !ok {
				break
			}
			delete(a.ahead, a.next)
			a.next++
			l.tally.Reordered++
		}
	case version < a.next:
		l.tally.Duplicates++
		return
	default: // an earlier version is still missing
		if _, ok := a.ahead[version]; ok {
			l.tally.Duplicates++
			return
		}
		if a.ahead == nil {
			a.ahead = map[uint64]struct{}{}
		}
		a.ahead[version] = struct{}{}
	}
	if fate > 0 {
		l.e2e = append(l.e2e, max(0, at.UnixNano()-fate))
	} else {
		l.e2e = append(l.e2e, 0) // it overtook the caller's own note
	}
}

// count returns how many different events arrived.
func (l *ledger) count() int64 {
	l.arrivals.Lock()
	defer l.arrivals.Unlock()
	return int64(len(l.e2e))
}

// verdict compares what arrived with the last committed version of each aggregate, and with every aborted event.
func (l *ledger) verdict(last []uint64) Tally {
	l.arrivals.Lock()
	defer l.arrivals.Unlock()
	t := l.tally
	for i, want := range last {
		a := &l.aggregates[i]
		got := a.next - 1 + uint64(len(a.ahead))
		if got < want {
			t.Lost += int64(want - got) //nolint:gosec // small
		}
		if got > want {
			t.Phantom += int64(got - want) //nolint:gosec // small
		}
	}
	return t
}

// latencies returns the end-to-end latencies of what arrived since the mark, and the new mark.
func (l *ledger) latencies(mark int) (since []int64, now int) {
	l.arrivals.Lock()
	defer l.arrivals.Unlock()
	return append([]int64(nil), l.e2e[mark:]...), len(l.e2e)
}
