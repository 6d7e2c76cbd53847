package client

import "time"

// ride lets decisions, whose answers nobody waits for, go with the next call instead of in a message of their own: a message
// costs several times what a call in it costs, on both sides. It does so only while calls come that often. The session's lock
// guards it.
type ride struct {
	last  time.Time     // when the last call came that somebody waits for
	gap   time.Duration // between them, on average; 0: none has come yet
	timer *time.Timer   // nil until first used
	armed bool
}

const (
	// decisionWait is how long a decision may wait for a call.
	decisionWait = time.Millisecond
	// longestGap bounds what a pause between two calls counts for the average.
	longestGap = 100 * time.Millisecond
)

// called takes note of a call that somebody waits for: it takes the decisions along.
func (d *ride) called(now time.Time) {
	if d.gap == 0 {
		d.gap = longestGap
	}
	d.gap += (min(now.Sub(d.last), longestGap) - d.gap) / 8
	d.last = now
	if d.armed {
		d.armed = false
		d.timer.Stop()
	}
}

// waits reports whether a decision should wait for the next call; if none comes in time, send is called.
func (d *ride) waits(send func()) bool {
	if d.gap == 0 || d.gap > decisionWait {
		return false
	}
	if d.armed {
		return true
	}
	d.armed = true
	if d.timer == nil {
		d.timer = time.AfterFunc(decisionWait, send)
	} else {
		d.timer.Reset(decisionWait)
	}
	return true
}
