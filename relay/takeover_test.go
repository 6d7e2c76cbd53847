package relay_test

import (
	"context"
	"fmt"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/outbox-platform/outbox/relay"
	"github.com/outbox-platform/outbox/store"
	"github.com/outbox-platform/outbox/store/storetest"
)

// settled waits until the checkpoints say that everything is out.
func (p *platform) settled() {
	p.t.Helper()
	p.caughtUp()
	p.eventually("nothing is outstanding", func() bool {
		return storetest.Query[int64](p.t, p.db, "SELECT sum(length(pend)) FROM outbox.shard")[0] == 0
	})
}

// caughtUp waits until the checkpoints have everything.
func (p *platform) caughtUp() {
	p.t.Helper()
	p.eventually("checkpoints at the end of the log", func() bool {
		for _, s := range must(p.db.Store.Shards(p.t.Context())) {
			if s.LagSegments > 0 {
				return false
			}
		}
		return true
	})
}

func TestTakeoverSuppressesWhatWasDelivered(t *testing.T) {
	p := newPlatform(t)
	l, st := p.openLink()
	a := p.startOn(st, "a")
	for _, id := range []string{"x", "y", "z"} {
		p.publish(p.source, order(id, id+"0"))
		p.wantValues(id, id+"0")
	}
	p.settled()
	p.eventually("offsets are written", func() bool {
		return storetest.Query[int64](t, p.db, "SELECT sum(length(offsets)) FROM outbox.shard")[0] >= 12
	})
	a.sink.HoldAcks(true)
	for _, id := range []string{"x", "y", "z"} {
		p.publish(p.source, order(id, id+"1"), order(id, id+"2"))
		p.wantValues(id, id+"0", id+"1")
	}
	p.caughtUp()
	l.freeze(true)
	for _, id := range []string{"x", "y", "z"} {
		p.publish(p.source, order(id, id+"3"))
	}
	b := p.start("b")
	for _, id := range []string{"x", "y", "z"} {
		p.wantValues(id, id+"0", id+"1", id+"2", id+"3")
	}
	p.eventually("three duplicates suppressed", func() bool { return b.metric(t, "outbox_duplicates_suppressed_total") == 3 })
	if a.sink.Purges() == 0 {
		t.Error("the relay that lost its leases did not purge what was in flight")
	}
	l.freeze(false)
	p.eventually("fenced", func() bool { return a.metric(t, "outbox_fenced_total") == 2 })
	a.sink.HoldAcks(false)
	// The shards are shared again, in good order.
	p.eventually("one shard each", func() bool {
		return a.metric(t, "outbox_held_shards") == 1 && b.metric(t, "outbox_held_shards") == 1
	})
	p.publish(p.source, order("x", "x4"), order("y", "y4"), order("z", "z4"))
	for _, id := range []string{"x", "y", "z"} {
		p.wantValues(id, id+"0", id+"1", id+"2", id+"3", id+"4")
	}
	a.stop(t)
	b.stop(t)
	p.verify()
}

// A holder dies before it could write down that it writes to a partition at all: the next one looks there all the same, also for
// what had been parked.
func TestTakeoverSuppressesFirstRecords(t *testing.T) {
	p := newPlatform(t)
	l, st := p.openLink()
	a := p.startOn(st, "a", func(c *relay.Config) { c.ParkAfter = 50 * time.Millisecond })
	a.sink.HoldAcks(true)
	inDoubt := p.prepare(p.source, order("i", "i0"), order("j", "j0"))
	p.eventually("parked", func() bool { return p.parked() == 2 })
	p.commit(inDoubt)
	p.wantValues("i", "i0")
	p.wantValues("j", "j0")
	ids := []string{"x", "y", "z"}
	for _, id := range ids {
		p.publish(p.source, order(id, id+"0"), order(id, id+"1"))
		p.wantValues(id, id+"0")
	}
	p.caughtUp()
	if n := storetest.Query[int64](t, p.db, "SELECT sum(length(offsets)) FROM outbox.shard")[0]; n > 4 {
		t.Fatalf("offsets of %d bytes are written: this shows nothing", n)
	}
	l.freeze(true)
	b := p.start("b")
	for _, id := range ids {
		p.wantValues(id, id+"0", id+"1")
	}
	p.eventually("five duplicates suppressed", func() bool { return b.metric(t, "outbox_duplicates_suppressed_total") == 5 })
	p.eventually("nothing is parked", func() bool { return p.parked() == 0 })
	p.wantValues("i", "i0")
	p.wantValues("j", "j0")
	l.freeze(false)
	a.stop(t)
	b.stop(t)
	p.verify()
}

// A transaction of somebody else holds the horizon, and the last holder had stepped over it. The next one, which has yet to
// learn that, must not take what it may read at first for all that the last holder had read.
func TestTakeoverReadsWhatAForeignTransactionHides(t *testing.T) {
	p := &platform{t: t, db: storetest.NewCluster(t).New(t, storetest.WithShards(1))}
	p.fill()
	l, st := p.openLink()
	a := p.startOn(st, "a")
	p.publish(p.source, order("x", "x0"))
	p.wantValues("x", "x0")
	p.settled()
	foreign, err := pgx.Connect(t.Context(), p.db.DSN)
	if err != nil {
		t.Fatal(err)
	}
	defer foreign.Close(context.WithoutCancel(t.Context()))
	if _, err := foreign.Exec(t.Context(), "BEGIN; SELECT pg_current_xact_id()"); err != nil {
		t.Fatal(err)
	}
	p.publish(p.source, order("x", "x1"))
	p.wantValues("x", "x0", "x1")
	p.settled()
	// What is delivered from here on is in no checkpoint.
	p.db.Exec(t, "CREATE FUNCTION outbox.fail() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RAISE 'disk full' USING ERRCODE = '53100'; END $$")
	p.db.Exec(t, "CREATE TRIGGER fail BEFORE UPDATE ON outbox.shard FOR EACH ROW WHEN (new.holder = 'a') EXECUTE FUNCTION outbox.fail()")
	p.publish(p.source, order("x", "x2"))
	p.wantValues("x", "x0", "x1", "x2")
	l.freeze(true)
	b := p.start("b")
	p.eventually("taken over", func() bool { return b.metric(t, "outbox_takeovers_total") == 1 })
	p.publish(p.source, order("x", "x3"))
	p.eventually("what came after is out", func() bool {
		v := p.cluster.Values("x")
		return v[len(v)-1] == "x3"
	})
	p.wantValues("x", "x0", "x1", "x2", "x3")
	p.eventually("one duplicate suppressed", func() bool { return b.metric(t, "outbox_duplicates_suppressed_total") == 1 })
	l.freeze(false)
	a.stop(t)
	b.stop(t)
	p.verify()
}

func TestTakeoverWaitsForTheClusterToSuppress(t *testing.T) {
	p := newPlatform(t, storetest.WithShards(1))
	l, st := p.openLink()
	a := p.startOn(st, "a")
	p.publish(p.source, order("x", "x0"))
	p.wantValues("x", "x0")
	p.settled()
	a.sink.HoldAcks(true)
	p.publish(p.source, order("x", "x1"), order("x", "x2"))
	p.wantValues("x", "x0", "x1")
	l.freeze(true)
	p.cluster.SetDown(true)
	b := p.start("b")
	p.eventually("taken over", func() bool { return b.metric(t, "outbox_takeovers_total") == 1 })
	p.cluster.SetDown(false)
	p.wantValues("x", "x0", "x1", "x2")
	l.freeze(false)
	a.stop(t)
	b.stop(t)
	p.verify()
}

func TestOwnLeaseRunsOutAndNobodyTakesIt(t *testing.T) {
	p := newPlatform(t)
	l, st := p.openLink()
	a := p.startOn(st, "a", func(c *relay.Config) { c.LeaseTTL, c.RenewEvery = 500*time.Millisecond, 50*time.Millisecond })
	load := p.startLoad(4)
	for range 3 {
		n := p.cluster.Len()
		p.eventually("some arrived", func() bool { return p.cluster.Len() > n+20 })
		l.freeze(true)
		p.eventually("the lease ran out", func() bool {
			return storetest.Query[bool](t, p.db, "SELECT bool_and(lease_until < now()) FROM outbox.shard")[0]
		})
		l.freeze(false)
	}
	load.stop(p)
	load.wantInOrder(p)
	a.stop(t)
	p.verify()
}

func TestZombieDeliversNothingAfterItsLease(t *testing.T) {
	p := newPlatform(t)
	l, st := p.openLink()
	a := p.startOn(st, "a")
	p.publish(p.source, order("x", "x0"))
	p.wantValues("x", "x0")
	p.settled()
	a.sink.HoldWrites(true)
	p.publish(p.source, order("x", "x1"), order("x", "x2"))
	p.eventually("in flight", func() bool { return a.sink.Unreported() == 1 })
	l.freeze(true)
	b := p.start("b")
	p.wantValues("x", "x0", "x1", "x2")
	a.sink.HoldWrites(false)
	p.publish(p.source, order("x", "x3"))
	p.wantValues("x", "x0", "x1", "x2", "x3")
	if e := p.cluster.Written()[3].Header(relay.EpochHeader); strings.HasSuffix(e, ":1") {
		t.Errorf("the new holder writes under epoch %s", e)
	}
	l.freeze(false)
	a.stop(t)
	b.stop(t)
	p.wantValues("x", "x0", "x1", "x2", "x3")
	p.verify()
}

func TestTakeoverOfEverythingThatCanBeOutstanding(t *testing.T) {
	p := newPlatform(t, storetest.WithShards(1))
	block, park := p.register("block", 1), p.register("park", 2)
	refuse := func(values ...string) {
		p.cluster.Refuse(func(r relay.Record) *relay.SinkError {
			for _, v := range values {
				if string(r.Value) == v {
					return &relay.SinkError{Class: relay.ClassRecord, Code: "TOO_LARGE"}
				}
			}
			return nil
		})
	}
	refuse("b1", "p1")
	l, st := p.openLink()
	a := p.startOn(st, "a", func(c *relay.Config) { c.ParkAfter = 300 * time.Millisecond })
	indoubt := p.prepare(p.source, order("i", "i0"), order("j", "j0"))
	p.publish(p.source, order("i", "i1"))
	aborted := p.prepare(p.source, order("k", "k0"))
	p.publish(p.source, order("k", "k1"))
	p.publish(block, order("b", "b0"), order("b", "b1"), order("b", "b2"))
	p.publish(park, order("p", "p0"), order("p", "p1"), order("p", "p2"))
	p.publish(p.source, storetest.Event("later", "order", "t", "t0"), order("t", "t1"))
	p.eventually("parked and buried", func() bool { return p.parked() == 9 && p.dead() == 2 })
	p.cluster.SetDown(true)
	hot := p.prepare(p.source, order("h", "h0")) // in pend
	p.publish(p.source, order("c", "c0"), order("c", "c1"))
	p.eventually("in pend", func() bool {
		return storetest.Query[int64](t, p.db, "SELECT sum(length(pend)) FROM outbox.shard")[0] > 30
	})
	l.freeze(true)
	p.commit(hot)
	p.commit(indoubt)
	p.abort(aborted)
	b := p.start("b", func(c *relay.Config) { c.TakeoverTailTimeout = 100 * time.Millisecond })
	p.eventually("taken over", func() bool { return b.metric(t, "outbox_takeovers_total") == 1 })
	p.cluster.SetDown(false)
	p.wantValues("i", "i0", "i1")
	p.wantValues("j", "j0")
	p.wantValues("k", "k1")
	p.wantValues("h", "h0")
	p.eventually("c is out", func() bool { v := p.cluster.Values("c"); return len(v) > 0 && v[len(v)-1] == "c1" })
	p.wantValues("b", "b0")
	p.wantValues("p", "p0")
	p.publish(block, order("b", "b3"))
	p.publish(park, order("p", "p3"))
	p.eventually("still parked and buried", func() bool { return p.parked() == 5 && p.dead() == 3 })
	p.cluster.CreateTopic("later", 1)
	p.wantValues("t", "t0", "t1")
	refuse()
	p.operate(store.Aggregate{Source: block.ID, Type: "order", ID: "b"}, store.ActionRedrive)
	p.operate(store.Aggregate{Source: park.ID, Type: "order", ID: "p"}, store.ActionRedrive)
	p.wantValues("b", "b0", "b1", "b2", "b3")
	p.wantValues("p", "p0", "p1", "p2", "p3")
	p.eventually("nothing is left", func() bool { return p.parked() == 0 && p.dead() == 0 })
	l.freeze(false)
	a.stop(t)
	b.stop(t)
	p.verify()
}

// load publishes to some aggregates until stopped, and returns what must arrive.
type load struct {
	mu   sync.Mutex
	want map[string][]string
	end  chan struct{}
	done sync.WaitGroup
}

func (p *platform) startLoad(aggregates int) *load {
	l := &load{want: map[string][]string{}, end: make(chan struct{})}
	for i := range aggregates {
		id := fmt.Sprint("g", i)
		l.done.Go(func() {
			for n := 0; ; n++ {
				select {
				case <-l.end:
					return
				default:
				}
				payload := fmt.Sprint(n)
				if p.tryTransaction(id, payload, n%7 == 3) {
					l.mu.Lock()
					l.want[id] = append(l.want[id], payload)
					l.mu.Unlock()
				}
			}
		})
	}
	return l
}

// tryTransaction prepares and decides one transaction, however long that takes.
func (p *platform) tryTransaction(id, payload string, abort bool) (committed bool) {
	key := storetest.Key(p.source.ID)
	again := func(r store.Request) store.Answer {
		for {
			r := r
			a, err := p.do(&r)
			if err == nil {
				return a
			}
			waitABit()
		}
	}
	events := []store.Event{order(id, payload)}
	a := again(store.Request{Kind: store.KindPrepare, Key: key, Database: storetest.DatabaseTransaction(1), Events: events})
	kind := store.KindCommit
	if abort {
		kind = store.KindAbort
	}
	again(store.Request{Kind: kind, Key: key, Shards: a.Shards})
	return !abort
}

// stop ends the load and waits until everything of it arrived.
func (l *load) stop(p *platform) {
	p.t.Helper()
	close(l.end)
	l.done.Wait()
	n := 0
	for _, want := range l.want {
		n += len(want)
	}
	p.eventually("all arrived", func() bool {
		if p.cluster.Len() < n {
			return false
		}
		arrived := map[string]bool{} // some may have arrived twice
		for _, r := range p.cluster.Written() {
			arrived[string(r.Key)+"/"+string(r.Value)] = true
		}
		return len(arrived) >= n
	})
}

// wantExactly checks that each event arrived once and in order.
func (l *load) wantExactly(p *platform) {
	p.t.Helper()
	for id, want := range l.want {
		p.wantValues(id, want...)
	}
}

// wantInOrder checks that each event arrived, and none before an earlier one did.
func (l *load) wantInOrder(p *platform) {
	p.t.Helper()
	for id, want := range l.want {
		next := 0
		rank := map[string]int{}
		for i, v := range want {
			rank[v] = i
		}
		for _, v := range p.cluster.Values(id) {
			i, ok := rank[v]
			switch {
			case !ok:
				p.t.Fatalf("phantom %s of %s", v, id)
			case i > next:
				p.t.Fatalf("%s of %s arrived before %s", v, id, want[next])
			case i == next:
				next++
			}
		}
		if next != len(want) {
			p.t.Fatalf("lost: %s of %s", want[next], id)
		}
	}
}

func TestRelaysShareShardsWithoutDuplicates(t *testing.T) {
	p := newPlatform(t, storetest.WithShards(6))
	a := p.start("a")
	l := p.startLoad(12)
	p.eventually("some arrived", func() bool { return p.cluster.Len() > 50 })
	b, c := p.start("b"), p.start("c")
	p.eventually("two shards each", func() bool {
		return a.metric(t, "outbox_held_shards") == 2 && b.metric(t, "outbox_held_shards") == 2 && c.metric(t, "outbox_held_shards") == 2
	})
	n := p.cluster.Len()
	p.eventually("some more arrived", func() bool { return p.cluster.Len() > n+50 })
	b.stop(t)
	p.eventually("three shards each", func() bool {
		return a.metric(t, "outbox_held_shards") == 3 && c.metric(t, "outbox_held_shards") == 3
	})
	l.stop(p)
	l.wantExactly(p)
	a.stop(t)
	c.stop(t)
	p.verify()
}

func TestStoreCrashUnderLoad(t *testing.T) {
	cluster := storetest.NewCluster(t)
	p := &platform{t: t, db: cluster.New(t, storetest.WithShards(2))}
	p.fill()
	r := p.start("a")
	l := p.startLoad(8)
	for range 2 {
		n := p.cluster.Len()
		p.eventually("some arrived", func() bool { return p.cluster.Len() > n+50 })
		cluster.Kill()
		cluster.Restart(t)
	}
	n := p.cluster.Len()
	p.eventually("some arrived", func() bool { return p.cluster.Len() > n+20 })
	l.stop(p)
	l.wantInOrder(p)
	r.stop(t)
	p.verify()
}

func TestFencedByHand(t *testing.T) {
	p := newPlatform(t, storetest.WithShards(1))
	r := p.start("a")
	p.publish(p.source, order("x", "x0"))
	p.wantValues("x", "x0")
	r.sink.HoldAcks(true)
	p.publish(p.source, order("x", "x1"))
	p.wantValues("x", "x0", "x1")
	p.db.Exec(t, "UPDATE outbox.shard SET epoch = epoch + 10, holder = 'else', lease_until = now() + '1 hour'")
	p.eventually("fenced", func() bool { return r.metric(t, "outbox_fenced_total") == 1 && r.metric(t, "outbox_held_shards") == 0 })
	if r.sink.Purges() == 0 {
		t.Error("what was in flight was not purged")
	}
	row := func() string {
		return storetest.Query[string](t, p.db, "SELECT s::text FROM outbox.shard s")[0]
	}
	before := row()
	p.publish(p.source, order("x", "x2"))
	r.stop(t)
	if after := row(); after != before {
		t.Errorf("a fenced relay wrote: %s, then %s", before, after)
	}
	if p.cluster.Len() != 2 {
		t.Error("a fenced relay delivered")
	}
}

func TestStoreChangedStartsFromTheCheckpoints(t *testing.T) {
	p := newPlatform(t)
	r := p.start("a")
	l := p.startLoad(6)
	for range 3 {
		n := p.cluster.Len()
		p.eventually("some arrived", func() bool { return p.cluster.Len() > n+30 })
		r.relay.StoreChanged()
	}
	l.stop(p)
	l.wantInOrder(p)
	r.stop(t)
	if got := r.metric(t, "outbox_store_changes_total"); got != 3 {
		t.Errorf("outbox_store_changes_total is %v", got)
	}
	p.verify()
}

func TestStopIsBoundedWhenTheClusterIsAway(t *testing.T) {
	p := newPlatform(t)
	r := p.start("a", func(c *relay.Config) { c.DrainTimeout = 200 * time.Millisecond })
	p.publish(p.source, order("x", "x0"))
	p.wantValues("x", "x0")
	p.cluster.SetDown(true)
	p.publish(p.source, order("x", "x1"))
	p.eventually("in flight", func() bool { return r.sink.Unreported() == 1 })
	began := time.Now()
	r.stop(t)
	if took := time.Since(began); took > patience/2 {
		t.Errorf("the stop took %s", took)
	}
	for _, s := range must(p.db.Store.Shards(t.Context())) {
		if s.Holder != "" {
			t.Errorf("shard %d was not released", s.Shard)
		}
	}
	p.cluster.SetDown(false)
	p.start("b")
	p.wantValues("x", "x0", "x1")
}

func TestStopDoesNotWaitForATakeover(t *testing.T) {
	p := newPlatform(t, storetest.WithShards(1))
	a := p.start("a")
	p.publish(p.source, order("x", "x0"))
	p.wantValues("x", "x0")
	p.settled()
	p.cluster.SetDown(true)
	p.publish(p.source, order("x", "x1"))
	p.caughtUp()
	a.stop(t)
	b := p.start("b", func(c *relay.Config) { c.TakeoverTailTimeout = time.Hour })
	p.eventually("taken over", func() bool { return b.metric(t, "outbox_takeovers_total") == 1 })
	b.stop(t) // which waits for less than an hour
}

func TestIdleCostsLittle(t *testing.T) {
	p := newPlatform(t, storetest.WithShards(16))
	r := p.start("a", func(c *relay.Config) { *c = relay.Config{Instance: "a"} })
	p.eventually("all held", func() bool { return r.metric(t, "outbox_held_shards") == 16 })
	before := cpuTime(t)
	<-time.After(2 * time.Second)
	cpu := float64(cpuTime(t)-before) / float64(2*time.Second)
	t.Logf("idle: %.2f %% CPU", 100*cpu)
	if cpu > 0.15 { // a busy loop takes 1; the rest is for the race detector and a busy machine
		t.Errorf("an idle relay takes %.0f %% CPU", 100*cpu)
	}
}

// cpuTime is what this process has used so far.
func cpuTime(t testing.TB) time.Duration {
	var u syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &u); err != nil {
		t.Fatal(err)
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

func TestRunOnlyOnce(t *testing.T) {
	p := newPlatform(t)
	r := p.start("a")
	p.eventually("running", func() bool { return r.metric(t, "outbox_held_shards") == 2 })
	if err := r.relay.Run(t.Context()); err == nil {
		t.Error("a second Run was accepted")
	}
}

func TestStepThatFailsIsRepeated(t *testing.T) {
	p := newPlatform(t, storetest.WithShards(1))
	r := p.start("a", func(c *relay.Config) { c.ParkAfter = 50 * time.Millisecond })
	p.publish(p.source, order("y", "y0"))
	p.wantValues("y", "y0")
	p.db.Exec(t, `CREATE FUNCTION outbox.fail() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RAISE 'disk full' USING ERRCODE = '53100'; END $$`)
	p.db.Exec(t, `CREATE TRIGGER fail BEFORE INSERT ON outbox.parked FOR EACH ROW EXECUTE FUNCTION outbox.fail()`)
	stuck := p.prepare(p.source, order("x", "x0"))
	p.eventually("steps fail", func() bool { return r.metric(t, "outbox_relay_store_errors_total") > 1 })
	p.publish(p.source, order("y", "y1")) // nobody else waits
	p.wantValues("y", "y0", "y1")
	p.db.Exec(t, `DROP TRIGGER fail ON outbox.parked`)
	p.eventually("parked", func() bool { return p.parked() == 1 })
	p.commit(stuck)
	p.wantValues("x", "x0")
	r.stop(t)
	p.verify()
}

func TestReadingStopsWhenMemoryIsFull(t *testing.T) {
	p := newPlatform(t, storetest.WithShards(1))
	p.cluster.SetDown(true)
	r := p.start("a", func(c *relay.Config) { c.MemoryBytes = 20_000 })
	p.eventually("running", func() bool { return r.metric(t, "outbox_held_shards") == 1 })
	const n = 80
	for i := range n {
		p.publish(p.source, order(fmt.Sprint("o", i), strings.Repeat("x", 500)))
	}
	p.eventually("memory is full", func() bool { return r.metric(t, "outbox_relay_memory_bytes") >= 20_000 })
	if got := r.metric(t, "outbox_shard_backlog_events"); got > n/2 {
		t.Errorf("%v events of %d were read although memory was full", got, n)
	}
	p.cluster.SetDown(false)
	p.eventually("all arrived", func() bool { return p.cluster.Len() == n })
	r.stop(t)
	p.verify()
}
