package kafka

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"testing"
	"time"

	"github.com/twmb/franz-go/pkg/kerr"
	"github.com/twmb/franz-go/pkg/kfake"
	"github.com/twmb/franz-go/pkg/kgo"
	"github.com/twmb/franz-go/pkg/kmsg"

	broker "github.com/outbox-platform/outbox/embedded/kafka"
	"github.com/outbox-platform/outbox/relay"
	"github.com/outbox-platform/outbox/store"
)

// transactional turns the mode on, with ids of this test alone.
func transactional(tb testing.TB, more ...func(*Config)) func(*Config) {
	prefix := topicName(tb)
	return func(cfg *Config) {
		cfg.Transactional, cfg.TransactionalIDPrefix = true, prefix
		for _, change := range more {
			change(cfg)
		}
	}
}

// fence makes a sink the holder of a shard.
func fence(tb testing.TB, s *Sink, shard int16, epoch int64) {
	tb.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	if err := s.Fence(ctx, shard, epoch); err != nil {
		tb.Fatal(err)
	}
}

// of makes a delivery one of a shard and epoch.
func of(shard int16, epoch int64, d *relay.Delivery) *relay.Delivery {
	d.Shard, d.Epoch = shard, epoch
	return d
}

// committed reads what a read_committed consumer that shares no code with ours sees, until it has seen n records and then
// the end.
func committed(tb testing.TB, bootstrap string, topics ...string) []broker.Record {
	tb.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	records, err := broker.ReadCommitted(ctx, bootstrap, topics...)
	if err != nil {
		tb.Fatal(err)
	}
	return records
}

func TestTransactionsArriveUntouched(t *testing.T) {
	onBoth(t, func(t *testing.T, c cluster) {
		topic := createTopic(t, c, 5, nil)
		s := newSink(t, c.Bootstrap(), transactional(t))
		if !s.Fences() {
			t.Fatal("the mode is off")
		}
		var ds []*relay.Delivery
		for shard := range int16(3) {
			fence(t, s, shard, 7)
			for i := range 100 {
				n := int(shard)*100 + i
				ds = append(ds, of(shard, 7, delivery(topic, fmt.Sprint(n), n, strings.Repeat("v", n))))
			}
		}
		deliver(t, s, ds...)
		allOK(t, reports(t, s, len(ds)))
		records := committed(t, c.Bootstrap(), topic)
		if len(records) != len(ds) {
			t.Fatalf("%d records", len(records))
		}
		for _, r := range records {
			d := ds[index(t, r)]
			if r.Partition != relay.Partition(d.Record.Key, 5) || r.Partition != d.Partition || r.Offset != d.Offset || string(r.Value) != string(d.Record.Value) {
				t.Errorf("%q at %d/%d, reported %d/%d", r.Key, r.Partition, r.Offset, d.Partition, d.Offset)
			}
		}
	})
}

// TestTransactionsKeepOrder delivers as the relay does, from several shards at once.
func TestTransactionsKeepOrder(t *testing.T) {
	onBoth(t, func(t *testing.T, c cluster) {
		topic := createTopic(t, c, 3, nil)
		s := newSink(t, c.Bootstrap(), transactional(t))
		fence(t, s, 0, 1)
		g := &gate{tb: t, s: s, topic: topic, each: 20, epoch: 1}
		g.run(50)
		if n := g.check(committed(t, c.Bootstrap(), topic), 50); n != 0 {
			t.Errorf("%d duplicates", n)
		}
	})
}

// TestOnlyTheFencedEpochDelivers: without a producer for exactly this epoch a delivery is refused as fatal.
func TestOnlyTheFencedEpochDelivers(t *testing.T) {
	f := fake(t, broker.FakeConfig{Topics: map[string]int{"t": 1}})
	s := newSink(t, f.Bootstrap(), transactional(t))
	eventually(t, "the topic is known", func() bool { _, ok := goesTo(s, "t", nil); return ok })
	wantClass(t, s.Deliver(of(3, 1, delivery("t", "k", 1, "v"))), relay.ClassFatal)
	fence(t, s, 3, 1)
	fence(t, s, 3, 1) // nothing to do
	wantClass(t, s.Deliver(of(3, 2, delivery("t", "k", 2, "v"))), relay.ClassFatal)
	deliver(t, s, of(3, 1, delivery("t", "k", 3, "v")))
	allOK(t, reports(t, s, 1))
	fence(t, s, 3, 2)
	wantClass(t, s.Deliver(of(3, 1, delivery("t", "k", 4, "v"))), relay.ClassFatal)
	if err := s.Fence(t.Context(), 3, 1); err == nil {
		t.Error("an epoch that is over could fence")
	}
	deliver(t, s, of(3, 2, delivery("t", "k", 5, "v")))
	allOK(t, reports(t, s, 1))
	if n := len(committed(t, f.Bootstrap(), "t")); n != 2 {
		t.Errorf("%d records", n)
	}
}

// TestFencedHolderWritesNothing: the next holder fences while the former has a transaction open, with records written. None of
// them comes into effect, its reports say that nothing is certain, and it does not come back by itself.
func TestFencedHolderWritesNothing(t *testing.T) {
	onBoth(t, func(t *testing.T, c cluster) {
		topic := createTopic(t, c, 1, nil)
		mode := transactional(t)
		zombie, next := newSink(t, c.Bootstrap(), mode), newSink(t, c.Bootstrap(), mode)
		fence(t, zombie, 0, 1)
		deliver(t, zombie, of(0, 1, delivery(topic, "k", 1, "v")))
		allOK(t, reports(t, zombie, 1))

		// The zombie's wave is written, then it sleeps before the commit: we play that part.
		other := zombie.transactions.all()[0]
		asleep := make(chan struct{})
		hold := func() { <-asleep }
		other.beforeCommit.Store(&hold)
		deliver(t, zombie, of(0, 1, delivery(topic, "k", 2, "v")))
		eventually(t, "the zombie's record is written", func() bool { return len(readAll(t, c.Bootstrap(), topic)) == 2 })

		fence(t, next, 0, 2)
		seen := 0
		if err := next.Tail(t.Context(), map[relay.TopicPartition]int64{{Topic: topic}: 0}, func(relay.TopicPartition, int64, []store.Header) { seen++ }); err != nil {
			t.Fatal(err)
		}
		if seen != 1 {
			t.Errorf("the tail shows %d records, 1 is committed", seen)
		}
		deliver(t, next, of(0, 2, delivery(topic, "k", 2, "v")))
		allOK(t, reports(t, next, 1))

		close(asleep)
		wantClass(t, reports(t, zombie, 1)[2].Err, relay.ClassFatal)
		wantClass(t, zombie.Deliver(of(0, 1, delivery(topic, "k", 3, "v"))), relay.ClassFatal)
		deliver(t, next, of(0, 2, delivery(topic, "k", 3, "v")))
		allOK(t, reports(t, next, 1))
		if got := numbers(t, committed(t, c.Bootstrap(), topic)); got != "[1 2 3]" {
			t.Errorf("a read_committed consumer sees %s", got)
		}
		if got := numbers(t, readAll(t, c.Bootstrap(), topic)); got != "[1 2 2 3]" {
			t.Errorf("a read_uncommitted consumer sees %s", got)
		}
	})
}

// TestWithoutTransactionsAZombieSlips is the same without the mode: the former holder's late record is there twice.
func TestWithoutTransactionsAZombieSlips(t *testing.T) {
	f := fake(t, broker.FakeConfig{Topics: map[string]int{"t": 1}})
	zombie, next := newSink(t, f.Bootstrap(), nil), newSink(t, f.Bootstrap(), nil)
	deliver(t, next, delivery("t", "k", 1, "v"))
	allOK(t, reports(t, next, 1))
	deliver(t, zombie, delivery("t", "k", 1, "v")) // was in its queue
	allOK(t, reports(t, zombie, 1))
	if got := numbers(t, committed(t, f.Bootstrap(), "t")); got != "[1 1]" {
		t.Errorf("a consumer sees %s", got)
	}
}

// numbers are the records' numbers, in order.
func numbers(tb testing.TB, records []broker.Record) string {
	tb.Helper()
	all := make([]int, len(records))
	for i, r := range records {
		all[i] = index(tb, r)
	}
	return fmt.Sprint(all)
}

// TestRefusedRecordInATransaction: records that are too large for their topic are reported; their neighbours in batch and
// transaction are committed, once.
func TestRefusedRecordInATransaction(t *testing.T) {
	onBoth(t, func(t *testing.T, c cluster) {
		topic := createTopic(t, c, 2, map[string]string{"max.message.bytes": "20000"})
		s := newSink(t, c.Bootstrap(), transactional(t, func(cfg *Config) { cfg.Compression = "none" }))
		fence(t, s, 0, 1)
		const n, each = 60, 23
		var ds []*relay.Delivery
		for i := range n {
			size := 1000
			if i%each == 5 {
				size = 30_000
			}
			ds = append(ds, of(0, 1, delivery(topic, fmt.Sprint(i), i, strings.Repeat("x", size))))
		}
		deliver(t, s, ds...)
		for i, d := range reports(t, s, n) {
			if i%each == 5 {
				wantClass(t, d.Err, relay.ClassRecord)
			} else if d.Err != nil {
				t.Errorf("delivery %d: %v", i, d.Err)
			}
		}
		seen := map[int]int{}
		for _, r := range committed(t, c.Bootstrap(), topic) {
			seen[index(t, r)]++
		}
		for i := range n {
			if want := map[bool]int{true: 0, false: 1}[i%each == 5]; seen[i] != want {
				t.Errorf("record %d is there %d times", i, seen[i])
			}
		}
	})
}

// TestRefusedRecordIsNeverMistakenForTrouble: however librdkafka's news of a broken transaction and of the record that broke it
// arrive, the record gets its verdict, and is not tried again and again with pauses as if the cluster were in trouble.
func TestRefusedRecordIsNeverMistakenForTrouble(t *testing.T) {
	onBoth(t, func(t *testing.T, c cluster) {
		topic := createTopic(t, c, 1, map[string]string{"max.message.bytes": "20000"})
		logged := &strings.Builder{} // a handler writes one line at a time, and the sink's goroutines are gone when it is read
		s := newSink(t, c.Bootstrap(), transactional(t, func(cfg *Config) {
			cfg.Compression = "none"
			cfg.Logger = slog.New(slog.NewTextHandler(logged, &slog.HandlerOptions{Level: slog.LevelWarn}))
		}))
		fence(t, s, 0, 1)
		for i := range 40 {
			deliver(t, s, of(0, 1, delivery(topic, "k", i, strings.Repeat("x", 30_000))))
			wantClass(t, reports(t, s, 1)[i].Err, relay.ClassRecord)
		}
		ctx, cancel := context.WithTimeout(context.Background(), patience)
		defer cancel()
		if err := s.Close(ctx); err != nil {
			t.Fatal(err)
		}
		for line := range strings.Lines(logged.String()) {
			if strings.Contains(line, "tried again") && strings.Contains(line, codeTooLarge) {
				t.Error(line)
			}
		}
	})
}

// TestTopicRefusesTheTransaction: a topic that may not be written breaks the transaction without any record being named. Only
// its own records are reported, the others are committed; also when librdkafka knows before it has all records, and takes no more.
func TestTopicRefusesTheTransaction(t *testing.T) {
	t.Run("known when all is handed over", func(t *testing.T) { topicRefusesTheTransaction(t, false) })
	t.Run("known before", func(t *testing.T) { topicRefusesTheTransaction(t, true) })
}

func topicRefusesTheTransaction(t *testing.T, early bool) {
	f := fake(t, broker.FakeConfig{Topics: map[string]int{"good": 1, "bad": 1}})
	f.Cluster().ControlKey(int16(kmsg.AddPartitionsToTxn), func(r kmsg.Request) (kmsg.Response, error, bool) {
		f.Cluster().KeepControl()
		request := r.(*kmsg.AddPartitionsToTxnRequest)
		bad := false
		for _, topic := range request.Topics {
			bad = bad || topic.Topic == "bad"
		}
		if !bad {
			return nil, nil, false
		}
		response := request.ResponseKind().(*kmsg.AddPartitionsToTxnResponse)
		for _, topic := range request.Topics {
			answer := kmsg.AddPartitionsToTxnResponseTopic{Topic: topic.Topic}
			for _, p := range topic.Partitions {
				code := kerr.OperationNotAttempted.Code
				if topic.Topic == "bad" {
					code = kerr.TopicAuthorizationFailed.Code
				}
				answer.Partitions = append(answer.Partitions, kmsg.AddPartitionsToTxnResponseTopicPartition{Partition: p, ErrorCode: code})
			}
			response.Topics = append(response.Topics, answer)
		}
		return response, nil, true
	})
	s := newSink(t, f.Bootstrap(), transactional(t))
	fence(t, s, 0, 1)
	var ds []*relay.Delivery
	for i := range 20 {
		ds = append(ds, delivery([]string{"good", "bad"}[i%2], fmt.Sprint(i), i, "v"))
	}
	began := time.Now()
	for epoch := int64(1); len(ds) > 0; epoch++ { // nothing was in the transaction: it cannot be aborted, and the producer dies
		fence(t, s, 0, epoch)
		if early {
			tr := s.transactions.all()[0]
			broken := func() bool {
				tr.mu.Lock()
				defer tr.mu.Unlock()
				return tr.suspect || tr.fatal != nil
			}
			await := func(topic string) {
				for topic == "bad" && !broken() && t.Context().Err() == nil {
					<-time.After(time.Millisecond)
				}
			}
			tr.afterHandingOver.Store(&await)
		}
		accepted := 0
		var again []*relay.Delivery
		take := func(d *relay.Delivery, err error) {
			var e *relay.SinkError
			switch {
			case errors.As(err, &e) && e.Class == relay.ClassFatal:
				again = append(again, d)
			case d.Record.Topic == "bad":
				wantClass(t, err, relay.ClassTopic)
			case err != nil:
				t.Errorf("delivery %v: %v", d.Opaque, err)
			}
		}
		for _, d := range ds {
			if err := s.Deliver(of(0, epoch, d)); err != nil {
				take(d, err)
			} else {
				accepted++
			}
		}
		for _, d := range reports(t, s, accepted) {
			take(d, d.Err)
		}
		if ds = again; epoch == 10 {
			t.Fatalf("%d records left", len(ds))
		}
	}
	if took := time.Since(began); took > s.cfg.TransactionTimeout/2 {
		t.Errorf("found out after %s", took)
	}
	if n := len(committed(t, f.Bootstrap(), "good")); n != 10 {
		t.Errorf("%d records", n)
	}
}

// TestErrorsOfTheTransactionAreNotTheTopics: a record may be answered with what is wrong with its transaction. That is aborted, and
// all goes again.
func TestErrorsOfTheTransactionAreNotTheTopics(t *testing.T) {
	for _, code := range []*kerr.Error{kerr.InvalidTxnState, kerr.TransactionAbortable, kerr.ConcurrentTransactions} {
		t.Run(code.Message, func(t *testing.T) {
			f := fake(t, broker.FakeConfig{Topics: map[string]int{"t": 1}})
			s := newSink(t, f.Bootstrap(), transactional(t))
			fence(t, s, 0, 1)
			f.Cluster().Fault(kfake.Fault{Keys: []kmsg.Key{kmsg.Produce}, Err: code, Count: 1})
			deliver(t, s, of(0, 1, delivery("t", "k", 1, "v")), of(0, 1, delivery("t", "l", 2, "v")))
			allOK(t, reports(t, s, 2))
			if got := numbers(t, committed(t, f.Bootstrap(), "t")); got != "[1 2]" {
				t.Errorf("a read_committed consumer sees %s", got)
			}
		})
	}
}

// TestTopicNotAuthorisedForTransactions: a topic that we may see and not write is refused before it breaks a transaction.
func TestTopicNotAuthorisedForTransactions(t *testing.T) {
	acl := func(resource kmsg.ACLResourceType, name string, op kmsg.ACLOperation) kfake.ACL {
		return kfake.ACL{Resource: resource, Name: name, Pattern: kmsg.ACLResourcePatternTypeLiteral, Operation: op, Allow: true}
	}
	topic := kmsg.ACLResourceTypeTopic
	_, address := rawFake(t, kfake.EnableSASL(), kfake.EnableACLs(), kfake.Superuser("PLAIN", "admin", "a"), kfake.SeedTopics(2, "mine", "seen"),
		kfake.User("PLAIN", "relay", "r", acl(topic, "mine", kmsg.ACLOperationWrite), acl(topic, "mine", kmsg.ACLOperationDescribe), acl(topic, "seen", kmsg.ACLOperationDescribe),
			acl(kmsg.ACLResourceTypeTransactionalId, "app-0", kmsg.ACLOperationWrite), acl(kmsg.ACLResourceTypeTransactionalId, "app-0", kmsg.ACLOperationDescribe)))
	s := newSink(t, address, func(cfg *Config) {
		cfg.Transactional, cfg.TransactionalIDPrefix, cfg.TopicRecheck = true, "app", 50*time.Millisecond
		cfg.Properties = map[string]string{"security.protocol": "sasl_plaintext", "sasl.mechanism": "PLAIN", "sasl.username": "relay", "sasl.password": "r"}
	})
	fence(t, s, 0, 1)
	for i := range 20 {
		deliver(t, s, of(0, 1, delivery("mine", fmt.Sprint(i), i, "v")))
		n := 1
		if err := s.Deliver(of(0, 1, delivery("seen", "k", 100+i, "v"))); err != nil {
			wantClass(t, err, relay.ClassTopic)
		} else {
			n++
		}
		for _, d := range reports(t, s, n) {
			if d.Record.Topic == "seen" {
				wantClass(t, d.Err, relay.ClassTopic)
			} else if d.Err != nil {
				t.Error(d.Err)
			}
		}
	}
	// An id that is not ours is a refusal by the cluster.
	err := s.Fence(t.Context(), 1, 1)
	var e *relay.SinkError
	if !errors.As(err, &e) || e.Class != relay.ClassCluster {
		t.Errorf("fencing with an id that is not ours: %v", err)
	}
}

// TestPurgeAborts: what is under way is aborted and reported, and the producer goes on.
func TestPurgeAborts(t *testing.T) {
	onBoth(t, func(t *testing.T, c cluster) {
		topic := createTopic(t, c, 1, nil)
		s := newSink(t, c.Bootstrap(), transactional(t))
		fence(t, s, 0, 1)
		deliver(t, s, of(0, 1, delivery(topic, "k", 0, "v")))
		allOK(t, reports(t, s, 1))
		tr := s.transactions.all()[0]
		gate := make(chan struct{})
		hold := func() { <-gate }
		tr.beforeCommit.Store(&hold)
		deliver(t, s, of(0, 1, delivery(topic, "k", 1, "v")))
		eventually(t, "a record is written", func() bool { return len(readAll(t, c.Bootstrap(), topic)) == 2 })
		deliver(t, s, of(0, 1, delivery(topic, "j", 2, "v"))) // waits for the next
		s.Purge()
		close(gate)
		for _, d := range reports(t, s, 2) {
			wantClass(t, d.Err, relay.ClassPurged)
		}
		deliver(t, s, of(0, 1, delivery(topic, "k", 3, "v")))
		allOK(t, reports(t, s, 1))
		if got := numbers(t, committed(t, c.Bootstrap(), topic)); got != "[0 3]" {
			t.Errorf("a read_committed consumer sees %s", got)
		}
	})
}

// TestCloseWithATransactionOpen: Close is bounded, and reports what is not committed.
func TestCloseWithATransactionOpen(t *testing.T) {
	f := fake(t, broker.FakeConfig{Topics: map[string]int{"t": 1}})
	mode := transactional(t)
	s := newSink(t, f.Bootstrap(), mode)
	fence(t, s, 0, 1)
	loading := f.Cluster().Fault(kfake.Fault{Keys: []kmsg.Key{kmsg.EndTxn}, Err: kerr.CoordinatorLoadInProgress, Count: -1})
	deliver(t, s, of(0, 1, delivery("t", "k", 1, "v")))
	ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	if err := s.Close(ctx); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("close: %v", err)
	}
	wantClass(t, (<-s.Reports()).Err, relay.ClassPurged)

	loading.Remove()
	next := newSink(t, f.Bootstrap(), mode)
	fence(t, next, 0, 2)
	deliver(t, next, of(0, 2, delivery("t", "k", 2, "v")))
	allOK(t, reports(t, next, 1))
}

// TestTransactionThatDoesNotEnd: what hangs in the cluster, or in librdkafka, costs one producer and not the shard.
func TestTransactionThatDoesNotEnd(t *testing.T) {
	for _, key := range []kmsg.Key{kmsg.AddPartitionsToTxn, kmsg.EndTxn} {
		t.Run(key.Name(), func(t *testing.T) {
			f := fake(t, broker.FakeConfig{Topics: map[string]int{"t": 1}})
			mode := transactional(t)
			s := newSink(t, f.Bootstrap(), func(c *Config) {
				mode(c)
				c.TransactionTimeout = 2 * time.Second
			})
			fence(t, s, 0, 1)
			loading := f.Cluster().Fault(kfake.Fault{Keys: []kmsg.Key{key}, Err: kerr.CoordinatorLoadInProgress, Count: -1})
			deliver(t, s, of(0, 1, delivery("t", "k", 1, "v")), of(0, 1, delivery("t", "l", 2, "v")))
			for _, d := range reports(t, s, 2) {
				wantClass(t, d.Err, relay.ClassFatal)
			}
			loading.Remove()
			fence(t, s, 0, 2)
			deliver(t, s, of(0, 2, delivery("t", "k", 1, "v")))
			allOK(t, reports(t, s, 1))
			if got := numbers(t, committed(t, f.Bootstrap(), "t")); got != "[1]" {
				t.Errorf("a read_committed consumer sees %s", got)
			}
		})
	}
}

// TestTransactionsOutliveTheBroker: a broker that is killed under load and comes back. What is cut off meanwhile is fenced
// again, as the relay does; nothing that was acknowledged is missing, and order is kept.
func TestTransactionsOutliveTheBroker(t *testing.T) {
	own, err := broker.StartApache(t.Context(), broker.ApacheConfig{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = own.Stop(context.Background()) })
	topic := createTopic(t, own, 3, nil)
	s := newSink(t, own.Bootstrap(), transactional(t))
	fence(t, s, 0, 1)
	g := &gate{tb: t, s: s, topic: topic, each: 40, epoch: 1}
	g.onDone = func(done int) {
		if done == 300 {
			own.Kill(0)
			if err := own.Restart(t.Context(), 0); err != nil {
				t.Error(err)
			}
		}
	}
	g.onFatal = func() {
		g.epoch++
		fence(t, s, 0, g.epoch)
	}
	g.run(20)
	g.check(committed(t, own.Bootstrap(), topic), 20)
	t.Logf("epoch %d in the end; delivered again: %v", g.epoch, g.again)
}

// TestTailWaitsForOpenTransactions: records that are committed behind somebody's open transaction are not shown before it
// ends; the tail waits for them.
func TestTailWaitsForOpenTransactions(t *testing.T) {
	onBoth(t, func(t *testing.T, c cluster) {
		topic := createTopic(t, c, 1, nil)
		client, err := kgo.NewClient(kgo.SeedBrokers(c.Bootstrap()), kgo.DisableClientMetrics(), kgo.TransactionalID(topic+"-other"), kgo.DefaultProduceTopic(topic))
		if err != nil {
			t.Fatal(err)
		}
		defer client.Close()
		ctx, cancel := context.WithTimeout(t.Context(), patience)
		defer cancel()
		if err := client.BeginTransaction(); err != nil {
			t.Fatal(err)
		}
		if err := client.ProduceSync(ctx, kgo.StringRecord("open")).FirstErr(); err != nil {
			t.Fatal(err)
		}
		s := newSink(t, c.Bootstrap(), transactional(t))
		fence(t, s, 0, 1)
		deliver(t, s, of(0, 1, delivery(topic, "k", 1, "v")))
		allOK(t, reports(t, s, 1))

		early, stop := context.WithTimeout(ctx, 300*time.Millisecond)
		defer stop()
		from := map[relay.TopicPartition]int64{{Topic: topic}: 0}
		if err := s.Tail(early, from, func(relay.TopicPartition, int64, []store.Header) {}); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("the tail ended while a transaction was open: %v", err)
		}
		if err := client.EndTransaction(ctx, kgo.TryAbort); err != nil {
			t.Fatal(err)
		}
		n := 0
		if err := s.Tail(ctx, from, func(relay.TopicPartition, int64, []store.Header) { n++ }); err != nil || n != 1 {
			t.Errorf("%d records, %v", n, err)
		}
	})
}
