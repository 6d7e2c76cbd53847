package resolver

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"os"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	outboxv1 "github.com/outbox-platform/outbox/gen/go/outbox/v1"
	"github.com/outbox-platform/outbox/internal/fault"
	"github.com/outbox-platform/outbox/store"
)

const (
	// claimLease keeps other servers away from what this one is asking about: longer than it takes to ask.
	claimLease = 30 * time.Second
	// sourcesAge is how old what is known of sources gets.
	sourcesAge = 2 * time.Second
	// unknownPause bounds how often the sources are read because one is not known: it may have been deleted.
	unknownPause = 100 * time.Millisecond
	// hurryPause bounds how often one source database's back-off starts anew: sessions may come back by the thousand.
	hurryPause = time.Second
	// countPause is how often what is in doubt is counted for metrics.
	countPause = 5 * time.Second
	// claimRest is how many times as long as a look took the pause after it is when more is due, Config.Interval at most: ten
	// thousand transactions must not be claimed in one go while the store has other things to do.
	claimRest = 2
	// decidedPause keeps a transaction from being asked about again while its decision is being written.
	decidedPause = 10 * time.Second
	// maxWriting bounds the decisions that wait for the writer: a few batches, so that the next one is there when one is done.
	maxWriting = 128
	// retryPause is the pause before a decision that could not be written is tried again.
	retryPause = 200 * time.Millisecond
)

// Sessions are the live sessions of a server.
type Sessions interface {
	// Ask asks sessions of a source what became of transactions of one of its databases, and returns what they answered.
	Ask(ctx context.Context, source, database string, transactions []*outboxv1.SessionResponse_CheckTransaction) ([]*outboxv1.SessionRequest_CheckAnswer, error)
}

// Resolver finds out what became of in-doubt transactions. Safe for concurrent use.
type Resolver struct {
	cfg      Config
	store    *store.Store
	writer   *store.Writer
	sessions Sessions
	log      *slog.Logger
	metrics  *metrics
	name     string
	wake     chan struct{}
	writing  chan struct{} // a place for each decision that is being written
	running  sync.WaitGroup

	mu      sync.Mutex
	ctx     context.Context //nolint:containedctx // the lanes' life; nil: not running
	lanes   map[laneKey]*lane
	sources map[int32]store.Source
	looked  time.Time                       // when the sources were read last because one was not known
	hurried map[laneKey]time.Time           // when each was hurried last
	hurries map[laneKey]struct{}            // to be hurried
	sweeps  map[laneKey]store.TransactionID // being hurried: where the next page begins
	opened  map[string][]string             // sources whose sessions came back, with the databases they can answer for
}

// New returns a resolver. Its decisions go through w, whose Run is the caller's and must outlive Run.
func New(cfg Config, st *store.Store, w *store.Writer, sessions Sessions, log *slog.Logger, reg *prometheus.Registry) (*Resolver, error) {
	if err := cfg.Validate(); err != nil {
		return nil, fmt.Errorf("resolver configuration: %w", err)
	}
	m, err := newMetrics(reg)
	if err != nil {
		return nil, err
	}
	host, err := os.Hostname()
	if err != nil {
		return nil, fmt.Errorf("asking for the host's name: %w", err)
	}
	return &Resolver{
		cfg: cfg.withDefaults(), store: st, writer: w, sessions: sessions, log: log, metrics: m, name: host,
		wake:    make(chan struct{}, 1),
		writing: make(chan struct{}, maxWriting),
		lanes:   make(map[laneKey]*lane),
		sources: make(map[int32]store.Source),
		hurried: make(map[laneKey]time.Time),
		hurries: make(map[laneKey]struct{}),
		sweeps:  make(map[laneKey]store.TransactionID),
		opened:  make(map[string][]string),
	}, nil
}

// Run works until ctx ends.
func (r *Resolver) Run(ctx context.Context) error {
	r.mu.Lock()
	r.ctx = ctx
	r.mu.Unlock()
	defer func() {
		r.mu.Lock()
		r.ctx = nil
		r.mu.Unlock()
		r.running.Wait()
	}()
	timer := time.NewTimer(0)
	defer timer.Stop()
	var read, counted, rested time.Time
	failing := false
	for {
		now := time.Now()
		var more bool
		var err error
		if now.After(rested) {
			more, err = r.RunOnce(ctx, now.Sub(read) > sourcesAge)
			took := time.Since(now)
			if err == nil && now.Sub(read) > sourcesAge {
				read = now
			}
			if err == nil && now.Sub(counted) > countPause {
				counted = now
				if err = r.countInDoubt(ctx); err == nil {
					err = r.askSooner(ctx)
				}
			}
			rested = now.Add(took)
			if more {
				rested = rested.Add(min(claimRest*took, r.cfg.Interval))
			}
		}
		switch {
		case ctx.Err() != nil:
			return nil
		case err != nil && !failing:
			r.log.Warn("looking for in-doubt transactions; it is tried again", "error", err)
		}
		failing = err != nil
		wait := r.cfg.Interval
		if more || time.Until(rested) > 0 {
			wait = time.Until(rested)
		}
		timer.Reset(wait)
		select {
		case <-ctx.Done():
			return nil
		case <-timer.C:
		case <-r.wake:
		}
	}
}

// RunOnce takes some of what is due from the store and hands it to the lanes, after it has read the sources if told to. It
// returns whether more is likely to be due.
func (r *Resolver) RunOnce(ctx context.Context, readSources bool) (more bool, err error) {
	if readSources {
		if err := r.readSources(ctx); err != nil {
			return false, err
		}
	}
	hurrying, err := r.hurryStore(ctx)
	if err != nil {
		return false, err
	}
	claimed, err := r.store.ClaimInDoubt(ctx, r.cfg.ClaimLimit, claimLease)
	if err != nil {
		return false, err
	}
	r.enqueue(claimed)
	r.mu.Lock()
	defer r.mu.Unlock()
	r.gaugeLocked()
	// Of a full page a few rows may be left out: they were changed just before they were locked, or are decided already.
	return hurrying || len(claimed) > r.cfg.ClaimLimit/2, nil
}

func (r *Resolver) readSources(ctx context.Context) error {
	all, err := r.store.Sources(ctx, "", 0)
	if err != nil {
		return err
	}
	sources := make(map[int32]store.Source, len(all))
	for _, s := range all {
		sources[s.ID] = s
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.sources = sources
	return nil
}

// know reads the sources when this one is not known yet: it may have been registered a moment ago.
func (r *Resolver) know(ctx context.Context, source int32) {
	r.mu.Lock()
	_, known := r.sources[source]
	wait := time.Since(r.looked) < unknownPause
	if !known && !wait {
		r.looked = time.Now()
	}
	r.mu.Unlock()
	if known || wait {
		return
	}
	if err := r.readSources(ctx); err != nil && ctx.Err() == nil {
		r.log.Warn("reading the sources; it is tried again", "error", err)
	}
}

// sourceName is a source's name; "" when it is not known, or not any more.
func (r *Resolver) sourceName(id int32) string {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.sources[id].Name
}

// dsnRef is where the DSN of a source database is found; "": there is none.
func (r *Resolver) dsnRef(key laneKey) string {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, d := range r.sources[key.source].Databases {
		if d.Name == key.database {
			return d.DSNRef
		}
	}
	return ""
}

// enqueue hands transactions to their lanes.
func (r *Resolver) enqueue(parked []store.Parked) {
	if len(parked) == 0 {
		return
	}
	byLane := make(map[laneKey][]store.Parked)
	for _, p := range parked {
		if p.Database != nil {
			k := laneKey{source: p.Key.Source, database: p.Database.Database}
			byLane[k] = append(byLane[k], p)
		}
	}
	now := time.Now()
	r.mu.Lock()
	defer r.mu.Unlock()
	for k, list := range byLane {
		if l := r.laneLocked(k); l != nil {
			l.add(list, now)
		}
	}
}

// laneLocked returns a lane, which it begins if need be; nil when the resolver does not run. r.mu is held.
func (r *Resolver) laneLocked(k laneKey) *lane {
	if r.ctx == nil || r.ctx.Err() != nil {
		return nil
	}
	if l := r.lanes[k]; l != nil {
		return l
	}
	l := &lane{key: k, resolver: r, wake: make(chan struct{}, 1), items: make(map[store.Key]*item), database: &sourceDatabase{}}
	r.lanes[k] = l
	ctx := r.ctx
	r.running.Go(func() {
		l.run(ctx)
		r.mu.Lock()
		defer r.mu.Unlock()
		if r.lanes[k] == l {
			delete(r.lanes, k)
		}
	})
	return l
}

// retire takes a lane without work out; false: it has got some.
func (r *Resolver) retire(l *lane) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	if l.size() > 0 {
		return false
	}
	delete(r.lanes, l.key)
	return true
}

func (r *Resolver) gaugeLocked() {
	n := 0
	for _, l := range r.lanes {
		n += l.size()
	}
	r.metrics.queued.Set(float64(n))
}

// SessionOpened is called when a source can answer for these databases: what is in doubt is asked about at once.
func (r *Resolver) SessionOpened(source string, databases []string) {
	r.mu.Lock()
	r.opened[source] = append(r.opened[source][:0:0], databases...)
	r.mu.Unlock()
	r.signal()
}

// SessionBroke is called when a session has ended: what it leaves undecided is asked about at once.
func (r *Resolver) SessionBroke(source, instance string, undecided []store.Parked) {
	r.log.Info("a session ended with undecided transactions", "source", source, "instance", instance, "transactions", len(undecided))
	r.enqueue(undecided)
}

// hurry starts the back-off of a source database anew: it can be asked again.
func (r *Resolver) hurry(k laneKey) {
	r.mu.Lock()
	r.hurries[k] = struct{}{}
	r.mu.Unlock()
	r.signal()
}

func (r *Resolver) signal() {
	select {
	case r.wake <- struct{}{}:
	default:
	}
}

// hurryStore makes due, in the lanes and in the store, what can be asked about again. In the store that takes a call for each page
// and one that finds nothing; more: the last one did find something.
func (r *Resolver) hurryStore(ctx context.Context) (more bool, err error) {
	now := time.Now()
	r.mu.Lock()
	for id, s := range r.sources {
		for _, name := range r.opened[s.Name] {
			r.hurries[laneKey{source: id, database: name}] = struct{}{}
		}
		delete(r.opened, s.Name)
	}
	for k := range r.hurries {
		if now.Sub(r.hurried[k]) >= hurryPause {
			r.hurried[k] = now
			delete(r.hurries, k)
			r.sweeps[k] = store.TransactionID{}
			if l := r.lanes[k]; l != nil {
				l.hurry()
			}
		}
	}
	sweeps := maps.Clone(r.sweeps)
	r.mu.Unlock()
	for k, after := range sweeps {
		page, last, err := r.store.HurryInDoubt(ctx, k.source, k.database, after, r.cfg.ClaimLimit, claimLease)
		if err != nil {
			return false, err // it goes on from there
		}
		r.enqueue(page)
		r.mu.Lock()
		if last == (store.TransactionID{}) {
			delete(r.sweeps, k)
		} else {
			r.sweeps[k] = last
			more = true
		}
		r.mu.Unlock()
	}
	return more, nil
}

// countInDoubt tells metrics what is in doubt.
func (r *Resolver) countInDoubt(ctx context.Context) error {
	counts, err := r.store.InDoubtCounts(ctx)
	if err != nil {
		return err
	}
	r.metrics.inDoubt.Reset()
	r.metrics.oldest.Reset()
	for _, c := range counts {
		r.metrics.inDoubt.WithLabelValues(c.Source).Set(float64(c.Transactions))
		r.metrics.oldest.WithLabelValues(c.Source).Set(c.Oldest.Seconds())
	}
	return nil
}

// askSooner looks for transactions that would not be asked about for longer than any pause here: the store's clock was put back.
func (r *Resolver) askSooner(ctx context.Context) error {
	n, err := r.store.AskSooner(ctx, 2*(claimLease+max(r.cfg.RunningBackoff, r.cfg.UnknownBackoff)))
	if n > 0 {
		r.log.Warn("the store's clock was put back: in-doubt transactions are asked about now", "events", n)
	}
	return err
}

// decide writes a conclusive answer, once there is a place for it. The transaction stays in its lane until it is written.
func (r *Resolver) decide(ctx context.Context, l *lane, it *item, a answer) {
	select {
	case r.writing <- struct{}{}:
		r.submit(l, it, a)
	case <-ctx.Done():
	}
}

// submit hands a decision to the writer. It never blocks, and gives the place back in the end.
func (r *Resolver) submit(l *lane, it *item, a answer) {
	l.mu.Lock()
	it.due = time.Now().Add(decidedPause)
	l.mu.Unlock()
	req := decision(a, r.name)
	req.Background = true
	req.Done = func(_ *store.Request, ans store.Answer) { r.decided(l, it, a, ans.Err) }
	fault.Point("resolver.before-decision")
	if err := r.writer.Submit(req); err != nil {
		<-r.writing
		l.retry(it)
	}
}

// decision is the request that writes an answer.
func decision(a answer, actor string) *store.Request {
	kind := store.KindAbort
	if a.outcome == committed {
		kind = store.KindCommit
	}
	evidence := a.evidence
	if evidence == "" {
		evidence = "{}"
	}
	return &store.Request{Kind: kind, Key: a.key, Resolution: &store.Resolution{Method: a.method, Evidence: []byte(evidence), Actor: actor}}
}

// retry asks again soon: the decision could not be written.
func (l *lane) retry(it *item) {
	l.mu.Lock()
	it.due = time.Now().Add(jitter(retryPause))
	l.mu.Unlock()
	l.signal()
}

// decided is told what became of a decision. It runs on a goroutine of the writer and never blocks.
func (r *Resolver) decided(l *lane, it *item, a answer, err error) {
	if errors.Is(err, store.ErrInvalid) && a.evidence != "" {
		r.log.Error("the store refuses the evidence; deciding without it", "transaction_id", a.key.Transaction.String(), "error", err)
		a.evidence = ""
		r.submit(l, it, a)
		return
	}
	<-r.writing
	if errors.Is(err, store.ErrUnavailable) || errors.Is(err, store.ErrContention) || errors.Is(err, store.ErrBacklogFull) {
		l.retry(it)
		return
	}
	l.drop(it)
	r.outcome(a, it.heard, err)
}

// outcome counts a decision that is written, or that came too late.
func (r *Resolver) outcome(a answer, heard time.Time, err error) {
	var other *store.DecidedError
	switch {
	case err == nil:
		r.metrics.resolved.WithLabelValues(a.method, outcomeName(a.outcome)).Inc()
		r.metrics.seconds.WithLabelValues(a.method).Observe(time.Since(heard).Seconds())
		if a.naiveWrong {
			r.metrics.naiveWrong.Inc()
		}
	case errors.As(err, &other) && a.outcome == committed:
		// The other way round is normal: a marker is deleted once its Commit is acknowledged.
		r.metrics.contradictions.Inc()
		r.log.Error("a marker is found for a transaction that is on record as ABORTED: the source and the platform disagree about history",
			"transaction_id", a.key.Transaction.String(), "source", r.sourceName(a.key.Source), "method", a.method, "evidence", a.evidence)
	case errors.As(err, &other), errors.Is(err, store.ErrUnknown):
	default:
		r.log.Error("writing a decision", "transaction_id", a.key.Transaction.String(), "error", err)
	}
}
