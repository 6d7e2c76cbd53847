package store

import "time"

// background are the requests that nobody waits for and of which there may be thousands at once: a source's database comes
// back, and all that was in doubt is decided. They must not be in the way of those that somebody waits for, and must not
// starve either. So they are never in one batch with others, only one batch of them is in flight, it is small, and after
// each the writer rests from them, if others use it, for as many times as long as it took.
//
// A batch is also a transaction that the relays' horizon waits for: what others commit meanwhile is read after it has ended.
//
// All of it is guarded by the queue's lock.
type background struct {
	q        *queue
	ready    ring
	inFlight int // 0 or 1
	rests    bool
	timer    *time.Timer

	others  time.Time // when the last request came that is not of the background
	began   time.Time
	resting bool
}

const (
	// backgroundBatch bounds the requests in a batch.
	backgroundBatch = 24
	// backgroundRest is how many times as long as a batch took the writer then rests from the background.
	backgroundRest = 2
	// longestRest bounds it: a batch may have waited for the store to come back.
	longestRest = 250 * time.Millisecond
	// othersLast is how long after their last request others are believed to use the writer.
	othersLast = time.Second
)

func (b *background) init(q *queue) {
	b.q, b.rests = q, true
	b.timer = time.AfterFunc(time.Hour, b.rested)
	b.timer.Stop()
}

// due reports whether a batch may go now.
func (b *background) due() bool {
	return b.ready.len() > 0 && b.inFlight == 0 && (!b.resting || b.q.closing)
}

// batch moves requests to out. They carry no events, so that their number bounds their size.
func (b *background) batch(out []*Request) []*Request {
	b.inFlight++
	b.began = time.Now()
	for ; b.ready.len() > 0 && len(out) < min(backgroundBatch, b.q.maxBatch); b.ready.pop() {
		out = append(out, b.ready.first())
	}
	return out
}

// done ends a batch and begins the rest after it.
func (b *background) done() {
	b.inFlight--
	now := time.Now()
	if b.rests && now.Sub(b.others) < othersLast {
		b.resting = true
		b.timer.Reset(min(backgroundRest*now.Sub(b.began), longestRest))
	}
}

// rested ends a rest.
func (b *background) rested() {
	b.q.mu.Lock()
	defer b.q.mu.Unlock()
	b.resting = false
	b.q.signal()
}
