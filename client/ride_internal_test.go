package client

import (
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

// Decisions wait for a call only while calls come often, and never longer than they may.
func TestDecisionsRideWithCalls(t *testing.T) {
	for name, c := range map[string]struct {
		calls int
		gap   time.Duration
		waits bool
	}{
		"no call yet": {0, 0, false},
		"rare calls":  {50, 5 * time.Millisecond, false},
		"often":       {50, 300 * time.Microsecond, true},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				var d ride
				var mu sync.Mutex // the session's
				sent := make(chan time.Time, 2)
				for range c.calls {
					time.Sleep(c.gap) //nolint:forbidigo // of the bubble's clock
					d.called(time.Now())
				}
				began := time.Now()
				send := func() {
					mu.Lock()
					defer mu.Unlock()
					d.armed = false
					sent <- time.Now()
				}
				waits := func() bool {
					mu.Lock()
					defer mu.Unlock()
					return d.waits(send)
				}
				for range 2 { // the second rides with the first
					if got := waits(); got != c.waits {
						t.Fatalf("waits: %t", got)
					}
				}
				if !c.waits {
					return
				}
				if at := <-sent; at.Sub(began) != decisionWait {
					t.Errorf("sent after %s", at.Sub(began))
				}
				if !waits() {
					t.Error("the next one does not wait")
				}
				mu.Lock()
				d.called(time.Now()) // takes it along
				mu.Unlock()
				time.Sleep(2 * decisionWait) //nolint:forbidigo // of the bubble's clock
				if len(sent) != 0 {
					t.Error("sent again although a call took it along")
				}
			})
		})
	}
}
