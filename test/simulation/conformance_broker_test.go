package simulation

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/twmb/franz-go/pkg/kerr"
	"github.com/twmb/franz-go/pkg/kfake"
	"github.com/twmb/franz-go/pkg/kmsg"
	"pgregory.net/rapid"

	broker "github.com/outbox-platform/outbox/embedded/kafka"
	"github.com/outbox-platform/outbox/relay"
	"github.com/outbox-platform/outbox/relay/kafka"
	"github.com/outbox-platform/outbox/store"
)

// TestBrokerConforms runs scripts of deliveries, purges and faults against the sink of relay/kafka. What becomes of each
// delivery, and in which order records are written, is left to the sink and the brokers: the producer and the broker of the
// simulator must be able to do the very same.
func TestBrokerConforms(t *testing.T) {
	t.Parallel()
	f, err := broker.StartFake(broker.FakeConfig{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(f.Close)
	reached := map[string]int{}
	scripts := 0
	compareScripts(t, func(rt *rapid.T) {
		scripts++
		c := newKafkaComparison(rt, f.Bootstrap(), scripts, reached)
		c.faults = f.Cluster()
		defer c.end()
		operations := []func(){c.deliver, c.deliver, c.sequence, c.purge, c.fatal, c.tail, c.create, c.topics}
		for range rapid.IntRange(2, 6).Draw(rt, "operations") {
			operations[rapid.IntRange(0, len(operations)-1).Draw(rt, "operation")]()
		}
	})
	t.Logf("reached: %v", reached)
	for _, what := range []string{
		"acknowledged", "refused: class 1", "refused: class 2", "refused on the spot: class 1", "refused on the spot: class 2", "purged", "fatal", "tail", "created",
	} {
		if reached[what] == 0 && !t.Failed() {
			t.Errorf("no script reached %q: this proves nothing about it", what)
		}
	}
}

// TestBrokerConformsToApache is a script of what needs no faults, on a real Apache Kafka.
func TestBrokerConformsToApache(t *testing.T) {
	t.Parallel()
	a, err := broker.StartApache(t.Context(), broker.ApacheConfig{})
	if err != nil {
		t.Fatal("a real Apache Kafka is needed:", err)
	}
	t.Cleanup(func() {
		if err := a.Stop(context.WithoutCancel(t.Context())); err != nil {
			t.Error(err)
		}
	})
	reached := map[string]int{}
	for n := range 3 {
		script := rapid.Custom(func(rt *rapid.T) bool {
			c := newKafkaComparison(rt, a.Bootstrap(), n, reached)
			defer c.end()
			for range 3 {
				c.deliver()
				c.sequence()
				c.tail()
				c.create()
				c.topics()
			}
			return true
		})
		script.Example(n + 1)
	}
	t.Logf("reached: %v", reached)
}

// kafkaComparison is one script.
type kafkaComparison struct {
	t       *rapid.T
	sink    *kafka.Sink
	faults  *kfake.Cluster // nil: there are none
	at      string         // the brokers
	names   [3]string      // two topics that are there, and one that is not, at first
	b       *Broker
	p       *Producer
	number  int // deliveries so far
	died    bool
	reached map[string]int
}

// sent is one delivery on both sides.
type sent struct {
	number       int
	real, memory *relay.Delivery
	atOnce       error // it was refused on the spot
	reported     bool
}

// sizes of records: the second topic takes no large one, the producer no huge one.
var sizes = []int{10, 10, 10, 3000, 200_000}

const (
	topicLimit    = 2000
	producerLimit = 100_000
)

func newKafkaComparison(t *rapid.T, at string, script int, reached map[string]int) *kafkaComparison {
	c := &kafkaComparison{t: t, at: at, reached: reached}
	for i := range c.names {
		c.names[i] = fmt.Sprintf("%s-%d-%d", []string{"x", "y", "z"}[i], script, time.Now().UnixNano())
	}
	c.createTopic(0, 2, nil)
	c.createTopic(1, 1, map[string]string{"max.message.bytes": fmt.Sprint(topicLimit)})
	var err error
	c.sink, err = kafka.New(context.Background(), kafka.Config{ //nolint:usetesting // rapid's context ends with the script
		Brokers: strings.Split(at, ","), Logger: slog.New(slog.DiscardHandler), TopicRecheck: 10 * time.Millisecond, MaxMessageBytes: producerLimit,
		Linger: 5 * time.Millisecond, Compression: "none",
	})
	if err != nil {
		t.Fatal(err)
	}
	c.b.refuse = func(r *relay.Record) bool {
		return len(r.Value) > producerLimit || r.Topic == c.names[1] && len(r.Value) > topicLimit
	}
	c.p = c.b.Producer(1000)
	return c
}

func (c *kafkaComparison) createTopic(i, partitions int, configs map[string]string) {
	ctx, cancel := context.WithTimeout(context.Background(), patience) //nolint:usetesting // as above
	defer cancel()
	if err := broker.CreateTopic(ctx, c.at, c.names[i], partitions, configs); err != nil {
		c.t.Fatal(err)
	}
	if c.b == nil {
		c.b = NewBroker(0)
	}
	c.b.topics[c.names[i]] = &topic{partitions: make([][]relay.Record, partitions)}
}

func (c *kafkaComparison) end() {
	ctx, cancel := context.WithTimeout(context.Background(), patience) //nolint:usetesting // as above
	defer cancel()
	if err := c.sink.Close(ctx); err != nil {
		c.t.Errorf("closing: %v", err)
	}
}

func (c *kafkaComparison) reach(what string) { c.reached[what]++ }

// eventually waits for what offers no signal.
func (c *kafkaComparison) eventually(what string, ok func() bool) {
	deadline := time.NewTimer(patience)
	defer deadline.Stop()
	tick := time.NewTicker(2 * time.Millisecond)
	defer tick.Stop()
	for !ok() {
		select {
		case <-tick.C:
		case <-deadline.C:
			c.t.Fatalf("not within %s: %s", patience, what)
		}
	}
}

// send hands a record to the sink, with its number in a header.
func (c *kafkaComparison) send(topic int, key string, size int) *sent {
	value := make([]byte, size)
	binary.BigEndian.PutUint32(value, uint32(c.number)) //nolint:gosec // few
	s := &sent{number: c.number}
	c.number++
	record := relay.Record{Topic: c.names[topic], Key: []byte(key), Value: value, Timestamp: time.Now(), Headers: []store.Header{{Name: "n", Value: value[:4]}}}
	s.real, s.memory = &relay.Delivery{Record: record, Opaque: s}, &relay.Delivery{Record: record, Opaque: s}
	s.atOnce = c.sink.Deliver(s.real)
	return s
}

// await takes the reports of what was not refused on the spot.
func (c *kafkaComparison) await(all []*sent) {
	deadline := time.NewTimer(patience)
	defer deadline.Stop()
	for {
		left := slices.ContainsFunc(all, func(s *sent) bool { return s.atOnce == nil && !s.reported })
		if !left {
			break
		}
		select {
		case d := <-c.sink.Reports():
			s := d.Opaque.(*sent) //nolint:forcetypeassert,errcheck // as it was delivered
			if s.reported || s.atOnce != nil {
				c.t.Fatalf("%s is reported, which was reported before or refused on the spot", c.text(s))
			}
			s.reported = true
		case <-deadline.C:
			c.t.Fatalf("no report within %s", patience)
		}
	}
}

func (c *kafkaComparison) text(s *sent) string {
	out := "acknowledged"
	if err := errors.Join(s.atOnce, s.real.Err); err != nil {
		out = fmt.Sprintf("class %d, %v", classOf(err), err)
	}
	return fmt.Sprintf("record %d to %.1s with key %q of %d bytes (on the spot %v): %s", s.number, s.real.Record.Topic, s.real.Record.Key, len(s.real.Record.Value),
		s.atOnce != nil, out)
}

func classOf(err error) relay.Class {
	var e *relay.SinkError
	if errors.As(err, &e) {
		return e.Class
	}
	return 0
}

// deliver delivers some records at once, no two of a key: as a relay does.
func (c *kafkaComparison) deliver() {
	var all []*sent
	used := map[string]bool{}
	for range 1 + rapid.IntRange(0, 7).Draw(c.t, "records") {
		topic, key := rapid.IntRange(0, 2).Draw(c.t, "topic"), fmt.Sprint("k", rapid.IntRange(0, 9).Draw(c.t, "key"))
		size := sizes[rapid.IntRange(0, len(sizes)-1).Draw(c.t, "size")]
		if at := fmt.Sprint(topic, key); !used[at] {
			used[at] = true
			all = append(all, c.send(topic, key, size))
		}
	}
	c.await(all)
	c.explain(all)
}

// sequence delivers some records of one key at once: they keep their order if none is refused.
func (c *kafkaComparison) sequence() {
	topic := rapid.IntRange(0, 1).Draw(c.t, "topic")
	var all []*sent
	for range 2 + rapid.IntRange(0, 20).Draw(c.t, "records") {
		all = append(all, c.send(topic, "one", 10))
	}
	c.await(all)
	c.explain(all)
}

// purge purges what cannot be written.
func (c *kafkaComparison) purge() {
	c.known()
	h := c.faults.Fault(kfake.Fault{Keys: []kmsg.Key{kmsg.Produce}, Err: kerr.NotEnoughReplicas, Count: -1})
	var all []*sent
	for i := range 1 + rapid.IntRange(0, 5).Draw(c.t, "records") {
		all = append(all, c.send(0, fmt.Sprint("k", i), 10))
	}
	c.sink.Purge()
	c.await(all)
	h.Remove()
	c.explain(all)
	// librdkafka purges in its own time: what comes right behind may be caught as well.
	c.tryAgain("after the purge")
}

// tryAgain delivers a record until it is written.
func (c *kafkaComparison) tryAgain(key string) {
	for over := false; !over; {
		c.eventually("the cluster answers", func() bool {
			ok, _ := c.sink.Healthy()
			return ok
		})
		s := c.send(0, key, 10)
		c.await([]*sent{s})
		over = s.real.Err == nil && s.atOnce == nil
		c.explain([]*sent{s})
	}
}

// fatal lets the producer die.
func (c *kafkaComparison) fatal() {
	if c.died {
		return // each time it takes longer to come back
	}
	c.died = true
	c.known()
	h := c.faults.Fault(kfake.Fault{Keys: []kmsg.Key{kmsg.Produce}, Err: kerr.OutOfOrderSequenceNumber, Count: -1, When: ofFirstProducer()})
	var all []*sent
	for i := range 1 + rapid.IntRange(0, 5).Draw(c.t, "records") {
		all = append(all, c.send(0, fmt.Sprint("k", i), 10))
	}
	c.await(all)
	c.explain(all)
	all = []*sent{c.send(0, "while it is rebuilt", 10)} // or after that
	c.await(all)
	c.explain(all)
	c.tryAgain("after the death")
	h.Remove()
}

// ofFirstProducer says of requests whether they are of the producer whose request came first.
func ofFirstProducer() func(kmsg.Request) bool {
	const producerIDAt = 43 // in a record batch
	var first atomic.Int64  // 1 + its id
	return func(req kmsg.Request) bool {
		produce, ok := req.(*kmsg.ProduceRequest)
		if !ok || len(produce.Topics) == 0 || len(produce.Topics[0].Partitions) == 0 || len(produce.Topics[0].Partitions[0].Records) < producerIDAt+8 {
			return false
		}
		id := 1 + int64(binary.BigEndian.Uint64(produce.Topics[0].Partitions[0].Records[producerIDAt:])) //nolint:gosec // the same 64 bits
		first.CompareAndSwap(0, id)
		return first.Load() == id
	}
}

// known lets the sink know the topics.
func (c *kafkaComparison) known() {
	ctx, cancel := context.WithTimeout(context.Background(), patience) //nolint:usetesting // as above
	defer cancel()
	if _, err := c.sink.Topics(ctx, c.names[:]); err != nil {
		c.t.Fatalf("asking for topics: %v", err)
	}
}

// written reads what is there, as a foreign client sees it.
func (c *kafkaComparison) written() map[relay.TopicPartition][]int {
	ctx, cancel := context.WithTimeout(context.Background(), patience) //nolint:usetesting // as above
	defer cancel()
	all, err := broker.ReadAll(ctx, c.at, slices.Collect(maps.Keys(c.b.topics))...)
	if err != nil {
		c.t.Fatal(err)
	}
	found := map[relay.TopicPartition][]int{}
	for _, r := range all {
		tp := relay.TopicPartition{Topic: r.Topic, Partition: r.Partition}
		found[tp] = append(found[tp], int(binary.BigEndian.Uint32(r.Value)))
	}
	return found
}

// explain lets the producer in memory do what the real one did, or says why it cannot.
func (c *kafkaComparison) explain(all []*sent) {
	log := c.written()
	place := map[int]int{} // in its partition's log
	for _, numbers := range log {
		for i, n := range numbers {
			if _, twice := place[n]; twice {
				c.t.Fatalf("record %d is written twice", n)
			}
			place[n] = i
		}
	}
	fail := func(format string, args ...any) {
		c.t.Fatalf("%s\nthe deliveries:\n%s\nKafka has %v", fmt.Sprintf(format, args...), listed(all, func(s **sent) string { return c.text(*s) }), log)
	}
	queued := func(s *sent) int {
		return slices.IndexFunc(c.p.queue, func(u *underWay) bool { return u.d == s.memory })
	}
	c.p.apart = func(r *relay.Record) bool { // if another one of its partition that came later was written earlier
		own, isWritten := place[c.numberOf(r)]
		for _, s := range all {
			if other, ok := place[s.number]; ok && s.number > c.numberOf(r) && s.real.Record.Topic == r.Topic && (!isWritten || other < own) {
				c.reach("sent on its own")
				return true
			}
		}
		return false
	}
	for _, s := range all {
		class := classOf(s.atOnce)
		c.p.again = func() bool { return class != relay.ClassTopic }
		c.p.atOnce = func(*relay.Record) bool { return class == relay.ClassRecord }
		switch class {
		case relay.ClassCluster:
		case relay.ClassTopic: // what was on its way to it is refused already
			for _, before := range all {
				if n := queued(before); n >= 0 && before.real.Record.Topic == s.real.Record.Topic {
					c.p.write(n)
				}
			}
		default:
			c.p.rebuilt()
		}
		if got := classOf(c.p.Deliver(s.memory)); got != class {
			fail("%s: in memory Deliver says class %d", c.text(s), got)
		}
		if class != 0 {
			c.reach(fmt.Sprintf("refused on the spot: class %d", class))
		}
	}
	for moved := true; moved; {
		moved = false
		for _, s := range all {
			n := queued(s)
			if n < 0 || c.p.queue[n].written {
				continue
			}
			class := classOf(s.real.Err)
			if class != relay.ClassRecord && class != relay.ClassTopic {
				at, isWritten := place[s.number]
				tp := relay.TopicPartition{Topic: s.memory.Record.Topic, Partition: c.p.partition(s.memory)}
				if !isWritten || at != len(c.b.topics[tp.Topic].partitions[tp.Partition]) || log[tp][at] != s.number {
					continue // not now, or never
				}
			}
			if !c.p.write(n) {
				continue
			}
			moved = true
			if n := queued(s); n >= 0 && s.real.Err == nil {
				c.p.acknowledge(n)
			}
		}
	}
	for _, s := range all {
		n, class := queued(s), classOf(s.real.Err)
		if n < 0 {
			continue
		}
		if _, isWritten := place[s.number]; isWritten && !c.p.queue[n].written {
			fail("%s: it is written, which it cannot be in memory", c.text(s))
		}
		if class < relay.ClassCluster {
			fail("%s: in memory it is still under way", c.text(s))
		}
		c.p.giveUpOne(n, class)
		c.reach(map[relay.Class]string{relay.ClassCluster: "cluster", relay.ClassFatal: "fatal", relay.ClassPurged: "purged"}[class])
	}
	reports := map[*sent]int{}
	for _, d := range c.p.reports {
		reports[d.Opaque.(*sent)]++ //nolint:forcetypeassert,errcheck // as it was delivered
	}
	for _, s := range all {
		if want := map[bool]int{true: 0, false: 1}[s.atOnce != nil]; reports[s] != want {
			fail("%s: in memory it is reported %d times", c.text(s), reports[s])
		}
	}
	for _, d := range c.p.reports {
		s := d.Opaque.(*sent) //nolint:forcetypeassert,errcheck // as it was delivered
		memory, real := classOf(d.Err), classOf(s.real.Err)
		switch {
		case memory != real:
			fail("%s: in memory it is reported with class %d", c.text(s), memory)
		case real == 0 && (d.Partition != s.real.Partition || d.Offset != s.real.Offset):
			fail("%s at %d/%d, in memory at %d/%d", c.text(s), s.real.Partition, s.real.Offset, d.Partition, d.Offset)
		case real == 0:
			c.reach("acknowledged")
		case real <= relay.ClassTopic:
			c.reach(fmt.Sprintf("refused: class %d", real))
		}
	}
	c.p.reports = nil
	for name, t := range c.b.topics {
		for p, records := range t.partitions {
			var numbers []int
			for i := range records {
				numbers = append(numbers, c.numberOf(&records[i]))
			}
			if real := log[relay.TopicPartition{Topic: name, Partition: int32(p)}]; !slices.Equal(numbers, real) { //nolint:gosec // few
				fail("partition %.1s/%d has %v, in memory %v", name, p, real, numbers)
			}
		}
	}
}

func (c *kafkaComparison) numberOf(r *relay.Record) int { return int(binary.BigEndian.Uint32(r.Value)) }

// tail reads partitions from some offset on.
func (c *kafkaComparison) tail() {
	from, at := map[relay.TopicPartition]int64{}, map[relay.TopicPartition]time.Time{}
	most := int64(rapid.IntRange(1, 10).Draw(c.t, "most"))
	for i, name := range c.names {
		if t := c.b.topics[name]; t != nil {
			for p, records := range t.partitions {
				if rapid.IntRange(0, 3).Draw(c.t, "read") == 0 {
					continue
				}
				tp := relay.TopicPartition{Topic: c.names[i], Partition: int32(p)} //nolint:gosec // few
				n := rapid.IntRange(0, len(records)).Draw(c.t, "from")
				from[tp], at[tp] = int64(n), time.Now()
				if n < len(records) {
					at[tp] = records[n].Timestamp
				}
				at[tp] = at[tp].Truncate(time.Millisecond) // Kafka knows nothing shorter
			}
		}
	}
	read := func(s relay.Sink) map[relay.TopicPartition]string {
		ctx, cancel := context.WithTimeout(context.Background(), patience) //nolint:usetesting // as above
		defer cancel()
		found := map[relay.TopicPartition]string{}
		err := s.Tail(ctx, from, func(tp relay.TopicPartition, offset int64, headers []store.Header) {
			found[tp] += fmt.Sprintf(" %d:%x", offset, headers[0].Value)
		})
		if err != nil {
			c.t.Fatalf("%T: reading the tails: %v", s, err)
		}
		return found
	}
	if memory, real := read(c.p), read(c.sink); !maps.Equal(memory, real) {
		c.t.Fatalf("tails from %v: in memory %v, from Kafka %v", from, memory, real)
	}
	ask := func(s relay.Sink) map[relay.TopicPartition]int64 {
		ctx, cancel := context.WithTimeout(context.Background(), patience) //nolint:usetesting // as above
		defer cancel()
		found, err := s.OffsetsForTimes(ctx, at, most)
		if err != nil {
			c.t.Fatalf("%T: asking for offsets at times: %v", s, err)
		}
		return found
	}
	if memory, real := ask(c.p), ask(c.sink); !maps.Equal(memory, real) {
		c.t.Fatalf("offsets at %v: in memory %v, from Kafka %v", at, memory, real)
	}
	c.reach("tail")
}

// create creates the topic that is missing.
func (c *kafkaComparison) create() {
	if c.b.topics[c.names[2]] != nil {
		c.topics()
		return
	}
	c.createTopic(2, rapid.IntRange(1, 3).Draw(c.t, "partitions"), nil)
	c.reach("created")
	// A topic that was not there may be refused for a while: what was learned before counts.
	for over := false; !over; {
		s := c.send(2, "first", 10)
		c.await([]*sent{s})
		over = s.real.Err == nil && s.atOnce == nil
		c.b.topics[c.names[2]].missing, c.p.refused[c.names[2]] = !over, !over
		c.explain([]*sent{s})
	}
}

// topics asks for topics, and where keys go.
func (c *kafkaComparison) topics() {
	ask := func(s relay.Sink) []string {
		ctx, cancel := context.WithTimeout(context.Background(), patience) //nolint:usetesting // as above
		defer cancel()
		found, err := s.Topics(ctx, c.names[:])
		if err != nil {
			c.t.Fatalf("%T: asking for topics: %v", s, err)
		}
		slices.SortFunc(found, func(a, b store.Topic) int { return strings.Compare(a.Name, b.Name) })
		var texts []string
		for _, f := range found {
			texts = append(texts, fmt.Sprintf("%.1s has %d partitions", f.Name, f.Partitions))
		}
		return texts
	}
	if memory, real := ask(c.p), ask(c.sink); !slices.Equal(memory, real) {
		c.t.Fatalf("topics in memory: %v, in Kafka: %v", memory, real)
	}
	count := func(s relay.Sink) map[string]int32 {
		ctx, cancel := context.WithTimeout(context.Background(), patience) //nolint:usetesting // as above
		defer cancel()
		counts, err := s.Partitions(ctx, c.names[:])
		if err != nil {
			c.t.Fatalf("%T: asking for partitions: %v", s, err)
		}
		return counts
	}
	if memory, real := count(c.p), count(c.sink); !maps.Equal(memory, real) {
		c.t.Fatalf("partitions in memory: %v, in Kafka: %v", memory, real)
	}
}
