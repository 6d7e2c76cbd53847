package history

import (
	"bytes"
	"cmp"
	"fmt"
	"slices"

	"github.com/google/uuid"
	"github.com/twmb/franz-go/pkg/kgo"
)

// Check compares committed events with the records of all their topics, read to the end. partitions is the partition
// count of each topic. The order of both slices is free.
//
// An error means that the history itself cannot be judged, because it contradicts itself.
func Check(committed []Event, records []Record, partitions map[string]int) (*Report, error) {
	c := &check{
		report:  Report{Committed: len(committed), Records: len(records)},
		events:  make(map[uuid.UUID]*event, len(committed)),
		parts:   partitions,
		streams: map[stream]int64{},
		epochs:  map[shardPlace]int64{},
		zombies: map[zombie]int{},
		topics:  map[string]kgo.TopicPartitioner{},
	}
	if err := c.index(committed); err != nil {
		return nil, err
	}
	records = slices.Clone(records)
	slices.SortFunc(records, func(a, b Record) int {
		return cmp.Or(cmp.Compare(a.Topic, b.Topic), cmp.Compare(a.Partition, b.Partition), cmp.Compare(a.Offset, b.Offset))
	})
	for i := range records {
		if i > 0 && records[i-1].Topic == records[i].Topic && records[i-1].Partition == records[i].Partition && records[i-1].Offset == records[i].Offset {
			return nil, fmt.Errorf("offset %s was read twice", at(&records[i]))
		}
		c.record(&records[i])
	}
	c.lost(committed)
	c.acrossTopics()
	return &c.report, nil
}

// event is a committed event and what was found of it.
type event struct {
	Event
	rank  int64   // its place among the aggregate's events on its topic, from 1
	first *Record // its first record
}

// stream is what has an order that offsets show: one aggregate on one partition.
type stream struct {
	aggregate, topic string
	partition        int32
}

// shardPlace is where epochs may only grow.
type shardPlace struct {
	shard     int
	topic     string
	partition int32
}

// zombie is a holder that had lost its shard, with an aggregate of it.
type zombie struct {
	shard     int
	epoch     int64
	aggregate string
}

type check struct {
	report     Report
	events     map[uuid.UUID]*event
	aggregates map[string][]*event // by version
	parts      map[string]int
	streams    map[stream]int64     // highest rank seen
	epochs     map[shardPlace]int64 // highest epoch seen
	zombies    map[zombie]int       // late records
	topics     map[string]kgo.TopicPartitioner
}

// index sorts every aggregate's events and checks that the source counted them without gaps.
func (c *check) index(committed []Event) error {
	c.aggregates = map[string][]*event{}
	for _, e := range committed {
		if c.events[e.ID] != nil {
			return fmt.Errorf("event %s is committed twice", e.ID)
		}
		known := &event{Event: e}
		c.events[e.ID] = known
		c.aggregates[e.Aggregate] = append(c.aggregates[e.Aggregate], known)
	}
	for aggregate, events := range c.aggregates {
		slices.SortFunc(events, func(a, b *event) int { return cmp.Compare(a.Version, b.Version) })
		ranks := map[string]int64{}
		for i, e := range events {
			if i > 0 && e.Version != events[i-1].Version+1 {
				return fmt.Errorf("aggregate %s: version %d follows version %d", aggregate, e.Version, events[i-1].Version)
			}
			ranks[e.Topic]++
			e.rank = ranks[e.Topic]
		}
	}
	return nil
}

// record judges one record; they come by partition and offset.
func (c *check) record(r *Record) {
	e := c.events[r.ID]
	c.epoch(e, r)
	if e == nil || e.Topic != r.Topic {
		c.report.Phantom.addf("", "%s: no committed event %s on this topic", at(r), r.ID)
		return
	}
	c.order(e, r)
	c.content(e, r)
	if want := c.partition(r); want != r.Partition {
		c.report.Misplaced.addf(e.Aggregate, "%s: key %q belongs on partition %d of %d", at(r), r.Key, want, c.parts[r.Topic])
	}
	if e.first == nil {
		e.first = r
		return
	}
	c.report.Repeats = append(c.report.Repeats, Repeat{
		Shard: r.Shard, FirstEpoch: e.first.Epoch, Epoch: r.Epoch, AppendedAt: r.AppendedAt, First: e.first, Again: r,
		What: fmt.Sprintf("%s repeats %s: event %s, aggregate %s version %d, written by %d:%d and %d:%d",
			at(r), at(e.first), e.ID, e.Aggregate, e.Version, e.first.Shard, e.first.Epoch, r.Shard, r.Epoch),
	})
}

// order: the n-th event of an aggregate may come when the first n-1 have been seen. That catches a swap as well as a gap,
// and lets repeats pass.
func (c *check) order(e *event, r *Record) {
	s := stream{e.Aggregate, r.Topic, r.Partition}
	highest := c.streams[s]
	if e.rank > highest+1 {
		c.report.Reordered.addf(e.Aggregate, "%s: aggregate %s version %d comes before an earlier event of the aggregate on this topic (%d of them were seen)",
			at(r), e.Aggregate, e.Version, highest)
	}
	// An event that is seen for the first time although a later one was seen came too late.
	if e.rank <= highest && e.first == nil {
		c.report.Reordered.addf(e.Aggregate, "%s: aggregate %s version %d comes after a later event of the aggregate", at(r), e.Aggregate, e.Version)
	}
	c.streams[s] = max(highest, e.rank)
}

// content compares a record with what was prepared and with the first record of the same event. The platform adds headers
// of its own; those that were prepared must be there, in their order.
func (c *check) content(e *event, r *Record) {
	switch {
	case r.Payload != e.Payload:
		c.report.Altered.addf(e.Aggregate, "%s: payload of event %s differs", at(r), e.ID)
	case !bytes.Equal(r.Key, e.Key) || (r.Key == nil) != (e.Key == nil):
		c.report.Altered.addf(e.Aggregate, "%s: key of event %s is %q, prepared as %q", at(r), e.ID, r.Key, e.Key)
	case len(r.Headers) < len(e.Headers) || !slices.Equal(r.Headers[:len(e.Headers)], e.Headers):
		c.report.Altered.addf(e.Aggregate, "%s: headers of event %s are %v, prepared as %v", at(r), e.ID, r.Headers, e.Headers)
	case e.first != nil && !slices.Equal(r.Headers, e.first.Headers):
		c.report.Altered.addf(e.Aggregate, "%s: headers of event %s are %v, on its first record %v", at(r), e.ID, r.Headers, e.first.Headers)
	}
}

// epoch: a holder that lost its shard delivers nothing any more, but for the one record of each aggregate that may have been
// under way.
func (c *check) epoch(e *event, r *Record) {
	p := shardPlace{r.Shard, r.Topic, r.Partition}
	highest, seen := c.epochs[p]
	c.epochs[p] = max(highest, r.Epoch)
	if !seen || r.Epoch >= highest {
		return
	}
	c.report.Late.addf("", "%s: written by %d:%d after %d:%d had written", at(r), r.Shard, r.Epoch, r.Shard, highest)
	if e == nil {
		return
	}
	z := zombie{r.Shard, r.Epoch, e.Aggregate}
	if c.zombies[z]++; c.zombies[z] > 1 {
		c.report.Zombie.addf(e.Aggregate, "%s: written by %d:%d after %d:%d had written, and not the first of aggregate %s",
			at(r), r.Shard, r.Epoch, r.Shard, highest, e.Aggregate)
	}
}

// partition is where Kafka's own default partitioner puts a key, by a foreign implementation.
func (c *check) partition(r *Record) int32 {
	p := c.topics[r.Topic]
	if p == nil {
		p = kgo.StickyKeyPartitioner(nil).ForTopic(r.Topic)
		c.topics[r.Topic] = p
	}
	return int32(p.Partition(&kgo.Record{Key: r.Key}, c.parts[r.Topic]))
}

func (c *check) lost(committed []Event) {
	for _, known := range committed {
		if e := c.events[known.ID]; e.first == nil {
			c.report.Lost.addf(e.Aggregate, "event %s, aggregate %s version %d, topic %s", e.ID, e.Aggregate, e.Version, e.Topic)
		}
	}
}

// acrossTopics compares the broker's times of an aggregate's events on different topics: an event may not have been
// written before the one that precedes it.
func (c *check) acrossTopics() {
	for aggregate, events := range c.aggregates {
		var before *event
		for _, e := range events {
			if e.first == nil || e.first.AppendedAt.IsZero() {
				continue
			}
			if before != nil && before.Topic != e.Topic && e.first.AppendedAt.Before(before.first.AppendedAt) {
				c.report.Reordered.addf(aggregate, "aggregate %s: version %d on %s was written %s before version %d on %s",
					aggregate, e.Version, at(e.first), before.first.AppendedAt.Sub(e.first.AppendedAt), before.Version, at(before.first))
			}
			before = e
		}
	}
}

// at names a record, with the broker's time where it is known: it leads to the fault of that time.
func at(r *Record) string {
	where := fmt.Sprintf("%s/%d@%d", r.Topic, r.Partition, r.Offset)
	if r.AppendedAt.IsZero() {
		return where
	}
	return where + " of " + r.AppendedAt.UTC().Format("15:04:05.000")
}
