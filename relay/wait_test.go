package relay

import (
	"testing"
	"time"

	"github.com/outbox-platform/outbox/store"
)

func TestNothingDueIsNoBusyLoop(t *testing.T) {
	r, err := New(Config{Instance: "a"}, nil, nil, nil, nil)
	if err != nil {
		t.Fatal(err)
	}
	now := time.Unix(1000, 0)
	r.lease.beat.at, r.operations.at, r.read.at = now.Add(time.Hour), now.Add(time.Hour), now.Add(time.Hour)
	s := r.core.acquire(0, 1, store.Checkpoint{})
	s.renewAt = now.Add(-time.Second) // a renewal is due, but steps are not yet
	r.checkpoint.at = now.Add(10 * time.Millisecond)
	if got := r.wait(now); got != 10*time.Millisecond {
		t.Errorf("waits %s for the step", got)
	}
	s.renewAt, s.dirty, s.phase = now.Add(time.Hour), true, phaseActive
	if got := r.wait(now); got != 10*time.Millisecond {
		t.Errorf("waits %s for the step", got)
	}
	r.checkpoint.shards, r.checkpoint.steps = []*shard{s}, make([]store.Step, 1) // to be repeated
	if got := r.wait(now); got != 10*time.Millisecond {
		t.Errorf("waits %s for the step", got)
	}
	r.checkpoint.running = true
	if got := r.wait(now); got != r.cfg.RenewEvery/2 {
		t.Errorf("waits %s with nothing to do", got)
	}
	r.stopping = true
	r.lease.beat.at = now.Add(-time.Second) // not done any more
	if got := r.wait(now); got <= 0 {
		t.Errorf("waits %s during a stop", got)
	}
	r.more = true
	if got := r.wait(now); got != 0 {
		t.Errorf("waits %s although there is more to deliver", got)
	}
}
