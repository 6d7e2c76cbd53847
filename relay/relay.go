package relay

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/outbox-platform/outbox/store"
)

// Config sets up a Relay. The zero value of a field means its default.
type Config struct {
	// Instance names this relay among all that share the store. Required, and unique.
	Instance string
	// LeaseTTL is how long a shard stays ours without renewal, by the database's clock. Default 5 s, at most store.MaxLeaseTTL. We trust a renewal for
	// 70 % of it only, by our monotonic clock from before the attempt.
	LeaseTTL time.Duration
	// RenewEvery is how often leases are renewed and the relays counted. Default 1 s.
	RenewEvery time.Duration
	// CheckpointEvery is the least time between two steps. Default 50 ms.
	CheckpointEvery time.Duration
	// ParkAfter is how long an undecided event at the head of its aggregate stays in memory before it is parked, and may be
	// asked about. Default 500 ms.
	ParkAfter time.Duration
	// ParkFollowerAfter is the same when a later event waits behind it, or memory is full. Default 50 ms.
	ParkFollowerAfter time.Duration
	// MemoryBytes bounds what is kept of the log; when it is reached, reading stops until something left. One read may
	// exceed it. Default 64 MiB.
	MemoryBytes int64
	// MaxUnacked bounds the records handed to Kafka and not yet acknowledged. Default 10000.
	MaxUnacked int
	// PollMin and PollMax are the least and longest pause between two reads of the log when there is little to read; a hint
	// ends it early. Default 1 ms and 20 ms.
	PollMin, PollMax time.Duration
	// RetryMin and RetryMax bound the pause before a topic or the cluster is tried again: it doubles each time. Default
	// 100 ms and 10 s.
	RetryMin, RetryMax time.Duration
	// OperationsEvery is how often operators' requests are looked for. Default 250 ms.
	OperationsEvery time.Duration
	// SourcesEvery is how often the sources are read again, beside whenever an unknown one is met. Default 5 s.
	SourcesEvery time.Duration
	// TopicsEvery is how often the topic catalogue is written. Default 30 s.
	TopicsEvery time.Duration
	// DrainTimeout bounds the wait for acknowledgements when a shard is given up or Run ends. Default 5 s.
	DrainTimeout time.Duration
	// TakeoverTailLimit bounds the records read at a takeover to find those that the last holder delivered. Default 200000.
	TakeoverTailLimit int
	// TakeoverTailTimeout bounds the same in time, and before it the wait for what a transaction in the store's cluster hides of
	// the log; afterwards the shard goes on, and what is not found is delivered again.
	// Default 10 s.
	TakeoverTailTimeout time.Duration
}

func (c Config) withDefaults() Config {
	set(&c.LeaseTTL, 5*time.Second)
	set(&c.RenewEvery, time.Second)
	set(&c.CheckpointEvery, 50*time.Millisecond)
	set(&c.ParkAfter, 500*time.Millisecond)
	set(&c.ParkFollowerAfter, 50*time.Millisecond)
	set(&c.MemoryBytes, 64<<20)
	set(&c.MaxUnacked, 10_000)
	set(&c.PollMin, time.Millisecond)
	set(&c.PollMax, 20*time.Millisecond)
	set(&c.RetryMin, 100*time.Millisecond)
	set(&c.RetryMax, 10*time.Second)
	set(&c.OperationsEvery, 250*time.Millisecond)
	set(&c.SourcesEvery, 5*time.Second)
	set(&c.TopicsEvery, 30*time.Second)
	set(&c.DrainTimeout, 5*time.Second)
	set(&c.TakeoverTailLimit, 200_000)
	set(&c.TakeoverTailTimeout, 10*time.Second)
	return c
}

func set[T comparable](field *T, value T) {
	var zero T
	if *field == zero {
		*field = value
	}
}

// trust is how long a renewal is believed.
func (c Config) trust() time.Duration { return c.LeaseTTL * 7 / 10 }

func (c Config) validate() error {
	switch {
	case c.Instance == "":
		return errors.New("relay: Instance is not set")
	case c.RenewEvery >= c.trust():
		return fmt.Errorf("relay: RenewEvery %s must be less than 70 %% of LeaseTTL %s", c.RenewEvery, c.LeaseTTL)
	case c.LeaseTTL > store.MaxLeaseTTL:
		return fmt.Errorf("relay: LeaseTTL %s is more than %s", c.LeaseTTL, store.MaxLeaseTTL)
	case c.PollMin > c.PollMax:
		return fmt.Errorf("relay: PollMin %s is more than PollMax %s", c.PollMin, c.PollMax)
	case c.RetryMin > c.RetryMax:
		return fmt.Errorf("relay: RetryMin %s is more than RetryMax %s", c.RetryMin, c.RetryMax)
	case c.ParkFollowerAfter > c.ParkAfter:
		return fmt.Errorf("relay: ParkFollowerAfter %s is more than ParkAfter %s", c.ParkFollowerAfter, c.ParkAfter)
	case c.LeaseTTL < 0 || c.RenewEvery < 0 || c.CheckpointEvery < 0 || c.PollMin < 0 || c.RetryMin < 0 ||
		c.ParkFollowerAfter < 0 || c.MemoryBytes < 0 || c.MaxUnacked < 0:
		return errors.New("relay: a duration or bound is negative")
	}
	return nil
}

// ioTimeout bounds every access to the store.
const ioTimeout = 5 * time.Second

// Relay moves the committed events of the shards it holds from the store to a sink. Any number of relays share a store's
// shards evenly.
//
// One goroutine, Run's, owns all state; every access to the store is a goroutine of its own that hands its outcome back as
// a function for Run to call.
type Relay struct {
	cfg     Config
	st      Store
	sink    Sink
	fencer  Fencer // the sink, if it fences; else nil
	log     *slog.Logger
	metrics *metrics
	core    *core

	// The world's, but for a Stepped.
	now   func() time.Time
	after func(time.Duration) <-chan time.Time
	spawn func(work func() func())

	hints   atomic.Uint64
	hinted  chan struct{}
	running atomic.Bool

	// Of Run:
	io         context.Context
	takeovers  context.Context // of accesses that a stop need not wait for
	endTakes   context.CancelFunc
	results    chan func()
	reports    <-chan *Delivery // nil once the sink is closed
	inProgress int              // accesses on their way
	stopping   bool
	stopBy     time.Time

	read       readLoop
	lease      leaseLoop
	checkpoint stepLoop
	deliverAt  time.Time // earliest time of the next delivery after the sink refused one
	more       bool      // there may be more to deliver at once
	ticked     time.Time
	// failureLogged is when a failed delivery was logged last.
	failureLogged time.Time
	operations    every
	sources       every
	catalogue     catalogue
}

// New returns a relay that works once Run is called. It takes records to sink, which stays the caller's to close after
// Run. Metrics are registered with reg, which may be nil; log may be nil.
func New(cfg Config, st *store.Store, sink Sink, log *slog.Logger, reg prometheus.Registerer) (*Relay, error) {
	cfg = cfg.withDefaults()
	if err := cfg.validate(); err != nil {
		return nil, err
	}
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	m, err := newMetrics(reg)
	if err != nil {
		return nil, fmt.Errorf("register relay metrics: %w", err)
	}
	return newRelay(cfg, FromPostgres(st), sink, log, m), nil
}

// newRelay returns a relay with a complete configuration.
func newRelay(cfg Config, st Store, sink Sink, log *slog.Logger, m *metrics) *Relay {
	r := &Relay{
		cfg:     cfg,
		st:      st,
		sink:    sink,
		log:     log.With("instance", cfg.Instance),
		metrics: m,
		core: newCore(limits{
			parkAfter:         cfg.ParkAfter,
			parkFollowerAfter: cfg.ParkFollowerAfter,
			memoryBytes:       cfg.MemoryBytes,
			maxUnacked:        cfg.MaxUnacked,
			maxPend:           1000,
			stepRows:          1000,
			stepBytes:         4 << 20,
			loadRows:          16,
			loadAggregates:    32,
			retryMin:          cfg.RetryMin,
			retryMax:          cfg.RetryMax,
		}),
		hinted: make(chan struct{}, 1),
		now:    time.Now,
		after:  time.After,
	}
	if f, ok := sink.(Fencer); ok && f.Fences() {
		r.fencer = f
	}
	r.spawn = func(work func() func()) {
		go func() { r.results <- work() }()
	}
	return r
}

// Hint tells that something was appended to these shards: the next read need not wait for its time. It never blocks, and
// may be called by anybody at any time; what is not hinted is found anyway.
func (r *Relay) Hint(shards store.ShardSet) {
	for {
		old := r.hints.Load()
		if r.hints.CompareAndSwap(old, old|uint64(shards)) {
			break
		}
	}
	select {
	case r.hinted <- struct{}{}:
	default:
	}
}

// Run works until ctx ends. Then it stops reading, waits for what is in flight no longer than DrainTimeout, writes the
// last checkpoints and releases its shards. It outlives every failure of store and Kafka; the only error it returns is
// that it was called before.
func (r *Relay) Run(ctx context.Context) error {
	if r.running.Swap(true) {
		return errors.New("relay: Run was called before")
	}
	defer r.begin(ctx)()
	r.log.Info("relay started", "shards", r.st.ShardCount())
	timer := time.NewTimer(0)
	defer timer.Stop()
	stop := ctx.Done()
	for {
		now := r.now()
		if stop == nil && r.stopped(now) {
			break
		}
		r.work(now)
		timer.Reset(r.wait(r.now()))
		select {
		case d := <-r.reports:
			r.takeReports(d)
		case done := <-r.results:
			r.inProgress--
			done()
		case <-r.hinted:
			r.takeHints()
		case <-timer.C:
		case <-stop:
			stop = nil
			r.beginStop(r.now())
		}
	}
	r.finish(ctx)
	return nil
}

// begin sets up what Run needs, and returns what ends it.
func (r *Relay) begin(ctx context.Context) (end func()) {
	io, cancel := context.WithCancel(context.WithoutCancel(ctx))
	r.io = io
	r.takeovers, r.endTakes = context.WithCancel(io)
	r.results = make(chan func(), 64)
	r.reports = r.sink.Reports()
	return cancel
}

// work does everything that is due.
func (r *Relay) work(now time.Time) {
	if now.Sub(r.ticked) >= r.cfg.CheckpointEvery/2 {
		r.ticked = now
		r.core.tick(now)
		r.distrust(now)
	}
	r.deliver(now)
	r.startSteps(now)
	r.startLoads(now)
	r.startRead(now)
	r.giveUp(now)
	if !r.stopping {
		r.startMembership(now)
		r.startOperations(now)
		r.startSources(now)
		r.startCatalogue(now)
	}
	r.metrics.update(r, now)
}

// wait is how long nothing is due.
func (r *Relay) wait(now time.Time) time.Duration {
	if r.more {
		return 0
	}
	next := now.Add(r.cfg.RenewEvery / 2)
	r.read.wake(r, &next)
	r.checkpoint.wake(r, &next)
	c := r.core
	busy := len(c.pauses) > 0 || c.cluster.backoff > 0 || r.stopping
	for _, s := range c.shards {
		busy = busy || len(s.waiting) > 0 || len(s.operations) > 0 || s.phase == phaseDraining
	}
	if busy {
		earlier(&next, now.Add(r.cfg.CheckpointEvery/2))
	}
	if r.deliverAt.After(now) {
		earlier(&next, r.deliverAt)
	}
	if !r.stopping {
		r.lease.beat.wake(&next)
		r.operations.wake(&next)
	}
	return max(next.Sub(now), 0)
}

func earlier(next *time.Time, t time.Time) {
	if t.Before(*next) {
		*next = t
	}
}

func later(a, b time.Time) time.Time {
	if a.Before(b) {
		return b
	}
	return a
}

// every is something that is done again and again, one at a time.
type every struct {
	at      time.Time // when it is due next
	running bool
}

func (e *every) due(now time.Time) bool { return !e.running && !now.Before(e.at) }

func (e *every) wake(next *time.Time) {
	if !e.running {
		earlier(next, e.at)
	}
}

// access runs work beside Run, and then what it returns in Run.
func (r *Relay) access(work func(ctx context.Context) func()) {
	r.accessWith(r.io, work)
}

// accessWith is access with another context.
func (r *Relay) accessWith(ctx context.Context, work func(ctx context.Context) func()) {
	r.inProgress++
	r.spawn(func() func() { return work(ctx) })
}

// beginStop gives all shards up.
func (r *Relay) beginStop(now time.Time) {
	r.log.Info("relay stopping", "shards", len(r.core.shards), "in_flight", r.core.unacked)
	r.stopping = true
	r.endTakes()
	r.stopBy = now.Add(r.cfg.DrainTimeout)
	for _, s := range r.core.shards {
		r.drain(s, now)
	}
}

// stopped reports whether Run may end.
func (r *Relay) stopped(now time.Time) bool {
	if r.inProgress > 0 {
		return false
	}
	return len(r.core.shards) == 0 && r.core.unacked == 0 || now.After(r.stopBy.Add(r.cfg.DrainTimeout))
}

// finish ends what Run opened.
func (r *Relay) finish(ctx context.Context) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), ioTimeout)
	defer cancel()
	if _, err := r.st.Heartbeat(ctx, r.cfg.Instance, 0); err != nil {
		r.log.Warn("relay could not sign off; the others will notice by time", "error", err)
	}
	for _, reader := range []Reader{r.read.reader, r.lease.reader} {
		if reader != nil {
			if err := reader.Close(ctx); err != nil {
				r.log.Warn("closing a reader", "error", err)
			}
		}
	}
	r.log.Info("relay stopped")
}
