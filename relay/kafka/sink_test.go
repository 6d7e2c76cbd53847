package kafka

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/twmb/franz-go/pkg/kerr"
	"github.com/twmb/franz-go/pkg/kfake"
	"github.com/twmb/franz-go/pkg/kmsg"

	broker "github.com/outbox-platform/outbox/embedded/kafka"
	"github.com/outbox-platform/outbox/relay"
	"github.com/outbox-platform/outbox/store"
)

func TestRecordsArriveUntouched(t *testing.T) {
	onBoth(t, func(t *testing.T, c cluster) {
		topic := createTopic(t, c, 5, nil)
		s := newSink(t, c.Bootstrap(), nil)
		var ds []*relay.Delivery
		for n, key := range []string{"a", "foobar", "", "å-ä-ö", "\x00\xff", "a-little-bit-long-string"} {
			d := delivery(topic, key, n, "value\x00\xff"+key)
			d.Record.Headers = append(d.Record.Headers,
				store.Header{Name: "traceparent", Value: []byte("00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01")},
				store.Header{Name: "twice", Value: []byte{0, 1, 0xff}}, store.Header{Name: "twice", Value: []byte{}},
				store.Header{Name: "nil", Value: nil})
			ds = append(ds, d)
		}
		ds[3].Record.Value = []byte{}
		allOK(t, settle(t, s, ds...))

		records := readAll(t, c.Bootstrap(), topic)
		if len(records) != len(ds) {
			t.Fatalf("%d records", len(records))
		}
		for _, r := range records {
			d := ds[index(t, r)]
			want := d.Record
			if !bytes.Equal(r.Key, want.Key) || r.Key == nil || !bytes.Equal(r.Value, want.Value) || r.Value == nil || !r.Timestamp.Equal(want.Timestamp) {
				t.Errorf("%q: key %#v value %#v timestamp %s", want.Key, r.Key, r.Value, r.Timestamp)
			}
			if p := relay.Partition(want.Key, 5); r.Partition != p || d.Partition != p || d.Offset != r.Offset {
				t.Errorf("%q: at %d/%d, reported %d/%d, murmur2 says %d", want.Key, r.Partition, r.Offset, d.Partition, d.Offset, p)
			}
			if p, ok := goesTo(s, topic, want.Key); !ok || p != r.Partition {
				t.Errorf("%q goes to %d, %v", want.Key, p, ok)
			}
			if len(r.Headers) != len(want.Headers) {
				t.Fatalf("headers %v", r.Headers)
			}
			for i, h := range r.Headers {
				if h.Key != want.Headers[i].Name || !bytes.Equal(h.Value, want.Headers[i].Value) || h.Value == nil {
					t.Errorf("header %d: %s=%#v, want %v", i, h.Key, h.Value, want.Headers[i])
				}
			}
		}
	})
}

// index is the number of a record, from its header.
func index(tb testing.TB, r broker.Record) int {
	tb.Helper()
	v, _ := r.Header("n")
	var n int
	if _, err := fmt.Sscan(string(v), &n); err != nil {
		tb.Fatalf("record without a number: %v", err)
	}
	return n
}

// TestRefusedRecordTakesNobodyWithIt delivers many records of one partition at once, so that they share batches, with a
// limit of the topic below the size of a batch: every k-th record is too large, and only those are refused.
func TestRefusedRecordTakesNobodyWithIt(t *testing.T) {
	onBoth(t, func(t *testing.T, c cluster) {
		topic := createTopic(t, c, 1, map[string]string{"max.message.bytes": "20000"})
		s := newSink(t, c.Bootstrap(), func(cfg *Config) { cfg.Linger = 20 * time.Millisecond; cfg.Compression = "none" })
		const n, each = 200, 23
		var ds []*relay.Delivery
		for i := range n {
			size := 1000
			if i%each == 5 {
				size = 30_000
			}
			ds = append(ds, delivery(topic, "k", i, strings.Repeat("x", size)))
		}
		for i, d := range settle(t, s, ds...) {
			if i%each == 5 {
				wantClass(t, d.Err, relay.ClassRecord)
			} else if d.Err != nil {
				t.Errorf("delivery %d: %v", i, d.Err)
			}
		}
		seen := map[int]int{}
		for _, r := range readAll(t, c.Bootstrap(), topic) {
			seen[index(t, r)]++
		}
		for i := range n {
			if want := map[bool]int{true: 0, false: 1}[i%each == 5]; seen[i] != want {
				t.Errorf("record %d is there %d times", i, seen[i])
			}
		}

		// What the topic's limit is has been learned: records now go alone at once.
		before := s.metrics.soloCount()
		ds = nil
		for i := range 20 {
			ds = append(ds, delivery(topic, "k", n+i, strings.Repeat("x", 15_000)))
		}
		allOK(t, settle(t, s, ds...))
		if after := s.metrics.soloCount(); after != before {
			t.Errorf("%v more records had to be tried twice", after-before)
		}
	})
}

func TestRecordLargerThanTheProducerAllows(t *testing.T) {
	f := fake(t, broker.FakeConfig{Topics: map[string]int{"t": 1}})
	s := newSink(t, f.Bootstrap(), func(cfg *Config) { cfg.MaxMessageBytes = 100_000 })
	deliver(t, s, delivery("t", "k", 1, "small"))
	allOK(t, reports(t, s, 1))
	eventually(t, "looked up", func() bool { _, ok := goesTo(s, "t", nil); return ok })
	wantClass(t, s.Deliver(delivery("t", "k", 2, strings.Repeat("x", 100_001))), relay.ClassRecord)
	eventually(t, "nothing queued", func() bool { return s.Queued() == 0 })

	// The same while its topic is looked up: then it is reported.
	if err := f.CreateTopic("new", 1, nil); err != nil {
		t.Fatal(err)
	}
	if err := s.Deliver(delivery("new", "k", 3, strings.Repeat("x", 100_001))); err != nil {
		t.Fatal(err)
	}
	wantClass(t, reports(t, s, 1)[3].Err, relay.ClassRecord)
}

// TestBrokerRefusals maps what brokers answer to classes.
func TestBrokerRefusals(t *testing.T) {
	tests := []struct {
		err   *kerr.Error
		class relay.Class
	}{
		{kerr.InvalidRecord, relay.ClassRecord},
		{kerr.InvalidTimestamp, relay.ClassRecord},
		{kerr.MessageTooLarge, relay.ClassRecord},
		{kerr.TopicAuthorizationFailed, relay.ClassTopic},
		{kerr.UnknownServerError, relay.ClassTopic},
	}
	for _, tt := range tests {
		t.Run(tt.err.Message, func(t *testing.T) {
			f := fake(t, broker.FakeConfig{Topics: map[string]int{"t": 1}})
			s := newSink(t, f.Bootstrap(), nil)
			h := f.Cluster().Fault(kfake.Fault{Keys: []kmsg.Key{kmsg.Produce}, Err: tt.err, Count: -1})
			deliver(t, s, delivery("t", "k", 1, "v"))
			wantClass(t, reports(t, s, 1)[1].Err, tt.class)
			h.Remove()
			// It is over: the next try succeeds, for topics after the recheck.
			eventually(t, "delivered again", func() bool {
				if err := s.Deliver(delivery("t", "k", 2, "v")); err != nil {
					wantClass(t, err, relay.ClassTopic)
					return false
				}
				return reports(t, s, 1)[2].Err == nil
			})
			if n := len(readAll(t, f.Bootstrap(), "t")); n != 1 {
				t.Errorf("%d records", n)
			}
		})
	}
}

// TestPassingTroubleStaysInside: these are retried by librdkafka without end. One record of an aggregate is under way at a time,
// as the relay does it, so order is kept whatever is delivered again.
func TestPassingTroubleStaysInside(t *testing.T) {
	for _, e := range []*kerr.Error{kerr.NotEnoughReplicas, kerr.NotEnoughReplicasAfterAppend, kerr.NotLeaderForPartition, kerr.KafkaStorageError, kerr.RequestTimedOut} {
		t.Run(e.Message, func(t *testing.T) {
			f := fake(t, broker.FakeConfig{Brokers: 3, Topics: map[string]int{"t": 1}})
			s := newSink(t, f.Bootstrap(), nil)
			// The partition knows the producer before the trouble starts: else acknowledgements may be implied, and what is
			// told as not delivered is written twice (see Sink.unproven).
			deliver(t, s, delivery("t", "k", 0, "v"))
			allOK(t, reports(t, s, 1))
			h := f.Cluster().Fault(kfake.Fault{Keys: []kmsg.Key{kmsg.Produce}, Err: e, Count: 3})
			for i := 1; i < 50; i++ {
				deliver(t, s, delivery("t", "k", i, "v"))
				allOK(t, reports(t, s, 1))
			}
			if h.Hits() != 3 {
				t.Errorf("%d faults hit", h.Hits())
			}
			checkOrder(t, readAll(t, f.Bootstrap(), "t"), 50)
		})
	}
}

func TestLeadersMoveDuringDelivery(t *testing.T) {
	f := fake(t, broker.FakeConfig{Brokers: 3, Topics: map[string]int{"t": 6}})
	s := newSink(t, f.Bootstrap(), nil)
	const n = 3000
	done := make(chan map[int]*relay.Delivery)
	go func() { done <- reports(t, s, n) }()
	for i := range n {
		if i%500 == 0 {
			f.Cluster().ShufflePartitionLeaders()
		}
		deliver(t, s, delivery("t", fmt.Sprint("k", i%50), i, "v"))
	}
	allOK(t, <-done)
	checkOrder(t, readAll(t, f.Bootstrap(), "t"), n)
}

// checkOrder checks that records 0..n-1 are there once, and per key in order.
func checkOrder(tb testing.TB, records []broker.Record, n int) {
	tb.Helper()
	seen := make([]int, n)
	last := map[string]int{}
	for _, r := range records {
		i := index(tb, r)
		seen[i]++
		if prev, ok := last[string(r.Key)]; ok && prev >= i {
			tb.Errorf("key %s: %d after %d", r.Key, i, prev)
		}
		last[string(r.Key)] = i
	}
	for i, times := range seen {
		if times != 1 {
			tb.Errorf("record %d is there %d times", i, times)
		}
	}
}

func TestQueueFull(t *testing.T) {
	f := fake(t, broker.FakeConfig{Topics: map[string]int{"t": 1}})
	s := newSink(t, f.Bootstrap(), func(cfg *Config) { cfg.MaxQueued = 10; cfg.MaxQueuedBytes = 50_000 })
	for i := range 10 {
		deliver(t, s, delivery("t", "k", i, "v"))
	}
	eventually(t, "all acknowledged", func() bool { return s.Queued() == 0 })
	// Reports that nobody reads hold their place.
	if err := s.Deliver(delivery("t", "k", 10, "v")); !errors.Is(err, relay.ErrSinkFull) {
		t.Fatalf("error %v", err)
	}
	<-s.Reports()
	deliver(t, s, delivery("t", "k", 10, "v"))
	allOK(t, reports(t, s, 10))

	// A single record always fits, a second not when bytes are short.
	h := f.Cluster().Fault(kfake.Fault{Keys: []kmsg.Key{kmsg.Produce}, Err: kerr.NotEnoughReplicas, Count: -1})
	deliver(t, s, delivery("t", "k", 11, strings.Repeat("x", 60_000)))
	if err := s.Deliver(delivery("t", "k", 12, "v")); !errors.Is(err, relay.ErrSinkFull) {
		t.Fatalf("error %v", err)
	}
	h.Remove()
	allOK(t, reports(t, s, 1))
	deliver(t, s, delivery("t", "k", 12, "v"))
	allOK(t, reports(t, s, 1))
}

func TestPurge(t *testing.T) {
	f := fake(t, broker.FakeConfig{Topics: map[string]int{"t": 3}})
	s := newSink(t, f.Bootstrap(), nil)
	deliver(t, s, delivery("t", "warm", -1, "v"))
	allOK(t, reports(t, s, 1))

	h := f.Cluster().Fault(kfake.Fault{Keys: []kmsg.Key{kmsg.Produce}, Err: kerr.NotEnoughReplicas, Count: -1})
	const n = 500
	for i := range n {
		deliver(t, s, delivery("t", fmt.Sprint(i), i, "v"))
	}
	noReport(t, s)
	s.Purge()
	for _, d := range reports(t, s, n) {
		wantClass(t, d.Err, relay.ClassPurged)
	}
	h.Remove()

	// It still works afterwards, although purging left gaps in the sequence.
	for i := range n {
		deliver(t, s, delivery("t", fmt.Sprint(i), n+i, "v"))
	}
	allOK(t, reports(t, s, n))
	noReport(t, s)
}

func TestPurgeWithRequestsOnTheirWay(t *testing.T) {
	f := fake(t, broker.FakeConfig{Topics: map[string]int{"t": 1}})
	s := newSink(t, f.Bootstrap(), nil)
	deliver(t, s, delivery("t", "k", -1, "v"))
	allOK(t, reports(t, s, 1))
	arrived, release := make(chan struct{}), make(chan struct{})
	f.Cluster().ControlKey(int16(kmsg.Produce), func(kmsg.Request) (kmsg.Response, error, bool) {
		f.Cluster().DropControl()
		close(arrived)
		f.Cluster().SleepControl(func() { <-release })
		return nil, nil, false
	})
	deliver(t, s, delivery("t", "k", 0, "v"))
	<-arrived
	s.Purge()
	wantClass(t, reports(t, s, 1)[0].Err, relay.ClassPurged)
	close(release)
	// librdkafka purges in its own time: what comes right behind may still be caught, is told so, and goes out again.
	for i := 1; i <= 2; i++ {
		eventually(t, "delivered after the purge", func() bool {
			deliver(t, s, delivery("t", "k", i, "v"))
			err := reports(t, s, 1)[i].Err
			if err != nil {
				wantClass(t, err, relay.ClassPurged)
			}
			return err == nil
		})
	}
	noReport(t, s)
}

func TestCloseWaits(t *testing.T) {
	f := fake(t, broker.FakeConfig{Topics: map[string]int{"t": 3}})
	s := newSink(t, f.Bootstrap(), nil)
	h := f.Cluster().Fault(kfake.Fault{Keys: []kmsg.Key{kmsg.Produce}, Err: kerr.NotEnoughReplicas, Count: 2})
	const n = 200
	for i := range n {
		deliver(t, s, delivery("t", fmt.Sprint(i), i, "v"))
	}
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	if err := s.Close(ctx); err != nil {
		t.Fatal(err)
	}
	h.Remove()
	allOK(t, reports(t, s, n))
	if _, open := <-s.Reports(); open {
		t.Error("reports still open")
	}
	if err := s.Close(ctx); err == nil {
		t.Error("no error from a second Close")
	}
	wantClass(t, s.Deliver(delivery("t", "k", 1, "v")), relay.ClassCluster)
	s.Purge()
	if _, err := s.Topics(ctx, nil); err == nil {
		t.Error("no error from Topics after Close")
	}
}

func TestClosePurgesWhenTimeIsUp(t *testing.T) {
	f := fake(t, broker.FakeConfig{Topics: map[string]int{"t": 3}})
	s := newSink(t, f.Bootstrap(), nil)
	healthy(t, s)
	f.Cluster().Fault(kfake.Fault{Keys: []kmsg.Key{kmsg.Produce}, Err: kerr.NotEnoughReplicas, Count: -1})
	const n = 200
	for i := range n {
		deliver(t, s, delivery("t", fmt.Sprint(i), i, "v"))
	}
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if err := s.Close(ctx); !errors.Is(err, context.DeadlineExceeded) {
		t.Fatalf("close: %v", err)
	}
	for _, d := range reports(t, s, n) {
		wantClass(t, d.Err, relay.ClassPurged)
	}
	if _, open := <-s.Reports(); open {
		t.Error("reports still open")
	}
}

// TestDeliverWhileClosing: whoever delivers at the same time gets either an error or a report, never both, never neither.
func TestDeliverWhileClosing(t *testing.T) {
	f := fake(t, broker.FakeConfig{Topics: map[string]int{"t": 3}})
	for range 5 {
		s := newSink(t, f.Bootstrap(), nil)
		accepted := make(chan int, 4)
		for g := range 4 {
			go func() {
				n := 0
				for i := 0; ; i++ {
					switch err := s.Deliver(delivery("t", "k", g*1_000_000+i, "v")); {
					case err == nil:
						n++
					case errors.Is(err, relay.ErrSinkFull):
					default:
						accepted <- n
						return
					}
				}
			}()
		}
		got := make(chan int)
		go func() {
			n := 0
			for range s.Reports() {
				n++
			}
			got <- n
		}()
		healthy(t, s)
		ctx, cancel := context.WithTimeout(t.Context(), patience)
		if err := s.Close(ctx); err != nil {
			t.Error(err)
		}
		cancel()
		want := 0
		for range 4 {
			want += <-accepted
		}
		if n := <-got; n != want {
			t.Errorf("%d accepted, %d reported", want, n)
		}
	}
}
