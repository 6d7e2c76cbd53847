package system_test

import (
	"testing"
	"time"
)

// eventually waits until a condition that offers no signal holds; done says what is still missing.
func eventually(t testing.TB, within time.Duration, what string, done func() (bool, string)) {
	t.Helper()
	deadline := time.After(within)
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for {
		ok, missing := done()
		if ok {
			return
		}
		select {
		case <-deadline:
			t.Fatalf("%s: not within %s: %s", what, within, missing)
		case <-t.Context().Done():
			t.Fatalf("%s: %v: %s", what, t.Context().Err(), missing)
		case <-tick.C:
		}
	}
}

// pause lets the load run for a while: how long a fault lasts is part of the test, and nothing signals its end.
func pause(t testing.TB, d time.Duration) {
	t.Helper()
	select {
	case <-t.Context().Done():
		t.Fatal(t.Context().Err())
	case <-time.After(d):
	}
}
