package system_test

import (
	"testing"
	"time"

	"github.com/outbox-platform/outbox/test/system/history"
	"github.com/outbox-platform/outbox/test/system/orders"
)

// firstCheckpoint is when a holder has long written down that it writes to a partition. If it dies before, the next one does not
// look there and repeats what it had written: see docs/guarantees.md.
const firstCheckpoint = time.Second

// TestZombiesInTransactions kills relays and lets them sleep beyond their lease, with transactions open, while others take over.
// A read_committed consumer sees every committed event once and in order, and nothing of a holder after its successor's
// first record. Once: but for the repeats that docs/guarantees.md names.
func TestZombiesInTransactions(t *testing.T) {
	b := newApacheBroker(t)
	p := deploy(t, deployment{servers: 1, relays: 2, broker: b, lease: leaseTTL, env: []string{"OUTBOX_KAFKA_TRANSACTIONAL=true"}})
	s := openShop(t, p, b, underFaults.Aggregates)
	s.committed = true
	finish := s.work(underFaults)
	pause(t, 3*time.Second)
	for _, fault := range []fault{
		relaySleeps(t, p.relays[1]),
		relayDies(t, p.relays[0]),
		relaySleepsAmidRecords(t, p.relays[0], b),
		relaySleepsWithQueue(t, p.relays[1], b),
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
	for _, repeat := range report.Repeats {
		if p.tailCutShort(repeat.Shard, repeat.Epoch) {
			t.Logf("the holder said that it might repeat: %s", repeat.What)
			continue
		}
		if !repeat.AppendedAt.IsZero() && repeat.Since < firstCheckpoint && repeat.Epoch == repeat.FirstEpoch+1 {
			t.Logf("among the shard's first records in that partition, before its holder's next checkpoint: %s", repeat.What)
			continue
		}
		t.Errorf("a repeat: %s", repeat.What)
		p.logShard(repeat.Shard)
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
