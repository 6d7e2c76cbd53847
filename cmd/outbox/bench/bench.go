package bench

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"sync"
	"time"
)

const (
	targetOutbox   = "outbox"
	targetNaive    = "naive"
	workloadEvents = "events"
	workloadOrders = "orders"
	workloadKill   = "kill"
	brokerAuto     = "auto"
	brokerFake     = "fake"
	brokerApache   = "apache"
)

// settle is how long the last records may take to arrive after the callers stopped before they count as lost.
const settle = 2 * time.Minute

// Cmd is the command line of the bench.
type Cmd struct {
	Workload     string        `help:"events: callers only prepare and commit; orders: a business transaction with one event; kill: services that die, until their transactions are decided." enum:"events,orders,kill" default:"orders"`
	Target       string        `help:"outbox: the platform; naive: an outbox table in the source's database with a polling relay." enum:"outbox,naive" default:"outbox"`
	Transport    string        `help:"How the SDK calls the platform." enum:"session,unary" default:"session"`
	Concurrency  []int         `help:"Callers at a time; one result each." default:"1,16,64,256"`
	Duration     time.Duration `help:"How long to measure each." default:"15s"`
	Transactions int64         `help:"Stop the measured phase after so many transactions (0: by --duration)."`
	Rate         float64       `help:"Transactions per second that all callers together begin, at most (0: each as fast as it gets answers). Shows latencies of a machine that is not full."`
	Payload      int           `help:"Bytes of an event's payload." default:"1024"`
	Aggregates   int           `help:"Aggregates that the events are spread over." default:"1000"`
	Rollback     float64       `help:"Share of transactions that are rolled back." default:"0.1"`
	SourceConns  int           `help:"Connections to the source database, at most." default:"64"`
	History      int           `help:"Transactions of history in the store before the run." default:"0"`
	Runs         int           `help:"Deaths at each step (kill only)." default:"200"`
	Resolver     string        `help:"Who finds out (kill only): another instance, the platform itself, or one after the other." enum:"all,check-back,direct" default:"all"`
	HoldXID      bool          `help:"Keep a transaction with an xid open in the store's PostgreSQL for the whole run." name:"hold-xid"`

	Broker    string `help:"Which broker to start: apache (real, needs Java and Maven), fake (in Go), or auto: fake for the workload kill." enum:"auto,apache,fake" default:"auto"`
	Postgres  string `help:"Major version of the PostgreSQL servers to start." default:"18"`
	DSN       string `help:"Store to use instead of starting one." name:"dsn"`
	SourceDSN string `help:"Source database to use instead of starting one (tables are created in it)." name:"source-dsn"`
	Brokers   string `help:"Kafka to use instead of starting one."`
	Server    string `help:"Platform (gRPC host:port) to use instead of starting one; register a source named bench with topics bench.* there."`
	Log       string `help:"File for the output of the processes that are started." type:"path"`
}

// Validate is called by kong.
func (c *Cmd) Validate() error {
	switch {
	case len(c.Concurrency) == 0 || slices.Min(c.Concurrency) < 1:
		return fmt.Errorf("--concurrency must be positive numbers: %v", c.Concurrency)
	case c.Payload < payloadHeader:
		return fmt.Errorf("--payload must be at least %d: %d", payloadHeader, c.Payload)
	case c.Rate < 0:
		return fmt.Errorf("--rate must not be negative: %g", c.Rate)
	case c.Rollback < 0 || c.Rollback >= 1:
		return fmt.Errorf("--rollback must be at least 0 and less than 1: %g", c.Rollback)
	case c.Workload == workloadEvents && c.Aggregates < slices.Max(c.Concurrency):
		return fmt.Errorf("--aggregates must not be less than --concurrency for the workload events: %d < %d", c.Aggregates, slices.Max(c.Concurrency))
	case c.Duration < time.Second:
		return fmt.Errorf("--duration must be at least 1s: %s", c.Duration)
	case c.Workload == workloadKill:
		return c.validateKill()
	}
	return nil
}

// Run measures and prints one result per concurrency to out (JSON lines if asJSON), and progress to progress.
func (c *Cmd) Run(ctx context.Context, out, progress io.Writer, asJSON bool) error {
	say := func(format string, args ...any) { fmt.Fprintf(progress, "bench: "+format+"\n", args...) }
	if c.Workload == workloadKill {
		return c.runKill(ctx, out, say, asJSON)
	}
	if c.Broker == brokerAuto {
		c.Broker = brokerApache
	}
	s, err := buildStage(ctx, c, say)
	if err != nil {
		return err
	}
	p := printer{w: out, json: asJSON}
	return errors.Join(c.runAll(ctx, s, &p, say), s.close(context.WithoutCancel(ctx)))
}

func (c *Cmd) runAll(ctx context.Context, s *stage, p *printer, say func(string, ...any)) error {
	if c.HoldXID {
		release, err := s.holdXID(ctx)
		if err != nil {
			return err
		}
		defer release()
	}
	for _, n := range c.Concurrency {
		say("%s against %s with %d callers, %s", c.Workload, c.Target, n, c.Duration)
		r, err := c.runOne(ctx, s, n, say)
		if err != nil {
			return fmt.Errorf("%s against %s with %d callers: %w", c.Workload, c.Target, n, err)
		}
		if err := p.print(r); err != nil {
			return err
		}
	}
	return nil
}

// workload makes the callers of a run, and tells the last committed version of each aggregate afterwards.
type workload interface {
	// caller returns the i-th caller, with an event in each transaction.
	caller(i int) caller
	// bare returns the i-th caller without events; nil when the workload has no such thing.
	bare(i int) caller
	// truth returns the last committed version of each aggregate.
	truth(ctx context.Context) ([]uint64, error)
	close() error
}

func (c *Cmd) runOne(ctx context.Context, s *stage, n int, say func(string, ...any)) (Result, error) {
	r := Result{Workload: c.Workload, Target: c.Target, Transport: c.Transport, Concurrency: n}
	if c.Target == targetNaive {
		r.Transport = ""
	}
	topic, err := s.newTopic(ctx)
	if err != nil {
		return r, err
	}
	l := newLedger(c.Aggregates)
	w, err := c.newWorkload(ctx, s, topic, n, l)
	if err != nil {
		return r, err
	}
	defer w.close() //nolint:errcheck // closed with its error below
	consuming, stopConsuming := context.WithCancel(ctx)
	consumed := make(chan struct{})
	var consumeErr error
	go func() {
		defer close(consumed)
		consumeErr = consume(consuming, strings.Split(s.brokers, ","), topic, l)
	}()
	err = c.phases(ctx, s, w, l, n, &r, func() error { return c.await(ctx, w, l, consumed, say) })
	stopConsuming()
	<-consumed
	err = errors.Join(err, consumeErr, w.close())
	if err != nil {
		return r, err
	}
	last, err := w.truth(ctx)
	if err != nil {
		return r, err
	}
	r.Tally = l.verdict(last)
	return r, nil
}

// phases measures: a warm-up, the bare transactions, the two interleaved, and the main phase. CPU and WAL are counted until
// the last event of the main phase has arrived (await), so that a relay that lags behind is not made to look dear.
func (c *Cmd) phases(ctx context.Context, s *stage, w workload, l *ledger, n int, r *Result, await func() error) error {
	callers, bare := make([]caller, n), make([]caller, n)
	for i := range n {
		callers[i], bare[i] = w.caller(i), w.bare(i)
	}
	pace := newPacer(c.Rate)
	if _, err := closedLoop(ctx, callers, min(2*time.Second, c.Duration/2), 0); err != nil {
		return fmt.Errorf("warming up: %w", err)
	}
	if bare[0] != nil {
		ld, err := closedLoop(ctx, bare, c.Duration/2, 0)
		if err != nil {
			return fmt.Errorf("running bare transactions: %w", err)
		}
		r.BareTxPerSecond = ld.perSecond()
		if err := c.interleave(ctx, callers, bare, pace, r); err != nil {
			return err
		}
	}
	if err := await(); err != nil {
		return err
	}
	_, mark := l.latencies(0)
	arrivedBefore := l.count()
	before, err := s.measure(ctx)
	if err != nil {
		return err
	}
	duration := c.Duration
	if c.Transactions > 0 {
		duration = 0
	}
	ld, err := closedLoop(ctx, pace.all(callers), duration, c.Transactions)
	if err != nil {
		return fmt.Errorf("measuring: %w", err)
	}
	arrived := l.count() - arrivedBefore
	if err := await(); err != nil {
		return err
	}
	after, err := s.measure(ctx)
	if err != nil {
		return err
	}
	r.TxPerSecond = ld.perSecond()
	r.PublishedPerSecond = float64(arrived) / ld.elapsed.Seconds()
	r.CPU, r.WALBytes = s.perEvent(before, after, l.count()-arrivedBefore)
	since, _ := l.latencies(mark)
	r.E2EP50, r.E2EP99 = quantile(since, 0.50), quantile(since, 0.99)
	return nil
}

// interleave runs transactions with and without an event in turn in every caller, so that noise meets both alike.
func (c *Cmd) interleave(ctx context.Context, callers, bare []caller, pace *pacer, r *Result) error {
	var mu sync.Mutex
	var with, without []int64
	mixed := make([]caller, len(callers))
	for i := range callers {
		mixed[i] = alternating(callers[i], bare[i], &mu, &with, &without)
	}
	if _, err := closedLoop(ctx, pace.all(mixed), c.Duration/2, 0); err != nil {
		return fmt.Errorf("interleaving: %w", err)
	}
	r.OverheadP50 = quantile(with, 0.50) - quantile(without, 0.50)
	r.OverheadP99 = quantile(with, 0.99) - quantile(without, 0.99)
	return nil
}

// await waits until everything that was committed has arrived, or nothing has for long.
func (c *Cmd) await(ctx context.Context, w workload, l *ledger, consumed <-chan struct{}, say func(string, ...any)) error {
	last, err := w.truth(ctx)
	if err != nil {
		return err
	}
	var want int64
	for _, v := range last {
		want += int64(v) //nolint:gosec // small
	}
	tick := time.NewTicker(100 * time.Millisecond)
	defer tick.Stop()
	got, since := l.count(), time.Now()
	for got < want && time.Since(since) < settle {
		select {
		case <-consumed:
			return errors.New("the consumer ended too early")
		case <-ctx.Done():
			return ctx.Err()
		case <-tick.C:
		}
		if now := l.count(); now != got {
			got, since = now, time.Now()
		}
	}
	if got < want {
		say("%d of %d committed events did not arrive within %s", want-got, want, settle)
	}
	return nil
}

func slicesMax(v []int) int { return slices.Max(v) }
