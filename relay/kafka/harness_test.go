package kafka

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/twmb/franz-go/pkg/kfake"
	"github.com/twmb/franz-go/pkg/kmsg"
	"go.uber.org/goleak"

	broker "github.com/outbox-platform/outbox/embedded/kafka"
	"github.com/outbox-platform/outbox/relay"
	"github.com/outbox-platform/outbox/store"
)

// patience bounds every wait; a test that meets it has failed.
const patience = 30 * time.Second

// shared is a real Apache Kafka broker for the tests that do not break it.
var shared struct {
	once   sync.Once
	broker *broker.Apache
	err    error
}

func TestMain(m *testing.M) {
	code := m.Run()
	if shared.broker != nil {
		if err := shared.broker.Stop(context.Background()); err != nil {
			fmt.Fprintln(os.Stderr, err)
			code = 1
		}
	}
	if code == 0 {
		if err := goleak.Find(); err != nil {
			fmt.Fprintln(os.Stderr, "goroutines left:", err)
			code = 1
		}
	}
	os.Exit(code)
}

// apache returns the address of the shared real broker.
func apache(tb testing.TB) *broker.Apache {
	tb.Helper()
	shared.once.Do(func() {
		shared.broker, shared.err = broker.StartApache(context.Background(), broker.ApacheConfig{Settings: map[string]string{"message.max.bytes": "1048588"}})
	})
	if shared.err != nil {
		tb.Fatalf("a real Apache Kafka is needed: %v", shared.err)
	}
	return shared.broker
}

// fake starts a fake cluster.
func fake(tb testing.TB, config broker.FakeConfig) *broker.Fake {
	tb.Helper()
	f, err := broker.StartFake(config)
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(f.Close)
	return f
}

// cluster is what most tests run on, once fake and once real.
type cluster interface {
	Bootstrap() string
}

// onBoth runs a test on the fake and on the real broker.
func onBoth(t *testing.T, test func(t *testing.T, c cluster)) {
	t.Run("fake", func(t *testing.T) { test(t, fake(t, broker.FakeConfig{})) })
	t.Run("apache", func(t *testing.T) { test(t, apache(t)) })
}

// topicName is a topic of this test alone.
func topicName(tb testing.TB) string {
	return strings.NewReplacer("/", ".", "#", ".", "=", "-").Replace(tb.Name()) + fmt.Sprintf("-%d", time.Now().UnixNano()%1e6)
}

func createTopic(tb testing.TB, c cluster, partitions int, configs map[string]string) string {
	tb.Helper()
	name := topicName(tb)
	createNamedTopic(tb, c, name, partitions, configs)
	return name
}

func createNamedTopic(tb testing.TB, c cluster, name string, partitions int, configs map[string]string) {
	tb.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	if err := broker.CreateTopic(ctx, c.Bootstrap(), name, partitions, configs); err != nil {
		tb.Fatal(err)
	}
}

// newSink starts a sink that is closed at the end of the test.
func newSink(tb testing.TB, bootstrap string, change func(*Config)) *Sink {
	tb.Helper()
	cfg := Config{Brokers: strings.Split(bootstrap, ","), Logger: slog.New(slog.NewTextHandler(testWriter{tb}, &slog.HandlerOptions{Level: slog.LevelWarn}))}
	if change != nil {
		change(&cfg)
	}
	s, err := New(context.Background(), cfg)
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() {
		s.mu.Lock()
		closed := s.closed
		s.mu.Unlock()
		if closed {
			return
		}
		ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
		defer cancel()
		if err := s.Close(ctx); err != nil {
			tb.Errorf("close: %v", err)
		}
	})
	return s
}

// testWriter sends logs to the test.
type testWriter struct{ tb testing.TB }

func (w testWriter) Write(p []byte) (int, error) {
	w.tb.Log(strings.TrimSpace(string(p)))
	return len(p), nil
}

// testTime is the timestamp of the first record. It must not be old: a broker that recovers forgets producers whose last
// record has a timestamp older than producer.id.expiration.ms (a day), and then accepts a repetition twice.
var testTime = time.Now().Truncate(time.Millisecond)

// delivery makes one. The opaque is its number.
func delivery(topic, key string, n int, value string) *relay.Delivery {
	return &relay.Delivery{
		Opaque: n,
		Record: relay.Record{
			Topic: topic, Key: []byte(key), Value: []byte(value), Timestamp: testTime.Add(time.Duration(n) * time.Millisecond),
			Headers: []store.Header{{Name: "n", Value: fmt.Append(nil, n)}},
		},
	}
}

// deliver hands deliveries over and fails the test when one is refused.
func deliver(tb testing.TB, s *Sink, ds ...*relay.Delivery) {
	tb.Helper()
	for _, d := range ds {
		if err := s.Deliver(d); err != nil {
			tb.Fatalf("deliver %v: %v", d.Opaque, err)
		}
	}
}

// reports reads n reports by their opaque. Two reports of one delivery fail the test.
func reports(tb testing.TB, s *Sink, n int) map[int]*relay.Delivery {
	tb.Helper()
	got := make(map[int]*relay.Delivery, n)
	timeout := time.After(patience)
	for len(got) < n {
		select {
		case d, ok := <-s.Reports():
			if !ok {
				tb.Fatalf("reports closed after %d of %d", len(got), n)
			}
			id := d.Opaque.(int)
			if got[id] != nil {
				tb.Fatalf("delivery %d reported twice", id)
			}
			got[id] = d
		case <-timeout:
			tb.Fatalf("%d of %d reports within %s", len(got), n, patience)
		}
	}
	return got
}

// settle delivers and returns the last report of each. What is reported as fatal is delivered again, as the relay does: on
// a real broker a topic just made refuses some first batches, and then acknowledgements may be implied (see
// Sink.unproven).
func settle(tb testing.TB, s *Sink, ds ...*relay.Delivery) map[int]*relay.Delivery {
	tb.Helper()
	final := make(map[int]*relay.Delivery, len(ds))
	for len(ds) > 0 {
		deliver(tb, s, ds...)
		got := reports(tb, s, len(ds))
		ds = ds[:0:0]
		for id, d := range got {
			var e *relay.SinkError
			if errors.As(d.Err, &e) && e.Class == relay.ClassFatal {
				ds = append(ds, d)
				continue
			}
			final[id] = d
		}
	}
	return final
}

// allOK fails the test unless every report is an acknowledgement.
func allOK(tb testing.TB, got map[int]*relay.Delivery) {
	tb.Helper()
	for id, d := range got {
		if d.Err != nil {
			tb.Errorf("delivery %d: %v", id, d.Err)
		}
		if d.Err == nil && (d.Partition < 0 || d.Offset < 0) {
			tb.Errorf("delivery %d acknowledged at %d/%d", id, d.Partition, d.Offset)
		}
	}
}

// wantClass fails the test unless the error is of the class.
func wantClass(tb testing.TB, err error, class relay.Class) {
	tb.Helper()
	e, ok := err.(*relay.SinkError) //nolint:errorlint // the contract says that it is one
	if !ok || e.Class != class {
		tb.Errorf("error %#v, want class %d", err, class)
	}
}

// noReport fails the test when there is one.
func noReport(tb testing.TB, s *Sink) {
	tb.Helper()
	select {
	case d, ok := <-s.Reports():
		tb.Errorf("unexpected report %+v (open %v)", d, ok)
	default:
	}
}

// eventually waits until a condition holds.
func eventually(tb testing.TB, what string, ok func() bool) {
	tb.Helper()
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	timeout := time.After(patience)
	for !ok() {
		select {
		case <-tick.C:
		case <-timeout:
			tb.Fatalf("within %s: %s", patience, what)
		}
	}
}

// healthy waits until the sink has reached its cluster.
func healthy(tb testing.TB, s *Sink) {
	tb.Helper()
	eventually(tb, "healthy", func() bool { ok, _ := s.Healthy(); return ok })
}

// readAll reads what a foreign client sees.
func readAll(tb testing.TB, bootstrap string, topics ...string) []broker.Record {
	tb.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	records, err := broker.ReadAll(ctx, bootstrap, topics...)
	if err != nil {
		tb.Fatal(err)
	}
	return records
}

// rawFake is a fake cluster with options that embedded/kafka does not offer.
func rawFake(tb testing.TB, opts ...kfake.Opt) (*kfake.Cluster, string) {
	tb.Helper()
	c, err := kfake.NewCluster(opts...)
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(c.Close)
	return c, strings.Join(c.ListenAddrs(), ",")
}

// producerIDAt is where a record batch of format 2 has the id of its producer.
const producerIDAt = 43

// ofFirstProducer is a fault's condition: the request is of the producer whose request came first. A condition that asks
// whether the producer was rebuilt by now would let those requests through that the old one has still under way.
func ofFirstProducer() func(kmsg.Request) bool {
	var first atomic.Int64 // 1 + its id
	return func(req kmsg.Request) bool {
		produce, ok := req.(*kmsg.ProduceRequest)
		if !ok || len(produce.Topics) == 0 || len(produce.Topics[0].Partitions) == 0 {
			return false
		}
		batch := produce.Topics[0].Partitions[0].Records
		if len(batch) < producerIDAt+8 {
			return false
		}
		id := 1 + int64(binary.BigEndian.Uint64(batch[producerIDAt:])) //nolint:gosec // the same 64 bits
		first.CompareAndSwap(0, id)
		return first.Load() == id
	}
}

// goesTo tells the partition of a key, if the sink knows the topic, and has it looked up if not.
func goesTo(s *Sink, topic string, key []byte) (partition int32, known bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	t, refusal := s.topicFor(topic)
	if refusal != nil || t.state != topicKnown { // while it hands over what it held, it holds what comes
		return 0, false
	}
	return relay.Partition(key, t.partitions), true
}
