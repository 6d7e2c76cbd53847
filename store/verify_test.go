package store_test

import (
	"fmt"
	"slices"
	"strings"
	"testing"

	"github.com/outbox-platform/outbox/store"
	"github.com/outbox-platform/outbox/store/storetest"
)

// population is a store in which everything occurs.
type population struct {
	*world
	published, aborted, parked, follower, pending, dead, resolved, young, unread, unreadInDoubt store.Key
}

// populate fills a store as a platform at work leaves it behind at any moment.
func populate(t testing.TB) *population {
	t.Helper()
	p := &population{world: newWorld(t)}
	a, b, besideA := p.twoShards()

	p.published = p.prepare(a, b, besideA)
	p.decide(p.published, store.KindCommit)
	p.publish(b)
	p.aborted = p.prepare("aborted")
	p.decide(p.aborted, store.KindAbort)
	p.parked = p.prepare("in doubt")
	p.follower = p.publish("in doubt")
	p.pending = p.prepare("pending")
	p.decide(p.pending, store.KindCommit)
	p.dead = p.publish("refused", b)
	p.resolved = p.prepare("resolved")
	p.resolve(p.resolved, store.KindCommit)
	p.young = p.prepare("young")
	p.park(p.parked, store.CauseInDoubt, store.Prepared)
	p.park(p.follower, store.CauseFollower, store.Committed)
	p.bury(p.dead, true)
	p.checkpoint(map[store.Key]store.State{p.pending: store.Committed, p.young: store.Prepared})

	// One batch with requests that lose.
	requests := []*store.Request{
		{Kind: store.KindPublish, Key: p.published, Events: events("other content")},
		{Kind: store.KindPublish, Key: storetest.Key(p.src.ID), Events: events(a)},
	}
	for range 20 {
		p.together(requests)
		if storetest.Query[int](t, p.Database, `SELECT count(*) FROM outbox.log WHERE stale IS NOT NULL`)[0] > 0 {
			break
		}
		requests[1].Key = storetest.Key(p.src.ID)
	}
	p.unread = p.prepare("unread", a, b)
	p.decide(p.unread, store.KindCommit)
	p.unreadInDoubt = p.prepare("unread too")
	p.hold()
	if _, err := p.Store.RequestOperation(t.Context(), store.Aggregate{Source: p.src.ID, Type: "order", ID: "refused"}, store.ActionRedrive, "me", "fixed"); err != nil {
		t.Fatal(err)
	}
	return p
}

// together submits requests one right after the other and waits for all.
func (w *world) together(requests []*store.Request) {
	w.t.Helper()
	done := make(chan struct{}, len(requests))
	for _, r := range requests {
		r.Done = func(*store.Request, store.Answer) { done <- struct{}{} }
		if err := w.w.Submit(r); err != nil {
			w.t.Fatal(err)
		}
	}
	for range requests {
		<-done
	}
}

func TestVerifyFindsNothingInASoundStore(t *testing.T) {
	t.Parallel()
	p := populate(t)
	p.sound()
	if n := storetest.Query[int](t, p.Database, `SELECT count(*) FROM outbox.log WHERE stale IS NOT NULL`)[0]; n == 0 {
		t.Error("no batch with losers was written: the check of stale ordinals saw nothing")
	}
	// Older generations may be truncated, and old transactions purged, without a trace.
	empty := newWorld(t)
	empty.sound()
}

// corruptions breaks every invariant in every way that Verify tells apart.
var corruptions = []struct {
	name      string
	invariant string
	detail    string // part of the violation's detail
	corrupt   func(*population)
}{
	{"two generations are open", store.InvariantGeneration, "generation 3", sql(`UPDATE outbox.generation SET used = true WHERE gen = 3`)},
	{"the open generation is closed", store.InvariantGeneration, "generation 0: open true", sql(`UPDATE outbox.generation SET closed_at = now() WHERE gen = 0`)},
	{"a closed generation is unused", store.InvariantGeneration, "generation 3", sql(`UPDATE outbox.generation SET closed_at = now() WHERE gen = 3`)},
	{"the open generation does not exist", store.InvariantGeneration, "does not exist", sql(`DELETE FROM outbox.generation WHERE gen = 0`)},
	{"segments in an empty generation", store.InvariantGeneration, "generation 0 is empty by its row",
		sql(`UPDATE outbox.control SET gen = 1; UPDATE outbox.generation SET used = gen = 1`)},

	{"a lease without a holder", store.InvariantLease, "shard 2 has", sql(`UPDATE outbox.shard SET holder = '' WHERE shard = 2`)},
	{"a lease without an epoch", store.InvariantLease, "shard 2 has", sql(`UPDATE outbox.shard SET epoch = 0 WHERE shard = 2`)},

	{"a checkpoint ahead of the log", store.InvariantCheckpoint, "ahead of the log", sql(`UPDATE outbox.shard SET xid = '9999999', oldest = '9999999' WHERE shard = 2`)},
	{"oldest after the checkpoint", store.InvariantCheckpoint, "oldest", sql(`UPDATE outbox.shard SET oldest = (xid::text::bigint + 1)::text::xid8 WHERE shard = 2`)},
	{"pend that cannot be read", store.InvariantCheckpoint, "decode pend", sql(`UPDATE outbox.shard SET pend = '\xff' WHERE shard = 2`)},
	{"offsets that cannot be read", store.InvariantCheckpoint, "decode offsets", sql(`UPDATE outbox.shard SET offsets = '\xff' WHERE shard = 2`)},
	{"a shard without a row", store.InvariantCheckpoint, "15 of 16", sql(`DELETE FROM outbox.shard WHERE shard = 15`)},
	{"a shard too many", store.InvariantCheckpoint, "shard 16 has a row", sql(`INSERT INTO outbox.shard (shard) VALUES (16)`)},

	{"pending after the checkpoint", store.InvariantPend, "is after checkpoint", changePend(func(e *store.PendEntry) { e.XID += 100_000 })},
	{"pending before oldest", store.InvariantPend, "is before oldest", pendingSQL(`UPDATE outbox.shard SET oldest = (oldest::text::bigint + 1)::text::xid8 WHERE shard = $1`)},
	{"pending and not in the log", store.InvariantPend, "not a valid event", changePend(func(e *store.PendEntry) { e.Record = 99 })},
	{"pending under another transaction", store.InvariantPend, "not a valid event", changePend(func(e *store.PendEntry) { e.Key.Transaction[0]++ })},
	{"pending and unknown", store.InvariantPend, "tx does not know it", func(p *population) {
		changePend(func(e *store.PendEntry) { e.State = store.Prepared })(p)
		p.deleteTransaction(p.pending)
	}},
	{"pending with another state", store.InvariantPend, "is ABORTED, tx says COMMITTED", changePend(func(e *store.PendEntry) { e.State = store.Aborted })},
	{"pending and parked", store.InvariantPend, "is parked too", func(p *population) { p.park(p.pending, store.CauseTopic, store.Committed) }},
	{"pending and a dead letter", store.InvariantPend, "is a dead letter too", func(p *population) { p.bury(p.pending, false) }},

	{"a segment of no shard", store.InvariantSegment, "there are 16 shards", sql(`UPDATE outbox.log SET shard = 16 WHERE ctid = (SELECT min(ctid) FROM outbox.log_0) AND gen = 0`)},
	{"a segment of another format", store.InvariantSegment, "format 9", sql(`UPDATE outbox.log SET body = set_byte(body, 0, 9)`)},
	{"a segment cut short", store.InvariantSegment, "corrupt", sql(`UPDATE outbox.log SET body = substr(body, 1, 30)`)},

	{"segments of a batch differ in their losers", store.InvariantStale, "name other losers", staleSQL(`UPDATE outbox.log SET stale = '{1,2}' WHERE xid = $1 AND shard = (SELECT max(shard) FROM outbox.log WHERE xid = $1)`)},
	{"a loser named twice", store.InvariantStale, "twice", staleSQL(`UPDATE outbox.log SET stale = stale || stale WHERE xid = $1`)},
	{"a loser that is no request", store.InvariantStale, "no request", staleSQL(`UPDATE outbox.log SET stale = stale || 77 WHERE xid = $1`)},

	{"a needed event without a transaction", store.InvariantEventHasTransaction, "tx does not know it", func(p *population) { p.deleteTransaction(p.unread) }},
	{"a needed event of another batch", store.InvariantEventHasTransaction, "second copy", func(p *population) { p.update(p.unread, `log_xid = '3'`) }},
	{"a second copy of events that are done", store.InvariantEventHasTransaction, "second copy", func(p *population) { p.update(p.published, `log_xid = '3'`) }},
	{"an event in a shard that tx does not name", store.InvariantEventHasTransaction, "not in a shard that tx names", func(p *population) { p.update(p.published, `shards = shards & (shards - 1)`) }},

	{"a decision that tx contradicts", store.InvariantDecisionAgrees, "is COMMITTED, tx says ABORTED", func(p *population) { p.update(p.published, `state = 2`) }},
	{"a publish that tx contradicts", store.InvariantDecisionAgrees, "came by Publish, tx says ABORTED", func(p *population) { p.update(p.follower, `state = 2`) }},
	{"a decision in a shard that tx does not name", store.InvariantDecisionAgrees, "not in a shard that tx names", func(p *population) { p.update(p.published, `shards = shards & (shards - 1)`) }},
	{"a decision before the events", store.InvariantDecisionAfterEvents, "is not after the events", func(p *population) {
		for _, r := range p.log() {
			if r.record.IsDecision && r.record.Key == p.unread {
				p.update(p.unread, fmt.Sprintf(`log_xid = '%d'`, r.XID))
			}
		}
	}},
	{"a decision that never reached the log", store.InvariantDecisionReachesShard, "counts as undecided", func(p *population) { p.update(p.unreadInDoubt, `state = 1, decided_at = now()`) }},
	{"a decision that was read and forgotten", store.InvariantDecisionReachesShard, "counts as undecided", func(p *population) { p.update(p.parked, `state = 1, decided_at = now()`) }},
	{"a pending decision that was read and forgotten", store.InvariantDecisionReachesShard, "counts as undecided", changePend(func(e *store.PendEntry) { e.State = store.Prepared })},

	{"another digest, one shard", store.InvariantDigest, "have digest", func(p *population) { p.update(p.aborted, `digest = digest + 1`) }},
	{"another digest, several shards", store.InvariantDigest, "have digest", func(p *population) { p.update(p.published, `digest = digest + 1`) }},
	{"an event lost from a segment", store.InvariantDigest, "have digest", func(p *population) {
		e := p.eventsOf(p.published)
		p.Exec(p.t, `DELETE FROM outbox.log WHERE shard = $1 AND xid = $2`, e[len(e)-1].shard, e[0].XID)
	}},

	{"a generation truncated too early", store.InvariantUnreadInLog, "is not in the log", sql(`TRUNCATE outbox.log_0`)},
	{"undecided and neither parked nor pending", store.InvariantUndecidedKept, "is done, tx says PREPARED", func(p *population) { p.unpark(p.parked) }},
	{"undecided and gone altogether", store.InvariantUndecidedKept, "neither pending, nor parked", func(p *population) {
		e := p.eventsOf(p.parked)[0]
		p.unpark(p.parked)
		p.Exec(p.t, `DELETE FROM outbox.log WHERE shard = $1 AND xid = $2`, e.shard, e.XID)
	}},
	{"published past an undecided event", store.InvariantOrderKept, "before it is undecided", func(p *population) { p.unpark(p.follower) }},

	{"parked in another shard", store.InvariantRowMatchesBody, "in parked under hash", func(p *population) { p.updateParked(p.parked, `shard = (shard + 1) % 16`) }},
	{"parked under another hash", store.InvariantRowMatchesBody, "in parked under hash", func(p *population) { p.updateParked(p.parked, `agg = agg + 1`) }},
	{"parked with a body that cannot be read", store.InvariantRowMatchesBody, "format", func(p *population) { p.updateParked(p.parked, `body = '\x'`) }},
	{"parked with another topic", store.InvariantRowMatchesBody, "its body is of", func(p *population) { p.updateParked(p.parked, `topic = 'x'`) }},
	{"a dead letter with another aggregate", store.InvariantRowMatchesBody, "in dead_letter", sql(`UPDATE outbox.dead_letter SET aggregate_id = aggregate_id || '!'`)},

	{"parked and unknown", store.InvariantParkedTransaction, "tx does not know it", func(p *population) { p.deleteTransaction(p.follower) }},
	{"parked from another batch", store.InvariantParkedTransaction, "tx names batch", func(p *population) { p.update(p.follower, `log_xid = '3'`) }},
	{"parked with another state", store.InvariantParkedTransaction, "is parked as ABORTED, tx says COMMITTED", func(p *population) { p.updateParked(p.follower, `state = 2`) }},
	{"parked in doubt and not to be asked about", store.InvariantParkedTransaction, "without its source database", func(p *population) { p.updateParked(p.parked, `database = NULL`) }},

	{"a dead letter and unknown", store.InvariantDeadLetterCommitted, "tx does not know it", func(p *population) { p.deleteTransaction(p.dead) }},
	{"a dead letter that was aborted", store.InvariantDeadLetterCommitted, "tx says ABORTED", func(p *population) { p.update(p.dead, `state = 2`) }},
	{"a dead letter and parked", store.InvariantParkedOrDead, "is parked and a dead letter", func(p *population) { p.park(p.dead, store.CauseRedriven, store.Committed) }},

	{"a state that does not exist", store.InvariantTransactionRow, "state 7", func(p *population) { p.update(p.published, `state = 7`) }},
	{"decided without a time", store.InvariantTransactionRow, "decided false", func(p *population) { p.update(p.published, `decided_at = NULL`) }},
	{"undecided with a time", store.InvariantTransactionRow, "state 0, decided true", func(p *population) { p.update(p.parked, `decided_at = now()`) }},
	{"no shards", store.InvariantTransactionRow, "shards 0", func(p *population) { p.update(p.published, `shards = 0`) }},
	{"shards that do not exist", store.InvariantTransactionRow, "shards", func(p *population) { p.update(p.published, `shards = shards | 65536`) }},
	{"a batch that was never written", store.InvariantTransactionRow, "batch 99999999", func(p *population) { p.update(p.published, `log_xid = '99999999'`) }},
	{"an unknown source", store.InvariantTransactionRow, "source known false", func(p *population) { p.update(p.published, `source_id = 99`) }},

	{"evidence for another decision", store.InvariantResolutionAgrees, "tx says 1", sql(`UPDATE outbox.resolution SET state = 2`)},
	{"evidence for nothing", store.InvariantResolutionAgrees, "tx says nothing", func(p *population) { p.deleteTransaction(p.resolved) }},
	{"an operation for another holder", store.InvariantOperationShard, "operation 1 is addressed", sql(`UPDATE outbox.operation SET shard = (shard + 1) % 16`)},
}

func TestVerifyFindsEveryCorruption(t *testing.T) {
	t.Parallel()
	p := populate(t)
	conn := p.Connect(t)
	for _, c := range corruptions {
		t.Run(c.name, func(t *testing.T) {
			tx, err := conn.Begin(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			defer tx.Rollback(t.Context()) //nolint:errcheck // the next test begins anew
			corrupted := *p
			w := *p.world
			w.t, w.tx = t, tx
			corrupted.world = &w
			c.corrupt(&corrupted)
			violations, err := store.VerifyIn(t.Context(), p.Store, tx)
			if err != nil {
				t.Fatal(err)
			}
			if !slices.ContainsFunc(violations, func(v store.Violation) bool {
				return v.Invariant == c.invariant && strings.Contains(v.Detail, c.detail)
			}) {
				t.Errorf("no violation of %s with %q; found: %q", c.invariant, c.detail, violations)
			}
		})
	}
	// What was rolled back left nothing behind, and nothing but the corruptions was found.
	p.sound()
}

// TestVerifyHasATestForEachInvariant keeps the table complete.
func TestVerifyHasATestForEachInvariant(t *testing.T) {
	t.Parallel()
	tested := map[string]bool{}
	for _, c := range corruptions {
		tested[c.invariant] = true
	}
	for _, invariant := range store.Invariants {
		if !tested[invariant] {
			t.Errorf("no corruption of %s is tested", invariant)
		}
		delete(tested, invariant)
	}
	if len(tested) > 0 {
		t.Errorf("not listed in Invariants: %v", tested)
	}
}

func TestVerifyBoundsWhatItLists(t *testing.T) {
	t.Parallel()
	p := populate(t)
	p.Exec(t, `INSERT INTO outbox.operation (shard, source_id, aggregate_type, aggregate_id, action, actor, reason)
		SELECT 99, 1, 'order', i::text, 1, '', '' FROM generate_series(1, 250) i`)
	violations, err := p.Store.Verify(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if len(violations) != 101 || violations[100].Detail != "… and 150 more" {
		t.Fatalf("%d violations, the last is %v", len(violations), violations[len(violations)-1])
	}
}

// TestVerifyGoesThroughLargeStores makes every loop of Verify go round more than once.
func TestVerifyGoesThroughLargeStores(t *testing.T) {
	t.Parallel()
	w := newWorld(t, storetest.WithShards(2))
	var requests []*store.Request
	pending := map[store.Key]store.State{}
	for i := range 1000 {
		k := storetest.Key(w.src.ID)
		e := events(fmt.Sprint("a", i), fmt.Sprint("b", i))
		e[0].Payload = make([]byte, 6000)
		requests = append(requests, &store.Request{Kind: store.KindPublish, Key: k, Events: e})
		if i%20 == 0 {
			pending[k] = store.Committed
		}
	}
	w.together(requests)
	w.checkpoint(pending)
	var blocked []store.Key
	for i := range 70 {
		blocked = append(blocked, w.publish(fmt.Sprint("blocked", i)))
	}
	w.checkpoint(pending)
	for _, k := range blocked {
		w.park(k, store.CauseTopic, store.Committed)
	}
	w.sound()
}

func sql(statements string) func(*population) {
	return func(p *population) {
		for _, s := range strings.Split(statements, ";") {
			if n := p.Exec(p.t, s); n == 0 && !strings.HasPrefix(s, "TRUNCATE") {
				p.t.Fatalf("nothing was corrupted by %s", s)
			}
		}
	}
}

// staleSQL corrupts the batch that has losers.
func staleSQL(statement string) func(*population) {
	return func(p *population) {
		xid := storetest.Query[uint64](p.t, p.Database, `SELECT xid FROM outbox.log WHERE stale IS NOT NULL ORDER BY xid LIMIT 1`)
		if len(xid) == 0 {
			p.t.Fatal("no batch has losers")
		}
		if p.Exec(p.t, statement, xid[0]) == 0 {
			p.t.Fatal("nothing was corrupted")
		}
	}
}

// pendingSQL corrupts the checkpoint that has something pending.
func pendingSQL(statement string) func(*population) {
	return func(p *population) {
		shard := p.eventsOf(p.pending)[0].shard
		// Oldest must not move past the checkpoint as well.
		p.Exec(p.t, `UPDATE outbox.shard SET xid = (xid::text::bigint + 5)::text::xid8 WHERE shard = $1`, shard)
		p.Exec(p.t, statement, shard)
	}
}

// changePend corrupts what is pending.
func changePend(change func(*store.PendEntry)) func(*population) {
	return func(p *population) {
		e := p.eventsOf(p.pending)[0]
		entry := store.PendEntry{EventPosition: e.EventPosition, Key: p.pending, State: store.Committed}
		change(&entry)
		p.Exec(p.t, `UPDATE outbox.shard SET pend = $2 WHERE shard = $1`, e.shard, store.EncodePend([]store.PendEntry{entry}))
	}
}

func (p *population) deleteTransaction(k store.Key) {
	p.t.Helper()
	p.Exec(p.t, `DELETE FROM outbox.tx WHERE source_id = $1 AND tx_id = $2`, k.Source, [16]byte(k.Transaction))
}

func (p *population) update(k store.Key, set string) {
	p.t.Helper()
	p.Exec(p.t, `UPDATE outbox.tx SET `+set+` WHERE source_id = $1 AND tx_id = $2`, k.Source, [16]byte(k.Transaction))
}

func (p *population) updateParked(k store.Key, set string) {
	p.t.Helper()
	if p.Exec(p.t, `UPDATE outbox.parked SET `+set+` WHERE source_id = $1 AND tx_id = $2`, k.Source, [16]byte(k.Transaction)) == 0 {
		p.t.Fatal("nothing is parked")
	}
}

func (p *population) unpark(k store.Key) {
	p.t.Helper()
	if p.Exec(p.t, `DELETE FROM outbox.parked WHERE source_id = $1 AND tx_id = $2`, k.Source, [16]byte(k.Transaction)) == 0 {
		p.t.Fatal("nothing is parked")
	}
}
