package main

import (
	"context"
	"maps"
	"net"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/google/uuid"
	"github.com/twmb/franz-go/pkg/kgo"

	"github.com/outbox-platform/outbox/test/robustness/check"
	"github.com/outbox-platform/outbox/test/robustness/cluster"
	"github.com/outbox-platform/outbox/test/robustness/journal"
)

// observer watches a run from outside: when a consumer sees each event first, and what relays count before they die.
//
// What a consumer sees is the only time of an event that says the same on all brokers: a record's own time is the event's, the
// fake brokers keep no other, and what Kafka appended is not visible before it is replicated, or its transaction committed.
type observer struct {
	cl     *cluster.Cluster
	client *kgo.Client
	end    context.CancelFunc
	all    sync.WaitGroup

	mu        sync.Mutex
	seen      map[uuid.UUID]int64
	published map[string]map[int]float64 // by relay and which start of it
	takeovers float64                    // before the first transaction
}

// observe begins to watch. Faults of the links do not concern it.
func observe(ctx context.Context, cl *cluster.Cluster, transactional bool) (*observer, error) {
	options := []kgo.Opt{
		kgo.SeedBrokers(strings.Split(cl.Brokers.Bootstrap(), ",")...),
		kgo.ConsumeTopics(slices.Collect(maps.Keys(cluster.Topics))...),
		kgo.ConsumeResetOffset(kgo.NewOffset().AtStart()),
		kgo.FetchMaxWait(500 * time.Millisecond),
		// New partitions are noticed soon.
		kgo.MetadataMinAge(250 * time.Millisecond), kgo.MetadataMaxAge(time.Second),
		kgo.Dialer(func(ctx context.Context, network, address string) (net.Conn, error) {
			for _, l := range cl.Links {
				if l.Address() == address {
					address = l.Upstream()
				}
			}
			return (&net.Dialer{Timeout: 2 * time.Second}).DialContext(ctx, network, address)
		}),
	}
	if transactional {
		options = append(options, kgo.FetchIsolationLevel(kgo.ReadCommitted()))
	}
	client, err := kgo.NewClient(options...)
	if err != nil {
		return nil, err
	}
	ctx, end := context.WithCancel(ctx)
	o := &observer{cl: cl, client: client, end: end, seen: map[uuid.UUID]int64{}, published: map[string]map[int]float64{}}
	for _, r := range cl.Relays {
		_, counters, err := r.Counters(ctx)
		if err != nil {
			o.stop()
			return nil, err
		}
		o.takeovers += counters["outbox_takeovers_total"]
		o.published[r.Name] = map[int]float64{}
		o.all.Go(func() {
			for ctx.Err() == nil {
				o.ask(ctx, r)
				wait(ctx, time.Second)
			}
		})
	}
	o.all.Go(func() { o.consume(ctx) })
	return o, nil
}

// stop may be called twice.
func (o *observer) stop() {
	o.end()
	o.all.Wait()
	o.client.Close()
}

func (o *observer) consume(ctx context.Context) {
	for ctx.Err() == nil {
		fetches := o.client.PollFetches(ctx) // its errors are the brokers' faults, and tried again
		now := journal.Now()
		o.mu.Lock()
		fetches.EachRecord(func(r *kgo.Record) {
			for _, h := range r.Headers {
				if h.Key != "ce_id" {
					continue
				}
				id, err := uuid.ParseBytes(h.Value)
				if _, again := o.seen[id]; err == nil && !again {
					o.seen[id] = now
				}
			}
		})
		o.mu.Unlock()
	}
}

// ask asks a relay what it has counted, and returns all of it; nil: it does not answer.
func (o *observer) ask(ctx context.Context, r *cluster.Process) map[string]float64 {
	ctx, cancel := context.WithTimeout(ctx, 2*time.Second)
	defer cancel()
	start, counters, err := r.Counters(ctx)
	if err != nil {
		return nil
	}
	o.mu.Lock()
	defer o.mu.Unlock()
	of := o.published[r.Name]
	of[start] = max(of[start], counters["outbox_published_total"])
	return counters
}

// restLimit bounds how long relays may take to count what they have done.
const restLimit = 20 * time.Second

// rest returns what was seen and counted once everything is published and counted: relays set their metrics every second.
// Of a platform that is not done nothing is waited for.
func (o *observer) rest(ctx context.Context, done bool) (map[uuid.UUID]int64, check.Counters) {
	limit := restLimit
	if !done {
		limit = time.Second
	}
	var relays map[string]float64
	for end := time.Now().Add(limit); time.Now().Before(end) && ctx.Err() == nil; {
		wait(ctx, 1500*time.Millisecond)
		before := relays
		if relays = o.total(ctx, o.cl.Relays); relays == nil {
			continue
		}
		left := 0.0
		for name, value := range relays {
			if strings.HasPrefix(name, "outbox_shard_backlog_events") || strings.HasPrefix(name, "outbox_blocked_aggregates") {
				left += value
			}
		}
		if left == 0 && before["outbox_published_total"] == relays["outbox_published_total"] && before["outbox_dropped_total"] == relays["outbox_dropped_total"] {
			break
		}
	}
	c := check.Counters{
		Relays: relays, Servers: o.total(ctx, o.cl.Servers), Takeovers: o.takeovers,
		RelaysRestarted: restarted(o.cl.Relays), ServersRestarted: restarted(o.cl.Servers),
	}
	o.stop()
	for _, starts := range o.published {
		for _, n := range starts {
			c.Published += n
		}
	}
	return o.seen, c
}

// total adds the metrics of processes; nil: one does not answer.
func (o *observer) total(ctx context.Context, processes []*cluster.Process) map[string]float64 {
	sum := map[string]float64{}
	for _, p := range processes {
		ctx, cancel := context.WithTimeout(ctx, 2*time.Second)
		_, counters, err := p.Counters(ctx)
		cancel()
		if err != nil {
			return nil
		}
		for name, value := range counters {
			if strings.HasPrefix(name, "outbox_") && !strings.Contains(name, "_bucket{") {
				sum[name] += value
			}
		}
	}
	return sum
}

func restarted(processes []*cluster.Process) bool {
	return slices.ContainsFunc(processes, func(p *cluster.Process) bool { return p.Starts > 1 })
}
