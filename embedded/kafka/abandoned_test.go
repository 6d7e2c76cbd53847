package kafka_test

import (
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/twmb/franz-go/pkg/kgo"

	"github.com/outbox-platform/outbox/embedded/kafka"
)

// begin writes a record into each of the topic's partitions in a transaction.
func begin(t *testing.T, bootstrap, value string) *kgo.Client {
	t.Helper()
	client, err := kgo.NewClient(kgo.SeedBrokers(strings.Split(bootstrap, ",")...), kgo.TransactionalID("shard-0"), kgo.DefaultProduceTopic("orders"),
		kgo.RecordPartitioner(kgo.ManualPartitioner()))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(client.Close)
	if err := client.BeginTransaction(); err != nil {
		t.Fatal(err)
	}
	for partition := range int32(2) {
		if err := client.ProduceSync(t.Context(), &kgo.Record{Value: []byte(value), Partition: partition}).FirstErr(); err != nil {
			t.Fatal(err)
		}
	}
	return client
}

func commit(t *testing.T, client *kgo.Client) {
	t.Helper()
	if err := client.EndTransaction(t.Context(), kgo.TryCommit); err != nil {
		t.Fatal(err)
	}
}

// killedImage is what brokers that are killed now leave behind.
func killedImage(t *testing.T, dir string) string {
	t.Helper()
	image := t.TempDir()
	if err := os.CopyFS(image, os.DirFS(dir)); err != nil {
		t.Fatal(err)
	}
	return image
}

// freePort is a port that nobody listens on, and that the system gives to nobody who asks for any.
func freePort(t *testing.T) int {
	t.Helper()
	for {
		port := 20_000 + rand.IntN(10_000)
		if l, err := net.Listen("tcp", "127.0.0.1:"+strconv.Itoa(port)); err == nil {
			_ = l.Close()
			return port
		}
	}
}

func startFake(t *testing.T, dir string, port int) *kafka.Fake {
	t.Helper()
	fake, err := kafka.StartFake(kafka.FakeConfig{Dir: dir, Port: port, Topics: map[string]int{"orders": 2}, SyncWrites: true})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(fake.Close)
	return fake
}

// wantCommitted checks what a consumer of committed records sees.
func wantCommitted(t *testing.T, fake *kafka.Fake, want ...string) {
	t.Helper()
	records, err := kafka.ReadCommitted(t.Context(), fake.Bootstrap(), "orders")
	if err != nil {
		t.Fatal(err)
	}
	for partition := range int32(2) {
		var got []string
		for _, r := range records {
			if r.Partition == partition {
				got = append(got, string(r.Value))
			}
		}
		if !slices.Equal(got, want) {
			t.Fatalf("committed records of partition %d: %q, want %q", partition, got, want)
		}
	}
}

// A consumer of committed records sees what was committed after brokers were killed with a transaction open, and never that one.
func TestTransactionsOfKilledFakeBrokersAreAborted(t *testing.T) {
	dir := t.TempDir()
	var want []string
	for n := range 3 {
		fake := startFake(t, dir, 0)
		wantCommitted(t, fake, want...)
		value := fmt.Sprint(n)
		commit(t, begin(t, fake.Bootstrap(), value))
		want = append(want, value)
		wantCommitted(t, fake, want...)
		begin(t, fake.Bootstrap(), "open behind "+value)
		dir = killedImage(t, dir)
	}
}

// Who has a transaction open when the brokers are killed cannot commit it afterwards.
func TestProducersOfKilledFakeBrokersAreFenced(t *testing.T) {
	port, dir := freePort(t), t.TempDir()
	fake := startFake(t, dir, port)
	client := begin(t, fake.Bootstrap(), "open")
	image := killedImage(t, dir)
	fake.Close()
	fake = startFake(t, image, port)
	if err := client.EndTransaction(t.Context(), kgo.TryCommit); err == nil {
		t.Error("the commit of a transaction that was aborted succeeds")
	}
	wantCommitted(t, fake)
}

// What is open at an orderly end goes on, also when a start in between fails.
func TestTransactionsOutliveAnOrderlyEnd(t *testing.T) {
	port, dir := freePort(t), t.TempDir()
	fake := startFake(t, dir, port)
	client := begin(t, fake.Bootstrap(), "open")
	fake.Close()
	blocked, err := net.Listen("tcp", "127.0.0.1:"+strconv.Itoa(port))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := kafka.StartFake(kafka.FakeConfig{Dir: dir, Port: port}); err == nil {
		t.Fatal("started on a port that is taken")
	}
	_ = blocked.Close()
	fake = startFake(t, dir, port)
	commit(t, client)
	wantCommitted(t, fake, "open")
}

// And a kill after that ends it, also when nothing was written in between.
func TestKillAfterAnOrderlyEnd(t *testing.T) {
	dir := t.TempDir()
	fake := startFake(t, dir, 0)
	begin(t, fake.Bootstrap(), "open")
	fake.Close()
	startFake(t, dir, 0)
	fake = startFake(t, killedImage(t, dir), 0)
	commit(t, begin(t, fake.Bootstrap(), "later"))
	wantCommitted(t, fake, "later")
}
