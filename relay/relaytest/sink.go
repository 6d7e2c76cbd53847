package relaytest

import (
	"context"
	"slices"
	"strings"
	"time"

	"github.com/outbox-platform/outbox/relay"
	"github.com/outbox-platform/outbox/store"
)

// Capacity is how many records a sink takes that are not yet reported, or whose report was not yet received.
const Capacity = 4096

// Sink is one producer of a Cluster.
type Sink struct {
	c       *Cluster
	reports chan *relay.Delivery
	// All under the cluster's lock.
	queue  []*relay.Delivery // not written
	acks   []*relay.Delivery // written, report held back
	hold   bool
	stall  bool
	onSpot error
	purges int
	closed bool
}

var _ relay.Sink = (*Sink)(nil)

// Sink returns a new producer.
func (c *Cluster) Sink() *Sink {
	s := &Sink{c: c, reports: make(chan *relay.Delivery, Capacity)}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.sinks = append(c.sinks, s)
	return s
}

// HoldAcks holds reports back: records are written all the same. False: those held back are reported.
func (s *Sink) HoldAcks(hold bool) {
	s.c.mu.Lock()
	defer s.c.mu.Unlock()
	s.hold = hold
	if !hold {
		for _, d := range s.acks {
			s.reports <- d
		}
		s.acks = nil
	}
}

// HoldWrites keeps records queued, as a producer does that cannot reach the brokers. False: what is queued is written.
func (s *Sink) HoldWrites(hold bool) {
	s.c.mu.Lock()
	defer s.c.mu.Unlock()
	s.stall = hold
	s.flush()
}

// FailDeliver lets Deliver fail on the spot with this error, relay.ErrSinkFull or a *relay.SinkError; nil ends it.
func (s *Sink) FailDeliver(err error) {
	s.c.mu.Lock()
	defer s.c.mu.Unlock()
	s.onSpot = err
}

// Unreported is the number of records whose report is held back or which are queued.
func (s *Sink) Unreported() int {
	s.c.mu.Lock()
	defer s.c.mu.Unlock()
	return len(s.acks) + len(s.queue)
}

// Purges is how often Purge was called.
func (s *Sink) Purges() int {
	s.c.mu.Lock()
	defer s.c.mu.Unlock()
	return s.purges
}

// Fatal lets the producer die and be rebuilt: everything not yet acknowledged is reported with ClassFatal, written or not.
func (s *Sink) Fatal() {
	s.c.mu.Lock()
	defer s.c.mu.Unlock()
	s.drop(relay.ClassFatal, "FATAL")
}

// drop reports everything unreported as failed.
func (s *Sink) drop(class relay.Class, code string) {
	for _, d := range append(s.acks, s.queue...) {
		d.Err = &relay.SinkError{Class: class, Code: code, Detail: "test"}
		s.reports <- d
	}
	s.acks, s.queue = nil, nil
}

// Deliver queues a record, and writes it at once when the cluster is there.
func (s *Sink) Deliver(d *relay.Delivery) error {
	s.c.mu.Lock()
	defer s.c.mu.Unlock()
	if s.onSpot != nil {
		return s.onSpot
	}
	if len(s.queue)+len(s.acks)+len(s.reports) >= Capacity {
		return relay.ErrSinkFull
	}
	s.queue = append(s.queue, d)
	s.flush()
	return nil
}

// flush writes what is queued. The cluster's lock is held.
func (s *Sink) flush() {
	if s.c.down || s.stall {
		return
	}
	for _, d := range s.queue {
		tp, offset, err := s.c.write(d.Record)
		if err != nil {
			d.Err = err
			s.reports <- d
			continue
		}
		d.Partition, d.Offset, d.Err = tp.Partition, offset, nil
		if s.hold {
			s.acks = append(s.acks, d)
		} else {
			s.reports <- d
		}
	}
	s.queue = nil
}

// Reports is where reports arrive.
func (s *Sink) Reports() <-chan *relay.Delivery { return s.reports }

// Purge drops what is queued, and what is not acknowledged.
func (s *Sink) Purge() {
	s.c.mu.Lock()
	defer s.c.mu.Unlock()
	s.purges++
	s.drop(relay.ClassPurged, "PURGED")
}

// Partitions counts partitions. While the cluster is away it fails.
func (s *Sink) Partitions(ctx context.Context, names []string) (map[string]int32, error) {
	topics, err := s.Topics(ctx, names)
	counts := map[string]int32{}
	for _, t := range topics {
		counts[t.Name] = t.Partitions
	}
	return counts, err
}

// Tail reads partitions to their end. While the cluster is away it fails.
func (s *Sink) Tail(ctx context.Context, from map[relay.TopicPartition]int64,
	fn func(tp relay.TopicPartition, offset int64, headers []store.Header),
) error {
	s.c.mu.Lock()
	if s.c.down {
		s.c.mu.Unlock()
		return &relay.SinkError{Class: relay.ClassCluster, Code: "ALL_BROKERS_DOWN", Detail: "test"}
	}
	var found []Stored
	for tp, offset := range from {
		t := s.c.topics[tp.Topic]
		if t == nil || int(tp.Partition) >= len(t.partitions) {
			s.c.mu.Unlock()
			return &relay.SinkError{Class: relay.ClassTopic, Code: "UNKNOWN_TOPIC_OR_PART", Detail: tp.Topic}
		}
		if all := t.partitions[tp.Partition]; offset < int64(len(all)) {
			found = append(found, all[offset:]...)
		}
	}
	s.c.mu.Unlock()
	for _, r := range found {
		if ctx.Err() != nil {
			return ctx.Err()
		}
		fn(r.TopicPartition, r.Offset, r.Record.Headers)
	}
	return nil
}

// OffsetsForTimes goes by the records' own timestamps. While the cluster is away it fails.
func (s *Sink) OffsetsForTimes(_ context.Context, at map[relay.TopicPartition]time.Time, most int64) (map[relay.TopicPartition]int64, error) {
	s.c.mu.Lock()
	defer s.c.mu.Unlock()
	if s.c.down {
		return nil, &relay.SinkError{Class: relay.ClassCluster, Code: "ALL_BROKERS_DOWN", Detail: "test"}
	}
	found := map[relay.TopicPartition]int64{}
	for tp, since := range at {
		t := s.c.topics[tp.Topic]
		if t == nil || int(tp.Partition) >= len(t.partitions) {
			continue
		}
		all := t.partitions[tp.Partition]
		first, end := slices.IndexFunc(all, func(r Stored) bool { return !r.Record.Timestamp.Before(since) }), int64(len(all))
		found[tp] = end
		if first >= 0 {
			found[tp] = max(int64(first), end-most)
		}
	}
	return found, nil
}

// Topics returns what the cluster knows.
func (s *Sink) Topics(_ context.Context, names []string) ([]store.Topic, error) {
	s.c.mu.Lock()
	defer s.c.mu.Unlock()
	if s.c.down {
		return nil, &relay.SinkError{Class: relay.ClassCluster, Code: "ALL_BROKERS_DOWN", Detail: "test"}
	}
	var topics []store.Topic
	for name, t := range s.c.topics {
		if names == nil || slices.Contains(names, name) {
			topics = append(topics, store.Topic{
				Name: name, Partitions: int32(len(t.partitions)), MaxMessageBytes: t.maxMessageBytes, //nolint:gosec // few
			})
		}
	}
	slices.SortFunc(topics, func(a, b store.Topic) int { return strings.Compare(a.Name, b.Name) })
	return topics, nil
}

// Close waits for what is queued until ctx ends, then purges it, and closes Reports.
func (s *Sink) Close(ctx context.Context) error {
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	for s.Unreported() > 0 {
		select {
		case <-tick.C:
			continue
		case <-ctx.Done():
		}
		s.Purge()
	}
	s.c.mu.Lock()
	defer s.c.mu.Unlock()
	if !s.closed {
		s.closed = true
		s.c.sinks = slices.DeleteFunc(s.c.sinks, func(other *Sink) bool { return other == s })
		close(s.reports)
	}
	return nil
}
