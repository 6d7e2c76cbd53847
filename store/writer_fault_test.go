package store_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/url"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/outbox-platform/outbox/store"
	"github.com/outbox-platform/outbox/store/storetest"
)

// within is how long a test waits for what takes milliseconds on an idle machine.
const within = 30 * time.Second

// blockKey makes every writer wait that inserts or decides k, until release is called.
func blockKey(t *testing.T, db *storetest.Database, k store.Key) (release func()) {
	t.Helper()
	tx, err := db.Connect(t).Begin(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if _, err := tx.Exec(t.Context(), `INSERT INTO outbox.tx (source_id, tx_id, shards, digest, log_xid, state) VALUES ($1, $2, 1, 1, '1', 0)
		ON CONFLICT (source_id, tx_id) DO UPDATE SET digest = excluded.digest`, k.Source, [16]byte(k.Transaction)); err != nil {
		t.Fatal(err)
	}
	return func() {
		if err := tx.Rollback(t.Context()); err != nil {
			t.Error(err)
		}
	}
}

// blockedWriter waits until a backend of a writer waits for a lock, and returns its process id.
func blockedWriter(t *testing.T, db *storetest.Database) (pid int32) {
	t.Helper()
	storetest.Eventually(t, within, func() bool {
		pids := storetest.Query[int32](t, db, `SELECT pid FROM pg_stat_activity WHERE datname = current_database() AND application_name = 'outbox' AND wait_event_type = 'Lock'`)
		if len(pids) > 0 {
			pid = pids[0]
		}
		return pid != 0
	})
	return pid
}

// The backend of a batch dies: the batch is sent again, and stored once.
func TestBackendTerminatedMidBatch(t *testing.T) {
	t.Parallel()
	db := storetest.New(t)
	w := runWriter(t, db.Store, store.WriterConfig{MaxWait: within})
	requests := []*store.Request{}
	for i := range 20 {
		requests = append(requests, prepare(storetest.Key(1), order(fmt.Sprint(i))))
	}
	release := blockKey(t, db, requests[10].Key)
	var p pending
	p.submit(t, w, requests...)
	for range 3 {
		pid := blockedWriter(t, db)
		db.Exec(t, `SELECT pg_terminate_backend($1, 10000)`, pid)
	}
	release()
	for r, a := range p.wait() {
		checkAnswer(t, r, a.Err, nil)
	}
	log := readLog(t, db.Store)
	for _, r := range requests {
		checkLogged(t, log, r.Key, 1, store.Prepared)
	}
}

// The backend of a batch is killed, as by the out-of-memory killer: PostgreSQL restarts all of itself, and the batch is sent
// again when it is back.
func TestBackendKilledMidBatch(t *testing.T) {
	t.Parallel()
	cluster := storetest.NewCluster(t)
	db := cluster.New(t)
	w := runWriter(t, db.Store, store.WriterConfig{MaxWait: within})
	do(t, w, prepare(storetest.Key(1), order("1")), nil) // connects
	r := prepare(storetest.Key(1), order("1"))
	blockKey(t, db, r.Key) // it ends with the crash
	var p pending
	p.submit(t, w, r)
	if err := syscall.Kill(int(blockedWriter(t, db)), syscall.SIGKILL); err != nil {
		t.Fatal("killing a backend needs the right to signal PostgreSQL's processes:", err)
	}
	p.wait()
	checkAnswer(t, r, p.answers[r].Err, nil)
	checkLogged(t, readLog(t, db.Store), r.Key, 1, store.Prepared)
}

// A statement that waits longer than the statement timeout is given up by the server and sent again.
func TestStatementTimeoutIsRetried(t *testing.T) {
	t.Parallel()
	db := storetest.New(t, storetest.WithConfig(func(c *store.Config) { c.StatementTimeout = 200 * time.Millisecond }))
	w := runWriter(t, db.Store, store.WriterConfig{MaxWait: within})
	r := prepare(storetest.Key(1), order("1"))
	release := blockKey(t, db, r.Key)
	var p pending
	p.submit(t, w, r)
	first := blockedWriter(t, db)
	storetest.Eventually(t, within, func() bool { return blockedWriter(t, db) != first })
	release()
	p.wait()
	checkAnswer(t, r, p.answers[r].Err, nil)
	checkLogged(t, readLog(t, db.Store), r.Key, 1, store.Prepared)
}

// Two batches that lock in contrary order: PostgreSQL aborts one with 40P01, and it is sent again.
func TestDeadlockIsRetried(t *testing.T) {
	t.Parallel()
	db := storetest.New(t)
	w := store.NewWriter(db.Store, store.WriterConfig{MaxWait: within})
	setup := runWriter(t, db.Open(t), store.WriterConfig{})
	k1, k2 := storetest.Key(1), storetest.Key(1) // ascending: version 7
	a1, a2 := do(t, setup, prepare(k1, order("1")), nil), do(t, setup, prepare(k2, order("2")), nil)
	other := db.Connect(t)
	if _, err := other.Exec(t.Context(), `SET deadlock_timeout = '1 h'`); err != nil {
		t.Fatal(err) // the writer is the victim
	}
	tx, err := other.Begin(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	const touch = `UPDATE outbox.tx SET digest = digest WHERE tx_id = $1`
	if _, err := tx.Exec(t.Context(), touch, [16]byte(k2.Transaction)); err != nil {
		t.Fatal(err)
	}
	requests := []*store.Request{commit(k2, a2.Shards), commit(k1, a1.Shards)}
	var p pending
	p.submit(t, w, requests...)
	stopAtEnd(t, w)
	blockedWriter(t, db)
	if _, err := tx.Exec(t.Context(), touch, [16]byte(k1.Transaction)); err != nil { // closes the cycle
		t.Fatal("the writer should have been the victim:", err)
	}
	if err := tx.Commit(t.Context()); err != nil {
		t.Fatal(err)
	}
	for r, a := range p.wait() {
		checkAnswer(t, r, a.Err, nil)
	}
	if n := storetest.Query[int64](t, db, `SELECT deadlocks FROM pg_stat_database WHERE datname = current_database()`); n[0] == 0 {
		// The counter is written with a delay; ask until it is there.
		storetest.Eventually(t, within, func() bool {
			return storetest.Query[int64](t, db, `SELECT deadlocks FROM pg_stat_database WHERE datname = current_database()`)[0] > 0
		})
	}
}

// The row with the counts arrives before the transaction commits, and committing may fail: nothing is answered before.
func TestNothingIsAnsweredBeforeCommit(t *testing.T) {
	t.Parallel()
	db := storetest.New(t)
	failing(t, db, "23514", 1000)
	db.Exec(t, `DROP TRIGGER fail ON outbox.tx`)
	db.Exec(t, `CREATE CONSTRAINT TRIGGER fail AFTER INSERT ON outbox.tx DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION public.fail()`)
	w := runWriter(t, db.Store, store.WriterConfig{MaxWait: within})
	k := storetest.Key(1)
	do(t, w, prepare(k, order("1")), store.ErrInvalid)
	do(t, w, commit(k, 0), store.ErrUnknown)
	db.Exec(t, `DROP TRIGGER fail ON outbox.tx`)
	do(t, w, prepare(k, order("1")), nil)
	checkLogged(t, readLog(t, db.Store), k, 1, store.Prepared)
}

// failing makes inserts into tx fail with an SQLSTATE, a number of times.
func failing(t *testing.T, db *storetest.Database, sqlstate string, times int) {
	t.Helper()
	db.Exec(t, fmt.Sprintf(`CREATE SEQUENCE public.failures MAXVALUE %d NO CYCLE`, times+1))
	db.Exec(t, fmt.Sprintf(`CREATE FUNCTION public.fail() RETURNS trigger LANGUAGE plpgsql AS $$
		BEGIN
			IF nextval('public.failures') <= %d THEN RAISE EXCEPTION 'injected' USING ERRCODE = '%s'; END IF;
			PERFORM setval('public.failures', %d);
			RETURN NEW;
		END $$`, times, sqlstate, times))
	db.Exec(t, `CREATE TRIGGER fail BEFORE INSERT ON outbox.tx FOR EACH ROW EXECUTE FUNCTION public.fail()`)
}

func TestSQLStatesOfABatch(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		state string
		times int
		want  error
	}{
		{"40001", 4, nil},
		{"40001", 100, store.ErrContention},
		{"53100", 3, nil}, // disk full, and then not
		{"23514", 100, store.ErrInvalid},
		{"25006", 2, nil}, // became a standby, and then was promoted again
	} {
		t.Run(fmt.Sprint(c.state, " ", c.times), func(t *testing.T) {
			t.Parallel()
			db := storetest.New(t)
			failing(t, db, c.state, c.times)
			w := runWriter(t, db.Store, store.WriterConfig{MaxWait: within})
			do(t, w, prepare(storetest.Key(1), order("1")), c.want)
		})
	}
	t.Run("a bug", func(t *testing.T) {
		t.Parallel()
		db := storetest.New(t)
		failing(t, db, "42883", 1)
		w := runWriter(t, db.Store, store.WriterConfig{})
		_, err := w.Do(t.Context(), prepare(storetest.Key(1), order("1")))
		if err == nil || errors.Is(err, store.ErrUnavailable) || errors.Is(err, store.ErrInvalid) || errors.Is(err, store.ErrContention) {
			t.Errorf("error %v", err)
		}
		do(t, w, prepare(storetest.Key(1), order("1")), nil)
	})
	t.Run("a bug in a look-up", func(t *testing.T) {
		t.Parallel()
		db := storetest.New(t)
		w := runWriter(t, db.Store, store.WriterConfig{})
		db.Exec(t, `ALTER TABLE outbox.tx RENAME COLUMN digest TO gone`)
		if _, err := w.Do(t.Context(), commit(storetest.Key(1), 0)); err == nil || errors.Is(err, store.ErrUnavailable) {
			t.Errorf("error %v", err)
		}
	})
}

// proxy stands between a writer and PostgreSQL. Armed, it lets the next statement through but not its answer, waits until
// the server is done with it, and cuts the connection.
type proxy struct {
	listener net.Listener
	target   string
	armed    atomic.Bool
	swallow  atomic.Int64 // answers that were swallowed
	conns    sync.WaitGroup
}

func newProxy(t *testing.T, dsn string) (p *proxy, proxied string) {
	t.Helper()
	u, err := url.Parse(dsn)
	if err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	p = &proxy{listener: l, target: u.Host}
	u.Host = l.Addr().String()
	p.conns.Go(p.accept)
	t.Cleanup(func() {
		l.Close()
		p.conns.Wait()
	})
	return p, u.String()
}

func (p *proxy) accept() {
	for {
		client, err := p.listener.Accept()
		if err != nil {
			return
		}
		server, err := net.Dial("tcp", p.target)
		if err != nil {
			client.Close()
			continue
		}
		p.conns.Go(func() { p.forward(client, server) })
	}
}

func (p *proxy) forward(client, server net.Conn) {
	defer client.Close()
	var wait sync.WaitGroup
	wait.Go(func() {
		_, _ = io.Copy(server, client)
		server.Close()
	})
	buf := make([]byte, 32<<10)
	for {
		n, err := server.Read(buf)
		if err != nil {
			break
		}
		// The answer to a statement begins after its transaction has committed: PostgreSQL sends it as a whole.
		if p.armed.CompareAndSwap(true, false) {
			p.swallow.Add(1)
			break
		}
		if _, err := client.Write(buf[:n]); err != nil {
			break
		}
	}
	client.Close()
	server.Close()
	wait.Wait()
}

// The connection is lost at COMMIT: the store has the batch, the writer does not know. It sends the batch again, gets OK
// for everything, and nothing is stored twice.
func TestConnectionLostAtCommit(t *testing.T) {
	t.Parallel()
	db := storetest.New(t)
	p, dsn := newProxy(t, db.DSN)
	st, err := store.Open(t.Context(), store.Config{DSN: dsn})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(st.Close)
	w := runWriter(t, st, store.WriterConfig{MaxWait: within})
	do(t, w, prepare(storetest.Key(1), order("1")), nil) // connects
	var keys []store.Key
	for i := range 20 {
		k := storetest.Key(1)
		keys = append(keys, k)
		p.armed.Store(true)
		a := do(t, w, prepare(k, order(fmt.Sprint(i))), nil)
		p.armed.Store(true)
		switch i % 3 {
		case 0:
			do(t, w, commit(k, a.Shards), nil)
		case 1:
			do(t, w, commit(k, 0), nil)
		case 2:
			do(t, w, publish(k, order("other")), store.ErrReused)
			do(t, w, commit(k, a.Shards), nil)
		}
	}
	if p.swallow.Load() < 20 {
		t.Fatalf("only %d answers were lost", p.swallow.Load())
	}
	log := readLog(t, db.Store)
	for _, k := range keys {
		checkLogged(t, log, k, 1, store.Committed)
	}
}

// While the store is away callers wait for MaxWait, no longer; when it is back the writer works again.
func TestStoreAway(t *testing.T) {
	t.Parallel()
	cluster := storetest.NewCluster(t)
	db := cluster.New(t)
	w := runWriter(t, db.Store, store.WriterConfig{MaxWait: 300 * time.Millisecond, MaxBatch: 16})
	k := storetest.Key(1)
	do(t, w, prepare(k, order("1")), nil)
	cluster.Kill()
	started := time.Now()
	var p pending
	var requests []*store.Request
	for i := range 100 {
		requests = append(requests, prepare(storetest.Key(1), order(fmt.Sprint(i))), commit(storetest.Key(1), 0), commit(storetest.Key(1), 1))
	}
	p.submit(t, w, requests...)
	for r, a := range p.wait() {
		checkAnswer(t, r, a.Err, store.ErrUnavailable)
	}
	if waited := time.Since(started); waited < 250*time.Millisecond || waited > 10*time.Second {
		t.Errorf("answered after %s", waited)
	}
	cluster.Restart(t)
	storetest.Eventually(t, within, func() bool {
		_, err := w.Do(t.Context(), commit(k, 0))
		return err == nil
	})
	checkLogged(t, readLog(t, db.Store), k, 1, store.Committed)
}

// PostgreSQL is killed again and again under load: what was acknowledged is there, once; what was not can be repeated.
func TestAcknowledgedIsDurable(t *testing.T) {
	t.Parallel()
	cluster := storetest.NewCluster(t)
	db := cluster.New(t)
	source := db.Source(t, "orders").ID
	w := runWriter(t, db.Store, store.WriterConfig{MaxWait: within})
	ctx, stop := context.WithCancel(t.Context())
	var callers sync.WaitGroup
	var mu sync.Mutex
	acknowledged := map[store.Key]store.State{}
	var count atomic.Int64
	for c := range 16 {
		callers.Go(func() {
			for i := 0; ctx.Err() == nil; i++ {
				k := storetest.Key(source)
				a, err := w.Do(t.Context(), prepare(k, order(fmt.Sprint(c))))
				state := store.Prepared
				if err == nil && i%3 > 0 {
					state = store.Committed
					_, err = w.Do(t.Context(), commit(k, a.Shards))
				}
				if err != nil {
					t.Error(err)
					return
				}
				mu.Lock()
				acknowledged[k] = state
				mu.Unlock()
				count.Add(1)
			}
		})
	}
	for range 3 {
		before := count.Load()
		storetest.Eventually(t, within, func() bool { return count.Load() > before+50 })
		cluster.Kill()
		cluster.Restart(t)
	}
	stop()
	callers.Wait()
	log := readLog(t, db.Store)
	for k, state := range acknowledged {
		checkLogged(t, log, k, 1, state)
	}
	if violations, err := db.Store.Verify(t.Context()); err != nil || len(violations) > 0 {
		t.Errorf("%d violations, the first %v, %v", len(violations), violations[:min(1, len(violations))], err)
	}
}

// A store that answers at the address but is another one, or has become unsafe, is not written to.
func TestWriterRefusesAnotherStore(t *testing.T) {
	t.Parallel()
	db := storetest.New(t)
	w := runWriter(t, db.Store, store.WriterConfig{MaxWait: 300 * time.Millisecond})
	db.Exec(t, `UPDATE outbox.control SET shards = 3`)
	do(t, w, prepare(storetest.Key(1), order("1")), store.ErrUnavailable)
	db.Exec(t, `UPDATE outbox.control SET shards = 16, system_identifier = 5`)
	do(t, w, prepare(storetest.Key(1), order("1")), store.ErrUnavailable)
	db.Exec(t, `UPDATE outbox.control SET system_identifier = (SELECT system_identifier FROM pg_control_system())`)
	do(t, w, prepare(storetest.Key(1), order("1")), nil)
}

// A row that is deleted and stored anew with every attempt ends in ErrContention instead of going round for ever.
func TestLookUpGivesUp(t *testing.T) {
	t.Parallel()
	db := storetest.New(t)
	w := runWriter(t, db.Store, store.WriterConfig{MaxWait: within})
	k := storetest.Key(1)
	do(t, w, prepare(k, order("1")), nil)
	// Updates of tx find nothing, but the row is there and undecided.
	db.Exec(t, `CREATE FUNCTION public.refuse() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RETURN NULL; END $$`)
	db.Exec(t, `CREATE TRIGGER refuse BEFORE UPDATE ON outbox.tx FOR EACH ROW EXECUTE FUNCTION public.refuse()`)
	do(t, w, commit(k, 0), store.ErrContention)
	db.Exec(t, `DROP TRIGGER refuse ON outbox.tx`)
	do(t, w, commit(k, 0), nil)
}
