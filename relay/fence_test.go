package relay_test

import (
	"context"
	"sync"
	"testing"
	"time"

	"github.com/outbox-platform/outbox/relay"
	"github.com/outbox-platform/outbox/relay/relaytest"
	"github.com/outbox-platform/outbox/store/storetest"
)

// fencer makes a sink one that fences: it takes deliveries of the epoch it was fenced for, and of no other.
type fencer struct {
	*relaytest.Sink
	mu     sync.Mutex
	away   bool            // Fence fails
	asleep chan struct{}   // Fence waits for it; nil: it does not
	epochs map[int16]int64 // fenced
	taken  int             // deliveries
}

func (f *fencer) Fences() bool { return true }

func (f *fencer) Fence(_ context.Context, shard int16, epoch int64) error {
	f.mu.Lock()
	asleep := f.asleep
	f.mu.Unlock()
	if asleep != nil {
		<-asleep
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.away {
		return &relay.SinkError{Class: relay.ClassCluster, Code: "_TIMED_OUT", Detail: "test"}
	}
	f.epochs[shard] = epoch
	return nil
}

func (f *fencer) Deliver(d *relay.Delivery) error {
	f.mu.Lock()
	fenced := f.epochs[d.Shard] == d.Epoch
	f.taken++
	f.mu.Unlock()
	if !fenced {
		return &relay.SinkError{Class: relay.ClassFatal, Code: "_STATE", Detail: "not fenced"}
	}
	return f.Sink.Deliver(d)
}

func (f *fencer) setAway(away bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.away = away
}

func (f *fencer) epochOf(shard int16) int64 {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.epochs[shard]
}

func (f *fencer) deliveries() int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.taken
}

// fencing lets the relays that are started from now on have fencers; it returns the first.
func (p *platform) fencing(change func(*fencer)) *fencer {
	f := &fencer{epochs: map[int16]int64{}}
	change(f)
	first := true
	p.wrap = func(s *relaytest.Sink) relay.Sink {
		if first {
			first, f.Sink = false, s
			return f
		}
		return &fencer{Sink: s, epochs: map[int16]int64{}}
	}
	return f
}

// TestNothingIsDeliveredBeforeTheFence: while former holders cannot be cut off, nothing is delivered, but the log is read:
// what is in doubt is parked, so that it is asked about.
func TestNothingIsDeliveredBeforeTheFence(t *testing.T) {
	p := newPlatform(t, storetest.WithShards(1))
	f := p.fencing(func(f *fencer) { f.away = true })
	p.publish(p.source, order("x", "x0"))
	tx := p.prepare(p.source, order("y", "y0"))
	a := p.start("a", func(cfg *relay.Config) { cfg.TakeoverTailTimeout = 100 * time.Millisecond })
	p.eventually("the undecided event is parked", func() bool { return p.parked() == 1 })
	p.commit(tx)
	p.publish(p.source, order("x", "x1"))
	p.caughtUp()
	if n := f.deliveries(); n != 0 {
		t.Errorf("%d deliveries before the fence", n)
	}
	f.setAway(false)
	p.wantValues("x", "x0", "x1")
	p.wantValues("y", "y0")
	a.stop(t)
	p.verify()
}

// TestCutOff: a producer that died ends the tenure. The next fences anew, and finds in Kafka what was written before.
func TestCutOff(t *testing.T) {
	p := newPlatform(t, storetest.WithShards(1))
	f := p.fencing(func(*fencer) {})
	a := p.start("a")
	p.publish(p.source, order("x", "x0"))
	p.wantValues("x", "x0")
	p.settled()
	p.eventually("offsets are written", func() bool {
		return storetest.Query[int64](t, p.db, "SELECT sum(length(offsets)) FROM outbox.shard")[0] >= 6
	})
	before := f.epochOf(0)
	a.sink.HoldAcks(true)
	p.publish(p.source, order("x", "x1"), order("x", "x2"))
	p.wantValues("x", "x0", "x1")
	a.sink.HoldAcks(false) // only what comes from now on
	p.publish(p.source, order("x", "x3"))
	p.wantValues("x", "x0", "x1", "x2", "x3")

	a.sink.HoldAcks(true)
	p.publish(p.source, order("x", "x4"))
	p.wantValues("x", "x0", "x1", "x2", "x3", "x4")
	a.sink.Fatal()
	a.sink.HoldAcks(false)
	p.publish(p.source, order("x", "x5"))
	p.wantValues("x", "x0", "x1", "x2", "x3", "x4", "x5")
	if after := f.epochOf(0); after <= before {
		t.Errorf("epoch %d after epoch %d", after, before)
	}
	p.eventually("one duplicate suppressed", func() bool { return a.metric(t, "outbox_duplicates_suppressed_total") == 1 })
	a.stop(t)
	p.verify()
}

// TestLateFenceDeliversNothing: a relay that slept while it cut others off has lost its lease meanwhile. It has cut off its
// successor, and must deliver nothing.
func TestLateFenceDeliversNothing(t *testing.T) {
	p := newPlatform(t, storetest.WithShards(1))
	asleep := make(chan struct{})
	f := p.fencing(func(f *fencer) { f.asleep = asleep })
	l, st := p.openLink()
	p.publish(p.source, order("x", "x0"))
	a := p.startOn(st, "a")
	p.eventually("a has the shard", func() bool { return a.metric(t, "outbox_held_shards") == 1 })
	l.freeze(true)
	b := p.start("b")
	p.wantValues("x", "x0")
	close(asleep)
	p.publish(p.source, order("x", "x1"))
	p.wantValues("x", "x0", "x1")
	l.freeze(false)
	p.eventually("fenced", func() bool { return a.metric(t, "outbox_fenced_total") == 1 })
	if n := f.deliveries(); n != 0 {
		t.Errorf("%d deliveries by the relay that slept", n)
	}
	b.stop(t)
	a.stop(t)
	p.verify()
}
