package store

import "time"

// ride lets decisions that nobody waits for go with the next prepare instead of in a batch of their own: that halves the
// batches, and a prepare, which somebody does wait for while he holds locks, finds the writer idle more often. It costs a
// decision DecisionWait at most, and nothing while prepares are rare.
//
// All of it is guarded by the queue's lock.
type ride struct {
	q     *queue
	wait  time.Duration
	timer *time.Timer
	armed bool // the timer runs
	over  bool // it has run out: what is ready goes now

	last time.Time     // when the last prepare came
	gap  time.Duration // between prepares, on average
}

// longestGap bounds what a pause between two prepares counts for the average.
const longestGap = 100 * time.Millisecond

func (d *ride) init(q *queue, wait time.Duration) {
	d.q, d.wait, d.gap = q, wait, longestGap
	d.timer = time.AfterFunc(time.Hour, d.end)
	d.timer.Stop()
}

// prepared takes note of a prepare or publish that came at now.
func (d *ride) prepared(now time.Time) {
	d.gap += (min(max(now.Sub(d.last), 0), longestGap) - d.gap) / 8
	d.last = now
}

// worthwhile reports whether decisions should wait for the next prepare, and then sees to it that they do not wait longer
// than they may.
func (d *ride) worthwhile() bool {
	if d.over || d.gap > d.wait {
		return false
	}
	if !d.armed {
		d.armed = true
		d.timer.Reset(d.wait)
	}
	return true
}

// taken: nothing, or the rest of a full batch, waits now.
func (d *ride) taken() {
	d.over = false
	if d.armed {
		d.armed = false
		d.timer.Stop()
	}
}

// end lets decisions go that no prepare has taken along.
func (d *ride) end() {
	d.q.mu.Lock()
	defer d.q.mu.Unlock()
	if !d.armed {
		return
	}
	d.armed, d.over = false, true
	d.q.signal()
}

// urgent reports whether somebody waits for the answer: a client's own decision is only told.
func (r *Request) urgent() bool { return r.enc.as.stores() || r.Resolution != nil }
