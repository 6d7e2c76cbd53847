package check_test

import (
	"fmt"
	"slices"
	"testing"
	"time"

	"github.com/outbox-platform/outbox/test/robustness/check"
	"github.com/outbox-platform/outbox/test/robustness/driver"
	"github.com/outbox-platform/outbox/test/robustness/journal"
)

// fault is one that begins now and lasts so long.
func (w *world) fault(name string, lasts time.Duration) {
	w.note(journal.Invoke, journal.Fault, "", [16]byte{}).State = name
	w.now += int64(lasts)
	w.note(journal.OK, journal.Fault, "", [16]byte{}).State = name
}

// later lets an event be seen so long after it was.
func (w *world) later(e journal.Event, by time.Duration) { w.Seen[e.ID] += int64(by) }

// TestTornDuringTheRun: a transaction may be visible in parts for as long as something explains it.
func TestTornDuringTheRun(t *testing.T) {
	const long = time.Minute
	for _, test := range []struct {
		name string
		torn bool
		do   func(*world)
	}{
		{"not for long", false, func(w *world) { w.later(w.event(0, 1), time.Second) }},
		{"for a minute", true, func(w *world) { w.later(w.event(0, 1), long) }},
		{"while a relay is away", false, func(w *world) {
			w.fault("kill-relay", long)
			w.later(w.event(0, 1), long)
		}},
		{"long after a relay was away", true, func(w *world) {
			w.fault("kill-relay", time.Second)
			w.later(w.event(0, 1), 2*long)
		}},
		{"while a service is away", true, func(w *world) {
			w.fault("kill-driver", long)
			w.later(w.event(0, 1), long)
		}},
		{"while an operator is waited for", false, func(w *world) {
			w.later(w.event(0, 1), long)
			w.Blocked["shop:thing/a"] = true
		}},
		{"while an earlier event of the aggregate is not visible", false, func(w *world) {
			w.transaction(driver.Sync, event("d", 1))
			w.transaction(driver.Sync, event("e", 1), event("d", 2))
			for i := range 2 {
				d := w.Entries[w.prepare[len(w.prepare)-1-i]].Events
				w.later(d[len(d)-1], long)
			}
		}},
		{"while a transaction before it is undecided", false, func(w *world) {
			w.transaction(driver.Sync, event("e", 1), event("c", 1))
			w.later(w.Entries[w.prepare[len(w.prepare)-1]].Events[1], long)
			w.Decided[w.txs[3]] = w.now + int64(long)
		}},
		{"and a transaction before it is decided", true, func(w *world) {
			w.transaction(driver.Sync, event("e", 1), event("c", 1))
			w.later(w.Entries[w.prepare[len(w.prepare)-1]].Events[1], long)
		}},
		{"and the store's clock had jumped when the one before it was decided", false, func(w *world) {
			w.transaction(driver.Sync, event("e", 1), event("c", 1))
			w.later(w.Entries[w.prepare[len(w.prepare)-1]].Events[1], long)
			w.Decided[w.txs[3]] = -int64(time.Hour)
		}},
		{"on a machine that can do no more", false, func(w *world) {
			w.later(w.event(0, 1), long)
			w.Saturated = true
		}},
	} {
		t.Run(test.name, func(t *testing.T) {
			w := well()
			test.do(w)
			w.Counters = check.Counters{}
			violations, summary, err := check.Check(w.Run)
			if err != nil {
				t.Fatal(err)
			}
			if found := slices.ContainsFunc(violations, func(v check.Violation) bool { return v.Invariant == "I3" }); found != test.torn || len(violations) > 1 {
				t.Errorf("%+v", violations)
			}
			if p := summary.Pace; p.Torn.N < 2 || p.Torn.Max < 1 || p.Unexplained.Max > p.Torn.Max || !w.Saturated && p.Unexplained.Max < 30 == test.torn {
				t.Errorf("%+v", p)
			}
		})
	}
}

// many is a run of so many transactions, one every ten milliseconds.
func many(n int) *world {
	w := well()
	w.Counters = check.Counters{}
	for i := range n {
		w.now += int64(10 * time.Millisecond)
		w.transaction(driver.Sync, event(fmt.Sprintf("m-%d", i), 1))
	}
	return w
}

// TestPace: what took long without a fault is a violation when it is the rule, and every fault has its recovery.
func TestPace(t *testing.T) {
	slow := func(w *world, what string, by time.Duration) {
		for i := range w.Entries {
			if e := &w.Entries[i]; e.F == what && e.Type == journal.OK {
				e.At += int64(by)
			}
		}
	}
	unseen := func(w *world, by time.Duration) {
		for id := range w.Seen {
			w.Seen[id] += int64(by)
		}
	}
	for _, test := range []struct {
		name   string
		broken bool
		do     func(*world)
	}{
		{"fast", false, func(*world) {}},
		{"Prepare takes four seconds", true, func(w *world) { slow(w, journal.Prepare, 4*time.Second) }},
		{"Kafka has it after forty seconds", true, func(w *world) { unseen(w, 40*time.Second) }},
		{"a fault holds it up", false, func(w *world) {
			w.now = 0
			w.fault("kill-relay", time.Minute)
			unseen(w, 40*time.Second)
		}},
		{"the machine can do no more", false, func(w *world) {
			unseen(w, 40*time.Second)
			w.Saturated = true
		}},
	} {
		t.Run(test.name, func(t *testing.T) {
			w := many(150)
			test.do(w)
			violations, summary, err := check.Check(w.Run)
			if err != nil {
				t.Fatal(err)
			}
			if found := slices.ContainsFunc(violations, func(v check.Violation) bool { return v.Invariant == "I15" }); found != test.broken || len(violations) > 1 {
				t.Errorf("%+v", violations)
			}
			if p := summary.Pace; p.Publish.N < 150 || p.Prepare.N < 150 || p.FoundOut.N != 1 {
				t.Errorf("%+v", p)
			}
		})
	}
}

// TestRecovery: a fault is over when every aggregate goes on that had to wait because of it.
func TestRecovery(t *testing.T) {
	w := well()
	w.now += int64(time.Minute)
	w.transaction(driver.Sync, event("d", 1))
	w.transaction(driver.Sync, event("d", 2))
	w.fault("kill-relay", 5*time.Second)
	w.transaction(driver.Sync, event("e", 1)) // after its end
	for i, by := range []time.Duration{9 * time.Second, 11 * time.Second, 20 * time.Second} {
		w.later(w.event(len(w.prepare)-3+i, 0), by)
	}
	w.fault("kill-driver", time.Second/2) // d has waited since before it
	w.now += int64(time.Minute)
	w.fault("kill-relay", time.Second)
	_, summary, err := check.Check(w.Run)
	if err != nil {
		t.Fatal(err)
	}
	relay, service := summary.Pace.Recovery["kill-relay"], summary.Pace.Recovery["kill-driver"]
	if !slices.Equal(relay, []float64{4, 0}) || !slices.Equal(service, []float64{19.5}) {
		t.Errorf("%+v", summary.Pace.Recovery)
	}
}
