package system_test

import (
	"flag"
	"slices"
	"syscall"
	"testing"
	"time"

	"github.com/outbox-platform/outbox/test/system/history"
	"github.com/outbox-platform/outbox/test/system/orders"
)

// brokerAway is how long the broker is away in TestBrokerAway; `go test ./test/system -run BrokerAway -broker-away 60s`.
var brokerAway = flag.Duration("broker-away", 20*time.Second, "how long the broker is away")

// underFaults is the load during faults. Few aggregates make long queues, where a wrong order shows.
var underFaults = orders.Workload{
	Callers: 16, PerSecond: 120, Aggregates: 30, Rollback: 0.1, MaxEvents: 4, MaxPayload: 1000, Seed: 7,
}

// TestFaults lets everything that can die die in turn, under load, and recover by itself: two servers, three relays, the
// store, the broker; and lets a relay sleep for longer than its lease.
func TestFaults(t *testing.T) {
	for name, start := range brokers {
		t.Run(name, func(t *testing.T) {
			b := start(t)
			p := deploy(t, deployment{servers: 2, relays: 3, broker: b, lease: leaseTTL, version: postgresFor[name]})
			s := openShop(t, p, b, underFaults.Aggregates)
			finish := s.work(underFaults)
			pause(t, 2*time.Second)

			var struck []window
			for _, fault := range faults(t, p, b) {
				w := window{from: time.Now()}
				fault.strike()
				w.to = time.Now()
				struck = append(struck, w)
				t.Logf("%s %s: %s", w.from.UTC().Format("15:04:05.000"), fault.name, w.to.Sub(w.from).Round(time.Millisecond))
				pause(t, 2*time.Second) // under load without a fault
			}

			tally := finish(true)
			t.Log(tally)
			if tally.Failed.Load() != 0 {
				t.Errorf("transactions of the service failed: %q", tally.Errors())
			}
			report := s.settle(nil)
			if report.Broken() {
				t.Error("the history is not what was promised")
			}
			checkRepeats(t, report, struck)
			if report.Committed < 2000 {
				t.Errorf("only %d events were committed: the load was too small to prove anything", report.Committed)
			}
			s.checkTakeovers()
			for _, process := range append(p.relays, p.servers...) {
				process.stop()
			}
			p.verify()
		})
	}
}

// window is when a fault was in force.
type window struct{ from, to time.Time }

// checkRepeats fails when an event was published again that no fault explains, or far too many were.
func checkRepeats(t *testing.T, report *history.Report, struck []window) {
	t.Helper()
	for _, repeat := range report.Repeats {
		explained := slices.ContainsFunc(struck, func(w window) bool {
			// The effects of a fault end when leases have run out and shards are taken over, on a busy machine.
			return repeat.AppendedAt.After(w.from) && repeat.AppendedAt.Before(w.to.Add(leaseTTL+2*time.Second))
		})
		if !repeat.AppendedAt.IsZero() && !explained {
			t.Errorf("no fault explains: %s", repeat.What)
		}
	}
	// At most one record per aggregate is under way when its holder dies.
	if most := underFaults.Aggregates * len(struck); len(report.Repeats) > most {
		t.Errorf("%d repeats, at most %d can be explained", len(report.Repeats), most)
	}
}

// fault is something that goes wrong and is over when strike returns.
type fault struct {
	name   string
	strike func()
}

// What hits one relay, in every test of takeovers.

func relayDies(t *testing.T, r *service) fault {
	return fault{"kill -9 a relay", func() {
		r.kill()
		pause(t, leaseTTL+2*time.Second)
		r.start()
	}}
}

func relaySleeps(t *testing.T, r *service) fault {
	return fault{"a relay sleeps beyond its lease", func() {
		r.freeze()
		pause(t, leaseTTL+3*time.Second)
		r.thaw()
	}}
}

func relaySleepsAmidRecords(t *testing.T, r *service, b broker) fault {
	return fault{"a relay sleeps beyond its lease with records under way to a broker that sleeps too", func() {
		must(t, b.signal(syscall.SIGSTOP))
		pause(t, time.Second)
		r.freeze()
		pause(t, leaseTTL+2*time.Second)
		// Now what the sleeping relay had sent and what its successor sends are written side by side.
		must(t, b.signal(syscall.SIGCONT))
		pause(t, 2*time.Second)
		r.thaw()
	}}
}

func relaySleepsWithQueue(t *testing.T, r *service, b broker) fault {
	return fault{"a relay sleeps beyond its lease with records queued for a broker that is away", func() {
		b.kill()
		pause(t, time.Second)
		r.freeze()
		pause(t, leaseTTL+2*time.Second)
		must(t, b.restart(t.Context()))
		pause(t, 2*time.Second)
		r.thaw()
	}}
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func faults(t *testing.T, p *platform, b broker) []fault {
	return []fault{
		{"kill -9 a server", func() {
			p.servers[0].kill()
			pause(t, 2*time.Second)
			p.servers[0].start()
		}},
		relayDies(t, p.relays[0]),
		{"immediate shutdown of the store", func() {
			must(t, p.store.StopImmediate(t.Context()))
			pause(t, time.Second)
			must(t, p.store.Restart(t.Context()))
		}},
		{"the store is away until all leases have run out", func() {
			must(t, p.store.StopImmediate(t.Context()))
			pause(t, leaseTTL+time.Second)
			must(t, p.store.Restart(t.Context()))
		}},
		{"kill -9 the store", func() {
			p.store.Kill()
			must(t, p.store.Restart(t.Context()))
		}},
		{"kill -9 the broker", func() {
			b.kill()
			pause(t, 2*time.Second)
			must(t, b.restart(t.Context()))
		}},
		relaySleeps(t, p.relays[1]),
		relaySleepsAmidRecords(t, p.relays[0], b),
		relaySleepsWithQueue(t, p.relays[2], b),
		{"a server sleeps", func() {
			p.servers[1].freeze()
			pause(t, 3*time.Second)
			p.servers[1].thaw()
		}},
		{"kill -9 a relay and both servers at once", func() {
			p.relays[2].kill()
			p.servers[0].kill()
			p.servers[1].kill()
			pause(t, time.Second)
			p.servers[0].start()
			p.servers[1].start()
			p.relays[2].start()
		}},
	}
}

// checkTakeovers fails when no shard changed its holder: then the faults proved nothing.
func (s *shop) checkTakeovers() {
	s.t.Helper()
	epochs := map[int]map[int64]bool{}
	takeovers := 0
	for _, r := range s.read() {
		if epochs[r.Shard] == nil {
			epochs[r.Shard] = map[int64]bool{}
		}
		if !epochs[r.Shard][r.Epoch] && len(epochs[r.Shard]) > 0 {
			takeovers++
		}
		epochs[r.Shard][r.Epoch] = true
	}
	s.t.Logf("%d takeovers of %d shards show in the records", takeovers, len(epochs))
	if takeovers < 5 {
		s.t.Errorf("only %d takeovers", takeovers)
	}
}

// TestBrokerAway takes the broker away for a while under load: nothing is refused, no attempt is counted, nothing is set
// aside, and the backlog drains in order.
func TestBrokerAway(t *testing.T) {
	for name, start := range brokers {
		t.Run(name, func(t *testing.T) {
			b := start(t)
			p := deploy(t, deployment{servers: 1, relays: 2, broker: b, lease: steadyTTL})
			s := openShop(t, p, b, underFaults.Aggregates)
			finish := s.work(underFaults)
			pause(t, 2*time.Second)
			b.kill()
			pause(t, *brokerAway)
			for _, a := range p.blocked() {
				t.Errorf("blocked while the broker is away: %+v", a)
			}
			if err := b.restart(t.Context()); err != nil {
				t.Fatal(err)
			}
			pause(t, 3*time.Second)
			tally := finish(true)
			t.Log(tally)
			if tally.Failed.Load() != 0 {
				t.Errorf("transactions of the service failed: %q", tally.Errors())
			}
			report := s.settle(nil)
			if report.Broken() || report.Late.Count != 0 {
				t.Error("the history is not what was promised")
			}
			if letters := p.deadLetters(); len(letters) != 0 {
				t.Errorf("dead letters: %+v", letters)
			}
			for _, process := range append(p.relays, p.servers...) {
				process.stop()
			}
			p.verify()
		})
	}
}
