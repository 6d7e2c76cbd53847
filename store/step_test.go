package store_test

import (
	"bytes"
	"errors"
	"reflect"
	"slices"
	"testing"
	"time"

	"github.com/outbox-platform/outbox/store"
	"github.com/outbox-platform/outbox/store/storetest"
)

func at(xid uint64, seq, record int32) store.EventPosition {
	return store.EventPosition{Position: store.Position{XID: xid, Seq: seq}, Record: record}
}

// parkedEvent returns an event as a relay parks it.
func parkedEvent(p store.EventPosition, k store.Key, aggregate string, cause store.Cause) store.Parked {
	r := store.Record{Key: k, Event: storetest.Event("orders", "order", aggregate, "payload"), PreparedAt: 1, Database: storetest.DatabaseTransaction(77)}
	return store.Parked{
		EventPosition: p, Key: k, Aggregate: store.Aggregate{Source: k.Source, Type: "order", ID: aggregate},
		Body: store.EncodeEvent(nil, &r), Cause: cause, Database: r.Database,
	}
}

func deadLetter(p store.EventPosition, k store.Key, aggregate string, queue bool) store.DeadLetter {
	parked := parkedEvent(p, k, aggregate, store.CauseRecord)
	return store.DeadLetter{EventPosition: p, Key: k, Aggregate: parked.Aggregate, Body: parked.Body, Error: "too large", Attempts: 1, Queue: queue}
}

// step writes one step and fails the test if it is fenced.
func step(t *testing.T, st *store.Store, s store.Step) {
	t.Helper()
	fenced, err := st.Steps(t.Context(), time.Minute, []store.Step{s})
	if err != nil || len(fenced) != 0 {
		t.Fatalf("step: fenced %v, %v", fenced, err)
	}
}

func TestPlainStepsMoveCheckpointsForwardOnly(t *testing.T) {
	t.Parallel()
	db := storetest.New(t, storetest.WithShards(3))
	leases := acquire(t, db.Store, "a", time.Second, 3, 3)
	steps := make([]store.Step, 3)
	for i, l := range leases {
		steps[i] = store.Step{Shard: l.Shard, Epoch: l.Epoch, Checkpoint: store.Checkpoint{
			Position: store.Position{XID: 1 << 40, Seq: 3}, Oldest: 1<<40 - 5, Pend: []byte{1, byte(i)}, Offsets: []byte{2}}}
	}
	steps[1].Epoch = 9 // not its holder
	fenced, err := db.Store.Steps(t.Context(), time.Minute, steps)
	if err != nil || !slices.Equal(fenced, []int16{leases[1].Shard}) {
		t.Fatalf("fenced %v, %v", fenced, err)
	}
	renewed := storetest.Query[bool](t, db, `SELECT lease_until > now() + interval '30 s' FROM outbox.shard WHERE xid = '1099511627776' AND seq = 3`)
	if !slices.Equal(renewed, []bool{true, true}) {
		t.Errorf("renewed %v", renewed)
	}
	// The same again is fine: an answer may have been lost.
	if fenced, err := db.Store.Steps(t.Context(), time.Minute, steps[:1]); err != nil || len(fenced) != 0 {
		t.Errorf("repeated: fenced %v, %v", fenced, err)
	}
	back := steps[0]
	back.Checkpoint.Position.Seq = 2
	if _, err := db.Store.Steps(t.Context(), time.Minute, []store.Step{back}); err == nil {
		t.Error("a checkpoint moved backwards")
	}
	// … and takes the others along: an error says that nothing was written.
	on := steps[2]
	on.Checkpoint.Position.Seq = 4
	if _, err := db.Store.Steps(t.Context(), time.Minute, []store.Step{on, back}); err == nil {
		t.Error("a checkpoint moved backwards beside another one")
	}
	if n := storetest.Query[int](t, db, `SELECT count(*)::int FROM outbox.shard WHERE seq = 4`); n[0] != 0 {
		t.Error("a step was written beside one that is an error")
	}
	back.Park = []store.Parked{parkedEvent(at(5, 0, 0), storetest.Key(1), "x", store.CauseInDoubt)}
	if _, err := db.Store.Steps(t.Context(), time.Minute, []store.Step{back}); err == nil {
		t.Error("a checkpoint moved backwards with rows")
	}
	if n := storetest.Query[int](t, db, `SELECT count(*)::int FROM outbox.parked`); n[0] != 0 {
		t.Error("a refused step left rows")
	}
	// What a step wrote is what the next holder gets.
	if err := db.Store.ReleaseShards(t.Context(), []int16{steps[0].Shard}, []int64{1}); err != nil {
		t.Fatal(err)
	}
	if fenced, err := db.Store.Steps(t.Context(), time.Minute, steps[:1]); err != nil || len(fenced) != 1 {
		t.Errorf("step after release: fenced %v, %v", fenced, err)
	}
	next := acquire(t, db.Store, "b", time.Minute, 1, 1)[0]
	if !reflect.DeepEqual(next.Checkpoint, steps[0].Checkpoint) || next.Shard != steps[0].Shard {
		t.Errorf("the next holder got %+v", next)
	}
}

// loadOf loads the parked rows of one aggregate of shard 0, and asks for another one's that has none.
func loadOf(t *testing.T, db *storetest.Database, a store.Aggregate, after store.EventPosition) ([]store.Parked, error) {
	t.Helper()
	none := store.ParkedAfter{Aggregate: store.Aggregate{Source: a.Source, Type: a.Type, ID: "none"}}
	loaded, err := db.Store.LoadParkedOf(t.Context(), []store.ParkedAfter{none, {Aggregate: a, After: after}}, 10)
	if err != nil {
		return nil, err
	}
	if len(loaded) != 2 || len(loaded[0]) != 0 {
		t.Fatalf("loaded %+v", loaded)
	}
	return loaded[1], nil
}

func TestStepWithRowsIsOneTransaction(t *testing.T) {
	t.Parallel()
	db := storetest.New(t, storetest.WithShards(1))
	l := acquire(t, db.Store, "a", time.Minute, 1, 1)[0]
	k1, k2, k3 := storetest.Key(1), storetest.Key(1), storetest.Key(1)
	first := parkedEvent(at(10, 0, 0), k1, "A", store.CauseInDoubt)
	second := parkedEvent(at(10, 0, 1), k2, "A", store.CauseFollower)
	second.State, second.Database = store.Committed, nil
	step(t, db.Store, store.Step{Shard: 0, Epoch: l.Epoch, Checkpoint: store.Checkpoint{Position: store.Position{XID: 10}},
		Park: []store.Parked{first, second}, Bury: []store.DeadLetter{deadLetter(at(9, 0, 0), k3, "B", true)}})

	loaded, err := loadOf(t, db, first.Aggregate, store.EventPosition{})
	if err != nil || len(loaded) != 2 {
		t.Fatal(loaded, err)
	}
	for i, want := range []store.Parked{first, second} {
		got := loaded[i]
		if got.Since.IsZero() {
			t.Error("since is not set")
		}
		got.Since = time.Time{}
		if !reflect.DeepEqual(got, want) {
			t.Errorf("loaded\n%+v want\n%+v", got, want)
		}
	}
	if rest, err := loadOf(t, db, first.Aggregate, first.EventPosition); err != nil || len(rest) != 1 || rest[0].Key != k2 {
		t.Errorf("after the first: %v, %v", rest, err)
	}
	queues, err := db.Store.LoadDeadQueues(t.Context(), 0)
	if err != nil || len(queues) != 1 || queues[0].ID != "B" {
		t.Errorf("dead queues %v, %v", queues, err)
	}
	dead, err := db.Store.LoadDeadLettersOf(t.Context(), 0, queues[0], store.EventPosition{}, 10)
	if err != nil || len(dead) != 1 || dead[0].Error != "too large" || !dead[0].Queue || dead[0].Key != k3 {
		t.Errorf("dead letters %+v, %v", dead, err)
	}
	op, err := db.Store.RequestOperation(t.Context(), queues[0], store.ActionRedrive, "me", "because")
	if err != nil {
		t.Fatal(err)
	}
	pending, err := db.Store.PendingOperations(t.Context(), []int16{0})
	if err != nil || len(pending) != 1 || pending[0].ID != op.ID || pending[0].Action != store.ActionRedrive || pending[0].Aggregate != queues[0] {
		t.Errorf("pending %+v, %v", pending, err)
	}

	// The redrive, a retry and a decision in one step.
	redriven := parkedEvent(at(9, 0, 0), k3, "B", store.CauseRedriven)
	redriven.State = store.Committed
	failed := second
	failed.Cause, failed.Attempts, failed.Error = store.CauseRecord, 3, "no"
	failed.NextTry = time.Now().Add(time.Hour).Truncate(time.Microsecond)
	again := store.Step{Shard: 0, Epoch: l.Epoch, Checkpoint: store.Checkpoint{Position: store.Position{XID: 11}},
		Exhume: []store.EventPosition{at(9, 0, 0)}, Park: []store.Parked{redriven, failed},
		Decide: []store.ParkedDecision{{Key: k1, State: store.Committed}}, Operations: []store.OperationOutcome{{ID: op.ID, Outcome: "done", Events: 1}}}
	old := again
	old.Epoch--
	if fenced, err := db.Store.Steps(t.Context(), time.Minute, []store.Step{old}); err != nil || len(fenced) != 1 {
		t.Fatalf("fenced %v, %v", fenced, err)
	}
	if all, _ := db.Store.LoadParked(t.Context(), 0); len(all) != 2 {
		t.Error("a fenced step changed rows")
	}
	step(t, db.Store, again)
	all, err := db.Store.LoadParked(t.Context(), 0)
	if err != nil || len(all) != 3 {
		t.Fatal(all, err)
	}
	if all[0].Key != k3 || all[0].Cause != store.CauseRedriven || all[1].State != store.Committed || all[2].Attempts != 3 || !all[2].NextTry.Equal(failed.NextTry) || all[2].Body != nil {
		t.Errorf("after the redrive: %+v", all)
	}
	if done, err := db.Store.OperationByID(t.Context(), op.ID); err != nil || !done.Done || done.Outcome != "done" || done.Events != 1 {
		t.Errorf("operation %+v, %v", done, err)
	}
	step(t, db.Store, store.Step{Shard: 0, Epoch: l.Epoch, Checkpoint: store.Checkpoint{Position: store.Position{XID: 12}},
		Unpark: []store.EventPosition{all[0].EventPosition, all[1].EventPosition, all[2].EventPosition}})
	if all, _ := db.Store.LoadParked(t.Context(), 0); len(all) != 0 {
		t.Errorf("left %+v", all)
	}
}

// A row that PostgreSQL refuses takes the whole step with it, the checkpoint included.
func TestStepFailsAsAWhole(t *testing.T) {
	t.Parallel()
	db := storetest.New(t, storetest.WithShards(1))
	l := acquire(t, db.Store, "a", time.Minute, 1, 1)[0]
	bad := parkedEvent(at(10, 0, 0), storetest.Key(1), "A", store.CauseRecord)
	bad.Error = "a NUL\x00"
	s := store.Step{Shard: 0, Epoch: l.Epoch, Checkpoint: store.Checkpoint{Position: store.Position{XID: 10}}, Park: []store.Parked{bad}}
	if _, err := db.Store.Steps(t.Context(), time.Minute, []store.Step{s}); !errors.Is(err, store.ErrInvalid) {
		t.Fatalf("error %v", err)
	}
	if x := storetest.Query[uint64](t, db, `SELECT xid FROM outbox.shard`); x[0] != 0 {
		t.Errorf("the checkpoint is at %d", x[0])
	}
}

// And a checkpoint that cannot be committed takes the rows with it.
func TestStepRowsFallWithTheirCheckpoint(t *testing.T) {
	t.Parallel()
	db := storetest.New(t, storetest.WithShards(1))
	l := acquire(t, db.Store, "a", time.Minute, 1, 1)[0]
	db.Exec(t, `CREATE FUNCTION public.fail() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RAISE EXCEPTION 'injected'; END $$`)
	db.Exec(t, `CREATE CONSTRAINT TRIGGER fail AFTER UPDATE ON outbox.shard DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION public.fail()`)
	s := store.Step{Shard: 0, Epoch: l.Epoch, Checkpoint: store.Checkpoint{Position: store.Position{XID: 10}},
		Park: []store.Parked{parkedEvent(at(10, 0, 0), storetest.Key(1), "A", store.CauseInDoubt)}}
	if _, err := db.Store.Steps(t.Context(), time.Minute, []store.Step{s}); err == nil {
		t.Fatal("the step succeeded")
	}
	if all, err := db.Store.LoadParked(t.Context(), 0); err != nil || len(all) != 0 {
		t.Errorf("parked %v, %v", all, err)
	}
}

func TestLoadParkedReadsStatesAgain(t *testing.T) {
	t.Parallel()
	db := storetest.New(t, storetest.WithShards(1))
	w := runWriter(t, db.Store, store.WriterConfig{})
	l := acquire(t, db.Store, "a", time.Minute, 1, 1)[0]
	k := storetest.Key(1)
	if _, err := w.Do(t.Context(), prepare(k, storetest.Event("orders", "order", "A", "x"))); err != nil {
		t.Fatal(err)
	}
	step(t, db.Store, store.Step{Epoch: l.Epoch, Checkpoint: store.Checkpoint{Position: store.Position{XID: 10}},
		Park: []store.Parked{parkedEvent(at(10, 0, 0), k, "A", store.CauseInDoubt)}})
	for _, want := range []store.State{store.Prepared, store.Committed} {
		all, err := db.Store.LoadParked(t.Context(), 0)
		if err != nil || len(all) != 1 || all[0].State != want {
			t.Fatalf("%+v, %v; want state %s", all, err, want)
		}
		states, err := db.Store.States(t.Context(), []store.Key{k, storetest.Key(1)})
		if err != nil || len(states) != 1 || states[k] != want {
			t.Fatalf("states %v, %v", states, err)
		}
		if _, err := w.Do(t.Context(), &store.Request{Kind: store.KindCommit, Key: k}); err != nil {
			t.Fatal(err)
		}
	}
}

// TestAskSooner: the store's clock was put back by ten minutes after transactions were to be asked about in a moment.
func TestAskSooner(t *testing.T) {
	t.Parallel()
	db := storetest.New(t, storetest.WithShards(1))
	acquire(t, db.Store, "a", time.Minute, 1, 1)
	late, soon := storetest.Key(1), storetest.Key(1)
	step(t, db.Store, store.Step{Shard: 0, Epoch: 1, Checkpoint: store.Checkpoint{Position: store.Position{XID: 10}},
		Park: []store.Parked{parkedEvent(at(10, 0, 0), late, "A", store.CauseInDoubt), parkedEvent(at(10, 0, 1), soon, "B", store.CauseInDoubt)}})
	db.Exec(t, `UPDATE outbox.parked SET check_at = now() + CASE WHEN record = 0 THEN interval '10 min' ELSE interval '1 min' END`)
	if n, err := db.Store.AskSooner(t.Context(), 2*time.Minute); err != nil || n != 1 {
		t.Errorf("%d rows, %v; want one", n, err)
	}
	found, err := db.Store.ClaimInDoubt(t.Context(), 10, time.Minute)
	if err != nil || len(found) != 1 || found[0].Key != late {
		t.Errorf("claimed %+v, %v; want one of %+v", found, err, late)
	}
}

func TestClaimInDoubt(t *testing.T) {
	t.Parallel()
	db := storetest.New(t, storetest.WithShards(2))
	leases := acquire(t, db.Store, "a", time.Minute, 2, 2)
	slices.SortFunc(leases, func(a, b store.Lease) int { return int(a.Shard - b.Shard) })
	k1, k2, decided := storetest.Key(1), storetest.Key(2), storetest.Key(1)
	done := parkedEvent(at(10, 0, 3), decided, "C", store.CauseFollower)
	done.State = store.Committed
	step(t, db.Store, store.Step{Shard: 0, Epoch: 1, Checkpoint: store.Checkpoint{Position: store.Position{XID: 10}},
		Park: []store.Parked{parkedEvent(at(10, 0, 0), k1, "A", store.CauseInDoubt), parkedEvent(at(10, 0, 1), k1, "B", store.CauseInDoubt), done}})
	step(t, db.Store, store.Step{Shard: 1, Epoch: 1, Checkpoint: store.Checkpoint{Position: store.Position{XID: 10}},
		Park: []store.Parked{parkedEvent(at(10, 1, 0), k1, "D", store.CauseInDoubt), parkedEvent(at(10, 1, 1), k2, "E", store.CauseFollower)}})

	claim := func(want ...store.Key) []store.Parked {
		t.Helper()
		found, err := db.Store.ClaimInDoubt(t.Context(), 10, time.Minute)
		if err != nil {
			t.Fatal(err)
		}
		var got []store.Key
		for _, p := range found {
			got = append(got, p.Key)
		}
		order := func(a, b store.Key) int { return bytes.Compare(a.Transaction[:], b.Transaction[:]) }
		slices.SortFunc(got, order)
		slices.SortFunc(want, order)
		if !slices.Equal(got, want) {
			t.Fatalf("claimed %v, want %v", got, want)
		}
		return found
	}
	for _, p := range claim(k1, k2) {
		if p.Checks != 1 || p.Database == nil || p.Database.XID != 77 || p.State != store.Prepared {
			t.Errorf("claimed %+v", p)
		}
	}
	claim() // leased
	if err := db.Store.RecordAnswer(t.Context(), []store.Key{k1, decided}, "IN_PROGRESS", -time.Second); err != nil {
		t.Fatal(err)
	}
	if found := claim(k1); found[0].Checks != 2 || found[0].LastAnswer != "IN_PROGRESS" {
		t.Errorf("claimed again %+v", found)
	}
	// Parking a row again, as a takeover may, keeps the resolver's lease.
	step(t, db.Store, store.Step{Shard: 0, Epoch: 1, Checkpoint: store.Checkpoint{Position: store.Position{XID: 10}},
		Park: []store.Parked{parkedEvent(at(10, 0, 0), k1, "A", store.CauseInDoubt)}})
	claim()
	// A decision ends the asking.
	if err := db.Store.RecordAnswer(t.Context(), []store.Key{k1, k2}, "UNKNOWN", -time.Second); err != nil {
		t.Fatal(err)
	}
	for i, l := range leases {
		step(t, db.Store, store.Step{Shard: int16(i), Epoch: l.Epoch, Checkpoint: store.Checkpoint{Position: store.Position{XID: 11}},
			Decide: []store.ParkedDecision{{Key: k1, State: store.Aborted}}})
	}
	claim(k2)
}

// Two resolvers at once never get the same transaction.
func TestClaimInDoubtSkipsWhatIsBeingClaimed(t *testing.T) {
	t.Parallel()
	db := storetest.New(t, storetest.WithShards(1))
	l := acquire(t, db.Store, "a", time.Minute, 1, 1)[0]
	k := storetest.Key(1)
	step(t, db.Store, store.Step{Epoch: l.Epoch, Checkpoint: store.Checkpoint{Position: store.Position{XID: 10}},
		Park: []store.Parked{parkedEvent(at(10, 0, 0), k, "A", store.CauseInDoubt)}})
	tx, err := db.Connect(t).Begin(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer tx.Rollback(t.Context()) //nolint:errcheck // the test ends
	if _, err := tx.Exec(t.Context(), `SELECT 1 FROM outbox.parked FOR UPDATE`); err != nil {
		t.Fatal(err)
	}
	found, err := db.Store.ClaimInDoubt(t.Context(), 10, time.Minute)
	if err != nil || len(found) != 0 {
		t.Errorf("claimed %+v, %v; want %+v", found[0].Key, err, storetest.Key(1))
	}
}

func TestHolderFunctionsFailWhenTheStoreIsClosed(t *testing.T) {
	t.Parallel()
	db := storetest.New(t, storetest.WithShards(1))
	st := db.Open(t)
	st.Close()
	ctx := t.Context()
	a := store.Aggregate{Source: 1}
	parked := []store.Parked{parkedEvent(at(1, 0, 0), storetest.Key(1), "A", store.CauseInDoubt)}
	calls := map[string]func() error{
		"heartbeat":       func() error { _, err := st.Heartbeat(ctx, "a", time.Second); return err },
		"acquire":         func() error { _, err := st.AcquireShards(ctx, "a", time.Second, 1); return err },
		"release":         func() error { return st.ReleaseShards(ctx, []int16{0}, []int64{1}) },
		"plain step":      func() error { _, err := st.Steps(ctx, time.Second, []store.Step{{}}); return err },
		"step with rows":  func() error { _, err := st.Steps(ctx, time.Second, []store.Step{{Park: parked}}); return err },
		"parked":          func() error { _, err := st.LoadParked(ctx, 0); return err },
		"parked of":       func() error { _, err := st.LoadParkedOf(ctx, []store.ParkedAfter{{Aggregate: a}}, 1); return err },
		"dead queues":     func() error { _, err := st.LoadDeadQueues(ctx, 0); return err },
		"dead letters of": func() error { _, err := st.LoadDeadLettersOf(ctx, 0, a, store.EventPosition{}, 1); return err },
		"states":          func() error { _, err := st.States(ctx, []store.Key{{}}); return err },
		"operations":      func() error { _, err := st.PendingOperations(ctx, []int16{0}); return err },
		"claim":           func() error { _, err := st.ClaimInDoubt(ctx, 1, time.Second); return err },
		"answer":          func() error { return st.RecordAnswer(ctx, []store.Key{{}}, "x", time.Second) },
		"ping":            func() error { return st.Ping(ctx) },
	}
	for name, call := range calls {
		if err := call(); !errors.Is(err, store.ErrUnavailable) {
			t.Errorf("%s: %v, want ErrUnavailable", name, err)
		}
	}
}

// A relay that lives on does not look again for rows that were written: a crash of PostgreSQL must not take them back. The
// simulator found that it did.
func TestRowsOfAnAnsweredStepSurviveACrash(t *testing.T) {
	t.Parallel()
	cluster := storetest.NewCluster(t, storetest.WithSettings(map[string]string{"wal_writer_delay": "10s"}))
	for _, lastIsFenced := range []bool{false, true} {
		db := cluster.New(t, storetest.WithShards(3))
		leases := acquire(t, db.Store, "a", time.Minute, 3, 3)
		steps := make([]store.Step, len(leases))
		for i, l := range leases {
			p := parkedEvent(at(5, int32(i), 0), storetest.Key(1), "a", store.CauseInDoubt)
			steps[i] = store.Step{Shard: l.Shard, Epoch: l.Epoch, Checkpoint: l.Checkpoint, Park: []store.Parked{p}}
			steps[i].Checkpoint.Position.XID = 5
		}
		want := 3
		if lastIsFenced {
			steps[2].Epoch--
			want = 2
		}
		fenced, err := db.Store.Steps(t.Context(), time.Minute, steps)
		if err != nil || len(fenced) != 3-want {
			t.Fatalf("fenced %v, %v", fenced, err)
		}
		cluster.Kill()
		cluster.Restart(t)
		survived := 0
		st := db.Open(t)
		for _, l := range leases {
			rows, err := st.LoadParked(t.Context(), l.Shard)
			if err != nil {
				t.Fatal(err)
			}
			survived += len(rows)
		}
		if survived != want {
			t.Errorf("last step fenced %v: %d of %d rows survived", lastIsFenced, survived, want)
		}
	}
}
