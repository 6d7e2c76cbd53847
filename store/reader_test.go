package store_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/outbox-platform/outbox/store"
	"github.com/outbox-platform/outbox/store/storetest"
)

func openReader(t testing.TB, st *store.Store) *store.Reader {
	t.Helper()
	r, err := st.OpenReader(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := r.Close(context.WithoutCancel(t.Context())); err != nil {
			t.Error(err)
		}
	})
	return r
}

func read(t testing.TB, r *store.Reader, cursors []store.Cursor) []store.Segment {
	t.Helper()
	segments, err := r.Read(t.Context(), cursors, 64)
	if err != nil {
		t.Fatal(err)
	}
	return segments
}

// readSome reads until there are so many segments, and goes on behind them: another transaction of the cluster, a test's or
// autovacuum's, may hold the horizon for a moment.
func readSome(t testing.TB, r *store.Reader, cursors []store.Cursor, n int) (found []store.Segment) {
	t.Helper()
	storetest.Eventually(t, within, func() bool {
		for _, s := range read(t, r, cursors) {
			found = append(found, s)
			cursors[s.Shard].Position = s.Position
		}
		return len(found) >= n
	})
	if len(found) != n {
		t.Fatalf("read %d segments, want %d", len(found), n)
	}
	return found
}

// begin begins a transaction on a connection of its own.
func begin(t *testing.T, db *storetest.Database) pgx.Tx {
	t.Helper()
	tx, err := db.Connect(t).Begin(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	return tx
}

func exec(t *testing.T, tx pgx.Tx, sql string, args ...any) {
	t.Helper()
	if _, err := tx.Exec(t.Context(), sql, args...); err != nil {
		t.Fatalf("%s: %v", sql, err)
	}
}

// append writes a segment as the append statement does: it locks the log before it gets its xid.
const appendSegment = `INSERT INTO outbox.log (shard, seq, gen, body) SELECT 0, 0, gen, '\x01' FROM outbox.control`

// slowWriter is a writer that has appended but not committed. Its xid is smaller than those of later batches.
func slowWriter(t *testing.T, db *storetest.Database) (xid uint64, tx pgx.Tx) {
	t.Helper()
	tx = begin(t, db)
	if err := tx.QueryRow(t.Context(), appendSegment+` RETURNING xid`).Scan(&xid); err != nil {
		t.Fatal(err)
	}
	return xid, tx
}

// Without the horizon the same statement skips the events of a transaction that commits late. With it none is skipped.
func TestNaiveCursorSkipsEvents(t *testing.T) {
	t.Parallel()
	db := storetest.New(t, storetest.WithShards(1))
	w := runWriter(t, db.Store, store.WriterConfig{})
	r := openReader(t, db.Store)
	naiveSQL := strings.Replace(store.ReadAllSQL, "AND e.xid < h.horizon", "", 1)
	if naiveSQL == store.ReadAllSQL {
		t.Fatal("the statement has no horizon to take away")
	}
	conn := db.Connect(t)
	var cursor store.Position
	naive := func() (found []uint64) {
		rows, err := conn.Query(t.Context(), naiveSQL, []int16{0}, []uint64{cursor.XID}, []int32{cursor.Seq}, 64, []uint64{})
		if err != nil {
			t.Fatal(err)
		}
		defer rows.Close()
		for rows.Next() {
			var xid *uint64
			var seq *int32
			if err := rows.Scan(nil, nil, nil, &xid, &seq, nil, nil); err != nil {
				t.Fatal(err)
			}
			if xid != nil {
				found = append(found, *xid)
				cursor = store.Position{XID: *xid, Seq: *seq}
			}
		}
		return found
	}
	late, tx := slowWriter(t, db)
	do(t, w, publish(storetest.Key(1), order("1")), nil)
	cursors := cursorsAtStart(db.Store)
	if got := naive(); len(got) != 1 || got[0] <= late {
		t.Fatalf("the naive cursor sees %v", got)
	}
	for started := time.Now(); time.Since(started) < 50*time.Millisecond; { // long enough to be suspected as foreign
		if got := read(t, r, cursors); len(got) != 0 {
			t.Fatalf("read %v although %d may still commit", got, late)
		}
	}
	if err := tx.Commit(t.Context()); err != nil {
		t.Fatal(err)
	}
	if got := naive(); len(got) != 0 {
		t.Errorf("the naive cursor sees %v: this test shows nothing", got)
	}
	if got := readSome(t, r, cursors, 2); got[0].XID != late {
		t.Errorf("read %v, want %d and then the later one", got, late)
	}
}

// The same under load: batches commit in another order than they got their xids, and the reader misses none of them.
func TestReaderMissesNothingUnderLoad(t *testing.T) {
	t.Parallel()
	db := storetest.New(t, storetest.WithShards(4))
	ctx, stop := context.WithTimeout(t.Context(), 2*time.Second)
	defer stop()
	var callers sync.WaitGroup
	var mu sync.Mutex
	want := map[store.Key]bool{}
	for range 3 {
		w := runWriter(t, db.Open(t), store.WriterConfig{SecondWriterAt: 2})
		for c := range 8 {
			callers.Go(func() {
				for ctx.Err() == nil {
					k := storetest.Key(1)
					if _, err := w.Do(t.Context(), publish(k, order(fmt.Sprint(c)))); err != nil {
						t.Error(err)
						return
					}
					mu.Lock()
					want[k] = true
					mu.Unlock()
				}
			})
		}
	}
	r := openReader(t, db.Store)
	cursors := cursorsAtStart(db.Store)
	got := map[store.Key]bool{}
	take := func(segments []store.Segment) {
		for _, s := range segments {
			cursors[s.Shard].Position = s.Position
			if err := s.Records(func(rec *store.Record) bool { got[rec.Key] = true; return true }); err != nil {
				t.Fatal(err)
			}
		}
	}
	for ctx.Err() == nil {
		take(read(t, r, cursors))
	}
	callers.Wait()
	storetest.Eventually(t, within, func() bool {
		take(read(t, r, cursors))
		return len(got) >= len(want)
	})
	for k := range want {
		if !got[k] {
			t.Errorf("%s was skipped", k.Transaction)
		}
	}
	t.Logf("%d transactions", len(want))
}

// A transaction that owns an xid but does not write the log is stepped over; one that does is not, not even beside it.
func TestForeignTransactionsAreSteppedOver(t *testing.T) {
	t.Parallel()
	// Alone: any other transaction of the cluster, known to nobody yet, would be one more to wait for.
	cluster := storetest.NewCluster(t, storetest.WithSettings(map[string]string{"autovacuum": "off"}))
	db := cluster.New(t, storetest.WithShards(1))
	other := cluster.New(t, storetest.WithoutSchema()) // another database of the cluster
	w := runWriter(t, db.Store, store.WriterConfig{})
	r := openReader(t, db.Store)
	cursors := cursorsAtStart(db.Store)
	readUntil := func(n int) (found []store.Segment) {
		t.Helper()
		storetest.Eventually(t, within, func() bool {
			found = append(found, read(t, r, cursors)...)
			if len(found) > 0 {
				cursors[0].Position = found[len(found)-1].Position
			}
			return len(found) >= n
		})
		return found
	}

	foreign := begin(t, other)
	exec(t, foreign, `CREATE TABLE public.orders (id int)`)
	same := begin(t, db)
	exec(t, same, `CREATE TEMP TABLE x (id int)`)
	do(t, w, publish(storetest.Key(1), order("1")), nil)
	readUntil(1)
	if h := r.Horizon(); !h.RoleAware || h.Held == 0 {
		t.Errorf("horizon %+v", h)
	}
	// Known once, it is known: no new search, no new wait.
	do(t, w, publish(storetest.Key(1), order("2")), nil)
	if got := read(t, r, cursors); len(got) != 1 {
		t.Errorf("read %d segments beside a known foreign transaction", len(got))
	} else {
		cursors[0].Position = got[0].Position
	}

	// A slow writer of the log between them holds the horizon at its own xid.
	late, slow := slowWriter(t, db)
	third := storetest.Key(1)
	do(t, w, publish(third, order("3")), nil)
	started := time.Now()
	for time.Since(started) < 100*time.Millisecond {
		if got := read(t, r, cursors); len(got) != 0 {
			t.Fatalf("read %v past the slow writer %d", got, late)
		}
	}
	if h := r.Horizon(); h.XID != late || !h.RoleAware {
		t.Errorf("horizon %+v, want it at %d", h, late)
	}
	if err := slow.Commit(t.Context()); err != nil {
		t.Fatal(err)
	}
	if got := readUntil(2); got[0].XID != late {
		t.Errorf("read %v", got)
	}

	// A writer that waits for a row lock, as a duplicate does, is a writer too.
	k := storetest.Key(1)
	release := blockKey(t, db, k)
	var p pending
	p.submit(t, w, publish(k, order("4")))
	blockedWriter(t, db)
	w2 := runWriter(t, db.Open(t), store.WriterConfig{})
	do(t, w2, publish(storetest.Key(1), order("5")), nil)
	started = time.Now()
	for time.Since(started) < 100*time.Millisecond {
		if got := read(t, r, cursors); len(got) != 0 {
			t.Fatalf("read %v past a blocked writer", got)
		}
	}
	release()
	p.wait()
	readUntil(2)

	for _, tx := range []pgx.Tx{foreign, same} {
		if err := tx.Rollback(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	storetest.Eventually(t, within, func() bool {
		read(t, r, cursors)
		h := r.Horizon()
		return !h.RoleAware && h.Held == 0
	})
}

// A prepared transaction has no backend to look at: it stays in the way until it ends, and then nothing is missing.
func TestPreparedTransactionHoldsTheHorizon(t *testing.T) {
	t.Parallel()
	cluster := storetest.NewCluster(t) // alone: it holds everybody's horizon
	db := cluster.New(t, storetest.WithShards(1))
	w := runWriter(t, db.Store, store.WriterConfig{})
	r := openReader(t, db.Store)
	cursors := cursorsAtStart(db.Store)
	conn := db.Connect(t)
	for _, sql := range []string{`BEGIN`, `CREATE TABLE public.t (id int)`, `PREPARE TRANSACTION 'p'`} {
		if _, err := conn.Exec(t.Context(), sql); err != nil {
			t.Fatal(err)
		}
	}
	do(t, w, publish(storetest.Key(1), order("1")), nil)
	storetest.Eventually(t, within, func() bool {
		if got := read(t, r, cursors); len(got) != 0 {
			t.Fatalf("read %v", got)
		}
		return r.Horizon().Held > 50*time.Millisecond
	})
	db.Exec(t, `COMMIT PREPARED 'p'`)
	readSome(t, r, cursors, 1)
}

// Nothing that is written into a generation just opened is passed over, whatever the reader believed to be in use.
func TestReaderFollowsTheRing(t *testing.T) {
	t.Parallel()
	db := storetest.New(t, storetest.WithShards(1))
	w := runWriter(t, db.Store, store.WriterConfig{})
	r := openReader(t, db.Store)
	cursors := cursorsAtStart(db.Store)
	for gen := range 8 { // first one generation, at last all of them
		db.Exec(t, `UPDATE outbox.generation SET used = true WHERE gen = $1`, gen)
		db.Exec(t, `UPDATE outbox.control SET gen = $1`, gen)
		do(t, w, publish(storetest.Key(1), order("1")), nil)
		storetest.Eventually(t, within, func() bool {
			got := read(t, r, cursors)
			if len(got) == 1 {
				cursors[0].Position = got[0].Position
			}
			return len(got) == 1
		})
	}
	if got := storetest.Query[int](t, db, `SELECT count(DISTINCT gen)::int FROM outbox.log`); got[0] != 8 {
		t.Errorf("%d generations are written", got[0])
	}
	if got := readAll(t, r, db.Store); len(got) != 8 {
		t.Errorf("%d segments in all", len(got))
	}
	db.Exec(t, `UPDATE outbox.generation SET used = gen IN (0, 1, 2)`)
	read(t, r, cursors)
	if got := readAll(t, r, db.Store); len(got) != 3 {
		t.Errorf("%d segments in three generations", len(got))
	}
}

// A batch that began before the rotation may get a later xid than one that began after it: both generations are read at
// once, or the cursor would pass the earlier one.
func TestAStragglerAfterARotationHidesNothing(t *testing.T) {
	t.Parallel()
	db := storetest.New(t, storetest.WithShards(1))
	r := openReader(t, db.Store)
	cursors := cursorsAtStart(db.Store)
	for gen := 1; gen < 5; gen++ {
		read(t, r, cursors) // now it believes to know what is in use
		db.Exec(t, `UPDATE outbox.generation SET used = true WHERE gen = $1`, gen)
		for _, g := range []int{gen, gen - 1} {
			db.Exec(t, `INSERT INTO outbox.log (shard, seq, gen, body) VALUES (0, 0, $1, '\x01')`, g)
		}
		end := storetest.Query[uint64](t, db, `SELECT pg_snapshot_xmax(pg_current_snapshot())`)[0]
		var got []store.Segment
		storetest.Eventually(t, within, func() bool { // in two reads if other tests hold the horizon between them
			segments := read(t, r, cursors)
			if got = append(got, segments...); len(got) > 0 {
				cursors[0].Position = got[len(got)-1].Position
			}
			return r.Horizon().XID >= end
		})
		if len(got) != 2 {
			t.Fatalf("read %v, want two segments", got)
		}
	}
}

func TestReadAt(t *testing.T) {
	t.Parallel()
	db := storetest.New(t, storetest.WithShards(2))
	w := runWriter(t, db.Store, store.WriterConfig{})
	r := openReader(t, db.Store)
	for i := range 20 {
		do(t, w, publish(storetest.Key(1), order(fmt.Sprint(i))), nil)
	}
	all := slices.DeleteFunc(readAll(t, r, db.Store), func(s store.Segment) bool { return s.Shard != 1 })
	if len(all) < 3 {
		t.Fatalf("only %d segments in shard 1", len(all))
	}
	at := []store.Position{all[2].Position, {XID: 1, Seq: 7}, all[0].Position}
	got, err := r.ReadAt(t.Context(), 1, at)
	if err != nil || len(got) != 2 || got[0].Position != all[0].Position || got[1].Position != all[2].Position || string(got[1].Body) != string(all[2].Body) {
		t.Errorf("read %v, %v", got, err)
	}
	if got, err := r.ReadAt(t.Context(), 0, at); err != nil || len(got) != 0 {
		t.Errorf("read in another shard %v, %v", got, err)
	}
}

// The reader survives broken connections, and says once when the server behind its address has another history.
func TestReaderReconnects(t *testing.T) {
	t.Parallel()
	cluster := storetest.NewCluster(t)
	db := cluster.New(t, storetest.WithShards(1))
	w := runWriter(t, db.Store, store.WriterConfig{MaxWait: within})
	do(t, w, publish(storetest.Key(1), order("1")), nil)
	r := openReader(t, db.Store)
	cursors := cursorsAtStart(db.Store)
	readSome(t, r, cursors, 1)
	unavailable := func() {
		t.Helper()
		if _, err := r.Read(t.Context(), cursors, 64); !errors.Is(err, store.ErrUnavailable) {
			t.Fatalf("read: %v", err)
		}
	}
	db.Exec(t, `SELECT pg_terminate_backend($1, 10000)`, r.Conn().PgConn().PID())
	unavailable()
	readSome(t, r, cursorsAtStart(db.Store), 1) // after reconnecting
	db.Exec(t, `SELECT pg_terminate_backend($1, 10000)`, r.Conn().PgConn().PID())
	if _, err := r.ReadAt(t.Context(), 0, nil); !errors.Is(err, store.ErrUnavailable) {
		t.Fatalf("read at: %v", err)
	}
	cluster.Kill()
	if got, err := r.Read(t.Context(), cursors, 64); err == nil {
		t.Fatalf("read %v from a dead server", got)
	}
	if _, err := r.ReadAt(t.Context(), 0, nil); !errors.Is(err, store.ErrUnavailable) {
		t.Fatalf("read at: %v", err)
	}

	// It comes back as a standby, which is of no use, and is promoted: another timeline.
	signal := filepath.Join(cluster.Server().DataDir(), "standby.signal")
	if err := os.WriteFile(signal, nil, 0o644); err != nil {
		t.Fatal(err)
	}
	cluster.Restart(t)
	unavailable()
	if _, err := store.Open(t.Context(), store.Config{DSN: db.DSN}); !errors.Is(err, store.ErrUnavailable) || !strings.Contains(err.Error(), "standby") {
		t.Errorf("open on a standby: %v", err)
	}
	storetest.Eventually(t, within, func() bool {
		if err := db.Store.Ping(t.Context()); err == nil {
			t.Fatal("ping calls a standby writable")
		}
		return storetest.Query[bool](t, db, `SELECT pg_promote()`)[0]
	})
	if _, err := r.Read(t.Context(), cursors, 64); !errors.Is(err, store.ErrStoreChanged) {
		t.Fatalf("read on the new timeline: %v", err)
	}
	readSome(t, r, cursorsAtStart(db.Store), 1)
	// The writer goes on.
	do(t, w, publish(storetest.Key(1), order("2")), nil)
	if err := r.Close(t.Context()); err != nil {
		t.Fatal(err)
	}
	readSome(t, r, cursorsAtStart(db.Store), 2) // after Close
}

func TestOpenReaderFails(t *testing.T) {
	t.Parallel()
	db := storetest.New(t)
	db.Exec(t, `ALTER TABLE outbox.log RENAME COLUMN stale TO gone`)
	if _, err := db.Store.OpenReader(t.Context()); err == nil {
		t.Error("opened on a schema that it does not know")
	}
}
