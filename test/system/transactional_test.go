package system_test

import (
	"context"
	"strings"
	"testing"
	"time"

	"github.com/twmb/franz-go/pkg/kgo"

	"github.com/outbox-platform/outbox/relay"
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
		t.Errorf("a repeat: %s", repeat.What)
		p.logShard(repeat.Shard)
		logPartition(t, b, repeat.First, repeat.Again)
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

// logPartition logs what a partition holds around two records: all of every producer, whatever became of its transaction, and the
// markers that say what did.
func logPartition(t *testing.T, b broker, first, again *history.Record) {
	t.Helper()
	const around = 10
	from := max(min(first.Offset, again.Offset)-around, 0)
	reader, err := kgo.NewClient(kgo.SeedBrokers(strings.Split(b.Bootstrap(), ",")...), kgo.KeepControlRecords(), kgo.ConsumePartitions(
		map[string]map[int32]kgo.Offset{again.Topic: {again.Partition: kgo.NewOffset().At(from)}}))
	if err != nil {
		t.Fatal(err)
	}
	defer reader.Close()
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second) // there may be nothing behind it
	defer cancel()
	for at := from; at < again.Offset+around && ctx.Err() == nil; {
		reader.PollFetches(ctx).EachRecord(func(r *kgo.Record) {
			if at = r.Offset + 1; at > again.Offset+around {
				return
			}
			what := "record"
			if r.Attrs.IsControl() {
				what = map[byte]string{0: "ABORT", 1: "COMMIT"}[r.Key[3]]
			}
			for _, h := range r.Headers {
				if h.Key == relay.EpochHeader {
					what += " of " + string(h.Value)
				}
			}
			t.Logf("%s/%d@%d %s producer %d epoch %d: %s", r.Topic, r.Partition, r.Offset, r.Timestamp.UTC().Format("15:04:05.000"),
				r.ProducerID, r.ProducerEpoch, what)
		})
	}
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
