package relay_test

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/outbox-platform/outbox/relay"
	"github.com/outbox-platform/outbox/store"
	"github.com/outbox-platform/outbox/store/storetest"
)

func TestCommittedEventsArriveInOrder(t *testing.T) {
	p := newPlatform(t)
	r := p.start("one")
	want := map[string][]string{}
	for i := range 60 {
		id := fmt.Sprint("o", i%4)
		payload := fmt.Sprint(id, "/", i)
		switch i % 5 {
		case 0:
			p.publish(p.source, order(id, payload))
			want[id] = append(want[id], payload)
		case 1:
			tx := p.prepare(p.source, order(id, payload))
			p.abort(tx)
		case 2: // several events of one transaction: two aggregates, one of them twice
			other := fmt.Sprint("p", i%3)
			tx := p.prepare(p.source, order(id, payload+"a"), order(other, payload+"b"), storetest.Event("bills", "order", id, payload+"c"))
			p.commit(tx)
			want[id] = append(want[id], payload+"a", payload+"c")
			want[other] = append(want[other], payload+"b")
		default:
			tx := p.prepare(p.source, order(id, payload))
			p.commit(tx)
			want[id] = append(want[id], payload)
		}
	}
	for id, values := range want {
		p.wantValues(id, values...)
	}
	rec := p.cluster.Written()[0]
	for _, name := range []string{"ce_id", "ce_type", "ce_source", relay.EpochHeader} {
		if rec.Header(name) == "" {
			t.Errorf("a record has no header %s: %v", name, rec.Record.Headers)
		}
	}
	r.stop(t)
	for _, name := range []string{"outbox_published_total", "outbox_commit_to_publish_seconds", "outbox_prepare_to_publish_seconds"} {
		if got := r.metric(t, name); int(got) != p.cluster.Len() {
			t.Errorf("%s is %v, written were %d", name, got, p.cluster.Len())
		}
	}
	p.verify()
	for _, s := range must(p.db.Store.Shards(t.Context())) {
		if s.Holder != "" || s.LagSegments != 0 {
			t.Errorf("after a stop: %+v", s)
		}
	}
}

func must[T any](v T, err error) T {
	if err != nil {
		panic(err)
	}
	return v
}

func TestHintEndsTheWait(t *testing.T) {
	p := newPlatform(t)
	r := p.start("one", func(c *relay.Config) { c.PollMin, c.PollMax = time.Minute, time.Minute })
	p.eventually("shards held", func() bool { return r.metric(t, "outbox_held_shards") == 2 })
	tx := p.prepare(p.source, order("a", "1"))
	p.commit(tx)
	p.eventually("hinted", func() bool {
		r.relay.Hint(tx.shards)
		return p.cluster.Len() == 1
	})
}

func TestInDoubtBlocksOnlyItsAggregate(t *testing.T) {
	p := newPlatform(t, storetest.WithShards(1))
	r := p.start("one", func(c *relay.Config) { c.ParkAfter = 100 * time.Millisecond })
	stuck := p.prepare(p.source, order("a", "a1"), order("b", "b1"))
	behind := p.prepare(p.source, order("a", "a2"))
	p.commit(behind)
	p.publish(p.source, order("c", "c1"))
	p.wantValues("c", "c1")
	p.eventually("parked", func() bool { return p.parked() == 3 })
	before := must(p.db.Store.Shards(t.Context()))[0].Position
	for i := range 20 {
		p.publish(p.source, order("d", fmt.Sprint(i)))
	}
	p.eventually("the checkpoint moves on", func() bool {
		s := must(p.db.Store.Shards(t.Context()))[0]
		return s.Position.Compare(before) > 0 && s.LagSegments == 0
	})
	p.publish(p.source, order("a", "a3"))
	p.eventually("the follower is parked", func() bool { return p.parked() == 4 })
	if got := p.cluster.Values("a"); got != nil {
		t.Fatalf("published before the decision: %q", got)
	}
	p.eventually("gauges", func() bool { return r.metric(t, "outbox_blocked_aggregates") == 2 })
	p.commit(stuck)
	p.wantValues("a", "a1", "a2", "a3")
	p.wantValues("b", "b1")
	p.eventually("nothing is parked", func() bool { return p.parked() == 0 })
	p.publish(p.source, order("a", "a4"))
	p.wantValues("a", "a1", "a2", "a3", "a4")
	r.stop(t)
	p.verify()
}

func TestAbortedInDoubtIsDropped(t *testing.T) {
	p := newPlatform(t, storetest.WithShards(1))
	r := p.start("one", func(c *relay.Config) { c.ParkAfter = 60 * time.Millisecond })
	stuck := p.prepare(p.source, order("a", "a1"))
	p.publish(p.source, order("a", "a2"))
	p.eventually("parked", func() bool { return p.parked() == 2 })
	p.abort(stuck)
	p.wantValues("a", "a2")
	p.eventually("nothing is parked", func() bool { return p.parked() == 0 })
	r.stop(t)
	p.verify()
}

func TestPolicyBlock(t *testing.T) {
	p := newPlatform(t)
	src := p.register("block", 1)
	p.cluster.RefuseTooLarge("a2")
	r := p.start("one")
	events, _ := orders(4, "a")
	p.publish(src, events...) // a0 … a3
	p.wantValues("a", "a0", "a1")
	p.publish(src, order("b", "b0"))
	p.wantValues("b", "b0")
	p.eventually("blocked", func() bool { return p.parked() == 2 })
	blocked, _, err := p.db.Store.BlockedAggregates(t.Context(), "block", "", 10)
	if err != nil || len(blocked) != 1 || blocked[0].Head.Attempts != 1 || !strings.Contains(blocked[0].Head.Error, "MESSAGE_TOO_LARGE") ||
		blocked[0].Head.Cause != store.CauseRecord {
		t.Fatalf("blocked aggregates: %+v, %v", blocked, err)
	}
	op := p.operate(blocked[0].Aggregate, store.ActionRedrive)
	if !strings.Contains(op.Outcome, "refused again") {
		t.Errorf("outcome %q", op.Outcome)
	}
	p.eventually("two attempts", func() bool {
		blocked, _, _ := p.db.Store.BlockedAggregates(t.Context(), "", "", 10)
		return len(blocked) == 1 && blocked[0].Head.Attempts == 2
	})
	p.cluster.Refuse(nil)
	if op := p.operate(blocked[0].Aggregate, store.ActionRedrive); op.Outcome != "published" || op.Events != 1 {
		t.Errorf("outcome %q of %d", op.Outcome, op.Events)
	}
	p.wantValues("a", "a0", "a1", "a2", "a3")
	p.eventually("nothing is parked", func() bool { return p.parked() == 0 })
	r.stop(t)
	p.verify()
}

func TestOperatorSkipsAndDropsABlockedHead(t *testing.T) {
	p := newPlatform(t)
	src := p.register("block", 1)
	a := store.Aggregate{Source: src.ID, Type: "order", ID: "a"}
	p.cluster.Refuse(func(r relay.Record) *relay.SinkError {
		if v := string(r.Value); v == "a1" || v == "a3" {
			return &relay.SinkError{Class: relay.ClassRecord, Code: "INVALID_RECORD"}
		}
		return nil
	})
	r := p.start("one")
	events, _ := orders(5, "a")
	p.publish(src, events...)
	p.wantValues("a", "a0")
	p.eventually("blocked", func() bool { return p.parked() == 4 })
	if op := p.operate(a, store.ActionSkip); op.Events != 1 || !strings.Contains(op.Outcome, "set the head aside") {
		t.Errorf("outcome %q of %d", op.Outcome, op.Events)
	}
	p.wantValues("a", "a0", "a2")
	p.eventually("blocked again", func() bool { return p.parked() == 2 && p.dead() == 1 })
	if op := p.operate(a, store.ActionDiscard); op.Events != 1 || !strings.Contains(op.Outcome, "dropped the head") {
		t.Errorf("outcome %q of %d", op.Outcome, op.Events)
	}
	p.wantValues("a", "a0", "a2", "a4")
	if op := p.operate(a, store.ActionSkip); !strings.Contains(op.Outcome, "nothing to do") {
		t.Errorf("outcome %q", op.Outcome)
	}
	p.cluster.Refuse(nil)
	if op := p.operate(a, store.ActionRedrive); op.Events != 1 {
		t.Errorf("outcome %q of %d", op.Outcome, op.Events)
	}
	p.wantValues("a", "a0", "a2", "a4", "a1") // out of order, as the operator wanted
	p.eventually("nothing is left", func() bool { return p.parked() == 0 && p.dead() == 0 })
	r.stop(t)
	p.verify()
}

func TestPolicyPark(t *testing.T) {
	p := newPlatform(t)
	src := p.register("park", 2)
	a := store.Aggregate{Source: src.ID, Type: "order", ID: "a"}
	p.cluster.RefuseTooLarge("a1")
	r := p.start("one")
	events, want := orders(4, "a")
	p.publish(src, events...)
	p.wantValues("a", "a0")
	p.eventually("dead letters", func() bool { return p.dead() == 3 })
	p.publish(src, order("a", "a4"))
	p.publish(src, order("b", "b0"))
	p.wantValues("b", "b0")
	p.eventually("later ones follow", func() bool { return p.dead() == 4 })
	p.cluster.Refuse(nil)
	stuck := p.prepare(src, order("a", "a5"))
	if op := p.operate(a, store.ActionRedrive); op.Events != 4 {
		t.Errorf("outcome %q of %d", op.Outcome, op.Events)
	}
	p.wantValues("a", append(want, "a4")...)
	p.commit(stuck)
	p.wantValues("a", append(want, "a4", "a5")...)
	p.eventually("nothing is left", func() bool { return p.parked() == 0 && p.dead() == 0 })

	p.cluster.RefuseTooLarge("a6")
	p.publish(src, order("a", "a6"), order("a", "a7"))
	p.eventually("dead letters", func() bool { return p.dead() == 2 })
	if op := p.operate(a, store.ActionDiscard); op.Events != 2 {
		t.Errorf("outcome %q of %d", op.Outcome, op.Events)
	}
	p.publish(src, order("a", "a8"))
	p.wantValues("a", append(want, "a4", "a5", "a8")...)
	r.stop(t)
	p.verify()
	if got := r.metric(t, "outbox_dead_letters_total"); got != 6 {
		t.Errorf("outbox_dead_letters_total is %v", got)
	}
}

func TestPolicySkip(t *testing.T) {
	p := newPlatform(t)
	src := p.register("skip", 3)
	p.cluster.RefuseTooLarge("a1")
	r := p.start("one")
	events, _ := orders(4, "a")
	p.publish(src, events...)
	p.wantValues("a", "a0", "a2", "a3")
	p.eventually("one dead letter", func() bool { return p.dead() == 1 })
	letters, _, err := p.db.Store.DeadLetters(t.Context(), "skip", "", 10)
	if err != nil || len(letters) != 1 || letters[0].Queue || letters[0].Attempts != 1 || !strings.Contains(letters[0].Error, "MESSAGE_TOO_LARGE") {
		t.Fatalf("dead letters: %+v, %v", letters, err)
	}
	r.stop(t)
	p.verify()
}

func TestUnknownTopicPausesOnlyItself(t *testing.T) {
	p := newPlatform(t, storetest.WithShards(1))
	r := p.start("one")
	p.publish(p.source, order("a", "a0"), storetest.Event("later", "order", "a", "a1"), order("a", "a2"))
	p.publish(p.source, storetest.Event("later", "order", "b", "b0"))
	p.publish(p.source, storetest.Event("bills", "order", "c", "c0"))
	p.wantValues("a", "a0")
	p.wantValues("c", "c0")
	p.eventually("parked", func() bool { return p.parked() == 3 })
	p.eventually("tried again", func() bool { return r.metric(t, "outbox_kafka_errors_total") > 3 })
	blocked, _, err := p.db.Store.BlockedAggregates(t.Context(), "", "", 10)
	if err != nil || len(blocked) != 2 || blocked[0].Head.Cause != store.CauseTopic || blocked[0].Head.Attempts != 0 {
		t.Fatalf("blocked aggregates: %+v, %v", blocked, err)
	}
	p.cluster.CreateTopic("later", 1)
	p.wantValues("a", "a0", "a1", "a2")
	p.wantValues("b", "b0")
	p.eventually("nothing is left", func() bool { return p.parked() == 0 })
	if p.dead() != 0 {
		t.Error("a topic's failure made dead letters")
	}
	r.stop(t)
	p.verify()
}

func TestOperatorTriesAPausedTopicAtOnce(t *testing.T) {
	p := newPlatform(t, storetest.WithShards(1))
	r := p.start("one", func(c *relay.Config) { c.RetryMin, c.RetryMax = time.Hour, time.Hour })
	a := store.Aggregate{Source: p.source.ID, Type: "order", ID: "a"}
	p.publish(p.source, storetest.Event("later", "order", "a", "a0"), order("a", "a1"))
	p.eventually("parked", func() bool { return p.parked() == 2 })
	if op := p.operate(a, store.ActionRedrive); !strings.Contains(op.Outcome, "UNKNOWN_TOPIC") {
		t.Errorf("outcome %q", op.Outcome)
	}
	p.cluster.CreateTopic("later", 1)
	if op := p.operate(a, store.ActionRedrive); op.Outcome != "published" {
		t.Errorf("outcome %q", op.Outcome)
	}
	p.wantValues("a", "a0", "a1")
	r.stop(t)
	p.verify()
}

func TestUnknownSourceWaitsUntilItIsKnown(t *testing.T) {
	p := newPlatform(t, storetest.WithShards(1))
	late := &store.Source{ID: p.source.ID + 1}
	r := p.start("one", func(c *relay.Config) { c.SourcesEvery = 50 * time.Millisecond })
	p.publish(late, order("a", "a0"), order("a", "a1"))
	p.publish(p.source, order("b", "b0"))
	p.wantValues("b", "b0")
	p.eventually("parked", func() bool { return p.parked() == 2 })
	if src := p.register("late", 1); src.ID != late.ID {
		t.Fatalf("the next source is %d, not %d", src.ID, late.ID)
	}
	p.wantValues("a", "a0", "a1")
	r.stop(t)
	p.verify()
}

func TestClusterAwayLosesNothing(t *testing.T) {
	p := newPlatform(t)
	p.cluster.SetDown(true) // from the start
	r := p.start("one")
	want := map[string][]string{}
	for i := range 40 {
		id := fmt.Sprint("o", i%3)
		want[id] = append(want[id], fmt.Sprint(i))
		p.publish(p.source, order(id, fmt.Sprint(i)))
	}
	p.eventually("in flight", func() bool { return r.sink.Unreported() == 3 })
	p.cluster.SetDown(false)
	for id, values := range want {
		p.wantValues(id, values...)
	}
	// The other kind: it answers, and refuses everything.
	p.cluster.Refuse(func(relay.Record) *relay.SinkError {
		return &relay.SinkError{Class: relay.ClassCluster, Code: "AUTHENTICATION"}
	})
	for i := range 10 {
		want["o0"] = append(want["o0"], fmt.Sprint("x", i))
		p.publish(p.source, order("o0", fmt.Sprint("x", i)))
	}
	p.eventually("refused", func() bool { return r.metric(t, "outbox_kafka_errors_total") > 2 })
	p.cluster.Refuse(nil)
	p.wantValues("o0", want["o0"]...)
	if p.dead() != 0 {
		t.Error("a failure of the cluster made dead letters")
	}
	r.stop(t)
	p.verify()
}

func TestFatalProducerErrorKeepsOrder(t *testing.T) {
	p := newPlatform(t)
	r := p.start("one")
	r.sink.HoldAcks(true)
	events, want := orders(5, "a")
	p.publish(p.source, events...)
	p.eventually("in flight", func() bool { return r.sink.Unreported() == 1 })
	r.sink.Fatal() // a0 was written, and nobody knows
	r.sink.HoldAcks(false)
	p.wantValues("a", append([]string{"a0"}, want...)...)
	r.stop(t)
	p.verify()
}

func TestSinkFullWaits(t *testing.T) {
	p := newPlatform(t)
	p.cluster.SetDown(true)
	r := p.start("one", func(c *relay.Config) { c.MaxUnacked = 3 })
	for i := range 10 {
		p.publish(p.source, order(fmt.Sprint("o", i), "x"))
	}
	p.eventually("three in flight", func() bool { return r.sink.Unreported() == 3 })
	p.cluster.SetDown(false)
	p.eventually("all written", func() bool { return p.cluster.Len() == 10 })
}

func TestManyReportsAtOnceAreAllTaken(t *testing.T) {
	p := newPlatform(t)
	r := p.start("one")
	r.sink.HoldAcks(true)
	const n = 3000 // more than are taken at once
	for i := 0; i < n; i += 100 {
		var events []store.Event
		for j := range 100 {
			events = append(events, order(fmt.Sprint("o", i+j), "first"))
		}
		p.publish(p.source, events...)
	}
	p.eventually("in flight", func() bool { return r.sink.Unreported() == n })
	r.sink.HoldAcks(false)
	p.eventually("all taken", func() bool { return r.metric(t, "outbox_published_total") == n })
	r.stop(t)
	p.verify()
}

func TestMemoryFullOfUndecidedEventsIsParked(t *testing.T) {
	p := newPlatform(t, storetest.WithShards(1))
	r := p.start("one", func(c *relay.Config) { c.MemoryBytes = 20_000 })
	var open []prepared
	for i := range 60 {
		open = append(open, p.prepare(p.source, order(fmt.Sprint("o", i), strings.Repeat("x", 500))))
	}
	p.publish(p.source, order("z", "z0")) // behind all of them in the log
	p.wantValues("z", "z0")
	p.eventually("parked", func() bool { return p.parked() == 60 })
	p.eventually("memory is free", func() bool { return r.metric(t, "outbox_relay_memory_bytes") == 0 })
	for _, tx := range open {
		p.commit(tx)
	}
	p.eventually("all written", func() bool { return p.cluster.Len() == 61 })
	p.eventually("nothing is parked", func() bool { return p.parked() == 0 })
	r.stop(t)
	p.verify()
}

func TestManyParkedRowsThawInOrder(t *testing.T) {
	p := newPlatform(t, storetest.WithShards(1))
	r := p.start("one", func(c *relay.Config) { c.ParkAfter = 50 * time.Millisecond })
	stuck := p.prepare(p.source, order("a", "first"))
	p.eventually("parked", func() bool { return p.parked() == 1 })
	want := []string{"first"}
	for i := range 5 {
		events, payloads := orders(20, fmt.Sprint("a", i, "-"))
		for j := range events {
			events[j].AggregateID = "a"
		}
		p.publish(p.source, events...)
		want = append(want, payloads...)
	}
	p.eventually("all parked", func() bool { return p.parked() == 101 })
	p.commit(stuck)
	p.wantValues("a", want...)
	p.eventually("nothing is parked", func() bool { return p.parked() == 0 })
	r.stop(t)
	p.verify()
}

func TestTopicCatalogueIsWritten(t *testing.T) {
	p := newPlatform(t)
	p.cluster.CreateTopic("__internal", 1)
	p.register("exact", 1)
	p.start("one", func(c *relay.Config) { c.TopicsEvery = 20 * time.Millisecond })
	want := func(n int) func() bool {
		return func() bool {
			topics := must(p.db.Store.Topics(t.Context()))
			return len(topics) == n && topics[0] == store.Topic{Name: "bills", Partitions: 3, MaxMessageBytes: 1 << 20}
		}
	}
	p.eventually("two topics", want(2))
	p.cluster.CreateTopic("more", 1)
	p.eventually("three topics", want(3))
}

func TestConfigIsChecked(t *testing.T) {
	for _, cfg := range []relay.Config{
		{},
		{Instance: "a", RenewEvery: time.Minute},
		{Instance: "a", LeaseTTL: time.Minute + 1},
		{Instance: "a", PollMin: time.Second},
		{Instance: "a", RetryMin: time.Hour},
		{Instance: "a", ParkFollowerAfter: time.Minute},
		{Instance: "a", MemoryBytes: -1},
	} {
		if _, err := relay.New(cfg, nil, nil, nil, nil); err == nil {
			t.Errorf("%+v was accepted", cfg)
		}
	}
	reg := prometheus.NewRegistry()
	if _, err := relay.New(relay.Config{Instance: "a"}, nil, nil, nil, reg); err != nil {
		t.Error(err)
	}
	if _, err := relay.New(relay.Config{Instance: "a"}, nil, nil, nil, reg); err == nil {
		t.Error("metrics were registered twice")
	}
}

func TestRefusalsOnTheSpot(t *testing.T) {
	p := newPlatform(t)
	r := p.start("one")
	for i, err := range []error{
		relay.ErrSinkFull,
		&relay.SinkError{Class: relay.ClassFatal, Code: "BEING_REBUILT"},
		&relay.SinkError{Class: relay.ClassCluster, Code: "AWAY"},
		&relay.SinkError{Class: relay.ClassTopic, Code: "UNKNOWN"},
	} {
		r.sink.FailDeliver(err)
		id := fmt.Sprint("o", i)
		p.publish(p.source, order(id, "0"), order(id, "1"))
		errors := r.metric(t, "outbox_kafka_errors_total")
		if i > 0 {
			p.eventually("refused", func() bool { return r.metric(t, "outbox_kafka_errors_total") > errors })
		}
		r.sink.FailDeliver(nil)
		p.wantValues(id, "0", "1")
	}
	r.sink.FailDeliver(&relay.SinkError{Class: relay.ClassRecord, Code: "TOO_LARGE"})
	src := p.register("skip", 3)
	p.publish(src, order("s", "0"))
	p.eventually("a dead letter", func() bool { return p.dead() == 1 })
	r.stop(t)
	p.verify()
}

func TestSecondInDoubtBehindTheFirst(t *testing.T) {
	p := newPlatform(t, storetest.WithShards(1))
	r := p.start("one", func(c *relay.Config) { c.ParkAfter = 50 * time.Millisecond })
	first, second := p.prepare(p.source, order("a", "a0")), p.prepare(p.source, order("a", "a1"))
	p.publish(p.source, order("a", "a2"))
	p.eventually("parked", func() bool { return p.parked() == 3 })
	p.commit(first)
	p.wantValues("a", "a0")
	p.eventually("unparked", func() bool { return p.parked() == 2 })
	p.commit(second)
	p.wantValues("a", "a0", "a1", "a2")
	r.stop(t)
	p.verify()
}

func TestLoadThatFailsIsRepeated(t *testing.T) {
	p := newPlatform(t, storetest.WithShards(1))
	r := p.start("one", func(c *relay.Config) { c.ParkAfter = 50 * time.Millisecond })
	stuck := p.prepare(p.source, order("a", "a0"))
	p.eventually("parked", func() bool { return p.parked() == 1 })
	p.db.Exec(t, "ALTER TABLE outbox.parked RENAME COLUMN since TO away") // which steps do not name
	p.commit(stuck)
	errors := r.metric(t, "outbox_relay_store_errors_total")
	p.eventually("loads fail", func() bool { return r.metric(t, "outbox_relay_store_errors_total") > errors+2 })
	p.db.Exec(t, "ALTER TABLE outbox.parked RENAME COLUMN away TO since")
	p.wantValues("a", "a0")
	p.eventually("nothing is parked", func() bool { return p.parked() == 0 })
	r.stop(t)
	p.verify()
}

func TestCorruptCheckpointIsNotGuessed(t *testing.T) {
	p := newPlatform(t, storetest.WithShards(1))
	p.db.Exec(t, `UPDATE outbox.shard SET pend = '\x07'`)
	p.publish(p.source, order("a", "a0"))
	r := p.start("one")
	p.eventually("tried again", func() bool { return r.metric(t, "outbox_relay_store_errors_total") > 2 })
	r.stop(t)
	if p.cluster.Len() != 0 {
		t.Error("delivered without a checkpoint")
	}
	if got := storetest.Query[string](t, p.db, `SELECT pend::text || holder FROM outbox.shard`)[0]; got != `\x07` {
		t.Errorf("the shard is left as %s", got)
	}
	p.db.Exec(t, `UPDATE outbox.shard SET pend = ''`)
	p.start("two")
	p.wantValues("a", "a0")
}

func TestSinkClosedTooEarly(t *testing.T) {
	p := newPlatform(t)
	r := p.start("one", func(c *relay.Config) { c.DrainTimeout = 100 * time.Millisecond })
	p.publish(p.source, order("a", "a0"))
	p.wantValues("a", "a0")
	if err := r.sink.Close(t.Context()); err != nil {
		t.Fatal(err)
	}
	p.publish(p.source, order("a", "a1"))
	r.stop(t)
	p.start("two")
	p.wantValues("a", "a0", "a1")
}
