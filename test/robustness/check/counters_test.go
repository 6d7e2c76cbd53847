package check_test

import (
	"slices"
	"testing"

	"github.com/outbox-platform/outbox/test/robustness/check"
	"github.com/outbox-platform/outbox/test/robustness/driver"
	"github.com/outbox-platform/outbox/test/robustness/journal"
)

// TestCounters miscounts one thing at a time.
func TestCounters(t *testing.T) {
	relays := func(name string, value float64) func(*world) {
		return func(w *world) { w.Counters.Relays["outbox_"+name] = value }
	}
	servers := func(name string, value float64) func(*world) {
		return func(w *world) { w.Counters.Servers["outbox_"+name] = value }
	}
	for _, test := range []struct {
		name  string
		wrong bool
		harm  func(*world)
	}{
		{"all is counted", false, func(*world) {}},
		{"nobody answers", false, func(w *world) { w.Counters = check.Counters{} }},
		{"more is published than Kafka has, by relays that were killed", true, func(w *world) { w.Counters.Published, w.Disturbances = 7, 1 }},
		{"less is", false, func(w *world) { w.Counters.Published, w.Disturbances = 5, 1 }},
		{"an acknowledged record is not counted", true, relays("published_total", 5)},
		{"a relay that was killed had counted it", false, func(w *world) {
			relays("published_total", 5)(w)
			w.Counters.RelaysRestarted = true
		}},
		{"something is blocked when all is published", true, relays(`blocked_aggregates{cause="in_doubt"}`, 1)},
		{"there is a backlog when all is published", true, relays(`shard_backlog_events{shard="1"}`, 2)},
		{"a segment was corrupt", true, relays("corrupt_total", 1)},
		{"a record was refused without a fault", true, relays(`kafka_errors_total{class="record"}`, 1)},
		{"a duplicate is suppressed, and nobody took over", true, relays("duplicates_suppressed_total", 1)},
		{"a duplicate is suppressed at a takeover", false, func(w *world) {
			relays("duplicates_suppressed_total", 1)(w)
			relays("takeovers_total", 2)(w)
		}},
		{"an aborted event is not dropped", true, relays("dropped_total", 0)},
		{"an acknowledged Prepare is not counted", true, servers("prepares_total", 4)},
		{"a Prepare is counted many times", true, servers("prepares_total", 50)},
		{"a server that was killed had counted it", false, func(w *world) {
			servers("prepares_total", 4)(w)
			w.Counters.ServersRestarted = true
		}},
		{"spilled: it is counted as a Publish", false, func(w *world) {
			servers("prepares_total", 4)(w)
			servers(`decisions_total{method="publish",state="committed"}`, 1)(w)
			w.note(journal.Info, journal.Get, driver.Sync, w.txs[0])
		}},
		{"a Commit is not counted", true, servers(`decisions_total{method="client",state="committed"}`, 2)},
		{"an Abort is not counted", true, servers(`decisions_total{method="client",state="aborted"}`, 0)},
		{"Aborts are counted that nobody sent", true, servers(`decisions_total{method="client",state="aborted"}`, 40)},
		{"a decision that was found out is not counted", true, func(w *world) {
			servers(`resolved_transactions_total{method="direct",state="committed"}`, 0)(w)
			servers(`decisions_total{method="client",state="committed"}`, 4)(w)
		}},
		{"a fault may have lost the answer", false, func(w *world) {
			servers(`decisions_total{method="client",state="committed"}`, 2)(w)
			w.fault("kill-driver", 1)
		}},
	} {
		t.Run(test.name, func(t *testing.T) {
			w := well()
			test.harm(w)
			violations, _, err := check.Check(w.Run)
			if err != nil {
				t.Fatal(err)
			}
			found := slices.ContainsFunc(violations, func(v check.Violation) bool { return v.Invariant == "I14" })
			if found != test.wrong || len(violations) > 1 {
				t.Errorf("%+v", violations)
			}
		})
	}
}
