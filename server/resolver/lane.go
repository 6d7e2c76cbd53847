package resolver

import (
	"context"
	"errors"
	"math/rand/v2"
	"sync"
	"time"

	"github.com/jackc/pgx/v5/pgxpool"

	outboxv1 "github.com/outbox-platform/outbox/gen/go/outbox/v1"
	"github.com/outbox-platform/outbox/store"
)

const (
	// roundSize is how many transactions are asked about at once.
	roundSize = 500
	// firstBackoff is the pause after the first inconclusive answer; it doubles with each. A service that has just died
	// leaves transactions that its database takes a moment to notice.
	firstBackoff = 20 * time.Millisecond
	// keptBackoff is the pause from which on a transaction is left to the store instead of being remembered here.
	keptBackoff = 500 * time.Millisecond
	// laneIdle is how long a lane without work keeps its connections.
	laneIdle = time.Minute
)

// laneKey names a source database.
type laneKey struct {
	source   int32
	database string
}

// item is one transaction that a lane is asking about.
type item struct {
	parked store.Parked
	heard  time.Time // when this server heard of it
	due    time.Time
	tries  int
	again  bool // claimed once more since it was last put off: the store waits for us
}

// lane asks about the transactions of one source database: its own queue, connections and back-off.
type lane struct {
	key      laneKey
	resolver *Resolver
	wake     chan struct{}

	mu    sync.Mutex
	items map[store.Key]*item

	database *sourceDatabase
}

// add gives the lane transactions. Those it has become due now if they were not asked about yet.
func (l *lane) add(parked []store.Parked, now time.Time) {
	l.mu.Lock()
	for i := range parked {
		if old := l.items[parked[i].Key]; old != nil {
			old.parked.Checks = max(old.parked.Checks, parked[i].Checks)
			old.again = true
			continue
		}
		if len(l.items) >= l.resolver.cfg.MaxQueued {
			break // the store has them, and they come again
		}
		l.items[parked[i].Key] = &item{parked: parked[i], heard: now, due: now}
	}
	l.mu.Unlock()
	l.signal()
}

// hurry makes everything due now, from the first pause on.
func (l *lane) hurry() {
	l.mu.Lock()
	now := time.Now()
	for _, it := range l.items {
		it.due, it.tries, it.parked.Checks = now, 0, 0
	}
	l.mu.Unlock()
	l.signal()
}

func (l *lane) signal() {
	select {
	case l.wake <- struct{}{}:
	default:
	}
}

// due returns what is due, at most roundSize, and when the next is. Key and Database of an item never change.
func (l *lane) due(now time.Time) (batch []*item, next time.Time) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, it := range l.items {
		switch {
		case it.due.After(now):
			if next.IsZero() || it.due.Before(next) {
				next = it.due
			}
		case len(batch) < roundSize:
			batch = append(batch, it)
		default:
			next = now
		}
	}
	return batch, next
}

// leave forgets transactions that the store was told to bring again, but for those that it has brought meanwhile: their
// claim is ours, and nobody else would ask about them until it runs out.
func (l *lane) leave(items []*item) {
	l.mu.Lock()
	defer l.mu.Unlock()
	now := time.Now()
	for _, it := range items {
		if it.again {
			it.again, it.due = false, now
			continue
		}
		delete(l.items, it.parked.Key)
	}
}

// drop forgets transactions.
func (l *lane) drop(items ...*item) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, it := range items {
		delete(l.items, it.parked.Key)
	}
}

func (l *lane) size() int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return len(l.items)
}

// run works until ctx ends, or until there was nothing to do for laneIdle.
func (l *lane) run(ctx context.Context) {
	defer l.database.close()
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		batch, next := l.due(time.Now())
		if len(batch) > 0 {
			l.round(ctx, batch)
			if ctx.Err() != nil {
				return
			}
			continue
		}
		wait := laneIdle
		if !next.IsZero() {
			wait = max(time.Until(next), time.Millisecond)
		}
		timer.Reset(wait)
		select {
		case <-l.wake:
		case <-timer.C:
			if next.IsZero() && l.resolver.retire(l) {
				return
			}
		case <-ctx.Done():
			return
		}
	}
}

// answer is what one of the two ways found out about one transaction.
type answer struct {
	key        store.Key
	method     string
	outcome    outcome
	reason     string
	evidence   string
	naiveWrong bool
	over       bool // it is on record as decided: there is nothing to write
}

// round asks about a batch both ways, decides what is conclusive as soon as it is, and puts off the rest.
func (l *lane) round(ctx context.Context, batch []*item) {
	byKey := make(map[store.Key]*item, len(batch))
	parked := make([]store.Parked, len(batch))
	for i, it := range batch {
		byKey[it.parked.Key] = it
		parked[i] = store.Parked{Key: it.parked.Key, Database: it.parked.Database}
	}
	best := l.inquire(ctx, parked, func(a answer) {
		l.resolver.decide(ctx, l, byKey[a.key], a)
	})
	if ctx.Err() != nil {
		return
	}
	rest := make([]*item, 0, len(batch))
	for _, it := range batch {
		switch a, ok := best[it.parked.Key]; {
		case ok && a.over:
			l.drop(it)
		case !ok || !conclusive(a.outcome):
			rest = append(rest, it)
		}
	}
	l.postpone(ctx, rest, best)
}

func conclusive(o outcome) bool { return o == committed || o == aborted }

// settles reports whether asking the other way too could not tell more: both read the same database.
func settles(o outcome) bool { return conclusive(o) || o == inProgress }

// inquire asks both ways at once, calls decide for the first conclusive answer about each transaction, and returns the
// best ones. It does not wait for the slower way once everything is answered; that one ends by itself, in time.
func (l *lane) inquire(ctx context.Context, parked []store.Parked, decide func(answer)) map[store.Key]answer {
	l.resolver.know(ctx, l.key.source)
	replies := make(chan []answer, 2)
	ways := 0
	begin := func(way func(context.Context) []answer) {
		ways++
		l.resolver.running.Go(func() {
			ctx, cancel := context.WithTimeout(ctx, l.resolver.cfg.AskTimeout)
			defer cancel()
			replies <- way(ctx)
		})
	}
	begin(func(ctx context.Context) []answer { return l.resolver.checkBack(ctx, l.key, parked) })
	if pool := l.connections(ctx); pool != nil {
		begin(func(ctx context.Context) []answer { return l.direct(ctx, pool, parked) })
	}
	best := make(map[store.Key]answer, len(parked))
	settled := 0
	for range ways {
		if settled == len(parked) {
			break
		}
		for _, a := range l.resolver.remember(ctx, parked, <-replies) {
			old, have := best[a.key]
			if have && (conclusive(old.outcome) || !settles(a.outcome)) {
				continue
			}
			if settles(a.outcome) && (!have || !settles(old.outcome)) {
				settled++
			}
			best[a.key] = a
			if conclusive(a.outcome) && !a.over && decide != nil {
				decide(a)
			}
		}
	}
	return best
}

// postpone sets when undecided transactions are asked about again. Soon: they are remembered. Later: the store is told,
// and they come again from there.
func (l *lane) postpone(ctx context.Context, rest []*item, best map[store.Key]answer) {
	now := time.Now()
	type group struct {
		answer string
		checks int32
		longer bool
	}
	leave := make(map[group][]store.Key)
	var left []*item
	// While the database cannot be reached one transaction stays here, to notice when it can.
	probe, away := l.database.away()
	l.mu.Lock()
	for _, it := range rest {
		a, answered := best[it.parked.Key]
		it.tries++
		if away {
			away = false
			it.due = probe
			continue
		}
		if pause := firstBackoff << min(it.tries-1, 10); pause < keptBackoff && it.parked.Checks <= 1 {
			it.due = now.Add(jitter(pause))
			continue
		}
		g := group{answer: "nobody could be asked", checks: min(it.parked.Checks, 10), longer: true}
		if answered {
			g.answer, g.longer = describe(a), a.outcome != inProgress
		}
		leave[g] = append(leave[g], it.parked.Key)
		left = append(left, it)
		it.again = false
	}
	l.mu.Unlock()
	for g, keys := range leave {
		most := l.resolver.cfg.RunningBackoff
		if g.longer {
			most = l.resolver.cfg.UnknownBackoff
		}
		pause := jitter(min(keptBackoff<<max(g.checks-1, 0), most))
		if err := l.resolver.store.RecordAnswer(ctx, keys, g.answer, pause); err != nil && ctx.Err() == nil {
			l.resolver.log.Warn("recording an answer", "error", err) // the claim runs out, and they come again
		}
	}
	l.leave(left)
}

// describe is an answer as it is recorded.
func describe(a answer) string {
	text := a.method + ": " + outcomeName(a.outcome)
	if a.reason != "" {
		text += ": " + a.reason
	}
	const most = 500
	return text[:min(len(text), most)]
}

// jitter spreads a pause over ± 20 %.
func jitter(d time.Duration) time.Duration {
	return time.Duration(float64(d) * (0.8 + 0.4*rand.Float64())) //nolint:gosec // not a secret
}

// connections returns connections to the source database for a direct look, or nil: there is no DSN, or it could not be
// reached a moment ago.
func (l *lane) connections(ctx context.Context) *pgxpool.Pool {
	// The pool outlives the round.
	pool, err := l.database.connections(context.WithoutCancel(ctx), l.resolver.dsnRef(l.key), l.resolver.cfg.AskTimeout)
	if err != nil {
		l.unreachable(err)
	}
	return pool
}

// direct looks into the source database.
func (l *lane) direct(ctx context.Context, pool *pgxpool.Pool, parked []store.Parked) []answer {
	seen, err := judgeAll(ctx, pool, parked)
	if err != nil {
		if !errors.Is(ctx.Err(), context.Canceled) { // else we stop, or the operator went away
			l.unreachable(err)
		}
		return nil
	}
	if l.database.worked() {
		l.resolver.log.Info("a source database answers again", "source", l.resolver.sourceName(l.key.source), "database", l.key.database)
		l.resolver.hurry(l.key)
	}
	answers := make([]answer, 0, len(seen))
	for k, f := range seen {
		answers = append(answers, answer{key: k, method: methodDirect, outcome: f.outcome, reason: f.reason, evidence: f.evidence, naiveWrong: f.naiveWrong})
	}
	l.resolver.count(methodDirect, answers)
	return answers
}

// unreachable leaves the database alone for a while.
func (l *lane) unreachable(err error) {
	l.resolver.metrics.failures.WithLabelValues(methodDirect).Inc()
	if l.database.failed() {
		l.resolver.log.Warn("a source database cannot be asked; it is tried again", "source", l.resolver.sourceName(l.key.source), "database", l.key.database, "error", err)
	}
}

// checkBack asks live sessions of the source.
func (r *Resolver) checkBack(ctx context.Context, key laneKey, parked []store.Parked) []answer {
	var answers []answer
	for i := range parked {
		if p := &parked[i]; p.Database.Mode == store.ModeClientOnly {
			answers = append(answers, answer{key: p.Key, method: methodCheckBack, outcome: unknown, reason: clientOnly})
		}
	}
	transactions, keys := questionsAbout(parked)
	if len(transactions) == 0 {
		return answers
	}
	got, err := r.sessions.Ask(ctx, r.sourceName(key.source), key.database, transactions)
	if err != nil {
		r.metrics.failures.WithLabelValues(methodCheckBack).Inc()
		return answers
	}
	for _, a := range got {
		k, asked := keys[store.TransactionID(a.GetTransactionId())]
		if !asked {
			continue
		}
		answers = append(answers, answer{
			key: k, method: methodCheckBack, outcome: a.GetOutcome(), reason: a.GetReason(), evidence: a.GetEvidence(), naiveWrong: a.GetNaiveWrong(),
		})
	}
	r.count(methodCheckBack, answers)
	return answers
}

// questionsAbout makes the questions about transactions that somebody can be asked about.
func questionsAbout(parked []store.Parked) ([]*outboxv1.SessionResponse_CheckTransaction, map[store.TransactionID]store.Key) {
	questions := make([]*outboxv1.SessionResponse_CheckTransaction, 0, len(parked))
	keys := make(map[store.TransactionID]store.Key, len(parked))
	for i := range parked {
		p := &parked[i]
		if p.Database.Mode == store.ModeClientOnly {
			continue
		}
		keys[p.Key.Transaction] = p.Key
		questions = append(questions, &outboxv1.SessionResponse_CheckTransaction{
			TransactionId:       p.Key.Transaction[:],
			DatabaseTransaction: databaseTransaction(p.Database),
		})
	}
	return questions, keys
}

func databaseTransaction(d *store.DatabaseTransaction) *outboxv1.DatabaseTransaction {
	return &outboxv1.DatabaseTransaction{
		Database: d.Database, Xid: d.XID, SystemIdentifier: d.SystemIdentifier, Timeline: d.Timeline,
		DatabaseOid: d.DatabaseOID, MarkerOid: d.MarkerOID, Mode: outboxv1.DatabaseMode(d.Mode),
	}
}

func (r *Resolver) count(method string, answers []answer) {
	for _, a := range answers {
		r.metrics.answers.WithLabelValues(method, outcomeName(a.outcome)).Inc()
	}
}
