package pgxoutbox_test

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/prometheus/client_golang/prometheus"

	"github.com/outbox-platform/outbox/client"
	"github.com/outbox-platform/outbox/client/internal/sourcedb"
	"github.com/outbox-platform/outbox/client/pgxoutbox"
	outboxv1 "github.com/outbox-platform/outbox/gen/go/outbox/v1"
	"github.com/outbox-platform/outbox/server"
	"github.com/outbox-platform/outbox/server/resolver"
	"github.com/outbox-platform/outbox/store"
	"github.com/outbox-platform/outbox/store/storetest"
)

// The cases in which pg_xact_status alone would publish what never happened, or drop what did, each with what it says and with
// what the platform says, by check-back and by looking itself. Everything is real: the SDK, a server of the platform, and a
// PostgreSQL that is killed, or fails over.

// phantomVersions are the oldest PostgreSQL that the tests run, and the newest.
var phantomVersions = []string{"15", "18"}

// phantoms is a service with a PostgreSQL of its own, and a platform that nobody has told how it ended.
type phantoms struct {
	t        *testing.T
	cluster  *storetest.Cluster
	name     string // of the service's database
	dsn      string
	pool     *pgxpool.Pool
	platform *storetest.Database
	writer   *store.Writer
	source   *store.Source
	address  string
	asked    atomic.Int64
}

// eachVersion runs a case on every version of PostgreSQL.
func eachVersion(t *testing.T, settings map[string]string, run func(t *testing.T, p *phantoms)) {
	for _, version := range phantomVersions {
		t.Run("PostgreSQL "+version, func(t *testing.T) {
			run(t, newPhantoms(t, storetest.NewCluster(t, storetest.WithVersion(version), storetest.WithSettings(settings))))
		})
	}
}

func newPhantoms(t *testing.T, cluster *storetest.Cluster) *phantoms {
	t.Helper()
	p := &phantoms{t: t, cluster: cluster, platform: storetest.New(t)}
	p.dsn = cluster.New(t, storetest.WithoutSchema()).DSN
	cc, err := pgx.ParseConfig(p.dsn)
	if err != nil {
		t.Fatal(err)
	}
	p.name = cc.Database
	p.pool = p.connect(p.dsn)
	p.exec(schema + client.MarkerDDL + "CREATE TABLE stranger (n int);")
	p.source = p.platform.Source(t, "orders")
	p.writer = p.platform.Writer(t, store.WriterConfig{})
	p.address = serve(t, p.platform, p.writer)
	return p
}

// serve runs a server of the platform that has no resolver.
func serve(t *testing.T, db *storetest.Database, w *store.Writer) string {
	t.Helper()
	cfg, err := server.DefaultConfig()
	if err != nil {
		t.Fatal(err)
	}
	cfg.GRPCListen, cfg.HTTPListen = "127.0.0.1:0", "127.0.0.1:0"
	s, err := server.New(cfg, db.Store, w, slog.New(slog.DiscardHandler), prometheus.NewRegistry())
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.WithoutCancel(t.Context()))
	done := make(chan error, 1)
	go func() { done <- s.Serve(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil && !errors.Is(err, context.Canceled) {
			t.Error(err)
		}
	})
	return s.GRPCAddr()
}

func (p *phantoms) connect(dsn string) *pgxpool.Pool {
	p.t.Helper()
	pool, err := pgxpool.New(p.t.Context(), dsn)
	if err != nil {
		p.t.Fatal(err)
	}
	p.t.Cleanup(pool.Close)
	return pool
}

func (p *phantoms) exec(sql string, args ...any) {
	p.t.Helper()
	if _, err := p.pool.Exec(p.t.Context(), sql, args...); err != nil {
		p.t.Fatal(sql, err)
	}
}

// crash kills the database's server and starts it again.
func (p *phantoms) crash() {
	p.t.Helper()
	p.cluster.Kill()
	p.cluster.Restart(p.t)
	p.pool.Reset()
}

// onto goes on with another server, which has the same databases.
func (p *phantoms) onto(cluster *storetest.Cluster) {
	p.t.Helper()
	p.cluster, p.dsn = cluster, cluster.Server().DSN(p.name)
	p.pool = p.connect(p.dsn)
}

// order is a transaction of the service: its business row, and its event.
type order struct {
	p    *phantoms
	name string
	conn *pgx.Conn
	tx   pgx.Tx
	id   uuid.UUID
	at   client.DatabaseTransaction // as the platform stored it
}

// begin opens a transaction and writes its business row.
func (p *phantoms) begin(settings ...string) *order {
	p.t.Helper()
	ctx := p.t.Context()
	o := &order{p: p, name: uuid.NewString()}
	var err error
	if o.conn, err = pgx.Connect(ctx, p.dsn); err != nil {
		p.t.Fatal(err)
	}
	p.t.Cleanup(func() { _ = o.conn.Close(context.WithoutCancel(ctx)) })
	for _, sql := range settings {
		if _, err := o.conn.Exec(ctx, sql); err != nil {
			p.t.Fatal(sql, err)
		}
	}
	if o.tx, err = o.conn.Begin(ctx); err != nil {
		p.t.Fatal(err)
	}
	return o
}

// prepare does what the SDK does before COMMIT.
func (o *order) prepare() *order {
	o.p.t.Helper()
	ctx := o.p.t.Context()
	if err := upsert(ctx, o.tx, o.name); err != nil {
		o.p.t.Fatal(err)
	}
	c := o.p.client()
	a, err := pgxoutbox.Mark(ctx, o.tx, c, pgxoutbox.Options{})
	if err != nil {
		o.p.t.Fatal(err)
	}
	if err := a.Prepare(ctx, event(o.name, "a")); err != nil {
		o.p.t.Fatal(err)
	}
	o.stored(a.ID())
	return o
}

// prepareRaw is the protocol by hand, for what the SDK refuses.
func (o *order) prepareRaw(change ...func(*client.DatabaseTransaction)) {
	o.p.t.Helper()
	ctx := o.p.t.Context()
	id := client.NewID()
	d := client.DatabaseTransaction{Mode: client.ModeMarker, Timeline: 1}
	err := o.tx.QueryRow(ctx, `INSERT INTO outbox_marker (id) VALUES ($1) RETURNING pg_current_xact_id()::text::bigint,
		(SELECT system_identifier FROM pg_control_system()), (SELECT oid::bigint FROM pg_database WHERE datname = current_database()),
		'outbox_marker'::regclass::oid::bigint`, id).Scan(&d.XID, &d.SystemIdentifier, &d.DatabaseOID, &d.MarkerOID)
	if err != nil {
		o.p.t.Fatal(err)
	}
	for _, f := range change {
		f(&d)
	}
	if _, err := o.p.client().Prepare(ctx, id, d, event(o.name, "a")); err != nil {
		o.p.t.Fatal(err)
	}
	o.stored(id)
}

// client is an instance of the service.
func (p *phantoms) client() *client.Client {
	p.t.Helper()
	c, err := client.New(client.Config{Target: p.address, Source: p.source.Name, Plaintext: true, CloseTimeout: time.Millisecond})
	if err != nil {
		p.t.Fatal(err)
	}
	p.t.Cleanup(func() { c.Close() })
	return c
}

// stored reads what the platform knows.
func (o *order) stored(id uuid.UUID) {
	o.p.t.Helper()
	o.id = id
	tx, err := o.p.platform.Store.Transaction(o.p.t.Context(), o.key())
	if err != nil {
		o.p.t.Fatal(err)
	}
	d := tx.Database
	o.at = client.DatabaseTransaction{
		Database: d.Database, XID: d.XID, SystemIdentifier: d.SystemIdentifier, Timeline: d.Timeline,
		DatabaseOID: d.DatabaseOID, MarkerOID: d.MarkerOID, Mode: client.Mode(d.Mode),
	}
}

func (o *order) key() store.Key {
	return store.Key{Source: o.p.source.ID, Transaction: store.TransactionID(o.id)}
}

func (o *order) exec(sql string) {
	o.p.t.Helper()
	if _, err := o.tx.Exec(o.p.t.Context(), sql); err != nil {
		o.p.t.Fatal(sql, err)
	}
}

func (o *order) commit() *order {
	o.p.t.Helper()
	if err := o.tx.Commit(o.p.t.Context()); err != nil {
		o.p.t.Fatal(err)
	}
	return o
}

// die breaks the connections off.
func (o *order) die() { _ = o.conn.PgConn().Conn().Close() }

// happened is the truth: the business row in the service's database.
func (o *order) happened() bool {
	o.p.t.Helper()
	var yes bool
	if err := o.p.pool.QueryRow(o.p.t.Context(), `SELECT EXISTS (SELECT FROM orders WHERE id = $1)`, o.name).Scan(&yes); err != nil {
		o.p.t.Fatal(err)
	}
	return yes
}

const (
	future    = "in the future"
	forgotten = "NULL"
)

// naive is what pg_xact_status alone says.
func (o *order) naive(want string) {
	o.p.t.Helper()
	o.naiveOf(o.p.pool, want)
}

func (o *order) naiveOf(pool *pgxpool.Pool, want string) {
	o.p.t.Helper()
	var status *string
	err := pool.QueryRow(o.p.t.Context(), `SELECT pg_xact_status($1::text::xid8)`, strconv.FormatUint(o.at.XID, 10)).Scan(&status)
	var pg *pgconn.PgError
	got := forgotten
	switch {
	case errors.As(err, &pg) && pg.Code == "22023":
		got = future
	case err != nil:
		o.p.t.Fatal(err)
	case status != nil:
		got = *status
	}
	if got != want {
		o.p.t.Fatalf("the naive check says %q, want %q: this test proves nothing", got, want)
	}
}

// says asks both ways, and compares with what has to be said. wrong: both have to notice that the naive check is wrong.
func (o *order) says(want client.Outcome, reason string, wrong bool) {
	o.p.t.Helper()
	v := pgxoutbox.Verdicts(o.p.t.Context(), o.p.pool, []client.CheckTransaction{{ID: o.id, Database: o.at}})[0]
	if v.Outcome != want || !strings.Contains(v.Reason, reason) || v.NaiveWrong != wrong {
		o.p.t.Errorf("check-back: %s (%s), the naive check wrong: %v; want %s (%s), %v", v.Outcome, v.Reason, v.NaiveWrong, want, reason, wrong)
	}
	resp, noticed := o.direct()
	if client.Outcome(resp.GetOutcome()) != want || !strings.Contains(resp.GetReason(), reason) || noticed != wrong || resp.GetMethod() != "direct" {
		o.p.t.Errorf("direct: %v, the naive check wrong: %v; want %s (%s), %v", resp, noticed, want, reason, wrong)
	}
}

// nobody has no sessions.
type nobody struct{}

func (nobody) Ask(context.Context, string, string, []*outboxv1.SessionResponse_CheckTransaction) ([]*outboxv1.SessionRequest_CheckAnswer, error) {
	return nil, errors.New("no session")
}

// resolver runs the platform's resolver, with a way into the service's database and no session, until stop.
func (p *phantoms) resolver() (r *resolver.Resolver, reg *prometheus.Registry, src *store.Source, stop func()) {
	p.t.Helper()
	variable := fmt.Sprintf("OUTBOX_TEST_PHANTOM_DSN_%d", p.asked.Add(1))
	p.t.Setenv(variable, p.dsn)
	src, _, err := p.platform.Store.ApplySource(p.t.Context(), store.Source{
		Name: "orders", Topics: []string{"*"}, RecordProfile: 1, FailurePolicy: 1, CloudEventsSource: "/orders", Revision: 0,
		Databases: []store.SourceDatabase{{Name: "default", Mode: store.ModeMarker, DSNRef: "env:" + variable}},
	}, "test", "test")
	if err != nil {
		p.t.Fatal(err)
	}
	reg = prometheus.NewRegistry()
	r, err = resolver.New(resolver.Config{Interval: time.Hour}, p.platform.Store, p.writer, nobody{}, slog.New(slog.DiscardHandler), reg)
	if err != nil {
		p.t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.WithoutCancel(p.t.Context()))
	done := make(chan error, 1)
	go func() { done <- r.Run(ctx) }()
	return r, reg, src, func() {
		cancel()
		if err := <-done; err != nil {
			p.t.Error(err)
		}
	}
}

// direct lets the platform look for itself, which decides the transaction if the answer is conclusive.
func (o *order) direct() (resp *outboxv1.CheckTransactionResponse, naiveWrong bool) {
	o.p.t.Helper()
	r, reg, _, stop := o.p.resolver()
	defer stop()
	d := store.DatabaseTransaction{
		Database: "default", XID: o.at.XID, SystemIdentifier: o.at.SystemIdentifier, Timeline: o.at.Timeline,
		DatabaseOID: o.at.DatabaseOID, MarkerOID: o.at.MarkerOID, Mode: store.Mode(o.at.Mode),
	}
	storetest.Eventually(o.p.t, 20*time.Second, func() bool {
		var err error
		resp, err = r.Check(o.p.t.Context(), store.Parked{Key: o.key(), Database: &d})
		if err != nil && !errors.Is(err, store.ErrUnavailable) { // it does not run yet
			o.p.t.Fatal(err)
		}
		return err == nil
	})
	families, err := reg.Gather()
	if err != nil {
		o.p.t.Fatal(err)
	}
	for _, f := range families {
		if f.GetName() == "outbox_naive_check_wrong_total" {
			naiveWrong = f.GetMetric()[0].GetCounter().GetValue() > 0
		}
	}
	return resp, naiveWrong
}

// state is what the platform has decided.
func (o *order) state() store.State {
	o.p.t.Helper()
	tx, err := o.p.platform.Store.Transaction(o.p.t.Context(), o.key())
	if err != nil {
		o.p.t.Fatal(err)
	}
	return tx.State
}

// takeXID lets strangers work until one of them gets an xid; that one is returned, uncommitted.
func (p *phantoms) takeXID(xid uint64) pgx.Tx {
	p.t.Helper()
	ctx := p.t.Context()
	conn, err := pgx.Connect(ctx, p.dsn)
	if err != nil {
		p.t.Fatal(err)
	}
	p.t.Cleanup(func() { _ = conn.Close(context.WithoutCancel(ctx)) })
	for {
		tx, err := conn.Begin(ctx)
		if err != nil {
			p.t.Fatal(err)
		}
		var got uint64
		if err := tx.QueryRow(ctx, `INSERT INTO stranger VALUES (1) RETURNING pg_current_xact_id()::text::bigint`).Scan(&got); err != nil {
			p.t.Fatal(err)
		}
		if got == xid {
			return tx
		}
		if got > xid {
			p.t.Fatalf("the stranger's xid is %d, not %d", got, xid)
		}
		if err := tx.Commit(ctx); err != nil {
			p.t.Fatal(err)
		}
	}
}

// reused goes on when a crash has lost the transaction's xid: a stranger gets it, and commits. false: it was not lost.
func (o *order) reused() bool {
	o.p.t.Helper()
	var next uint64
	if err := o.p.pool.QueryRow(o.p.t.Context(), `SELECT pg_snapshot_xmax(pg_current_snapshot())::text::bigint`).Scan(&next); err != nil {
		o.p.t.Fatal(err)
	}
	if next > o.at.XID {
		return false // it was written to disk in time
	}
	o.naive(future)
	stranger := o.p.takeXID(o.at.XID)
	// While the stranger runs it delays the verdict; it cannot change it.
	o.says(client.OutcomeInProgress, "", false)
	if err := stranger.Commit(o.p.t.Context()); err != nil {
		o.p.t.Fatal(err)
	}
	o.naive("committed")
	if o.happened() {
		o.p.t.Fatal("the order is there: this test proves nothing")
	}
	o.says(client.OutcomeAborted, "", true)
	if st := o.state(); st != store.Aborted {
		o.p.t.Errorf("it is %s", st)
	}
	return true
}

// phantomTries is how often a crash is tried whose damage depends on timing.
const phantomTries = 8

// until tries a crash until it does what the case is about.
func (p *phantoms) until(attempt func() bool) {
	p.t.Helper()
	for range phantomTries {
		if attempt() {
			return
		}
	}
	p.t.Fatal("the xid was never lost: this test proves nothing")
}

// The database crashes with the transaction open. Nothing had flushed its xid, so a stranger gets it, and commits.
func TestPhantomCrashWithXIDReuse(t *testing.T) {
	eachVersion(t, nil, func(t *testing.T, p *phantoms) {
		p.until(func() bool {
			p.exec("CHECKPOINT")
			o := p.begin().prepare()
			p.crash()
			return o.reused()
		})
	})
}

// The kernel kills a backend that has nothing to do with us (OOM): all of them are restarted, without a new postmaster. Its
// start time, which one might compare, stays the same.
func TestPhantomNeighbourBackendKilled(t *testing.T) {
	eachVersion(t, nil, func(t *testing.T, p *phantoms) {
		p.until(func() bool {
			p.exec("CHECKPOINT")
			var before, after time.Time
			if err := p.pool.QueryRow(t.Context(), `SELECT pg_postmaster_start_time()`).Scan(&before); err != nil {
				t.Fatal(err)
			}
			o := p.begin().prepare()
			neighbour, err := pgx.Connect(t.Context(), p.dsn)
			if err != nil {
				t.Fatal(err)
			}
			if err := syscall.Kill(int(neighbour.PgConn().PID()), syscall.SIGKILL); err != nil {
				t.Fatal(err)
			}
			// The victim's own connection ends because the server throws everybody out.
			storetest.Eventually(t, 20*time.Second, func() bool { return o.conn.Ping(t.Context()) != nil })
			_ = neighbour.Close(t.Context())
			p.pool.Reset()
			p.cluster.Await(t, `SELECT NOT pg_is_in_recovery()`)
			storetest.Eventually(t, 20*time.Second, func() bool {
				return p.pool.QueryRow(t.Context(), `SELECT pg_postmaster_start_time()`).Scan(&after) == nil
			})
			if !after.Equal(before) {
				t.Fatal("the postmaster was started anew: this test proves nothing")
			}
			return o.reused()
		})
	})
}

// The primary commits, dies, and its standby, which has not heard of it, is promoted. The commit is gone, its xid goes to a
// stranger. That is a loss that nobody can repair; what must not happen is a decision before somebody says that the old
// primary is fenced. What was replicated is decided at once.
func TestPhantomFailoverToAsynchronousStandby(t *testing.T) {
	eachVersion(t, nil, func(t *testing.T, p *phantoms) {
		standby := p.cluster.Standby(t, "standby")
		replicated := p.begin().prepare().commit()
		p.catchUp(standby)
		standby.Kill() // the network between the two breaks
		lost := p.begin().prepare().commit()
		p.cluster.Kill()
		standby.Restart(t)
		standby.Promote(t)
		p.onto(standby)

		replicated.naive("committed")
		replicated.says(client.OutcomeCommitted, "", false)
		lost.naive(future)
		lost.says(client.OutcomeUnknown, "timeline 2, not 1", false)
		v := pgxoutbox.Verdicts(t.Context(), p.pool, []client.CheckTransaction{{ID: lost.id, Database: lost.at}, {ID: replicated.id, Database: replicated.at}})
		if v[0].FailedOverTo != 2 || v[1].FailedOverTo != 0 {
			t.Errorf("failed over to timeline %d, and %d of what is marked", v[0].FailedOverTo, v[1].FailedOverTo)
		}
		stranger := p.takeXID(lost.at.XID)
		lost.says(client.OutcomeInProgress, "", false) // it might be itself, prepared for two phases: that only delays
		if err := stranger.Commit(t.Context()); err != nil {
			t.Fatal(err)
		}
		lost.naive("committed")
		if lost.happened() || !replicated.happened() {
			t.Fatal("the wrong order was lost: this test proves nothing")
		}
		lost.says(client.OutcomeUnknown, "timeline 2, not 1", false)
		if st := lost.state(); st != store.Prepared {
			t.Errorf("it is %s", st)
		}
	})
}

// catchUp waits until a standby has everything.
func (p *phantoms) catchUp(standby *storetest.Cluster) {
	p.t.Helper()
	var lsn string
	if err := p.pool.QueryRow(p.t.Context(), `SELECT pg_current_wal_flush_lsn()::text`).Scan(&lsn); err != nil {
		p.t.Fatal(err)
	}
	standby.Await(p.t, `SELECT coalesce(pg_last_wal_replay_lsn() >= '`+lsn+`', false)`)
}

// A lagging standby says of a committed transaction that it runs, or that its xid is in the future: who asks there and has
// little patience drops the events.
func TestPhantomStandbyAsked(t *testing.T) {
	eachVersion(t, nil, func(t *testing.T, p *phantoms) {
		standby := p.cluster.Standby(t, "standby")
		begun := p.begin().prepare() // the standby knows that it runs
		p.exec("INSERT INTO stranger VALUES (1)")
		p.catchUp(standby)
		standby.Await(t, `SELECT pg_wal_replay_pause() IS NOT NULL`)
		standby.Await(t, `SELECT pg_get_wal_replay_pause_state() = 'paused'`)
		begun.commit()
		later := p.begin().prepare().commit()
		if !begun.happened() || !later.happened() {
			t.Fatal("not committed: this test proves nothing")
		}
		primary := p.cluster
		p.onto(standby)
		begun.naive("in progress")
		begun.says(client.OutcomeUnknown, "standby", false)
		later.naive(future) // which on a primary means that it is lost
		later.says(client.OutcomeUnknown, "standby", false)
		standby.Await(t, `SELECT pg_wal_replay_resume() IS NOT NULL`)
		standby.Await(t, `SELECT pg_last_wal_replay_lsn() >= pg_last_wal_receive_lsn()`)
		// Up to date, by chance: nobody can see that from there.
		begun.says(client.OutcomeUnknown, "standby", false)
		p.onto(primary)
		begun.says(client.OutcomeCommitted, "", false)
		later.says(client.OutcomeCommitted, "", false)
	})
}

// A status that nobody keeps any more: after a million transactions and a VACUUM FREEZE PostgreSQL says NULL. Whatever a naive
// check makes of it is wrong for one of two transactions. The marker decides both.
func TestPhantomStatusIsNull(t *testing.T) {
	eachVersion(t, map[string]string{"fsync": "off"}, func(t *testing.T, p *phantoms) {
		done := p.begin().prepare().commit()
		gone := p.begin().prepare()
		if err := gone.tx.Rollback(t.Context()); err != nil {
			t.Fatal(err)
		}
		fenced := p.begin()
		fenced.prepareRaw(func(d *client.DatabaseTransaction) { d.Mode = client.ModeXIDFenced })
		fenced.commit()
		p.burn(1_100_000)
		done.naive(forgotten)
		gone.naive(forgotten)
		done.says(client.OutcomeCommitted, "", false)
		gone.says(client.OutcomeAborted, "", false)
		// Without a marker nobody can tell.
		fenced.says(client.OutcomeUnknown, "forgotten", false)
	})
}

// burn uses up xids, and lets the server forget the old ones.
func (p *phantoms) burn(n int) {
	p.t.Helper()
	p.exec("CREATE UNLOGGED TABLE burnt (n int)")
	// Each of these blocks is a subtransaction with an xid of its own.
	const batch = 100_000
	for ; n > 0; n -= batch {
		p.exec(fmt.Sprintf(`DO $$ BEGIN FOR i IN 1..%d LOOP BEGIN INSERT INTO burnt VALUES (i); EXCEPTION WHEN division_by_zero THEN NULL; END; END LOOP; END $$`, batch))
		p.exec("TRUNCATE burnt")
	}
	p.exec("DROP TABLE burnt; UPDATE pg_database SET datallowconn = true")
	rows, err := p.pool.Query(p.t.Context(), "SELECT datname FROM pg_database")
	if err != nil {
		p.t.Fatal(err)
	}
	names, err := pgx.CollectRows(rows, pgx.RowTo[string])
	if err != nil {
		p.t.Fatal(err)
	}
	for _, name := range names {
		conn, err := pgx.Connect(p.t.Context(), p.cluster.Server().DSN(name))
		if err != nil {
			p.t.Fatal(err)
		}
		if _, err := conn.Exec(p.t.Context(), "VACUUM FREEZE"); err != nil {
			p.t.Fatal(err)
		}
		_ = conn.Close(p.t.Context())
	}
}

// A transaction in the hands of two-phase commit runs until somebody decides it, also across a crash of the server. Here
// pg_xact_status is right, "in progress", for as long as it takes: wrong is only who loses patience, or takes the end of the
// session for the end of the transaction.
func TestPhantomPreparedTransaction(t *testing.T) {
	eachVersion(t, nil, func(t *testing.T, p *phantoms) {
		done, gone := p.begin().prepare(), p.begin().prepare()
		done.exec("PREPARE TRANSACTION 'done'")
		gone.exec("PREPARE TRANSACTION 'gone'")
		done.die()
		gone.die()
		for range 2 {
			for _, o := range []*order{done, gone} {
				o.naive("in progress")
				o.says(client.OutcomeInProgress, "", false)
			}
			p.crash()
		}
		p.exec("COMMIT PREPARED 'done'")
		p.exec("ROLLBACK PREPARED 'gone'")
		done.says(client.OutcomeCommitted, "", false)
		gone.says(client.OutcomeAborted, "", false)
	})
}

// COMMIT is done here and waits for a synchronous standby that does not come. pg_xact_status says "in progress", rightly: the
// row cannot be seen, and the marker cannot either. But who takes a missing marker, or a service that has gone away, for an
// abort would drop the events: when the server restarts, or the wait is given up, it is committed.
func TestPhantomCommitWaitsForSynchronousStandby(t *testing.T) {
	eachVersion(t, nil, func(t *testing.T, p *phantoms) {
		p.exec("ALTER SYSTEM SET synchronous_standby_names = 'nobody'")
		p.exec("SELECT pg_reload_conf()")
		p.cluster.Await(t, `SELECT current_setting('synchronous_standby_names') = 'nobody'`)
		waiting := func() *order {
			o := p.begin().prepare()
			pid := o.conn.PgConn().PID()
			committed := make(chan error, 1)
			go func() { committed <- o.tx.Commit(context.WithoutCancel(t.Context())) }()
			t.Cleanup(func() { <-committed }) //nolint:errcheck // ended, one way or the other
			p.cluster.Await(t, fmt.Sprintf(`SELECT EXISTS (SELECT FROM pg_stat_activity WHERE pid = %d AND wait_event = 'SyncRep')`, pid))
			if o.happened() {
				t.Fatal("it can be seen already: this test proves nothing")
			}
			o.naive("in progress")
			o.says(client.OutcomeInProgress, "", false)
			return o
		}
		cancelled := waiting()
		p.cluster.Await(t, fmt.Sprintf(`SELECT pg_cancel_backend(%d)`, cancelled.conn.PgConn().PID()))
		storetest.Eventually(t, 20*time.Second, cancelled.happened)
		cancelled.naive("committed") // although it was not replicated
		cancelled.says(client.OutcomeCommitted, "", false)

		crashed := waiting()
		p.crash()
		crashed.naive("committed")
		crashed.says(client.OutcomeCommitted, "", false)
	})
}

// Prepare is called in a savepoint that is rolled back, and the rest of the transaction commits. The SDK refuses that; another
// client may not.
func TestPhantomSavepoint(t *testing.T) {
	eachVersion(t, nil, func(t *testing.T, p *phantoms) {
		o := p.begin()
		o.exec("INSERT INTO stranger VALUES (1)")
		inner, err := o.tx.Begin(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		if _, err := pgxoutbox.Mark(t.Context(), inner, p.client(), pgxoutbox.Options{}); !errors.Is(err, client.ErrSavepoint) {
			t.Fatalf("the SDK says: %v", err)
		}
		if err := inner.Rollback(t.Context()); err != nil {
			t.Fatal(err)
		}
		o.exec("SAVEPOINT s")
		if err := upsert(t.Context(), o.tx, o.name); err != nil {
			t.Fatal(err)
		}
		o.prepareRaw()
		o.exec("ROLLBACK TO s")
		o.commit()
		o.naive("committed")
		if o.happened() {
			t.Fatal("the order is there: this test proves nothing")
		}
		o.says(client.OutcomeAborted, "", true)
	})
}

// With synchronous_commit = off a COMMIT is acknowledged before it is on disk, and a crash undoes it. The SDK refuses that;
// another client may not.
func TestPhantomSynchronousCommitOff(t *testing.T) {
	eachVersion(t, map[string]string{"wal_writer_delay": "10s"}, func(t *testing.T, p *phantoms) {
		const off = "SET synchronous_commit = off"
		refused := p.begin(off)
		if _, err := pgxoutbox.Mark(t.Context(), refused.tx, p.client(), pgxoutbox.Options{}); !errors.Is(err, client.ErrAsyncCommit) {
			t.Fatalf("the SDK says: %v", err)
		}
		refused.die()
		p.until(func() bool {
			p.exec("CHECKPOINT")
			o := p.begin(off)
			if err := upsert(t.Context(), o.tx, o.name); err != nil {
				t.Fatal(err)
			}
			o.prepareRaw()
			o.commit()
			o.naive("committed")
			p.crash()
			return !o.happened() && o.reused()
		})
	})
}

// Status and marker are asked for in one statement, in a transaction that has looked at the database before: the status is of
// now, the snapshot is not. "committed" and "no marker" together would drop the events of a committed transaction.
func TestPhantomSnapshotOlderThanStatus(t *testing.T) {
	eachVersion(t, nil, func(t *testing.T, p *phantoms) {
		o := p.begin().prepare()
		tx, err := p.pool.BeginTx(t.Context(), pgx.TxOptions{IsoLevel: pgx.RepeatableRead})
		if err != nil {
			t.Fatal(err)
		}
		defer tx.Rollback(context.WithoutCancel(t.Context())) //nolint:errcheck // it changed nothing
		if _, err := tx.Exec(t.Context(), "SELECT count(*) FROM orders"); err != nil {
			t.Fatal(err)
		}
		o.commit()
		var status string
		var marked bool
		err = tx.QueryRow(t.Context(), `SELECT pg_xact_status($1::text::xid8), EXISTS (SELECT FROM outbox_marker WHERE id = $2)`,
			strconv.FormatUint(o.at.XID, 10), o.id).Scan(&status, &marked)
		if err != nil || status != "committed" || marked {
			t.Fatalf("%s, marked %v, %v: this test proves nothing", status, marked, err)
		}
		// The rules of the SDK in such a transaction: not ABORTED.
		v := sourcedb.Verdicts(t.Context(), pgxoutbox.NewQueryer(tx), []client.CheckTransaction{{ID: o.id, Database: o.at}})[0]
		if v.Outcome != client.OutcomeInProgress || !strings.Contains(v.Reason, "just now") {
			t.Errorf("in the old snapshot: %s (%s)", v.Outcome, v.Reason)
		}
		o.says(client.OutcomeCommitted, "", false)
	})
}
