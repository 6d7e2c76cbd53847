package kafka_test

import (
	"context"
	"fmt"
	"os"
	"strings"
	"testing"

	"github.com/twmb/franz-go/pkg/kgo"
	"go.uber.org/goleak"

	"github.com/outbox-platform/outbox/embedded/kafka"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// produce writes n records with the foreign client and waits for all acknowledgements.
func produce(t *testing.T, bootstrap, topic string, from, n int) {
	t.Helper()
	client, err := kgo.NewClient(kgo.SeedBrokers(strings.Split(bootstrap, ",")...))
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	var records []*kgo.Record
	for i := from; i < from+n; i++ {
		records = append(records, &kgo.Record{
			Topic: topic, Key: fmt.Appendf(nil, "key-%d", i%7), Value: fmt.Append(nil, i),
			Headers: []kgo.RecordHeader{{Key: "h", Value: []byte("v")}},
		})
	}
	if err := client.ProduceSync(t.Context(), records...).FirstErr(); err != nil {
		t.Fatal(err)
	}
}

// checkRead reads everything and checks that each of n records is there once, and per key in order.
func checkRead(t *testing.T, bootstrap, topic string, n int) {
	t.Helper()
	records, err := kafka.ReadAll(t.Context(), bootstrap, topic)
	if err != nil {
		t.Fatal(err)
	}
	if len(records) != n {
		t.Fatalf("read %d records, want %d", len(records), n)
	}
	last := map[string]int{}
	for _, r := range records {
		var i int
		if _, err := fmt.Sscan(string(r.Value), &i); err != nil {
			t.Fatal(err)
		}
		key := string(r.Key)
		if before, seen := last[key]; key != fmt.Sprintf("key-%d", i%7) || (seen && before >= i) {
			t.Errorf("record %d with key %s after %d", i, key, before)
		}
		last[key] = i
		if v, found := r.Header("h"); !found || string(v) != "v" || r.Timestamp.IsZero() {
			t.Errorf("record %d: headers %v, time %v", i, r.Headers, r.Timestamp)
		}
	}
}

func TestFakeKeepsRecordsInItsDirectory(t *testing.T) {
	config := kafka.FakeConfig{Dir: t.TempDir(), Brokers: 2, Topics: map[string]int{"orders": 3, "empty": 0}}
	fake, err := kafka.StartFake(config)
	if err != nil {
		t.Fatal(err)
	}
	if got := len(fake.Cluster().PartitionInfos("empty")); got != kafka.DefaultPartitions {
		t.Errorf("%d partitions by default", got)
	}
	produce(t, fake.Bootstrap(), "orders", 0, 100)
	fake.Close()

	fake, err = kafka.StartFake(config)
	if err != nil {
		t.Fatal(err)
	}
	defer fake.Close()
	produce(t, fake.Bootstrap(), "orders", 100, 100)
	checkRead(t, fake.Bootstrap(), "orders", 200)
	checkRead(t, fake.Bootstrap(), "empty", 0)
	if err := fake.CreateTopic("orders", 1, nil); err == nil {
		t.Error("second topic of the same name")
	}
	if _, err := kafka.ReadAll(t.Context(), fake.Bootstrap(), "unknown"); err == nil || !strings.Contains(err.Error(), "unknown") {
		t.Errorf("topic that does not exist: %v", err)
	}
}

func TestReadUntilSeesRecordsThatComeLater(t *testing.T) {
	fake, err := kafka.StartFake(kafka.FakeConfig{Topics: map[string]int{"orders": 2}})
	if err != nil {
		t.Fatal(err)
	}
	defer fake.Close()
	produce(t, fake.Bootstrap(), "orders", 0, 10)
	read := make(chan int)
	seen := make(chan struct{}, 100)
	go func() {
		records, err := kafka.ReadUntil(t.Context(), fake.Bootstrap(), func(records []kafka.Record) bool {
			seen <- struct{}{}
			return len(records) >= 20
		}, "orders")
		if err != nil {
			t.Error(err)
		}
		read <- len(records)
	}()
	<-seen
	produce(t, fake.Bootstrap(), "orders", 10, 10)
	if n := <-read; n != 20 {
		t.Errorf("read %d records", n)
	}

	ended, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := kafka.ReadUntil(ended, fake.Bootstrap(), kafka.AtLeast(1000), "orders"); err == nil {
		t.Error("no error from an ended context")
	}
}

func startApache(t *testing.T, config kafka.ApacheConfig) *kafka.Apache {
	t.Helper()
	config.Log = func(line string) { t.Log(line) }
	apache, err := kafka.StartApache(t.Context(), config)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := apache.Stop(context.Background()); err != nil {
			t.Error(err)
		}
	})
	return apache
}

func TestApacheKeepsRecordsThroughKill(t *testing.T) {
	apache := startApache(t, kafka.ApacheConfig{Heap: "256m"})
	if err := apache.CreateTopic(t.Context(), "orders", 3, map[string]string{"max.message.bytes": "20000"}); err != nil {
		t.Fatal(err)
	}
	produce(t, apache.Bootstrap(), "orders", 0, 500)
	before, err := apache.CPUTime()
	if err != nil || before == 0 {
		t.Errorf("CPU time %v, %v", before, err)
	}
	pid := apache.PID(0)
	apache.Kill(0)
	if stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid)); err == nil && !strings.Contains(string(stat), ") Z ") {
		t.Errorf("killed node still there: %s", stat)
	}
	if err := apache.Restart(t.Context(), 0); err != nil {
		t.Fatal(err)
	}
	produce(t, apache.Bootstrap(), "orders", 500, 100)
	checkRead(t, apache.Bootstrap(), "orders", 600)
	if after, err := apache.CPUTime(); err != nil || after <= before {
		t.Errorf("CPU time went from %v to %v over a restart (%v)", before, after, err)
	}

	client, err := kgo.NewClient(kgo.SeedBrokers(apache.Bootstrap()), kgo.ProducerBatchMaxBytes(1<<20), kgo.ProducerBatchCompression(kgo.NoCompression()))
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	large := &kgo.Record{Topic: "orders", Value: make([]byte, 30_000)}
	if err := client.ProduceSync(t.Context(), large).FirstErr(); err == nil {
		t.Error("the topic's own limit is not in force")
	}
	if err := apache.CreateTopic(t.Context(), "orders", 3, nil); err == nil || !strings.Contains(err.Error(), "orders") {
		t.Errorf("second topic of the same name: %v", err)
	}
}

func TestApacheClusterServesWithoutOneNode(t *testing.T) {
	apache := startApache(t, kafka.ApacheConfig{Dir: t.TempDir(), Nodes: 3, Heap: "256m"})
	if err := apache.CreateTopic(t.Context(), "orders", 3, nil); err != nil {
		t.Fatal(err)
	}
	produce(t, apache.Bootstrap(), "orders", 0, 100)
	apache.Kill(1)
	produce(t, apache.Bootstrap(), "orders", 100, 100)
	checkRead(t, apache.Bootstrap(), "orders", 200)
	if err := apache.Restart(t.Context(), 1); err != nil {
		t.Fatal(err)
	}
}

func TestMissingJavaSaysWhatToInstall(t *testing.T) {
	t.Setenv("PATH", t.TempDir())
	t.Setenv("JAVA_HOME", "")
	_, err := kafka.StartApache(t.Context(), kafka.ApacheConfig{})
	if err == nil || !strings.Contains(err.Error(), "default-jre-headless") {
		t.Errorf("error does not say what to install: %v", err)
	}
}
