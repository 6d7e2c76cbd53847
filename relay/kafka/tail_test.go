package kafka

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"testing"
	"time"

	ck "github.com/confluentinc/confluent-kafka-go/v2/kafka"
	"github.com/twmb/franz-go/pkg/kgo"

	broker "github.com/outbox-platform/outbox/embedded/kafka"
	"github.com/outbox-platform/outbox/relay"
	"github.com/outbox-platform/outbox/store"
)

func TestTail(t *testing.T) {
	onBoth(t, func(t *testing.T, c cluster) {
		topic := createTopic(t, c, 3, nil)
		s := newSink(t, c.Bootstrap(), nil)
		const n = 300
		var ds []*relay.Delivery
		for i := range n {
			ds = append(ds, delivery(topic, fmt.Sprint(i), i, "v"))
		}
		at := map[relay.TopicPartition]map[int64]int{}
		from := map[relay.TopicPartition]int64{}
		for i, d := range settle(t, s, ds...) {
			tp := relay.TopicPartition{Topic: topic, Partition: d.Partition}
			if at[tp] == nil {
				at[tp] = map[int64]int{}
			}
			at[tp][d.Offset] = i
		}
		for tp, offsets := range at {
			from[tp] = int64(len(offsets) / 2)
		}
		p0 := relay.TopicPartition{Topic: topic, Partition: 0}
		from[p0] = 1_000_000 // there is no such offset: from the start
		from[relay.TopicPartition{Topic: topic, Partition: 99}] = 0
		from[relay.TopicPartition{Topic: topic + "-missing", Partition: 0}] = 0

		seen := map[relay.TopicPartition]int64{}
		err := s.Tail(t.Context(), from, func(tp relay.TopicPartition, offset int64, headers []store.Header) {
			want, started := seen[tp]
			if !started {
				want = from[tp]
				if tp == p0 {
					want = 0
				}
			}
			if offset != want {
				t.Errorf("%v: offset %d, want %d", tp, offset, want)
			}
			seen[tp] = offset + 1
			if len(headers) != 1 || headers[0].Name != "n" || string(headers[0].Value) != fmt.Sprint(at[tp][offset]) {
				t.Errorf("%v offset %d: headers %v", tp, offset, headers)
			}
		})
		if err != nil {
			t.Fatal(err)
		}
		for tp, offsets := range at {
			if seen[tp] != int64(len(offsets)) {
				t.Errorf("%v: read to %d of %d", tp, seen[tp], len(offsets))
			}
		}
	})
}

func TestOffsetsForTimes(t *testing.T) {
	onBoth(t, func(t *testing.T, c cluster) {
		topic := createTopic(t, c, 2, nil)
		s := newSink(t, c.Bootstrap(), nil)
		const n = 20
		for i := range n {
			settle(t, s, delivery(topic, "k", i, "v"))
		}
		tp := relay.TopicPartition{Topic: topic, Partition: relay.Partition([]byte("k"), 2)}
		other := relay.TopicPartition{Topic: topic, Partition: 1 - tp.Partition} // nothing is in it
		at := func(ms int) time.Time { return testTime.Add(time.Duration(ms) * time.Millisecond) }
		for _, test := range []struct {
			at   map[relay.TopicPartition]time.Time
			most int64
			want map[relay.TopicPartition]int64
		}{
			{nil, n, nil},
			{map[relay.TopicPartition]time.Time{tp: at(7), other: at(0)}, n, map[relay.TopicPartition]int64{tp: 7, other: 0}},
			{map[relay.TopicPartition]time.Time{tp: at(-1)}, n, map[relay.TopicPartition]int64{tp: 0}},
			{map[relay.TopicPartition]time.Time{tp: at(-1)}, 3, map[relay.TopicPartition]int64{tp: n - 3}},
			{map[relay.TopicPartition]time.Time{tp: time.Unix(-5, 0)}, n + 1, map[relay.TopicPartition]int64{tp: 0}},
			{map[relay.TopicPartition]time.Time{tp: at(n)}, n, map[relay.TopicPartition]int64{tp: n}},
			{map[relay.TopicPartition]time.Time{{Topic: topic, Partition: 99}: at(0), {Topic: topic + "-missing"}: at(0)}, n, nil},
		} {
			found, err := s.OffsetsForTimes(t.Context(), test.at, test.most)
			if err != nil || !maps.Equal(found, test.want) {
				t.Errorf("at %v: found %v, %v; want %v", test.at, found, err, test.want)
			}
		}
	})
}

// TestTailWithoutTransactionsOfOurOwn: what is not committed is nothing that was delivered, and nothing to wait for.
func TestTailWithoutTransactionsOfOurOwn(t *testing.T) {
	onBoth(t, func(t *testing.T, c cluster) {
		topic := createTopic(t, c, 1, nil)
		client, err := kgo.NewClient(kgo.SeedBrokers(c.Bootstrap()), kgo.DisableClientMetrics(), kgo.TransactionalID(topic), kgo.DefaultProduceTopic(topic))
		if err != nil {
			t.Fatal(err)
		}
		defer client.Close()
		ctx, cancel := context.WithTimeout(t.Context(), patience)
		defer cancel()
		s := newSink(t, c.Bootstrap(), nil)
		write := func() {
			t.Helper()
			if err := client.BeginTransaction(); err != nil {
				t.Fatal(err)
			}
			if err := client.ProduceSync(ctx, kgo.StringRecord("v")).FirstErr(); err != nil {
				t.Fatal(err)
			}
		}
		end := func(how kgo.TransactionEndTry) {
			t.Helper()
			if err := client.EndTransaction(ctx, how); err != nil {
				t.Fatal(err)
			}
		}
		seen := func() (n int) {
			t.Helper()
			if err := s.Tail(ctx, map[relay.TopicPartition]int64{{Topic: topic}: 0}, func(relay.TopicPartition, int64, []store.Header) { n++ }); err != nil {
				t.Fatal(err)
			}
			return n
		}
		write()
		end(kgo.TryCommit)
		eventually(t, "it is committed", func() bool { return seen() == 1 }) // its marker comes after the reply
		write()
		if n := seen(); n != 1 {
			t.Errorf("%d records, one of them of an open transaction", n)
		}
		end(kgo.TryAbort)
		write() // begins when the marker is there
		if n := seen(); n != 1 {
			t.Errorf("%d records, some of them of transactions that were aborted or are open", n)
		}
		// An offset behind what the open transaction hides: there is nothing to read, and not everything.
		deliver(t, s, delivery(topic, "k", 1, "v"))
		report := reports(t, s, 1)
		allOK(t, report)
		at := report[1].Offset
		if err := s.Tail(ctx, map[relay.TopicPartition]int64{{Topic: topic}: at + 1}, func(relay.TopicPartition, int64, []store.Header) {
			t.Error("a record from before the offset")
		}); err != nil {
			t.Error(err)
		}
		end(kgo.TryAbort)
	})
}

// TestPartitionsThatAreLeftOut: those that cannot be read are no reason not to read the others, and no reason to try it all again.
func TestPartitionsThatAreLeftOut(t *testing.T) {
	refused, away := judge(ck.NewError(ck.ErrTopicAuthorizationFailed, "refused", false)), context.DeadlineExceeded
	for _, test := range []struct {
		errs  []error
		n     int
		class relay.Class
	}{
		{[]error{nil}, 1, 0},
		{[]error{away}, 1, relay.ClassCluster},
		{[]error{away, nil, away}, 2, relay.ClassCluster},
		{[]error{away}, 2, relay.ClassTopic},
		{[]error{refused}, 1, relay.ClassTopic},
		{[]error{refused, away}, 2, relay.ClassCluster},
	} {
		err := leftOut(slices.Clone(test.errs), test.n)
		var e *relay.SinkError
		if errors.As(err, &e) != (test.class != 0) || e != nil && e.Class != test.class {
			t.Errorf("%v of %d: %v, want class %v", test.errs, test.n, err, test.class)
		}
	}
}

func TestTailOfNothing(t *testing.T) {
	f := fake(t, broker.FakeConfig{Topics: map[string]int{"t": 2}})
	s := newSink(t, f.Bootstrap(), nil)
	none := func(relay.TopicPartition, int64, []store.Header) { t.Error("a record") }
	for _, from := range []map[relay.TopicPartition]int64{nil, {}, {{Topic: "t"}: 0, {Topic: "t", Partition: 1}: 5}} {
		if err := s.Tail(t.Context(), from, none); err != nil {
			t.Error(err)
		}
	}
}

// TestTailAfterDeletion: offsets that retention has taken start at the oldest that is left.
func TestTailAfterDeletion(t *testing.T) {
	f := fake(t, broker.FakeConfig{Topics: map[string]int{"t": 1}})
	s := newSink(t, f.Bootstrap(), nil)
	for i := range 10 {
		deliver(t, s, delivery("t", "k", i, "v"))
		allOK(t, reports(t, s, 1))
	}
	if err := f.Cluster().DeleteRecords("t", 0, 6); err != nil {
		t.Fatal(err)
	}
	var offsets []int64
	err := s.Tail(t.Context(), map[relay.TopicPartition]int64{{Topic: "t"}: 2}, func(_ relay.TopicPartition, offset int64, _ []store.Header) { offsets = append(offsets, offset) })
	if err != nil || fmt.Sprint(offsets) != "[6 7 8 9]" {
		t.Errorf("offsets %v, %v", offsets, err)
	}
}

func TestTailEndsWithItsContext(t *testing.T) {
	f := fake(t, broker.FakeConfig{Topics: map[string]int{"t": 1}})
	s := newSink(t, f.Bootstrap(), nil)
	deliver(t, s, delivery("t", "k", 1, "v"))
	allOK(t, reports(t, s, 1))
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := s.Tail(ctx, map[relay.TopicPartition]int64{{Topic: "t"}: 0}, func(relay.TopicPartition, int64, []store.Header) {}); !errors.Is(err, context.Canceled) {
		t.Errorf("error %v", err)
	}
	f.Close()
	if _, err := s.OffsetsForTimes(ctx, map[relay.TopicPartition]time.Time{{Topic: "t"}: testTime}, 1); !errors.Is(err, context.Canceled) {
		t.Errorf("error %v", err)
	}
}

// TestTailBehindAMarker: the last offset of a partition may hold no record, here the commit of somebody's transaction.
func TestTailBehindAMarker(t *testing.T) {
	onBoth(t, func(t *testing.T, c cluster) {
		topic := createTopic(t, c, 1, nil)
		client, err := kgo.NewClient(kgo.SeedBrokers(c.Bootstrap()), kgo.DisableClientMetrics(), kgo.TransactionalID(topic), kgo.DefaultProduceTopic(topic))
		if err != nil {
			t.Fatal(err)
		}
		defer client.Close()
		ctx, cancel := context.WithTimeout(t.Context(), patience)
		defer cancel()
		if err := client.BeginTransaction(); err != nil {
			t.Fatal(err)
		}
		if err := client.ProduceSync(ctx, kgo.StringRecord("v")).FirstErr(); err != nil {
			t.Fatal(err)
		}
		if err := client.EndTransaction(ctx, kgo.TryCommit); err != nil {
			t.Fatal(err)
		}
		s := newSink(t, c.Bootstrap(), nil)
		n := 0
		if err := s.Tail(ctx, map[relay.TopicPartition]int64{{Topic: topic}: 0}, func(relay.TopicPartition, int64, []store.Header) { n++ }); err != nil || n != 1 {
			t.Errorf("%d records, %v", n, err)
		}
	})
}
