package store_test

import (
	"context"
	"errors"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/outbox-platform/outbox/store"
	"github.com/outbox-platform/outbox/store/storetest"
)

// cutEverywhere runs call again and again, over a connection that breaks at its first statement, its second, and so on, until no
// statement is left to break. It must fail with ErrUnavailable or not at all, and must succeed once nothing breaks.
func cutEverywhere(t *testing.T, c *storetest.Cut, call func() error) {
	t.Helper()
	for n := 0; ; n++ {
		c.After(n)
		err := call()
		cut := c.Done()
		if err != nil && (!cut || !errors.Is(err, store.ErrUnavailable)) {
			t.Fatalf("cut at statement %d (%v): %v", n, cut, err)
		}
		if !cut {
			return
		}
		if n == 100 {
			t.Fatal("it never ends")
		}
	}
}

// Whatever statement a call breaks off at, its caller learns that the store is away, and may repeat it.
func TestConnectionsBreakAtEveryStatement(t *testing.T) {
	t.Parallel()
	w := newWorld(t, storetest.WithShards(2))
	undecided := w.prepare("a")
	w.park(undecided, store.CauseInDoubt, store.Prepared)
	done := w.publish("y", "b")
	w.resolve(w.prepare("c"), store.KindCommit)
	w.hold()
	cut := storetest.NewCut(t, w.DSN)
	// One connection: what is prepared on it is known, and a call that finds it broken makes a new one.
	st, err := store.Open(t.Context(), store.Config{DSN: cut.DSN, MaxConns: 1})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(st.Close)
	a := store.Aggregate{Source: w.src.ID, Type: "order", ID: "a"}
	row := parkedEvent(at(1, 0, 0), undecided, "A", store.CauseInDoubt)
	for name, call := range map[string]func(ctx context.Context) error{
		"heartbeat":  func(ctx context.Context) error { _, err := st.Heartbeat(ctx, "a", time.Hour); return err },
		"acquire":    func(ctx context.Context) error { _, err := st.AcquireShards(ctx, "a", time.Hour, 1); return err },
		"release":    func(ctx context.Context) error { return st.ReleaseShards(ctx, []int16{0}, []int64{99}) },
		"plain step": func(ctx context.Context) error { _, err := st.Steps(ctx, time.Hour, []store.Step{{}}); return err },
		"step with rows": func(ctx context.Context) error {
			_, err := st.Steps(ctx, time.Hour, []store.Step{{Park: []store.Parked{row}}})
			return err
		},
		"parked": func(ctx context.Context) error { _, err := st.LoadParked(ctx, 0); return err },
		"parked of": func(ctx context.Context) error {
			_, err := st.LoadParkedOf(ctx, []store.ParkedAfter{{Aggregate: a}}, 1)
			return err
		},
		"dead queues": func(ctx context.Context) error { _, err := st.LoadDeadQueues(ctx, 0); return err },
		"dead letters of": func(ctx context.Context) error {
			_, err := st.LoadDeadLettersOf(ctx, 0, a, store.EventPosition{}, 1)
			return err
		},
		"states":     func(ctx context.Context) error { _, err := st.States(ctx, []store.Key{undecided}); return err },
		"operations": func(ctx context.Context) error { _, err := st.PendingOperations(ctx, []int16{0, 1}); return err },
		"claim":      func(ctx context.Context) error { _, err := st.ClaimInDoubt(ctx, 1, 0); return err },
		"hurry": func(ctx context.Context) error {
			_, _, err := st.HurryInDoubt(ctx, w.src.ID, "default", store.TransactionID{}, 1, 0)
			return err
		},
		"answer": func(ctx context.Context) error { return st.RecordAnswer(ctx, []store.Key{undecided}, "x", 0) },
		"memories": func(ctx context.Context) error {
			_, err := st.Memories(ctx, []store.Key{undecided, done}, 0)
			return err
		},
		"transaction": func(ctx context.Context) error { _, err := st.Transaction(ctx, done); return err },
		"verify":      func(ctx context.Context) error { _, err := st.Verify(ctx); return err },
		"reader": func(ctx context.Context) error {
			r, err := st.OpenReader(ctx)
			if err != nil {
				return err
			}
			defer r.Close(context.WithoutCancel(ctx)) //nolint:errcheck // it may be broken
			if _, err := r.Read(ctx, cursorsAtStart(st), 64); err != nil {
				return err
			}
			_, err = r.ReadAt(ctx, 0, []store.Position{{XID: 1}})
			return err
		},
	} {
		t.Run(name, func(t *testing.T) { //nolint:paralleltest // they share the connection
			cutEverywhere(t, cut, func() error { return call(t.Context()) })
		})
	}
	w.sound()
}

// Maintenance breaks off at every statement of a pass that closes a generation and empties another: what was done stays done, and
// the next pass does the rest.
func TestMaintenanceBreaksAtEveryStatement(t *testing.T) {
	t.Parallel()
	w := newWorld(t, storetest.WithShards(1))
	cut := storetest.NewCut(t, w.DSN)
	st, err := store.Open(t.Context(), store.Config{DSN: cut.DSN, MaxConns: 1})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(st.Close)
	w.publish("z")
	w.maintain(small)
	w.checkpoint(nil)
	for n := 0; ; n++ {
		// The server has noticed that whoever held the lock is gone, and there is a generation to close, and one to empty.
		storetest.Eventually(t, within, func() bool {
			return w.one(`SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND database = (SELECT oid FROM pg_database WHERE datname = current_database())`) == 0
		})
		w.publish("z")
		w.checkpoint(nil)
		w.closedLongAgo()
		st.TruncateAgain()
		cut.After(n)
		report, err := st.MaintainOnce(t.Context(), store.MaintenanceConfig{GenerationBytes: 1, LogRetention: time.Minute})
		switch broken := cut.Done(); {
		case err != nil && (!broken || !errors.Is(err, store.ErrUnavailable)):
			t.Fatalf("cut at statement %d (%v): %v", n, broken, err)
		case st.TruncationPaused():
			n-- // the lock was not to be had in time: once more
		case !broken && report.Truncated == 0:
			t.Fatalf("nothing was emptied: %+v", report)
		case !broken:
			w.sound()
			return
		}
	}
}

// A writer repeats what breaks off, at whatever statement, and stores it once.
func TestAWritersConnectionsBreakAtEveryStatement(t *testing.T) {
	t.Parallel()
	db := storetest.New(t, storetest.WithShards(2))
	cut := storetest.NewCut(t, db.DSN)
	st, err := store.Open(t.Context(), store.Config{DSN: cut.DSN})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(st.Close)
	var keys []store.Key
	cutEverywhere(t, cut, func() error {
		w := runWriter(t, st, store.WriterConfig{MaxWait: within})
		k := storetest.Key(1)
		keys = append(keys, k)
		do(t, w, prepare(k, order(k.Transaction.String())), nil)
		do(t, w, commit(k, 0), nil) // with a look-up
		return nil
	})
	log := readLog(t, db.Store)
	for _, k := range keys {
		checkLogged(t, log, k, 1, store.Committed)
	}
	if len(keys) < 8 {
		t.Errorf("only %d statements were cut", len(keys)-1)
	}
}

// The search for foreign transactions breaks off: the read says so, and the next one goes on.
func TestTheSearchForForeignTransactionsBreaksOff(t *testing.T) {
	t.Parallel()
	db := storetest.New(t, storetest.WithShards(1))
	cut := storetest.NewCut(t, db.DSN)
	st, err := store.Open(t.Context(), store.Config{DSN: cut.DSN})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(st.Close)
	w := runWriter(t, db.Store, store.WriterConfig{})
	r := openReader(t, st)
	cursors := cursorsAtStart(st)
	foreign := begin(t, db)
	exec(t, foreign, `CREATE TEMP TABLE x (id int)`)
	do(t, w, publish(storetest.Key(1), order("1")), nil)
	storetest.Eventually(t, within, func() bool { // the next read searches
		read(t, r, cursors)
		return r.Suspicious()
	})
	cut.After(0)
	_, err = r.Read(t.Context(), cursors, 64)
	if !cut.Done() || !errors.Is(err, store.ErrUnavailable) || !strings.Contains(err.Error(), "foreign") {
		t.Fatalf("read: %v", err)
	}
	storetest.Eventually(t, within, func() bool { return len(read(t, r, cursors)) == 1 })
	if err := foreign.Rollback(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(r.Close(t.Context()), r.Close(t.Context())); err != nil {
		t.Error("closing twice:", err)
	}
}

// A straggler writes to a generation between the look and the lock: it is not emptied.
func TestAGenerationIsLookedAtAgainUnderTheLock(t *testing.T) {
	t.Parallel()
	w := newWorld(t, storetest.WithShards(1))
	w.publish("a")
	w.maintain(small) // closes generation 0
	w.checkpoint(nil)
	w.closedLongAgo()
	// The lock is not waited for for long; who was too slow tries again.
	storetest.Eventually(t, within, func() bool {
		st := w.Open(t)
		straggler := begin(t, w.Database)
		exec(t, straggler, `LOCK TABLE outbox.log_0 IN ROW EXCLUSIVE MODE`)
		ended := make(chan error, 1)
		go func() {
			report, err := st.MaintainOnce(t.Context(), store.MaintenanceConfig{GenerationBytes: 1 << 40, LogRetention: time.Second})
			if err == nil && report.Truncated != 0 {
				err = errors.New("a generation that is needed was emptied")
			}
			ended <- err
		}()
		var err error
		waits := func() bool {
			return w.one(`SELECT count(*) FROM pg_locks WHERE relation = 'outbox.log_0'::regclass AND NOT granted`) > 0
		}
		over := false
		storetest.Eventually(t, within, func() bool {
			select {
			case err = <-ended:
				over = true
			default:
			}
			return over || waits()
		})
		exec(t, straggler, `INSERT INTO outbox.log (shard, xid, seq, gen, body) SELECT 0, pg_current_xact_id(), 0, 0, body FROM outbox.log WHERE gen = 0 LIMIT 1`)
		if e := straggler.Commit(t.Context()); e != nil {
			t.Fatal(e)
		}
		if !over {
			err = <-ended
		}
		if err != nil {
			t.Fatal(err)
		}
		again := st.TruncationPaused()
		if again {
			w.checkpoint(nil)
		}
		return !again
	})
	if n := w.one(`SELECT count(*) FROM outbox.log WHERE gen = 0`); n < 2 {
		t.Errorf("%d segments are left", n)
	}
}

// Two requests of one transaction in one batch, which the queue never makes: the statement's counts do not add up, and nobody
// is told that he won.
func TestCountsOfABatchMustAddUp(t *testing.T) {
	t.Parallel()
	db := storetest.New(t)
	k := storetest.Key(1)
	err := store.AppendTogether(t.Context(), db.Store, prepare(k, order("1")), prepare(k, order("1")))
	if err == nil || !strings.Contains(err.Error(), "do not add up") {
		t.Errorf("error %v", err)
	}
}

// Lists of a checkpoint that are cut short anywhere are refused.
func TestPrefixesOfListsAreRefused(t *testing.T) {
	t.Parallel()
	pend := store.EncodePend([]store.PendEntry{pendAt(7, 1, 2, 3, store.Committed), pendAt(7, 1, 3, 3, store.Prepared), pendAt(900, 1, 3, 4, store.Aborted)})
	for n := 1; n < len(pend); n++ {
		if got, err := store.DecodePend(pend[:n]); !errors.Is(err, store.ErrInvalid) {
			t.Errorf("%d bytes of pend: %v, %v", n, got, err)
		}
	}
	offsets := store.EncodeOffsets([]store.TopicOffset{{Topic: "a", Partition: 1, Offset: 2}, {Topic: "a", Partition: 2, Offset: 900}, {Topic: "b", Offset: 1}})
	for n := 1; n < len(offsets); n++ {
		if got, err := store.DecodeOffsets(offsets[:n]); !errors.Is(err, store.ErrInvalid) {
			t.Errorf("%d bytes of offsets: %v, %v", n, got, err)
		}
	}
}

// A body that cannot be read is parked and set aside as it is; its topic is not known.
func TestARowWhoseBodyIsDamaged(t *testing.T) {
	t.Parallel()
	db := storetest.New(t, storetest.WithShards(1))
	l := acquire(t, db.Store, "relay", time.Minute, 1, 1)[0]
	p := parkedEvent(at(1, 0, 0), storetest.Key(1), "A", store.CauseRecord)
	p.Body = []byte{0}
	step(t, db.Store, store.Step{Epoch: l.Epoch, Checkpoint: store.Checkpoint{Position: store.Position{XID: 20}}, Park: []store.Parked{p}})
	if topics := storetest.Query[string](t, db, `SELECT topic FROM outbox.parked`); !slices.Equal(topics, []string{""}) {
		t.Errorf("topics %q", topics)
	}
}

func TestDecidedErrorNamesTheState(t *testing.T) {
	t.Parallel()
	for state, want := range map[store.State]string{store.Committed: "COMMITTED", store.Aborted: "ABORTED"} {
		if got := (&store.DecidedError{State: state}).Error(); !strings.Contains(got, want) {
			t.Errorf("%q", got)
		}
	}
}
