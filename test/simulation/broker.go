package simulation

import (
	"context"
	"slices"
	"sort"
	"strings"
	"time"

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
	// apart says, for each record that waits in the partition of one that is refused, whether it was in its company: then it
	// is sent again on its own, and no longer in the order of the others. nil: none was.
	apart func(*relay.Record) bool
	// atOnce says of a record that will be refused whether Deliver itself refuses it; nil: it never does.
	atOnce func(*relay.Record) bool
	// again says whether a topic that was refused is looked up again by now; nil: always.
	again func() bool

	rebuilding bool            // after a fatal error, until rebuilt
	refused    map[string]bool // topics; their records are refused on the spot
}

var _ relay.Sink = (*Producer)(nil)

type underWay struct {
	d       *relay.Delivery
	written bool
	alone   bool // sent on its own
}

// Producer returns a new producer.
func (b *Broker) Producer(capacity int) *Producer {
	return &Producer{b: b, capacity: capacity, none: make(chan *relay.Delivery), refused: map[string]bool{}}
}

// rebuilt ends what a fatal error began.
func (p *Producer) rebuilt() { p.rebuilding = false }

// Deliver queues a record, or refuses it on the spot.
func (p *Producer) Deliver(d *relay.Delivery) error {
	topic := d.Record.Topic
	switch {
	case p.looks(topic):
		return &relay.SinkError{Class: relay.ClassTopic, Code: "UNKNOWN_TOPIC_OR_PART"}
	case p.atOnce != nil && p.b.refuse != nil && p.b.refuse(&d.Record) && p.atOnce(&d.Record):
		return &relay.SinkError{Class: relay.ClassRecord, Code: "MSG_SIZE_TOO_LARGE"}
	case p.rebuilding:
		return &relay.SinkError{Class: relay.ClassCluster, Code: "_STATE"}
	}
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
		if !before.written && before.alone == u.alone && before.d.Record.Topic == u.d.Record.Topic && p.partition(before.d) == p.partition(u.d) {
			return false
		}
	}
	tp, offset, refused := p.b.write(&u.d.Record, false)
	if refused != nil {
		p.queue = slices.Delete(p.queue, n, n+1)
		u.d.Err = refused
		p.reports = append(p.reports, u.d)
		if refused.Class == relay.ClassTopic {
			p.refused[u.d.Record.Topic] = true
		} else {
			p.separate(u.d)
		}
		return true
	}
	u.written = true
	u.d.Partition, u.d.Offset, u.d.Err = tp.Partition, offset, nil
	return true
}

// separate sends on its own what was in the company of a refused record.
func (p *Producer) separate(refused *relay.Delivery) {
	for _, u := range p.queue {
		if p.apart != nil && !u.written && !u.alone && u.d.Record.Topic == refused.Record.Topic && p.partition(u.d) == p.partition(refused) {
			u.alone = p.apart(&u.d.Record)
		}
	}
}

func (p *Producer) partition(d *relay.Delivery) int32 {
	t := p.b.topics[d.Record.Topic]
	if t == nil {
		return 0
	}
	return relay.Partition(d.Record.Key, int32(len(t.partitions))) //nolint:gosec // few
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
	p.rebuilding = p.rebuilding || class == relay.ClassFatal
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

// looks reports whether a topic is refused, and looks it up again if it is time.
func (p *Producer) looks(topic string) (refused bool) {
	if p.refused[topic] && (p.again == nil || p.again()) {
		delete(p.refused, topic)
	}
	return p.refused[topic]
}

// Partitions counts partitions.
func (p *Producer) Partitions(ctx context.Context, names []string) (map[string]int32, error) {
	counts := map[string]int32{}
	return counts, p.ask(func() error {
		topics, err := p.Topics(ctx, names)
		for _, t := range topics {
			counts[t.Name] = t.Partitions
		}
		return err
	})
}

// ask makes a call that is no Deliver.
func (p *Producer) ask(do func() error) error {
	if p.access != nil {
		return p.access(do)
	}
	return do()
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
	return p.ask(read)
}

// OffsetsForTimes goes by the records' own timestamps.
func (p *Producer) OffsetsForTimes(_ context.Context, at map[relay.TopicPartition]time.Time, most int64) (map[relay.TopicPartition]int64, error) {
	found := map[relay.TopicPartition]int64{}
	ask := func() error {
		if p.b.down {
			return &relay.SinkError{Class: relay.ClassCluster, Code: "ALL_BROKERS_DOWN"}
		}
		for tp, since := range at {
			t := p.b.topics[tp.Topic]
			if t == nil || t.missing || int(tp.Partition) >= len(t.partitions) {
				continue
			}
			all := t.partitions[tp.Partition]
			first, end := slices.IndexFunc(all, func(r relay.Record) bool { return !r.Timestamp.Before(since) }), int64(len(all))
			found[tp] = end
			if first >= 0 {
				found[tp] = max(int64(first), end-most)
			}
		}
		return nil
	}
	return found, p.ask(ask)
}

// Topics returns what the cluster has of the topics named, or all.
func (p *Producer) Topics(_ context.Context, names []string) (found []store.Topic, err error) {
	if p.b.down {
		return nil, &relay.SinkError{Class: relay.ClassCluster, Code: "ALL_BROKERS_DOWN"}
	}
	for name, t := range p.b.topics {
		if !t.missing && (names == nil || slices.Contains(names, name)) {
			found = append(found, store.Topic{Name: name, Partitions: int32(len(t.partitions)), MaxMessageBytes: 1 << 20}) //nolint:gosec // few
		}
	}
	slices.SortFunc(found, func(a, b store.Topic) int { return strings.Compare(a.Name, b.Name) })
	return found, nil
}

// Close gives everything up.
func (p *Producer) Close(context.Context) error {
	p.giveUp(relay.ClassPurged)
	return nil
}
