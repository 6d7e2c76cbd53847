package postgres_test

import (
	"strconv"
	"testing"
	"time"
)

// eventually waits until a condition that offers no signal holds.
func eventually(t *testing.T, condition func() bool) {
	t.Helper()
	deadline := time.After(30 * time.Second)
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	for !condition() {
		select {
		case <-deadline:
			t.Fatal("condition did not hold within 30 s")
		case <-tick.C:
		}
	}
}

func itoa(n int) string { return strconv.Itoa(n) }
