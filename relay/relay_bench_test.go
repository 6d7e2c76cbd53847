package relay_test

import (
	"fmt"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"context"

	"github.com/outbox-platform/outbox/relay"
	"github.com/outbox-platform/outbox/store"
	"github.com/outbox-platform/outbox/store/storetest"
)

// instantSink acknowledges at once and keeps nothing.
type instantSink struct {
	reports   chan *relay.Delivery
	delivered atomic.Int64
	want      int64
	done      chan struct{}
}

func (s *instantSink) Deliver(d *relay.Delivery) error {
	d.Err, d.Offset = nil, s.delivered.Add(1)
	select {
	case s.reports <- d:
	default:
		s.delivered.Add(-1)
		return relay.ErrSinkFull
	}
	if d.Offset == s.want {
		close(s.done)
	}
	return nil
}
func (s *instantSink) Reports() <-chan *relay.Delivery { return s.reports }
func (s *instantSink) Purge()                          {}
func (s *instantSink) Partitions(context.Context, []string) (map[string]int32, error) {
	return nil, nil
}
func (s *instantSink) Close(context.Context) error                             { return nil }
func (s *instantSink) Topics(context.Context, []string) ([]store.Topic, error) { return nil, nil }
func (s *instantSink) OffsetsForTimes(context.Context, map[relay.TopicPartition]time.Time, int64) (map[relay.TopicPartition]int64, error) {
	return nil, nil //nolint:nilnil // nothing is there
}

func (s *instantSink) Tail(context.Context, map[relay.TopicPartition]int64, func(relay.TopicPartition, int64, []store.Header)) error {
	return nil
}

// BenchmarkRelay drains a log that was written before, PostgreSQL included: events per second.
func BenchmarkRelay(b *testing.B) {
	const batch = 20
	db := storetest.New(b, storetest.WithShards(16))
	writer := db.Writer(b, store.WriterConfig{})
	source := db.Source(b, "shop")
	payload := strings.Repeat("x", 1024)
	preloaded := 0
	answers := make(chan store.Answer, 512)
	inFlight := 0
	for preloaded < max(b.N, 1) {
		r := &store.Request{Kind: store.KindPublish, Key: storetest.Key(source.ID), Done: func(_ *store.Request, a store.Answer) { answers <- a }}
		for range batch {
			r.Events = append(r.Events, storetest.Event("orders", "order", fmt.Sprint("o", preloaded%5000), payload))
			preloaded++
		}
		if inFlight == cap(answers) {
			if a := <-answers; a.Err != nil {
				b.Fatal(a.Err)
			}
			inFlight--
		}
		if err := writer.Submit(r); err != nil {
			b.Fatal(err)
		}
		inFlight++
	}
	for ; inFlight > 0; inFlight-- {
		if a := <-answers; a.Err != nil {
			b.Fatal(a.Err)
		}
	}
	sink := &instantSink{reports: make(chan *relay.Delivery, 16384), want: int64(preloaded), done: make(chan struct{})}
	r, err := relay.New(relay.Config{Instance: "bench"}, db.Store, sink, nil, nil)
	if err != nil {
		b.Fatal(err)
	}
	ctx, cancel := context.WithCancel(b.Context())
	ended := make(chan error, 1)
	b.ResetTimer()
	began := time.Now()
	cpu := cpuTime(b)
	go func() { ended <- r.Run(ctx) }()
	<-sink.done
	b.ReportMetric(float64(preloaded)/time.Since(began).Seconds(), "events/s")
	b.ReportMetric(float64((cpuTime(b)-cpu).Microseconds())/float64(preloaded), "µs-cpu/event")
	b.StopTimer()
	cancel()
	if err := <-ended; err != nil {
		b.Fatal(err)
	}
}
