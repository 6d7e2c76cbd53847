package store

import (
	"fmt"
	"runtime"
	"sync"
	"sync/atomic"
	"time"
)

// writersPerProcess is how many batches may be in flight. With one, callers wait for one flush of the disk; a second pays
// when so many wait that both batches are large (measured: four only make batches smaller).
const writersPerProcess = 2

// queue holds the requests of a writer between Submit and Done, and says who may work on which.
//
// A request is ready (may go into a batch), in a batch, wanting (a row of tx must be read first), or held (behind an
// earlier request of its transaction).
type queue struct {
	maxQueued, maxBatch, maxBatchBytes, secondAt int
	maxBytes                                     int64

	outstanding atomic.Int64 // submitted and not answered
	bytes       atomic.Int64

	mu         sync.Mutex
	work       sync.Cond // an appender may find work, or should end
	look       sync.Cond // the look-up may find work, or should end
	ready      ring
	urgent     int // of ready: those that somebody waits for
	ride       ride
	background background
	wanting    []*Request
	heads      map[Key]*Request // the request of each key that is not held
	inFlight   int              // batches, but for one of the background
	closing    bool
}

func (q *queue) init(cfg WriterConfig) {
	q.maxQueued, q.maxBytes = cfg.MaxQueued, cfg.MaxQueuedBytes
	q.maxBatch, q.maxBatchBytes, q.secondAt = cfg.MaxBatch, cfg.MaxBatchBytes, cfg.SecondWriterAt
	q.work.L, q.look.L = &q.mu, &q.mu
	q.ride.init(q, cfg.DecisionWait)
	q.background.init(q)
	q.heads = make(map[Key]*Request)
}

// admits refuses early, before a request is encoded.
func (q *queue) admits() error {
	if q.outstanding.Load() >= int64(q.maxQueued) || q.bytes.Load() >= q.maxBytes {
		return ErrBacklogFull
	}
	return nil
}

func (q *queue) submit(r *Request) error {
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.closing {
		return fmt.Errorf("%w: the writer is closing", ErrUnavailable)
	}
	n := q.outstanding.Load()
	if n >= int64(q.maxQueued) || n > 0 && q.bytes.Load()+r.enc.size > q.maxBytes {
		return ErrBacklogFull
	}
	q.outstanding.Add(1)
	q.bytes.Add(r.enc.size)
	if r.Kind.stores() {
		q.ride.prepared(r.enc.queued)
	}
	if !r.Background {
		q.background.others = r.enc.queued
	}
	if head, busy := q.heads[r.Key]; busy {
		if head.enc.last == nil {
			head.enc.next = r
		} else {
			head.enc.last.enc.next = r
		}
		head.enc.last = r
		return nil
	}
	q.heads[r.Key] = r
	q.put(r)
	return nil
}

// put makes a request ready, or wanting if it is a decision whose shards are not known. The lock is held.
func (q *queue) put(r *Request) {
	if r.enc.shards == 0 {
		q.wanting = append(q.wanting, r)
		q.look.Signal()
		return
	}
	if r.Background {
		q.background.ready.push(r)
	} else {
		q.ready.push(r)
		if r.urgent() {
			q.urgent++
		}
	}
	q.signal()
}

// signal wakes an appender if there is something for one. The lock is held.
func (q *queue) signal() {
	if q.mayTake() != nothing {
		q.work.Signal()
	}
}

// choice is what an appender may take.
type choice int

const (
	nothing choice = iota
	fromReady
	fromBackground
)

// mayTake says what the next batch would be made of. Whoever somebody waits for comes first, but what is of the background
// need not wait until there is nobody like that: its turn comes while a batch of them is in flight.
func (q *queue) mayTake() choice {
	switch busy := q.inFlight + q.background.inFlight; {
	case busy == writersPerProcess:
		return nothing
	case q.inFlight == 0 && q.readyGoes():
		return fromReady
	case q.background.due():
		return fromBackground
	case q.inFlight > 0 && q.ready.len() >= q.secondAt: // a second batch is put in flight only when enough wait
		return fromReady
	}
	return nothing
}

// readyGoes: decisions go alone only when no prepare is about to come that could take them along.
func (q *queue) readyGoes() bool {
	n := q.ready.len()
	return n > 0 && (q.urgent > 0 || n >= q.secondAt || q.closing || !q.ride.worthwhile())
}

// done: there will never be work again. The lock is held.
func (q *queue) done() bool { return q.closing && q.outstanding.Load() == 0 }

// take waits for work and moves the next batch into b, or returns nothing when the writer has drained. What was taken is
// given back by settle and batchDone.
func (q *queue) take(b []*Request) ([]*Request, choice) {
	q.mu.Lock()
	defer q.mu.Unlock()
	for {
		from := q.mayTake()
		for ; from == nothing; from = q.mayTake() {
			if q.done() {
				return b, nothing
			}
			q.work.Wait()
		}
		if from == fromBackground {
			return q.begin(b, from), from
		}
		q.inFlight++
		q.mu.Unlock()
		// Callers that were answered a moment ago are about to submit again: let them, the batch gets larger. It is not a
		// linger: with nobody else to run this returns at once.
		runtime.Gosched()
		q.mu.Lock()
		q.inFlight--
		if q.ready.len() > 0 { // the other appender may have taken it all meanwhile
			return q.begin(b, from), from
		}
	}
}

// begin puts a batch in flight. The lock is held.
func (q *queue) begin(b []*Request, from choice) []*Request {
	if from == fromBackground {
		b = q.background.batch(b)
	} else {
		q.inFlight++
		b = q.batch(b)
	}
	q.signal() // there may be something for the other appender
	return b
}

// batch moves requests from ready to b while they fit.
func (q *queue) batch(b []*Request) []*Request {
	bytes := int64(0)
	for q.ready.len() > 0 && len(b) < q.maxBatch {
		r := q.ready.first()
		if bytes += r.enc.size; bytes > int64(q.maxBatchBytes) && len(b) > 0 {
			break
		}
		q.popReady()
		b = append(b, r)
	}
	q.ride.taken()
	return b
}

// popReady takes the first ready request off. The lock is held.
func (q *queue) popReady() {
	if q.ready.first().urgent() {
		q.urgent--
	}
	q.ready.pop()
}

// batchDone ends what take began.
func (q *queue) batchDone(from choice) {
	q.mu.Lock()
	defer q.mu.Unlock()
	if from == fromBackground {
		q.background.done()
	} else {
		q.inFlight--
	}
	q.signal()
}

// takeWanting waits for requests that want a look-up and moves them into b, or returns false when the writer has drained.
func (q *queue) takeWanting(b []*Request) ([]*Request, bool) {
	q.mu.Lock()
	defer q.mu.Unlock()
	for len(q.wanting) == 0 {
		if q.done() {
			return b, false
		}
		q.look.Wait()
	}
	n := min(len(q.wanting), q.maxBatch)
	b = append(b, q.wanting[:n]...)
	q.wanting = append(q.wanting[:0], q.wanting[n:]...)
	return b, true
}

// settle takes requests that are about to be answered off the books and lets those held behind them go on; the callers'
// Done comes afterwards, outside the lock. known says whether the shards of the answered are certain: a decision held
// behind one needs no look-up then. Requests that lost want a look-up; they must not be touched after this.
func (q *queue) settle(answered, lost []*Request, known bool) {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.wanting = append(q.wanting, lost...)
	if len(q.wanting) > 0 {
		q.look.Signal()
	}
	for _, r := range answered {
		q.outstanding.Add(-1)
		q.bytes.Add(-r.enc.size)
		next := r.enc.next
		if next == nil {
			delete(q.heads, r.Key)
			continue
		}
		next.enc.last = r.enc.last
		if next.enc.last == next {
			next.enc.last = nil
		}
		q.heads[r.Key] = next
		if known && next.enc.shards == 0 {
			next.enc.shards = r.enc.shards
		}
		q.put(next)
	}
	if q.done() {
		q.work.Broadcast()
		q.look.Broadcast()
	}
}

// again puts a request back into the queue after a look-up.
func (q *queue) again(r *Request) {
	q.mu.Lock()
	q.put(r)
	q.mu.Unlock()
}

// expired takes the requests out of ready whose deadline has passed: the store is away, and nobody should wait longer
// only because others are before him.
func (q *queue) expired(now time.Time) []*Request {
	q.mu.Lock()
	defer q.mu.Unlock()
	var late []*Request
	for q.ready.len() > 0 && now.After(q.ready.first().enc.deadline) {
		late = append(late, q.ready.first())
		q.popReady()
	}
	for b := &q.background.ready; b.len() > 0 && now.After(b.first().enc.deadline); b.pop() {
		late = append(late, b.first())
	}
	return late
}

// drain refuses new requests from now on, and lets the loops end once everything is answered.
func (q *queue) drain() {
	q.mu.Lock()
	q.closing = true
	q.work.Broadcast()
	q.look.Broadcast()
	q.mu.Unlock()
}

// ring is a first-in, first-out queue that grows.
type ring struct {
	buf         []*Request // a power of two long
	head, count int
}

func (q *ring) len() int { return q.count }

func (q *ring) first() *Request { return q.buf[q.head] }

func (q *ring) push(r *Request) {
	if q.count == len(q.buf) {
		grown := make([]*Request, max(64, 2*len(q.buf)))
		n := copy(grown, q.buf[q.head:])
		copy(grown[n:], q.buf[:q.head])
		q.buf, q.head = grown, 0
	}
	q.buf[(q.head+q.count)&(len(q.buf)-1)] = r
	q.count++
}

func (q *ring) pop() {
	q.buf[q.head] = nil
	q.head = (q.head + 1) & (len(q.buf) - 1)
	q.count--
}
