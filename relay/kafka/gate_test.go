package kafka

import (
	"errors"
	"fmt"
	"slices"
	"testing"
	"time"

	broker "github.com/outbox-platform/outbox/embedded/kafka"
	"github.com/outbox-platform/outbox/relay"
)

// gate delivers as the relay does: at most one unacknowledged record per key, and what is not acknowledged is delivered
// again before anything newer of its key.
type gate struct {
	tb     testing.TB
	s      *Sink
	topic  string
	each   int // records per key
	next   map[string]int
	wait   []*relay.Delivery // refused on the spot, to be tried again
	left   int
	again  map[relay.Class]int // reports that made a record be delivered again
	onDone func(done int)      // called after each acknowledgement
	// In transactional mode:
	epoch   int64
	onFatal func() // called when the producer is gone
}

// run delivers each records of every key and returns when all are acknowledged.
func (g *gate) run(keys int) {
	g.tb.Helper()
	g.next, g.again = map[string]int{}, map[relay.Class]int{}
	g.left = keys * g.each
	for i := range keys {
		g.advance(fmt.Sprintf("key-%03d", i))
	}
	timeout := time.After(4 * patience)
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	done := 0
	for g.left > 0 {
		select {
		case d := <-g.s.Reports():
			if g.report(d) {
				done++
				if g.onDone != nil {
					g.onDone(done)
				}
			}
		case <-tick.C:
			again := g.wait
			g.wait = nil
			for _, d := range again {
				g.deliver(d)
			}
		case <-timeout:
			_, why := g.s.Healthy()
			g.tb.Fatalf("%d records left; health %q, queued %d", g.left, why, g.s.Queued())
		}
	}
}

// report handles one; true: a record is done.
func (g *gate) report(d *relay.Delivery) bool {
	key := string(d.Record.Key)
	if d.Err == nil {
		g.left--
		g.next[key]++
		g.advance(key)
		return true
	}
	var e *relay.SinkError
	if !errors.As(d.Err, &e) || e.Class == relay.ClassRecord {
		g.tb.Fatalf("delivery %v: %v", d.Opaque, d.Err)
	}
	g.again[e.Class]++
	g.wait = append(g.wait, d)
	if e.Class == relay.ClassFatal && g.onFatal != nil && d.Epoch == g.epoch {
		g.onFatal()
	}
	return false
}

func (g *gate) advance(key string) {
	n := g.next[key]
	if n == g.each {
		return
	}
	g.deliver(delivery(g.topic, key, n, fmt.Sprintf("%s/%d", key, n)))
}

func (g *gate) deliver(d *relay.Delivery) {
	d.Epoch = g.epoch
	switch err := g.s.Deliver(d); {
	case err == nil:
	case errors.Is(err, relay.ErrSinkFull):
		g.wait = append(g.wait, d)
	default:
		var e *relay.SinkError
		if !errors.As(err, &e) || e.Class == relay.ClassRecord {
			g.tb.Fatalf("deliver %v: %v", d.Opaque, err)
		}
		g.wait = append(g.wait, d)
	}
}

// check reads everything back: nothing is lost, and a record never comes before one that precedes it was there, whatever
// was repeated. It returns the number of duplicates.
func (g *gate) check(records []broker.Record, keys int) (duplicates int) {
	g.tb.Helper()
	seen := map[string][]int{}
	for _, r := range records {
		key := string(r.Key)
		n := index(g.tb, r)
		switch have := seen[key]; {
		case slices.Contains(have, n):
			duplicates++
		case n != len(have):
			g.tb.Fatalf("%s: record %d after %v", key, n, have)
		default:
			seen[key] = append(have, n)
		}
	}
	for i := range keys {
		if key := fmt.Sprintf("key-%03d", i); len(seen[key]) != g.each {
			g.tb.Errorf("%s: %d of %d records", key, len(seen[key]), g.each)
		}
	}
	return duplicates
}
