package kafka

import (
	"context"
	"fmt"
	"maps"
	"strings"
	"testing"
	"time"

	"github.com/twmb/franz-go/pkg/kfake"
	"github.com/twmb/franz-go/pkg/kgo"
	"github.com/twmb/franz-go/pkg/kmsg"

	broker "github.com/outbox-platform/outbox/embedded/kafka"
	"github.com/outbox-platform/outbox/relay"
	"github.com/outbox-platform/outbox/store"
)

// TestUnknownTopic: an unknown topic is told within the time of one look-up, then on the spot; other topics do not notice.
// Once it is created its records go.
func TestUnknownTopic(t *testing.T) {
	onBoth(t, func(t *testing.T, c cluster) {
		s := newSink(t, c.Bootstrap(), func(cfg *Config) { cfg.TopicRecheck = 50 * time.Millisecond })
		there := createTopic(t, c, 2, nil)
		deliver(t, s, delivery(there, "k", 0, "v"))
		allOK(t, reports(t, s, 1))

		missing := topicName(t) + "-missing"
		start := time.Now()
		deliver(t, s, delivery(missing, "k", 1, "v"), delivery(missing, "k", 2, "v"))
		for _, d := range reports(t, s, 2) {
			wantClass(t, d.Err, relay.ClassTopic)
		}
		if took := time.Since(start); took > 5*time.Second {
			t.Errorf("it took %s", took)
		}
		wantClass(t, s.Deliver(delivery(missing, "k", 3, "v")), relay.ClassTopic)
		if _, ok := goesTo(s, missing, []byte("k")); ok {
			t.Error("the partition of an unknown topic is known")
		}
		deliver(t, s, delivery(there, "k", 4, "v"))
		allOK(t, reports(t, s, 1))

		createNamedTopic(t, c, missing, 2, nil)
		eventually(t, "accepted", func() bool {
			err := s.Deliver(delivery(missing, "k", 5, "v"))
			if err != nil {
				wantClass(t, err, relay.ClassTopic)
			}
			return err == nil
		})
		allOK(t, reports(t, s, 1))
		if records := readAll(t, c.Bootstrap(), missing); len(records) != 1 || index(t, records[0]) != 5 {
			t.Errorf("records %v", records)
		}
	})
}

func TestIllegalTopicNames(t *testing.T) {
	f := fake(t, broker.FakeConfig{})
	s := newSink(t, f.Bootstrap(), nil)
	for _, name := range []string{"", ".", "..", "a/b", "ä", "a b", "a\x00", strings.Repeat("a", 250), strings.Repeat("a", 5000)} {
		wantClass(t, s.Deliver(delivery(name, "k", 1, "v")), relay.ClassTopic)
		if _, ok := goesTo(s, name, nil); ok {
			t.Errorf("it is known where %q goes", name)
		}
	}
	if got, err := s.Topics(t.Context(), []string{"a/b", "", "missing"}); err != nil || len(got) != 0 {
		t.Errorf("topics %v, %v", got, err)
	}
	noReport(t, s)
}

// TestTopicDeleted: a topic that goes away is the topic's fault, and works again after it was made anew.
func TestTopicDeleted(t *testing.T) {
	f := fake(t, broker.FakeConfig{Topics: map[string]int{"t": 2, "other": 1}})
	s := newSink(t, f.Bootstrap(), func(cfg *Config) {
		cfg.TopicRecheck = 50 * time.Millisecond
		cfg.MetadataRefresh = 100 * time.Millisecond
	})
	deliver(t, s, delivery("t", "k", 0, "v"))
	allOK(t, reports(t, s, 1))
	if err := f.Cluster().DeleteTopic("t"); err != nil {
		t.Fatal(err)
	}
	// Accepted before the sink knows, or refused after: the class is the same, and it does not take half a minute.
	start := time.Now()
	if err := s.Deliver(delivery("t", "k", 1, "v")); err != nil {
		wantClass(t, err, relay.ClassTopic)
	} else {
		wantClass(t, reports(t, s, 1)[1].Err, relay.ClassTopic)
	}
	t.Logf("told after %s", time.Since(start))
	deliver(t, s, delivery("other", "k", 2, "v"))
	allOK(t, reports(t, s, 1))

	if err := f.CreateTopic("t", 3, nil); err != nil {
		t.Fatal(err)
	}
	n := 10
	eventually(t, "delivered to the new topic", func() bool {
		n++
		if err := s.Deliver(delivery("t", "k", n, "v")); err != nil {
			wantClass(t, err, relay.ClassTopic)
			return false
		}
		d := reports(t, s, 1)[n]
		if d.Err != nil {
			if e := d.Err.(*relay.SinkError); e.Class != relay.ClassTopic && e.Class != relay.ClassFatal && e.Class != relay.ClassCluster { //nolint:errorlint // the contract
				t.Fatal(d.Err)
			}
		}
		return d.Err == nil
	})
}

// TestMorePartitions: a partition count that grows is noticed, and the sink and the producer agree on it.
func TestMorePartitions(t *testing.T) {
	onBoth(t, func(t *testing.T, c cluster) {
		topic := createTopic(t, c, 2, nil)
		s := newSink(t, c.Bootstrap(), func(cfg *Config) { cfg.MetadataRefresh = 100 * time.Millisecond })
		allOK(t, settle(t, s, delivery(topic, "warm", -1, "v")))
		addPartitions(t, c.Bootstrap(), topic, 7)
		key := []byte("4") // 0x5a4b5ca1 % 7 = 5
		if p := relay.Partition(key, 7); p < 2 {
			t.Fatalf("the key must fall on a new partition, not %d", p)
		}
		eventually(t, "seven partitions", func() bool { p, ok := goesTo(s, topic, key); return ok && p == relay.Partition(key, 7) })
		var ds []*relay.Delivery
		for i := range 100 {
			ds = append(ds, delivery(topic, fmt.Sprint(i), i, "v"))
		}
		allOK(t, settle(t, s, ds...))
		for _, d := range ds {
			if p := relay.Partition(d.Record.Key, 7); d.Partition != p {
				t.Errorf("key %s on %d, want %d", d.Record.Key, d.Partition, p)
			}
		}
	})
}

func addPartitions(tb testing.TB, bootstrap, topic string, n int32) {
	tb.Helper()
	client, err := kgo.NewClient(kgo.SeedBrokers(bootstrap), kgo.DisableClientMetrics())
	if err != nil {
		tb.Fatal(err)
	}
	defer client.Close()
	req := kmsg.NewPtrCreatePartitionsRequest()
	rt := kmsg.NewCreatePartitionsRequestTopic()
	rt.Topic, rt.Count = topic, n
	req.Topics = append(req.Topics, rt)
	req.TimeoutMillis = 10_000
	resp, err := req.RequestWith(tb.Context(), client)
	if err != nil || resp.Topics[0].ErrorCode != 0 {
		tb.Fatalf("adding partitions: %v %+v", err, resp)
	}
}

// TestTopicsAreKnownFromTheStart: where keys go is known soon after the start, before anything was delivered.
func TestTopicsAreKnownFromTheStart(t *testing.T) {
	f := fake(t, broker.FakeConfig{Topics: map[string]int{"t": 3}})
	s := newSink(t, f.Bootstrap(), nil)
	healthy(t, s)
	if p, ok := goesTo(s, "t", []byte("k")); !ok || p != relay.Partition([]byte("k"), 3) {
		t.Errorf("partition %d, %v", p, ok)
	}
}

// TestPartitionsOfTopicsNotKnownYet: a relay that takes shards over right after its start asks at once.
func TestPartitionsOfTopicsNotKnownYet(t *testing.T) {
	onBoth(t, func(t *testing.T, c cluster) {
		a := createTopic(t, c, 3, nil)
		s := newSink(t, c.Bootstrap(), nil)
		want := map[string]int32{a: 3}
		for range 2 { // not known, known
			got, err := s.Partitions(t.Context(), []string{a, "not-there", "a/b"})
			if err != nil || !maps.Equal(got, want) {
				t.Errorf("partitions %v, %v", got, err)
			}
			allOK(t, settle(t, s, delivery(a, "k", 1, "v")))
		}
	})
}

func TestTopics(t *testing.T) {
	onBoth(t, func(t *testing.T, c cluster) {
		a := createTopic(t, c, 3, map[string]string{"max.message.bytes": "77777"})
		b := a + "-b"
		createNamedTopic(t, c, b, 1, nil)
		s := newSink(t, c.Bootstrap(), nil)
		want := map[string]store.Topic{
			a: {Name: a, Partitions: 3, MaxMessageBytes: 77777},
			b: {Name: b, Partitions: 1, MaxMessageBytes: 1048588},
		}
		got, err := s.Topics(t.Context(), []string{b, a, a, "not-there", "__consumer_offsets"})
		if err != nil || len(got) != 2 || want[got[0].Name] != got[0] || want[got[1].Name] != got[1] {
			t.Errorf("topics %v, %v", got, err)
		}
		all, err := s.Topics(t.Context(), nil)
		if err != nil {
			t.Fatal(err)
		}
		found := 0
		for _, topic := range all {
			if strings.HasPrefix(topic.Name, "__") {
				t.Errorf("internal topic %s", topic.Name)
			}
			if w, ok := want[topic.Name]; ok {
				found++
				if topic != w {
					t.Errorf("topic %+v, want %+v", topic, w)
				}
			}
		}
		if found != 2 {
			t.Errorf("%d found in %v", found, all)
		}
		if none, err := s.Topics(t.Context(), []string{}); err != nil || len(none) != 0 {
			t.Errorf("no names: %v, %v", none, err)
		}
		// They are in the cache now: no look-up before the first record.
		if p, ok := goesTo(s, a, []byte("k")); !ok || p != relay.Partition([]byte("k"), 3) {
			t.Errorf("partition %d, %v", p, ok)
		}
	})
}

// TestWrongPassword: the cluster refuses us; nothing is reported, Healthy says why, and with the right to log in back
// everything goes out.
func TestWrongPassword(t *testing.T) {
	c, address := rawFake(t, kfake.EnableSASL(), kfake.Superuser("PLAIN", "admin", "right"), kfake.SeedTopics(2, "t"))
	_ = c
	login := func(password string) func(*Config) {
		return func(cfg *Config) {
			cfg.Properties = map[string]string{"security.protocol": "sasl_plaintext", "sasl.mechanism": "PLAIN", "sasl.username": "admin", "sasl.password": password}
		}
	}
	s := newSink(t, address, login("wrong"))
	deliver(t, s, delivery("t", "k", 1, "v"))
	eventually(t, "authentication named as the reason", func() bool {
		ok, why := s.Healthy()
		return !ok && strings.Contains(strings.ToLower(why), "auth")
	})
	noReport(t, s)
	s.Purge()
	wantClass(t, reports(t, s, 1)[1].Err, relay.ClassPurged)

	s = newSink(t, address, login("right"))
	deliver(t, s, delivery("t", "k", 2, "v"))
	allOK(t, reports(t, s, 1))
}

// TestTopicNotAuthorised: a right that is missing on one topic concerns that topic only, also when we may see it.
func TestTopicNotAuthorised(t *testing.T) {
	topicACL := func(name string, op kmsg.ACLOperation) kfake.ACL {
		return kfake.ACL{Resource: kmsg.ACLResourceTypeTopic, Name: name, Pattern: kmsg.ACLResourcePatternTypeLiteral, Operation: op, Allow: true}
	}
	_, address := rawFake(t, kfake.EnableSASL(), kfake.EnableACLs(), kfake.Superuser("PLAIN", "admin", "a"), kfake.SeedTopics(2, "mine", "seen", "hidden"),
		kfake.User("PLAIN", "relay", "r", topicACL("mine", kmsg.ACLOperationWrite), topicACL("mine", kmsg.ACLOperationDescribe), topicACL("seen", kmsg.ACLOperationDescribe)))
	s := newSink(t, address, func(cfg *Config) {
		cfg.TopicRecheck = 50 * time.Millisecond
		cfg.Properties = map[string]string{"security.protocol": "sasl_plaintext", "sasl.mechanism": "PLAIN", "sasl.username": "relay", "sasl.password": "r"}
	})
	deliver(t, s, delivery("mine", "k", 1, "v"), delivery("seen", "k", 2, "v"), delivery("hidden", "k", 3, "v"))
	got := reports(t, s, 3)
	if got[1].Err != nil {
		t.Error(got[1].Err)
	}
	wantClass(t, got[2].Err, relay.ClassTopic)
	wantClass(t, got[3].Err, relay.ClassTopic)
	for i := range 20 {
		deliver(t, s, delivery("mine", "k", 10+i, "v"))
		if err := s.Deliver(delivery("seen", "k", 30, "v")); err != nil {
			wantClass(t, err, relay.ClassTopic)
		} else {
			for _, d := range reports(t, s, 2) {
				if d.Record.Topic == "seen" {
					wantClass(t, d.Err, relay.ClassTopic)
				} else if d.Err != nil {
					t.Error(d.Err)
				}
			}
			continue
		}
		allOK(t, reports(t, s, 1))
	}
	// Writing is not reading: takeovers need both. Without, Tail fails and does not pretend that there was nothing.
	ctx, cancel := context.WithTimeout(t.Context(), time.Second)
	defer cancel()
	err := s.Tail(ctx, map[relay.TopicPartition]int64{{Topic: "mine"}: 0, {Topic: "mine", Partition: 1}: 0}, func(relay.TopicPartition, int64, []store.Header) { t.Error("a record") })
	if err == nil {
		t.Error("no error from reading a tail without the right to read")
	}
	topics, err := s.Topics(t.Context(), nil)
	if err != nil || len(topics) != 2 || topics[0].MaxMessageBytes != defaultMaxMessageBytes {
		t.Errorf("topics %v, %v", topics, err)
	}
}
