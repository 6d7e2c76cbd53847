package system_test

import (
	"context"
	"log/slog"
	"maps"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/google/uuid"

	"github.com/outbox-platform/outbox/client"
	"github.com/outbox-platform/outbox/embedded/kafka"
	"github.com/outbox-platform/outbox/test/system/history"
	"github.com/outbox-platform/outbox/test/system/orders"
)

// shopTopics are the topics of the shop's events, with their partition counts.
var shopTopics = map[string]int{"orders": 6, "payments": 3}

// settleLimit is how long the platform may take, after the last fault, to publish all that is committed.
const settleLimit = 90 * time.Second

// shop is the service under test: a database of its own and two instances, each with another server first.
type shop struct {
	t         testing.TB
	dsn       string
	broker    broker
	instances []*orders.Instance
	// committed: its consumers read with isolation.level=read_committed.
	committed bool
}

func openShop(t testing.TB, p *platform, b broker, aggregates int) *shop {
	t.Helper()
	database := startPostgres(t, "")
	dsn, err := database.CreateDatabase(t.Context(), "shop")
	if err != nil {
		t.Fatal(err)
	}
	if err := orders.CreateSchema(t.Context(), dsn, aggregates); err != nil {
		t.Fatal(err)
	}
	for topic, partitions := range shopTopics {
		// The broker's own time orders the records of different topics.
		if err := b.CreateTopic(t.Context(), topic, partitions, map[string]string{"message.timestamp.type": "LogAppendTime"}); err != nil {
			t.Fatal(err)
		}
	}
	s := &shop{t: t, dsn: dsn, broker: b}
	servers := p.addresses()
	for i := range 2 {
		instance, err := orders.Start(t.Context(), orders.Config{
			DSN: dsn, Source: sourceName, Servers: slices.Concat(servers[i%len(servers):], servers[:i%len(servers)]), MaxConns: 16,
			Logger:  slog.New(slog.NewTextHandler(t.Output(), &slog.HandlerOptions{Level: slog.LevelWarn})),
			OnAlarm: func(a client.Alarm) { t.Errorf("alarm %s: transaction %s: %v", a.Kind, a.TransactionID, a.Err) },
		})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(instance.Close)
		s.instances = append(s.instances, instance)
	}
	return s
}

// work starts the load on all instances and returns how to end it and wait; a workload with a number of transactions ends by
// itself.
func (s *shop) work(w orders.Workload) (finish func(now bool) *orders.Tally) {
	w.Topics = slices.Sorted(maps.Keys(shopTopics))
	w.PerSecond /= float64(len(s.instances))
	w.Transactions /= len(s.instances)
	w.Callers /= len(s.instances)
	ctx, cancel := context.WithCancel(s.t.Context())
	tally := &orders.Tally{}
	var all sync.WaitGroup
	for i, instance := range s.instances {
		own := w
		own.Seed += uint64(1000 * i)
		all.Go(func() { instance.Run(ctx, own, tally) })
	}
	return func(now bool) *orders.Tally {
		if now {
			cancel()
		}
		all.Wait()
		cancel()
		return tally
	}
}

// settle waits until everything that is committed has arrived, and judges the history.
func (s *shop) settle(expected func(history.Event) bool) *history.Report {
	s.t.Helper()
	eventually(s.t, settleLimit, "spilled requests to be published", func() (bool, string) {
		n, err := orders.Undelivered(s.t.Context(), s.dsn)
		if err != nil {
			s.t.Fatal(err)
		}
		return n == 0, "some are left"
	})
	committed, err := orders.Committed(s.t.Context(), s.dsn)
	if err != nil {
		s.t.Fatal(err)
	}
	if expected != nil {
		committed = slices.DeleteFunc(committed, func(e history.Event) bool { return !expected(e) })
	}
	missing := map[uuid.UUID]bool{}
	for _, e := range committed {
		missing[e.ID] = true
	}
	started := time.Now()
	ctx, cancel := context.WithTimeout(s.t.Context(), settleLimit)
	defer cancel()
	next := 0
	readUntil := kafka.ReadUntil
	if s.committed {
		readUntil = kafka.ReadCommittedUntil
	}
	_, err = readUntil(ctx, s.broker.Bootstrap(), func(read []kafka.Record) bool {
		for ; next < len(read); next++ {
			if id, found := read[next].Header("ce_id"); found {
				if parsed, err := uuid.ParseBytes(id); err == nil {
					delete(missing, parsed)
				}
			}
		}
		return len(missing) == 0
	}, slices.Sorted(maps.Keys(shopTopics))...)
	if err != nil && len(missing) > 0 {
		s.t.Errorf("%d of %d events are missing after %s: %v", len(missing), len(committed), settleLimit, err)
	}
	s.t.Logf("all had arrived %s after the load ended", time.Since(started).Round(10*time.Millisecond))
	return s.judge(committed)
}

// judge reads everything once more, to the end, and compares.
func (s *shop) judge(committed []history.Event) *history.Report {
	s.t.Helper()
	report, err := history.Check(committed, s.read(), shopTopics)
	if err != nil {
		s.t.Fatal(err)
	}
	s.t.Log(report)
	return report
}

// read reads all topics from their beginning to their present end.
func (s *shop) read() []history.Record {
	s.t.Helper()
	readAll := kafka.ReadAll
	if s.committed {
		readAll = kafka.ReadCommitted
	}
	read, err := readAll(s.t.Context(), s.broker.Bootstrap(), slices.Sorted(maps.Keys(shopTopics))...)
	if err != nil {
		s.t.Fatal(err)
	}
	records, err := history.FromKafka(read, s.broker.keepsTime())
	if err != nil {
		s.t.Fatal(err)
	}
	return records
}
