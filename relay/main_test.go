package relay_test

import (
	"context"
	"fmt"
	"log/slog"
	"os"
	"slices"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	dto "github.com/prometheus/client_model/go"

	"github.com/outbox-platform/outbox/relay"
	"github.com/outbox-platform/outbox/relay/relaytest"
	"github.com/outbox-platform/outbox/store"
	"github.com/outbox-platform/outbox/store/storetest"
)

func TestMain(m *testing.M) { storetest.Main(m) }

// patience is how long a test waits for what must happen.
const patience = 20 * time.Second

// platform is a store with a writer, a Kafka, and relays.
type platform struct {
	t       *testing.T
	db      *storetest.Database
	writer  *store.Writer
	cluster *relaytest.Cluster
	source  *store.Source
	wrap    func(*relaytest.Sink) relay.Sink // what relays get instead of the sink itself; nil: the sink
}

func newPlatform(t *testing.T, opts ...storetest.Option) *platform {
	t.Helper()
	opts = append([]storetest.Option{storetest.WithShards(2)}, opts...)
	p := &platform{t: t, db: storetest.New(t, opts...)}
	p.fill()
	return p
}

// fill adds everything that is not there.
func (p *platform) fill() {
	p.writer = p.db.Writer(p.t, store.WriterConfig{})
	p.cluster = relaytest.NewCluster(3, "orders", "bills")
	p.source = p.db.Source(p.t, "shop")
}

// register makes a source with a failure policy.
func (p *platform) register(name string, policy int16) *store.Source {
	p.t.Helper()
	src, _, err := p.db.Store.ApplySource(p.t.Context(), store.Source{
		Name: name, Topics: []string{"orders", "bills", "later"}, RecordProfile: 1, FailurePolicy: policy, CloudEventsSource: "/" + name,
		Databases: []store.SourceDatabase{{Name: "default", Mode: store.ModeMarker}},
	}, "test", "test")
	if err != nil {
		p.t.Fatal(err)
	}
	return src
}

// running is a relay at work.
type running struct {
	relay   *relay.Relay
	sink    *relaytest.Sink
	metrics *prometheus.Registry
	cancel  context.CancelFunc
	done    chan error
}

// start runs a relay until the test ends, or stop.
func (p *platform) start(name string, change ...func(*relay.Config)) *running {
	p.t.Helper()
	return p.startOn(p.db.Store, name, change...)
}

func (p *platform) startOn(st *store.Store, name string, change ...func(*relay.Config)) *running {
	p.t.Helper()
	cfg := relay.Config{Instance: name, LeaseTTL: 2 * time.Second, RenewEvery: 200 * time.Millisecond,
		OperationsEvery: 20 * time.Millisecond, RetryMin: 20 * time.Millisecond, RetryMax: 200 * time.Millisecond,
		DrainTimeout: time.Second}
	for _, f := range change {
		f(&cfg)
	}
	level := slog.LevelError + 1
	if os.Getenv("RELAY_LOG") != "" {
		level = slog.LevelInfo
	}
	log := slog.New(slog.NewTextHandler(p.t.Output(), &slog.HandlerOptions{Level: level}))
	r := &running{sink: p.cluster.Sink(), metrics: prometheus.NewRegistry(), done: make(chan error, 1)}
	var sink relay.Sink = r.sink
	if p.wrap != nil {
		sink = p.wrap(r.sink)
	}
	var err error
	if r.relay, err = relay.New(cfg, st, sink, log, r.metrics); err != nil {
		p.t.Fatal(err)
	}
	var ctx context.Context
	ctx, r.cancel = context.WithCancel(context.WithoutCancel(p.t.Context()))
	go func() { r.done <- r.relay.Run(ctx) }()
	p.t.Cleanup(func() { r.stop(p.t) })
	return r
}

// stop ends a relay in good order. It may be called again.
func (r *running) stop(t *testing.T) {
	t.Helper()
	if r.cancel == nil {
		return
	}
	r.cancel()
	r.cancel = nil
	select {
	case err := <-r.done:
		if err != nil {
			t.Error("the relay ended with", err)
		}
	case <-time.After(patience):
		t.Error("the relay did not end")
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(t.Context()), time.Second)
	defer cancel()
	if err := r.sink.Close(ctx); err != nil {
		t.Error(err)
	}
}

// metric returns the sum of a metric over its labels; histograms count.
func (r *running) metric(t *testing.T, name string) float64 {
	t.Helper()
	families, err := r.metrics.Gather()
	if err != nil {
		t.Fatal(err)
	}
	sum := 0.0
	for _, f := range families {
		if f.GetName() != name {
			continue
		}
		for _, m := range f.GetMetric() {
			switch f.GetType() {
			case dto.MetricType_COUNTER:
				sum += m.GetCounter().GetValue()
			case dto.MetricType_GAUGE:
				sum += m.GetGauge().GetValue()
			case dto.MetricType_HISTOGRAM:
				sum += float64(m.GetHistogram().GetSampleCount())
			}
		}
	}
	return sum
}

// prepared is a transaction that a test prepared.
type prepared struct {
	key    store.Key
	shards store.ShardSet
}

func (p *platform) do(r *store.Request) (store.Answer, error) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(p.t.Context()), patience)
	defer cancel()
	a, err := p.writer.Do(ctx, r)
	if err == nil {
		err = a.Err
	}
	return a, err
}

// prepare stores events, undecided.
func (p *platform) prepare(source *store.Source, events ...store.Event) prepared {
	p.t.Helper()
	key := storetest.Key(source.ID)
	a, err := p.do(&store.Request{Kind: store.KindPrepare, Key: key, Database: storetest.DatabaseTransaction(1), Events: events})
	if err != nil {
		p.t.Fatal("prepare:", err)
	}
	return prepared{key, a.Shards}
}

func (p *platform) decide(kind store.Kind, tx prepared) {
	p.t.Helper()
	if _, err := p.do(&store.Request{Kind: kind, Key: tx.key, Shards: tx.shards}); err != nil {
		p.t.Fatal("decide:", err)
	}
}

func (p *platform) commit(tx prepared) { p.t.Helper(); p.decide(store.KindCommit, tx) }
func (p *platform) abort(tx prepared)  { p.t.Helper(); p.decide(store.KindAbort, tx) }

// publish stores events, committed at once.
func (p *platform) publish(source *store.Source, events ...store.Event) {
	p.t.Helper()
	if _, err := p.do(&store.Request{Kind: store.KindPublish, Key: storetest.Key(source.ID), Events: events}); err != nil {
		p.t.Fatal("publish:", err)
	}
}

// order is an event of the aggregate order/id.
func order(id, payload string) store.Event { return storetest.Event("orders", "order", id, payload) }

func orders(n int, id string) (events []store.Event, payloads []string) {
	for i := range n {
		payloads = append(payloads, fmt.Sprint(id, i))
		events = append(events, order(id, payloads[i]))
	}
	return events, payloads
}

// wantValues waits until exactly these values were written with a key, in this order.
func (p *platform) wantValues(key string, want ...string) {
	p.t.Helper()
	deadline := time.Now().Add(patience)
	for {
		got := p.cluster.Values(key)
		if slices.Equal(got, want) {
			return
		}
		if time.Now().After(deadline) || len(got) > len(want) {
			p.t.Fatalf("key %s: written %q, want %q\n%s", key, got, want, p.explain())
		}
		waitABit()
	}
}

// waitABit yields between two looks at a condition.
func waitABit() { <-time.After(2 * time.Millisecond) }

func (p *platform) eventually(what string, condition func() bool) {
	p.t.Helper()
	for deadline := time.Now().Add(patience); !condition(); waitABit() {
		if time.Now().After(deadline) {
			p.t.Fatalf("%s: not within %s\n%s", what, patience, p.explain())
		}
	}
}

// explain says what the store holds.
func (p *platform) explain() string {
	ctx := context.WithoutCancel(p.t.Context())
	text := ""
	if shards, err := p.db.Store.Shards(ctx); err == nil {
		for _, s := range shards {
			text += fmt.Sprintf("shard %d: holder %q epoch %d position %s lag %d parked %d\n", s.Shard, s.Holder, s.Epoch, s.Position, s.LagSegments, s.Parked)
		}
	}
	return text
}

func (p *platform) parked() int {
	return int(storetest.Query[int64](p.t, p.db, "SELECT count(*) FROM outbox.parked")[0])
}

func (p *platform) dead() int {
	return int(storetest.Query[int64](p.t, p.db, "SELECT count(*) FROM outbox.dead_letter")[0])
}

// verify checks the stored state.
func (p *platform) verify() {
	p.t.Helper()
	violations, err := p.db.Store.Verify(context.WithoutCancel(p.t.Context()))
	if err != nil {
		p.t.Fatal(err)
	}
	for _, v := range violations {
		p.t.Errorf("violation: %s: %s", v.Invariant, v.Detail)
	}
}

// operate has an operator act on an aggregate, and returns the outcome.
func (p *platform) operate(a store.Aggregate, action store.Action) *store.Operation {
	p.t.Helper()
	op, err := p.db.Store.RequestOperation(p.t.Context(), a, action, "operator", "test")
	if err != nil {
		p.t.Fatal("operation:", err)
	}
	p.eventually("operation done", func() bool {
		op, err = p.db.Store.OperationByID(p.t.Context(), op.ID)
		return err == nil && op.Done
	})
	return op
}
