package system_test

import (
	"testing"

	"github.com/outbox-platform/outbox/test/system/orders"
)

// TestEveryCommittedEventArrivesOnce is the main job without faults, on both kinds of broker, at a rate that the machine can
// take and on the oldest and the newest PostgreSQL.
func TestEveryCommittedEventArrivesOnce(t *testing.T) {
	for name, start := range brokers {
		t.Run(name, func(t *testing.T) {
			b := start(t)
			p := deploy(t, deployment{servers: 2, relays: 2, broker: b, version: postgresFor[name], lease: steadyTTL})
			s := openShop(t, p, b, 40)
			tally := s.work(orders.Workload{
				Callers: 16, Transactions: 3000, Aggregates: 40, Rollback: 0.1, MaxEvents: 4, MaxPayload: 2000,
			})(false)
			t.Log(tally)
			if tally.Failed.Load() != 0 {
				t.Errorf("transactions failed: %q", tally.Errors())
			}
			report := s.settle(nil)
			if report.Broken() || len(report.Repeats) != 0 || report.Late.Count != 0 {
				t.Error("the history is not what was promised")
			}
			for _, process := range append(p.relays, p.servers...) {
				process.stop()
			}
			p.verify()
		})
	}
}
