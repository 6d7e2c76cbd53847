package driver

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strconv"
	"sync"
	"syscall"
	"time"

	"github.com/google/uuid"
	"github.com/jackc/pgx/v5"

	"github.com/outbox-platform/outbox/client"
	"github.com/outbox-platform/outbox/client/pgxoutbox"
	"github.com/outbox-platform/outbox/internal/fault"
	"github.com/outbox-platform/outbox/test/robustness/journal"
)

// bySDK does a transaction the way services do.
func (w *worker) bySDK(ctx context.Context, profile string) error {
	tx, changes, err := w.begin(ctx, profile)
	if err != nil {
		return err
	}
	if profile == Savepoint {
		if err := w.savepoints(ctx, tx); err != nil {
			rollBack(tx)
			return err
		}
	}
	if profile == GiveUp {
		rollBack(tx)
		return nil
	}
	attempt, err := pgxoutbox.Mark(ctx, tx, w.sdk, pgxoutbox.Options{})
	if err == nil {
		err = tell(ctx, tx, attempt.ID(), changes)
	}
	if err != nil {
		rollBack(tx)
		return err
	}
	id := attempt.ID()
	w.think(ctx, profile)
	events, noted := w.events(changes)
	w.note(journal.Invoke, journal.Prepare, profile, id, func(e *journal.Entry) { e.Events = noted })
	fault.Point("driver.K1")
	dieDuring("driver.K2")
	err = attempt.Prepare(ctx, events...)
	w.note(outcome(err), journal.Prepare, profile, id, because(err))
	if err != nil || profile == Undo {
		if rollBack(tx) {
			w.note(journal.OK, journal.Rollback, profile, id)
			attempt.AfterRollback()
		}
		w.uncertain()
		return err
	}
	fault.Point("driver.K3")
	if err := w.commit(ctx, tx, profile, id); err != nil {
		return err
	}
	switch profile {
	case Forget:
	case Late:
		w.later(time.Duration(w.random.Int64N(int64(4*time.Second))), func() {
			w.note(journal.Invoke, journal.Commit, profile, id)
			attempt.AfterCommit()
		})
	default:
		w.note(journal.Invoke, journal.Commit, profile, id)
		attempt.AfterCommit()
		fault.Point("driver.K6")
	}
	return nil
}

// commit commits locally.
func (w *worker) commit(ctx context.Context, tx pgx.Tx, profile string, id uuid.UUID) error {
	w.note(journal.Invoke, journal.Local, profile, id)
	dieDuring("driver.K4")
	err := tx.Commit(ctx)
	if err != nil {
		w.note(journal.Info, journal.Local, profile, id, because(err))
		w.uncertain()
		return err
	}
	w.note(journal.OK, journal.Local, profile, id)
	fault.Point("driver.K5")
	return nil
}

// later does something after a while, as part of what is under way.
func (w *worker) later(d time.Duration, do func()) {
	w.driver.open.Add(1)
	time.AfterFunc(d, func() {
		defer w.driver.open.Done()
		do()
	})
}

// savepoints does things that are undone before anything is prepared.
func (w *worker) savepoints(ctx context.Context, tx pgx.Tx) error {
	for _, sql := range []string{
		"SAVEPOINT one",
		"INSERT INTO truth (tx, aggregate, version, events) VALUES (gen_random_uuid(), 'undone', 0, 0)",
		"ROLLBACK TO SAVEPOINT one", "RELEASE SAVEPOINT one", "SAVEPOINT two", "RELEASE SAVEPOINT two",
	} {
		if _, err := tx.Exec(ctx, sql); err != nil {
			return err
		}
	}
	return nil
}

// misuse does what the SDK must refuse.
func (w *worker) misuse(ctx context.Context) error {
	tx, err := w.pool.Begin(ctx)
	if err != nil {
		return err
	}
	defer rollBack(tx)
	if w.random.IntN(3) == 0 {
		if _, err := tx.Exec(ctx, "SET LOCAL synchronous_commit = off"); err != nil {
			return err
		}
		_, err := pgxoutbox.Mark(ctx, tx, w.sdk, pgxoutbox.Options{})
		w.refused("synchronous_commit=off", err, client.ErrAsyncCommit)
		return nil
	}
	// A savepoint that is rolled back after its events were prepared: the transaction commits without them.
	changes := []change{{aggregate: w.fresh("misuse"), events: 1, version: 1}}
	if _, err := tx.Exec(ctx, "SAVEPOINT inner_one"); err != nil {
		return err
	}
	attempt, err := pgxoutbox.Mark(ctx, tx, w.sdk, pgxoutbox.Options{})
	w.refused("savepoint", err, client.ErrSavepoint)
	if err != nil {
		return nil
	}
	if err := tell(ctx, tx, attempt.ID(), changes); err != nil {
		return err
	}
	events, noted := w.events(changes)
	w.note(journal.Invoke, journal.Prepare, Misused, attempt.ID(), func(e *journal.Entry) { e.Events = noted })
	if err := attempt.Prepare(ctx, events...); err != nil {
		return err
	}
	if _, err := tx.Exec(ctx, "ROLLBACK TO SAVEPOINT inner_one"); err != nil {
		return err
	}
	if err := w.commit(ctx, tx, Misused, attempt.ID()); err != nil {
		return err
	}
	attempt.AfterCommit()
	return nil
}

// refused notes whether something was refused as it should be. A database that is away proves nothing.
func (w *worker) refused(what string, err, want error) {
	switch {
	case errors.Is(err, want):
		w.note(journal.OK, journal.Misuse, Misused, uuid.Nil, func(e *journal.Entry) { e.Note = what })
	case err == nil:
		w.note(journal.Fail, journal.Misuse, Misused, uuid.Nil, func(e *journal.Entry) { e.Note = what + " was not refused" })
	}
}

// publish publishes without a transaction, sometimes twice.
func (w *worker) publish(ctx context.Context) {
	c := w.plan(Direct)[0]
	c.version = w.versions(&c)
	id := client.NewID()
	events, noted := w.events([]change{c})
	now := time.Now()
	for i := range events {
		events[i].OccurredAt = now
	}
	w.note(journal.Invoke, journal.Publish, Direct, id, func(e *journal.Entry) { e.Events = noted })
	err := w.sdk.Publish(ctx, id, events...)
	w.note(outcome(err), journal.Publish, Direct, id, because(err))
	if err != nil {
		w.uncertain()
	}
	if w.random.IntN(3) == 0 {
		w.note(journal.Invoke, journal.Again, Direct, id)
		err := w.sdk.Publish(ctx, id, events...)
		w.note(outcome(err), journal.Again, Direct, id, because(err))
		if err != nil {
			w.uncertain()
		}
	}
}

// probe prepares a transaction and leaves it open until its connection breaks.
func (d *driver) probe(ctx context.Context) {
	w := &worker{driver: d, n: 0, random: newRandom(d.Seed)}
	w.begun = int(time.Now().UnixNano())
	tx, changes, err := w.begin(ctx, Probe)
	if err != nil {
		return
	}
	attempt, err := pgxoutbox.Mark(ctx, tx, w.sdk, pgxoutbox.Options{Spill: pgxoutbox.SpillNever})
	if err == nil {
		err = tell(ctx, tx, attempt.ID(), changes)
	}
	if err != nil {
		rollBack(tx)
		return
	}
	events, noted := w.events(changes)
	w.note(journal.Invoke, journal.Prepare, Probe, attempt.ID(), func(e *journal.Entry) { e.Events = noted })
	err = attempt.Prepare(ctx, events...)
	w.note(outcome(err), journal.Prepare, Probe, attempt.ID(), because(err))
	var xid int64
	if err := tx.QueryRow(ctx, "SELECT pg_current_xact_id()::text::bigint").Scan(&xid); err == nil {
		_ = os.WriteFile(d.Control+".xid", []byte(strconv.FormatInt(xid, 10)), 0o600)
	}
	go func() {
		_, _ = tx.Exec(ctx, "SELECT pg_sleep(30)") // until the database dies
		rollBack(tx)
	}()
}

// dieDuring kills this process while what follows is under way, if the point is armed: the request has left, or is about to.
func dieDuring(point string) {
	var started sync.WaitGroup
	started.Add(1)
	go func() {
		started.Done()
		t := time.Duration(syscall.Getpid()%8) * 150 * time.Microsecond
		<-time.After(t)
		fault.Point(point)
	}()
	started.Wait()
}

// byHand does a transaction the way of a service in a language that has no SDK: the marker by plain SQL, the calls one by one.
func (w *worker) byHand(ctx context.Context, profile string) error {
	tx, changes, err := w.begin(ctx, profile)
	if err != nil {
		return err
	}
	id := client.NewID()
	db, err := mark(ctx, tx, id)
	if err == nil {
		err = tell(ctx, tx, id, changes)
	}
	if err != nil {
		rollBack(tx)
		return err
	}
	w.think(ctx, profile)
	events, noted := w.events(changes)
	now := time.Now() // what is prepared twice must say when it happened, or it is something else each time
	for i := range events {
		events[i].OccurredAt = now
	}
	w.note(journal.Invoke, journal.Prepare, profile, id, func(e *journal.Entry) { e.Events = noted })
	token, err := w.sdk.Prepare(ctx, id, db, events...)
	w.note(outcome(err), journal.Prepare, profile, id, because(err))
	if err != nil {
		if rollBack(tx) {
			w.note(journal.OK, journal.Rollback, profile, id)
		}
		w.uncertain()
		return err
	}
	switch profile {
	case Duplicate:
		w.duplicate(ctx, id, db, events)
	case Sync:
		w.ask(ctx, profile, id)
	case TwoPhase:
		return w.twoPhase(ctx, tx, id, token)
	}
	if err := w.commit(ctx, tx, profile, id); err != nil {
		return err
	}
	var both sync.WaitGroup
	both.Go(func() {
		w.note(journal.Invoke, journal.Commit, profile, id)
		err := w.sdk.Commit(ctx, id, token)
		w.note(decided(err), journal.Commit, profile, id, because(err))
	})
	switch profile {
	case Race:
		w.note(journal.Invoke, journal.Abort, profile, id)
		err := w.sdk.Abort(ctx, id, nil)
		w.note(decided(err), journal.Abort, profile, id, because(err))
	case Sync:
		w.ask(ctx, profile, id)
	}
	both.Wait()
	if profile != Duplicate {
		w.ask(ctx, profile, id)
	}
	return nil
}

// decided is what the error of Commit or Abort says: a contradiction is an answer, everything else that fails is not.
func decided(err error) journal.Type {
	switch {
	case err == nil:
		return journal.OK
	case client.IsAlreadyDecided(err):
		return journal.Fail
	default:
		return journal.Info
	}
}

// ask asks for the state.
func (w *worker) ask(ctx context.Context, profile string, id uuid.UUID) {
	w.note(journal.Invoke, journal.Get, profile, id)
	t, err := w.sdk.GetTransaction(ctx, id)
	if err != nil {
		w.note(journal.Info, journal.Get, profile, id, because(err))
		return
	}
	w.note(journal.OK, journal.Get, profile, id, func(e *journal.Entry) { e.State = t.State.String() })
}

// duplicate prepares once more what is prepared, and then something else under the same id.
func (w *worker) duplicate(ctx context.Context, id uuid.UUID, db client.DatabaseTransaction, events []client.Event) {
	w.note(journal.Invoke, journal.Again, Duplicate, id)
	_, err := w.sdk.Prepare(ctx, id, db, events...)
	w.note(outcome(err), journal.Again, Duplicate, id, because(err))
	other := append([]client.Event(nil), events...)
	other[0].Payload = append([]byte("other"), other[0].Payload...)
	w.note(journal.Invoke, journal.Other, Duplicate, id)
	_, err = w.sdk.Prepare(ctx, id, db, other...)
	w.note(outcome(err), journal.Other, Duplicate, id, because(err))
}

// twoPhase ends the transaction in two phases, the second a while later.
func (w *worker) twoPhase(ctx context.Context, tx pgx.Tx, id uuid.UUID, token []byte) error {
	gid := "rb-" + id.String()
	w.note(journal.Invoke, journal.Local, TwoPhase, id)
	_, err := tx.Exec(ctx, "PREPARE TRANSACTION '"+gid+"'")
	rollBack(tx) // the session is no longer in it
	if err != nil {
		w.note(journal.Info, journal.Local, TwoPhase, id, because(err))
		return err
	}
	end := "COMMIT PREPARED"
	if w.random.IntN(5) == 0 {
		end = "ROLLBACK PREPARED"
	}
	w.later(time.Duration(w.random.Int64N(int64(4*time.Second))), func() {
		ctx, cancel := context.WithTimeout(context.Background(), patience)
		defer cancel()
		if _, err := w.pool.Exec(ctx, end+" '"+gid+"'"); err != nil {
			w.note(journal.Info, journal.Local, TwoPhase, id, because(err)) // whoever finds it ends it
			return
		}
		if end == "COMMIT PREPARED" {
			w.note(journal.OK, journal.Local, TwoPhase, id)
			w.note(journal.Invoke, journal.Commit, TwoPhase, id)
			err := w.sdk.Commit(ctx, id, token)
			w.note(decided(err), journal.Commit, TwoPhase, id, because(err))
		} else {
			w.note(journal.OK, journal.Rollback, TwoPhase, id)
		}
	})
	return nil
}

// errWaiting: spilled requests wait, and this service cannot spill.
var errWaiting = errors.New("earlier requests wait in the database")

// mark writes the marker and reads what ties it to its transaction.
func mark(ctx context.Context, tx pgx.Tx, id uuid.UUID) (client.DatabaseTransaction, error) {
	var (
		xid, system, database, table int64
		timeline                     string
		wait                         bool
	)
	err := tx.QueryRow(ctx, `INSERT INTO outbox_marker (id) VALUES ($1) RETURNING pg_current_xact_id()::text::bigint,
		(SELECT system_identifier FROM pg_control_system()), substr(pg_walfile_name(pg_current_wal_insert_lsn()), 1, 8),
		(SELECT oid::bigint FROM pg_database WHERE datname = current_database()), 'outbox_marker'::regclass::oid::bigint,
		EXISTS (SELECT FROM outbox_marker WHERE spilled IS NOT NULL AND refused IS NULL)`, [16]byte(id)).
		Scan(&xid, &system, &timeline, &database, &table, &wait)
	if err != nil {
		return client.DatabaseTransaction{}, fmt.Errorf("write the marker: %w", err)
	}
	if wait {
		return client.DatabaseTransaction{}, errWaiting
	}
	tl, err := strconv.ParseUint(timeline, 16, 32)
	return client.DatabaseTransaction{
		XID: uint64(xid), SystemIdentifier: uint64(system), Timeline: uint32(tl), DatabaseOID: uint32(database), MarkerOID: uint32(table), //nolint:gosec // the same bits
		Mode: client.ModeMarker,
	}, err
}
