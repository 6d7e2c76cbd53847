package kafka

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"strconv"
	"syscall"
	"testing"
	"time"

	broker "github.com/outbox-platform/outbox/embedded/kafka"
	"github.com/outbox-platform/outbox/relay"
	"github.com/outbox-platform/outbox/store"
)

// benchRecord is a record of the huleedu profile with a value of 1 KiB of JSON with random parts.
func benchRecord(topic string, key int) relay.Record {
	rng := rand.New(rand.NewPCG(uint64(key), 1))
	var value bytes.Buffer
	value.WriteString(`{"event_type":"order.placed.v1","data":[`)
	for value.Len() < 1010 {
		fmt.Fprintf(&value, `{"sku":"%08x","quantity":%d,"price":"%d.%02d"},`, rng.Uint32(), rng.IntN(9), rng.IntN(500), rng.IntN(100))
	}
	header := func(name, value string) store.Header { return store.Header{Name: name, Value: []byte(value)} }
	return relay.Record{
		Topic: topic, Key: []byte("order-" + strconv.Itoa(key)), Value: value.Bytes()[:1024], Timestamp: time.Now(),
		Headers: []store.Header{
			header("event_id", "0192f0a1-7c1e-7d3a-9b1e-1f2e3d4c5b6a"), header("trace_id", "0192f0a1-0000-7000-8000-000000000001"),
			header("schema_version", "1"), header("occurred_at", "2026-11-24T07:59:58.123456Z"), header("content_type", "application/json"),
			header("source_service", "shop"), header("event_type", "order.placed.v1"),
		},
	}
}

// BenchmarkDeliver measures Deliver to report with one record in flight per key, as the relay works: 16 keys show the
// latency, 1,000 the throughput.
func BenchmarkDeliver(b *testing.B) {
	for _, on := range []string{"fake", "apache"} {
		for _, keys := range []int{16, 1000} {
			b.Run(fmt.Sprintf("%s/keys-%d", on, keys), func(b *testing.B) { benchmarkDeliver(b, on, keys, nil) })
		}
	}
}

// BenchmarkSettings compares lingering and compression on the real broker: what the defaults were chosen by.
func BenchmarkSettings(b *testing.B) {
	for _, compression := range []string{"none", "lz4", "zstd"} {
		for _, linger := range []time.Duration{0, time.Millisecond, 2 * time.Millisecond} {
			for _, keys := range []int{16, 1000} {
				b.Run(fmt.Sprintf("%s/linger-%s/keys-%d", compression, linger, keys), func(b *testing.B) {
					benchmarkDeliver(b, "apache", keys, func(cfg *Config) { cfg.Compression = compression; cfg.Linger = linger })
				})
			}
		}
	}
}

func benchmarkDeliver(b *testing.B, on string, keys int, change func(*Config)) {
	c := apacheOrFake(b, on)
	topic := createTopic(b, c, 6, nil)
	s := newSink(b, c.Bootstrap(), change)
	ds := make([]*relay.Delivery, keys)
	sent := make([]time.Time, keys)
	for i := range ds {
		ds[i] = &relay.Delivery{Opaque: i, Record: benchRecord(topic, i)}
		deliver(b, s, ds[i])
	}
	for range ds { // warm: connections, producer id, topic
		if d := <-s.Reports(); d.Err != nil {
			b.Fatal(d.Err)
		}
	}
	latencies := make([]time.Duration, 0, 1<<20)
	b.ReportAllocs()
	b.ResetTimer()
	start, cpu := time.Now(), cpuTime(b)
	for i := range min(keys, b.N) {
		sent[i] = time.Now()
		deliver(b, s, ds[i])
	}
	for n := min(keys, b.N); n > 0; {
		d := <-s.Reports()
		if d.Err != nil {
			b.Fatal(d.Err)
		}
		i := d.Opaque.(int)
		latencies = append(latencies, time.Since(sent[i]))
		if len(latencies)+n <= b.N {
			sent[i] = time.Now()
			if err := s.Deliver(d); err != nil && !errors.Is(err, relay.ErrSinkFull) {
				b.Fatal(err)
			}
			continue
		}
		n--
	}
	took := time.Since(start)
	cpu = cpuTime(b) - cpu
	b.StopTimer()
	slices.Sort(latencies)
	b.ReportMetric(float64(b.N)/took.Seconds(), "records/s")
	b.ReportMetric(float64(cpu.Nanoseconds())/1e3/float64(b.N), "cpu-µs/op")
	b.ReportMetric(float64(latencies[len(latencies)/2].Microseconds()), "p50-µs")
	b.ReportMetric(float64(latencies[len(latencies)*99/100].Microseconds()), "p99-µs")
}

func apacheOrFake(b *testing.B, on string) cluster {
	if on == "apache" {
		return apache(b)
	}
	return fake(b, broker.FakeConfig{})
}

// cpuTime is what this process has used: on the real broker that is the producer's share, whatever else the machine does.
func cpuTime(b *testing.B) time.Duration {
	var u syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &u); err != nil {
		b.Fatal(err)
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}
