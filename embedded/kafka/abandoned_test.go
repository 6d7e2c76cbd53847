package kafka_test

import (
	"os"
	"slices"
	"testing"

	"github.com/twmb/franz-go/pkg/kgo"

	"github.com/outbox-platform/outbox/embedded/kafka"
)

// transact writes a record in a transaction and ends it, or leaves it open.
func transact(t *testing.T, bootstrap, value string, end bool) {
	t.Helper()
	client, err := kgo.NewClient(kgo.SeedBrokers(bootstrap), kgo.TransactionalID("shard-0"), kgo.DefaultProduceTopic("orders"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(client.Close)
	if err := client.BeginTransaction(); err != nil {
		t.Fatal(err)
	}
	if err := client.ProduceSync(t.Context(), kgo.StringRecord(value)).FirstErr(); err != nil {
		t.Fatal(err)
	}
	if end {
		if err := client.EndTransaction(t.Context(), kgo.TryCommit); err != nil {
			t.Fatal(err)
		}
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

func startFake(t *testing.T, dir string) *kafka.Fake {
	t.Helper()
	fake, err := kafka.StartFake(kafka.FakeConfig{Dir: dir, Topics: map[string]int{"orders": 1}, SyncWrites: true})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(fake.Close)
	return fake
}

// A consumer of committed records sees what was committed after brokers were killed with a transaction open, and never that one.
func TestTransactionsOfKilledFakeBrokersAreAborted(t *testing.T) {
	dir := t.TempDir()
	var want []string
	for _, name := range []string{"first", "second", "third"} {
		fake := startFake(t, dir)
		transact(t, fake.Bootstrap(), name, true)
		want = append(want, name)
		records, err := kafka.ReadCommitted(t.Context(), fake.Bootstrap(), "orders")
		if err != nil {
			t.Fatal(err)
		}
		var got []string
		for _, r := range records {
			got = append(got, string(r.Value))
		}
		if !slices.Equal(got, want) {
			t.Fatalf("committed records %q, want %q", got, want)
		}
		transact(t, fake.Bootstrap(), "open behind "+name, false)
		dir = killedImage(t, dir)
	}
}
