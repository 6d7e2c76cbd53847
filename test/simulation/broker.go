package simulation

import (
	"context"
	"slices"
	"sort"

	"github.com/outbox-platform/outbox/relay"
	"github.com/outbox-platform/outbox/store"
)

// Broker is Kafka in memory. It is not safe for concurrent use.
type Broker struct {
	topics map[string]*topic
	down   bool
	// refuse says that a record will never be accepted.
	refuse func(*relay.Record) bool
	// wrote is told of each record that is written; late: by a producer that is gone or has given the record up.
	wrote  func(r *relay.Record, late bool)
	ghosts []relay.Record // given up or left behind by a producer, but still on their way
}

type topic struct {
	missing    bool // unknown or not authorised
	partitions [][]relay.Record
}

// NewBroker returns a cluster with these topics.
func NewBroker(partitions int, topics ...string) *Broker {
	b := &Broker{topics: map[string]*topic{}}
	for _, name := range topics {
		b.topics[name] = &topic{partitions: make([][]relay.Record, partitions)}
	}
	return b
}

// write appends a record, or says why not.
func (b *Broker) write(r *relay.Record, late bool) (tp relay.TopicPartition, offset int64, refused *relay.SinkError) {
	t := b.topics[r.Topic]
	if t == nil || t.missing {
		return tp, 0, &relay.SinkError{Class: relay.ClassTopic, Code: "UNKNOWN_TOPIC_OR_PART"}
	}
	if b.refuse != nil && b.refuse(r) {
		return tp, 0, &relay.SinkError{Class: relay.ClassRecord, Code: "MSG_SIZE_TOO_LARGE"}
	}
	p := relay.Partition(r.Key, int32(len(t.partitions))) //nolint:gosec // few
	tp = relay.TopicPartition{Topic: r.Topic, Partition: p}
	t.partitions[p] = append(t.partitions[p], *r)
	if b.wrote != nil {
		b.wrote(r, late)
	}
	return tp, int64(len(t.partitions[p]) - 1), nil
}

// writeGhost lets one record arrive that its producer has given up.
func (b *Broker) writeGhost(i int) {
	r := b.ghosts[i]
	b.ghosts = slices.Delete(b.ghosts, i, i+1)
	_, _, _ = b.write(&r, true) // refused or not: nobody asks
}

// Producer is an idempotent producer, as relay/kafka makes one of librdkafka: it writes the records of a partition in their
// order and each once, for as long as it lives and wants it; what it gave up may be written all the same. Its owner says when
// a record is written, and when that is reported.
type Producer struct {
	b        *Broker
	capacity int
	queue    []*underWay
	reports  []*relay.Delivery
	none     chan *relay.Delivery // nothing comes through it: reports are handed over one by one
	// onDeliver is told of each record that is handed over.
	onDeliver func(*relay.Record)
	// access makes a call that is no Deliver; nil: it is made.
	access func(do func() error) error
	// onGiveUp is told when records are given up.
	onGiveUp func()
	// keep says, for each record that is given up and not written, whether it may still arrive.
	keep func() bool
}

var _ relay.Sink = (*Producer)(nil)

type underWay struct {
	d       *relay.Delivery
	written bool
}

// Producer returns a new producer.
func (b *Broker) Producer(capacity int) *Producer {
	return &Producer{b: b, capacity: capacity, none: make(chan *relay.Delivery)}
}

// Deliver queues a record.
func (p *Producer) Deliver(d *relay.Delivery) error {
	if len(p.queue)+len(p.reports) >= p.capacity {
		return relay.ErrSinkFull
	}
	if p.onDeliver != nil {
		p.onDeliver(&d.Record)
	}
	p.queue = append(p.queue, &underWay{d: d})
	return nil
}

// write lets the n-th queued record reach the brokers, if it is the first of its partition that has not; a refused one is
// reported. False: it cannot be written now.
func (p *Producer) write(n int) bool {
	u := p.queue[n]
	if u.written || p.b.down {
		return false
	}
	for _, before := range p.queue[:n] {
		if !before.written && before.d.Record.Topic == u.d.Record.Topic && p.partition(before.d) == p.partition(u.d) {
			return false
		}
	}
	tp, offset, refused := p.b.write(&u.d.Record, false)
	if refused != nil {
		p.queue = slices.Delete(p.queue, n, n+1)
		u.d.Err = refused
		p.reports = append(p.reports, u.d)
		return true
	}
	u.written = true
	u.d.Partition, u.d.Offset, u.d.Err = tp.Partition, offset, nil
	return true
}

func (p *Producer) partition(d *relay.Delivery) int32 {
	n, _ := p.Partition(d.Record.Topic, d.Record.Key)
	return n
}

// acknowledge reports the n-th queued record, which is written.
func (p *Producer) acknowledge(n int) bool {
	u := p.queue[n]
	if !u.written {
		return false
	}
	p.queue = slices.Delete(p.queue, n, n+1)
	p.reports = append(p.reports, u.d)
	return true
}

// giveUp reports everything as failed, written or not.
func (p *Producer) giveUp(class relay.Class) {
	if p.onGiveUp != nil && len(p.queue) > 0 {
		p.onGiveUp()
	}
	p.leave()
	for _, u := range p.queue {
		u.d.Err = &relay.SinkError{Class: class, Code: "GIVEN_UP"}
		p.reports = append(p.reports, u.d)
	}
	p.queue = nil
}

// giveUpOne reports the n-th queued record as failed.
func (p *Producer) giveUpOne(n int, class relay.Class) {
	u := p.queue[n]
	rest := slices.Delete(slices.Clone(p.queue), n, n+1)
	p.queue = []*underWay{u}
	p.giveUp(class)
	p.queue = rest
}

// leave lets what is not written go its own way: it may arrive late, or never.
func (p *Producer) leave() {
	for _, u := range p.queue {
		if !u.written && p.keep != nil && p.keep() {
			r := u.d.Record
			p.b.ghosts = append(p.b.ghosts, r)
		}
	}
}

// Reports returns a channel through which nothing comes.
func (p *Producer) Reports() <-chan *relay.Delivery { return p.none }

// Purge gives everything up.
func (p *Producer) Purge() { p.giveUp(relay.ClassPurged) }

// Partition tells where a key goes.
func (p *Producer) Partition(topic string, key []byte) (int32, bool) {
	t := p.b.topics[topic]
	if t == nil {
		return 0, false
	}
	return relay.Partition(key, int32(len(t.partitions))), true //nolint:gosec // few
}

// Tail reads partitions to their end.
func (p *Producer) Tail(_ context.Context, from map[relay.TopicPartition]int64,
	fn func(tp relay.TopicPartition, offset int64, headers []store.Header),
) error {
	partitions := make([]relay.TopicPartition, 0, len(from))
	for tp := range from {
		partitions = append(partitions, tp)
	}
	sort.Slice(partitions, func(i, j int) bool {
		a, b := partitions[i], partitions[j]
		return a.Topic < b.Topic || a.Topic == b.Topic && a.Partition < b.Partition
	})
	read := func() error {
		if p.b.down {
			return &relay.SinkError{Class: relay.ClassCluster, Code: "ALL_BROKERS_DOWN"}
		}
		for _, tp := range partitions {
			t := p.b.topics[tp.Topic]
			if t == nil || t.missing || int(tp.Partition) >= len(t.partitions) {
				return &relay.SinkError{Class: relay.ClassTopic, Code: "UNKNOWN_TOPIC_OR_PART"}
			}
			all := t.partitions[tp.Partition]
			for offset := from[tp]; offset < int64(len(all)); offset++ {
				fn(tp, offset, all[offset].Headers)
			}
		}
		return nil
	}
	if p.access != nil {
		return p.access(read)
	}
	return read()
}

// Topics is of no interest here.
func (p *Producer) Topics(context.Context, []string) ([]store.Topic, error) { return nil, nil }

// Close gives everything up.
func (p *Producer) Close(context.Context) error {
	p.giveUp(relay.ClassPurged)
	return nil
}
