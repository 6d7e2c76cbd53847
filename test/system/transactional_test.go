package system_test

import (
	"syscall"
	"testing"
	"time"

	"github.com/outbox-platform/outbox/test/system/history"
	"github.com/outbox-platform/outbox/test/system/orders"
)

// TestZombiesInTransactions kills relays and lets them sleep beyond their lease, with transactions open, while others take over.
// A read_committed consumer sees every committed event once and in order, and nothing of a holder after its successor's
// first record.
func TestZombiesInTransactions(t *testing.T) {
	b := newApacheBroker(t)
	p := deploy(t, deployment{servers: 1, relays: 2, broker: b, lease: leaseTTL, env: []string{"OUTBOX_KAFKA_TRANSACTIONAL=true"}})
	s := openShop(t, p, b, underFaults.Aggregates)
	s.committed = true
	finish := s.work(underFaults)
	pause(t, 3*time.Second)
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	for _, fault := range []fault{
		{"a relay sleeps beyond its lease", func() {
			p.relays[1].freeze()
			pause(t, leaseTTL+3*time.Second)
			p.relays[1].thaw()
		}},
		{"kill -9 a relay", func() {
			p.relays[0].kill()
			pause(t, leaseTTL+2*time.Second)
			p.relays[0].start()
		}},
		{"a relay sleeps beyond its lease with records under way to a broker that sleeps too", func() {
			must(b.signal(syscall.SIGSTOP))
			pause(t, time.Second)
			p.relays[0].freeze()
			pause(t, leaseTTL+2*time.Second)
			must(b.signal(syscall.SIGCONT))
			pause(t, 2*time.Second)
			p.relays[0].thaw()
		}},
		{"a relay sleeps beyond its lease with records queued for a broker that is away", func() {
			b.kill()
			pause(t, time.Second)
			p.relays[1].freeze()
			pause(t, leaseTTL+2*time.Second)
			must(b.restart(t.Context()))
			pause(t, 2*time.Second)
			p.relays[1].thaw()
		}},
	} {
		started := time.Now()
		fault.strike()
		t.Logf("%s %s: %s", started.UTC().Format("15:04:05.000"), fault.name, time.Since(started).Round(time.Millisecond))
		pause(t, 3*time.Second)
	}
	tally := finish(true)
	t.Log(tally)
	report := s.settle(nil)
	if report.Broken() {
		t.Error("the history is not what was promised")
	}
	if report.Late.Count != 0 {
		t.Errorf("%d records of holders that had lost their shard", report.Late.Count)
	}
	if len(report.Repeats) != 0 {
		t.Errorf("%d repeats", len(report.Repeats))
	}
	if report.Committed < 1000 {
		t.Errorf("only %d events were committed: the load was too small to prove anything", report.Committed)
	}
	s.checkTakeovers()
	s.compareUncommitted(report)
	for _, process := range append(p.relays, p.servers...) {
		process.stop()
	}
	p.verify()
}

// compareUncommitted logs what the transactions kept from the consumer.
func (s *shop) compareUncommitted(seen *history.Report) {
	s.t.Helper()
	s.committed = false
	defer func() { s.committed = true }()
	committed, err := orders.Committed(s.t.Context(), s.dsn)
	if err != nil {
		s.t.Fatal(err)
	}
	report, err := history.Check(committed, s.read(), shopTopics)
	if err != nil {
		s.t.Fatal(err)
	}
	s.t.Logf("a read_uncommitted consumer sees %d records more: late %d, repeats %d", report.Records-seen.Records, report.Late.Count, len(report.Repeats))
}
