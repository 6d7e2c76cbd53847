package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/google/uuid"
	"github.com/twmb/franz-go/pkg/kerr"
	"github.com/twmb/franz-go/pkg/kgo"

	"github.com/outbox-platform/outbox/examples/orders"
)

// devReport prints what the demo source did and what arrived, and keeps count. Safe for concurrent use.
type devReport struct {
	mu         sync.Mutex
	out        io.Writer
	committed  int
	rolledBack int
	failed     int
	came       int // events of this run that arrived
	earlier    int // events of earlier runs that arrived
	repeated   int
	disordered int
	waiting    map[uuid.UUID]time.Time // committed, not arrived; by order id, since when
	early      map[uuid.UUID]bool      // arrived before the source's COMMIT had answered
	seen       map[uuid.UUID]bool      // event ids
	versions   map[string]int64
	latencies  []time.Duration
	changed    chan struct{} // closed and replaced at each change
	target     int           // 0: none
	reached    chan struct{} // closed when so many events of this run have arrived
}

func newDevReport(out io.Writer, target int) *devReport {
	return &devReport{
		out: out, target: target, reached: make(chan struct{}), waiting: map[uuid.UUID]time.Time{}, early: map[uuid.UUID]bool{}, seen: map[uuid.UUID]bool{},
		versions: map[string]int64{}, changed: make(chan struct{}),
	}
}

func (r *devReport) print(format string, args ...any) {
	fmt.Fprintf(r.out, time.Now().Format("15:04:05.000")+" "+format+"\n", args...)
}

func (r *devReport) change() {
	close(r.changed)
	r.changed = make(chan struct{})
}

// outcome is told of each transaction of the source.
func (r *devReport) outcome(o orders.Outcome) {
	r.mu.Lock()
	defer r.mu.Unlock()
	defer r.change()
	switch {
	case o.Err == nil:
		r.committed++
		r.print("committed    order %s of %s, %s", short(o.Order.ID), o.Order.Customer, euros(o.Order.Cents))
		if r.early[o.Order.ID] {
			delete(r.early, o.Order.ID)
			return
		}
		r.waiting[o.Order.ID] = o.Ended
	case errors.Is(o.Err, orders.ErrDeclined):
		r.rolledBack++
		r.print("rolled back  order %s of %s: %v", short(o.Order.ID), o.Order.Customer, o.Err)
	default:
		r.failed++
		r.print("failed       order %s: %v", short(o.Order.ID), o.Err)
	}
}

// arrived is told of each record of the topic.
func (r *devReport) arrived(record *kgo.Record, mine bool) {
	var order orders.Order
	var id uuid.UUID
	for _, h := range record.Headers {
		if h.Key == "ce_id" {
			id, _ = uuid.Parse(string(h.Value)) // a foreign record has none, and is shown as it is
		}
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	defer r.change()
	if err := json.Unmarshal(record.Value, &order); err != nil {
		r.print("arrived      %s[%d]@%d: not an order: %v", record.Topic, record.Partition, record.Offset, err)
		return
	}
	if id != uuid.Nil && r.seen[id] {
		r.repeated++
		r.print("repeated     order %s (%s[%d]@%d)", short(order.ID), record.Topic, record.Partition, record.Offset)
		return
	}
	r.seen[id] = true
	if last, known := r.versions[order.Customer]; known && order.Version <= last {
		r.disordered++
	}
	r.versions[order.Customer] = order.Version
	if !mine {
		r.earlier++
		return
	}
	if r.came++; r.came == r.target {
		close(r.reached)
	}
	took := "before COMMIT had answered, or placed by another process"
	if since, ok := r.waiting[order.ID]; ok {
		delete(r.waiting, order.ID)
		latency := time.Since(since)
		r.latencies = append(r.latencies, latency)
		took = "after " + latency.Round(100*time.Microsecond).String()
	} else {
		r.early[order.ID] = true
	}
	r.print("arrived      order %s of %s: version %d, %s[%d]@%d, %s", short(order.ID), order.Customer, order.Version,
		record.Topic, record.Partition, record.Offset, took)
}

// awaitAll waits until everything committed has arrived.
func (r *devReport) awaitAll(ctx context.Context, limit time.Duration) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), limit)
	defer cancel()
	for {
		r.mu.Lock()
		missing, changed := len(r.waiting), r.changed
		r.mu.Unlock()
		if missing == 0 {
			return nil
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return fmt.Errorf("%d committed events have not arrived within %s; they will after the next start (see the log)", missing, limit)
		}
	}
}

// summary prints the counts.
func (r *devReport) summary() {
	r.mu.Lock()
	defer r.mu.Unlock()
	var b strings.Builder
	fmt.Fprintf(&b, "so far: %d committed, %d rolled back; %d arrived, %d on their way", r.committed, r.rolledBack, r.came, len(r.waiting))
	if n := len(r.latencies); n > 0 {
		sorted := slices.Sorted(slices.Values(r.latencies))
		fmt.Fprintf(&b, "; COMMIT to Kafka consumer: median %s, worst %s", sorted[n/2].Round(100*time.Microsecond), sorted[n-1].Round(100*time.Microsecond))
	}
	for _, c := range []struct {
		n    int
		what string
	}{{r.earlier, "of earlier runs arrived"}, {r.failed, "failed"}, {r.repeated, "REPEATED"}, {r.disordered, "OUT OF ORDER"}} {
		if c.n > 0 {
			fmt.Fprintf(&b, "; %d %s", c.n, c.what)
		}
	}
	r.print("%s", b.String())
}

func short(id uuid.UUID) string { return id.String()[24:] }

func euros(cents int64) string { return fmt.Sprintf("%d.%02d EUR", cents/100, cents%100) }

// watchOrders reads the demo's topic as any consumer would, in a group that remembers where it was, until ctx ends. Records
// that were written before it was called are not mine.
func watchOrders(ctx context.Context, brokers string, arrived func(record *kgo.Record, mine bool)) error {
	began := time.Now().Truncate(time.Millisecond) // as timestamps of records
	consumer, err := kgo.NewClient(
		kgo.SeedBrokers(strings.Split(brokers, ",")...), kgo.DisableClientMetrics(),
		kgo.ConsumerGroup("outbox-dev"), kgo.ConsumeTopics(orders.Topic),
		kgo.ConsumeResetOffset(kgo.NewOffset().AtStart()), kgo.FetchMaxWait(100*time.Millisecond),
		kgo.AutoCommitInterval(time.Second),
	)
	if err != nil {
		return fmt.Errorf("creating the consumer: %w", err)
	}
	defer consumer.Close()
	for {
		fetches := consumer.PollFetches(ctx)
		if ctx.Err() != nil {
			bounded, cancel := context.WithTimeout(context.WithoutCancel(ctx), 5*time.Second)
			defer cancel()
			if err := consumer.CommitUncommittedOffsets(bounded); err != nil {
				return fmt.Errorf("committing the consumer's offsets: %w", err)
			}
			return nil
		}
		for _, failed := range fetches.Errors() {
			if !kerr.IsRetriable(failed.Err) {
				return fmt.Errorf("reading topic %s: %w", failed.Topic, failed.Err)
			}
		}
		fetches.EachRecord(func(record *kgo.Record) {
			arrived(record, !record.Timestamp.Before(began))
		})
	}
}
