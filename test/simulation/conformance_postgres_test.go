package simulation

import (
	"context"
	"fmt"
	"slices"
	"strconv"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/outbox-platform/outbox/relay"
	"github.com/outbox-platform/outbox/store"
	"github.com/outbox-platform/outbox/store/storetest"
)

// onPostgres is the store itself as a subject, on a database that it has for itself. Time passes in it by moving back all
// that is written down of the past.
type onPostgres struct {
	relay.Store
	st      *store.Store
	tb      testing.TB
	db      *storetest.Database
	servers []string // the application names of the servers' connections
	hands   *pgx.Conn
	writers []*store.SteppedWriter
	under   []chan struct{} // closed when what a server has begun has ended; nil: nothing
	held    []bool
	reader  *store.Reader
}

var _ subject = (*onPostgres)(nil)

// patience is how long the real store may take for anything. Whoever meets it has failed.
const patience = 30 * time.Second

// holdSQL lets whoever has written transactions wait before it commits, if a lock that has the name of its application is
// taken: a slow writer.
const holdSQL = `
CREATE FUNCTION public.hold() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
  PERFORM pg_advisory_xact_lock_shared(hashtext(current_setting('application_name')));
  RETURN NULL;
END $$;
CREATE CONSTRAINT TRIGGER hold AFTER INSERT OR UPDATE ON outbox.tx DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION public.hold()`

// newOnPostgres opens the store of a database. Everything that takes part has connections of its own, with names.
func newOnPostgres(t testing.TB, db *storetest.Database, servers, maxBatch int) *onPostgres {
	t.Helper()
	p := &onPostgres{tb: t, db: db, hands: db.Connect(t), under: make([]chan struct{}, servers), held: make([]bool, servers)}
	if _, err := p.hands.Exec(t.Context(), holdSQL, pgx.QueryExecModeSimpleProtocol); err != nil {
		t.Fatal(err)
	}
	for n := range servers {
		p.servers = append(p.servers, "server-"+strconv.Itoa(n))
		w := store.NewSteppedWriterOf(p.open(p.servers[n]), patient(maxBatch))
		t.Cleanup(func() { w.Close(context.WithoutCancel(t.Context())) })
		p.writers = append(p.writers, w)
	}
	p.use(p.open("relay"))
	var err error
	if p.reader, err = p.open("reader").OpenReader(t.Context()); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = p.reader.Close(context.WithoutCancel(t.Context())) })
	return p
}

func (p *onPostgres) open(name string) *store.Store {
	p.tb.Helper()
	st, err := store.Open(p.tb.Context(), store.Config{DSN: p.db.DSN, ApplicationName: name, StatementTimeout: time.Minute, Unsafe: true})
	if err != nil {
		p.tb.Fatal(err)
	}
	p.tb.Cleanup(st.Close)
	return st
}

func (p *onPostgres) use(st *store.Store) { p.Store, p.st = relay.FromPostgres(st), st }

func (p *onPostgres) exec(sql string, args ...any) {
	p.tb.Helper()
	if _, err := p.hands.Exec(p.tb.Context(), sql, args...); err != nil {
		p.tb.Fatalf("%s: %v", sql, err)
	}
}

func query[T any](p *onPostgres, sql string, args ...any) []T {
	p.tb.Helper()
	rows, err := p.hands.Query(p.tb.Context(), sql, args...)
	if err == nil {
		var found []T
		if found, err = pgx.CollectRows(rows, pgx.RowTo[T]); err == nil {
			return found
		}
	}
	p.tb.Fatalf("%s: %v", sql, err)
	return nil
}

// empty makes the store as it was when it was new, but for the xids.
func (p *onPostgres) empty() {
	p.tb.Helper()
	for server := range p.servers {
		p.hold(server, false)
	}
	p.settle()
	for {
		if _, err := p.reader.Read(p.tb.Context(), nil, 1); err == nil {
			break
		}
	}
	err := pgx.BeginFunc(p.tb.Context(), p.hands, func(tx pgx.Tx) error {
		var b pgx.Batch
		for _, table := range []string{"tx", "parked", "dead_letter", "operation", "resolution", "relay"} {
			b.Queue(`DELETE FROM outbox.` + table)
		}
		for g := range ringSize {
			b.Queue(fmt.Sprintf(`TRUNCATE outbox.log_%d`, g))
		}
		b.Queue(`ALTER TABLE outbox.operation ALTER operation_id RESTART`)
		b.Queue(`UPDATE outbox.shard SET epoch = 0, holder = '', lease_until = '-infinity', xid = '0', seq = -1, oldest = '0', pend = '', offsets = ''`)
		b.Queue(`UPDATE outbox.generation SET closed_at = NULL, used = (gen = 0)`)
		b.Queue(`UPDATE outbox.control SET gen = 0, gen_since = now(), tx_known_since = now()`)
		return tx.SendBatch(p.tb.Context(), &b).Close()
	})
	if err != nil {
		p.tb.Fatal("emptying the store:", err)
	}
}

func (p *onPostgres) writer(server int) *store.SteppedWriter { return p.writers[server] }

func (p *onPostgres) run(server int, put func()) {
	ended := make(chan struct{})
	p.under[server] = ended
	go func() {
		defer close(ended)
		put()
	}()
	p.settle()
}

// waitingSQL names the applications that wait for a lock that somebody keeps who waits for us.
const waitingSQL = `
WITH l AS MATERIALIZED (SELECT * FROM pg_locks)
SELECT a.application_name FROM l w JOIN pg_stat_activity a USING (pid)
WHERE NOT w.granted AND a.datname = current_database() AND (w.locktype = 'advisory' OR w.locktype = 'transactionid' AND EXISTS (
  SELECT FROM l h JOIN l hw ON hw.pid = h.pid AND NOT hw.granted AND hw.locktype = 'advisory'
  WHERE h.locktype = 'transactionid' AND h.transactionid = w.transactionid AND h.granted))`

func (p *onPostgres) settle() {
	p.tb.Helper()
	deadline := time.NewTimer(patience)
	defer deadline.Stop()
	tick := time.NewTicker(2 * time.Millisecond)
	defer tick.Stop()
	for {
		looking := slices.IndexFunc(p.under, func(c chan struct{}) bool { return c != nil })
		if looking < 0 {
			return
		}
		for server, c := range p.under {
			select {
			case <-c:
				p.under[server] = nil
			default:
			}
		}
		if slices.Contains(p.held, true) {
			waiting := query[string](p, waitingSQL)
			all := true
			for server, c := range p.under {
				all = all && (c == nil || slices.Contains(waiting, p.servers[server]))
			}
			if all {
				return
			}
		}
		var ended chan struct{}
		if looking = slices.IndexFunc(p.under, func(c chan struct{}) bool { return c != nil }); looking >= 0 {
			ended = p.under[looking]
		}
		select {
		case <-ended:
		case <-tick.C:
		case <-deadline.C:
			p.tb.Fatal("a batch neither ends nor waits for us")
		}
	}
}

func (p *onPostgres) busy(server int) bool { return p.under[server] != nil }

func (p *onPostgres) hold(server int, held bool) {
	if held == p.held[server] {
		return
	}
	p.held[server] = held
	if held {
		p.exec(`SELECT pg_advisory_lock(hashtext($1))`, p.servers[server])
	} else {
		p.exec(`SELECT pg_advisory_unlock(hashtext($1))`, p.servers[server])
	}
}

// end ends connections, and returns when they are gone.
func (p *onPostgres) end(application, condition string) {
	p.exec(`SELECT pg_terminate_backend(pid, 30000) FROM pg_stat_activity WHERE datname = current_database() AND application_name = $1`+condition, application)
}

func (p *onPostgres) cut(server int) {
	p.end(p.servers[server], ` AND state = 'active'`)
	p.settle()
}

func (p *onPostgres) disconnect() { p.end("reader", "") }

func (p *onPostgres) ClaimInDoubt(ctx context.Context, limit int, lease time.Duration) ([]store.Parked, error) {
	return p.st.ClaimInDoubt(ctx, limit, lease)
}

func (p *onPostgres) RecordAnswer(ctx context.Context, keys []store.Key, answer string, next time.Duration) error {
	return p.st.RecordAnswer(ctx, keys, answer, next)
}

func (p *onPostgres) RequestOperation(ctx context.Context, a store.Aggregate, action store.Action, actor, reason string) (*store.Operation, error) {
	return p.st.RequestOperation(ctx, a, action, actor, reason)
}

// read reads until it has what it should: somebody else in the cluster may hold the horizon for a moment. More than that
// comes back at once.
func (p *onPostgres) read(cursors []store.Cursor, limit int, wanted func([]store.Segment) bool) (found []store.Segment, err error) {
	deadline := time.Now().Add(5 * time.Second)
	for {
		found, err = p.reader.Read(p.tb.Context(), cursors, limit)
		if err != nil || wanted(found) || time.Now().After(deadline) {
			return found, err
		}
	}
}

func (p *onPostgres) readAt(shard int16, at []store.Position) ([]store.Segment, error) {
	return p.reader.ReadAt(p.tb.Context(), shard, at)
}

func (p *onPostgres) pass(d time.Duration) {
	var b pgx.Batch
	for table, columns := range map[string][]string{
		"shard": {"lease_until"}, "relay": {"live_until"}, "parked": {"since", "check_at"}, "dead_letter": {"since"}, "operation": {"requested_at", "done_at"},
		"tx": {"prepared_at", "decided_at"}, "resolution": {"resolved_at"}, "generation": {"closed_at"}, "control": {"gen_since", "tx_known_since"},
	} {
		set := ""
		for i, c := range columns {
			if i > 0 {
				set += ", "
			}
			set += c + " = " + c + " - $1::interval"
		}
		b.Queue(`UPDATE outbox.`+table+` SET `+set, d)
	}
	if err := p.hands.SendBatch(p.tb.Context(), &b).Close(); err != nil {
		p.tb.Fatal("moving time:", err)
	}
}

func (p *onPostgres) upkeep(full bool, logRetention, retention, resolutionRetention time.Duration) string {
	cfg := store.MaintenanceConfig{GenerationBytes: 1 << 40, LogRetention: logRetention, TxRetention: retention, ResolutionRetention: resolutionRetention}
	if full {
		cfg.GenerationBytes = 1
	}
	report, err := p.st.MaintainOnce(p.tb.Context(), cfg)
	if err != nil || !report.Leader {
		p.tb.Fatal("maintenance:", report, err)
	}
	return upkeepText(report.Rotated, report.Truncated, int(report.Purged))
}

func upkeepText(rotated bool, truncated, purged int) string {
	return fmt.Sprintf("rotated %v, %d truncated, %d purged", rotated, truncated, purged)
}

func (p *onPostgres) dump() *dump {
	p.tb.Helper()
	d := &dump{}
	var b pgx.Batch
	collect := func(sql string, scan func(pgx.CollectableRow) error) {
		b.Queue(sql).Query(func(rows pgx.Rows) error {
			_, err := pgx.CollectRows(rows, func(row pgx.CollectableRow) (struct{}, error) { return struct{}{}, scan(row) })
			return err
		})
	}
	collect(`SELECT t.source_id, t.tx_id, t.state, t.shards, t.digest, t.log_xid, t.decided_at IS NOT NULL, coalesce(r.method || ' by ' || r.actor, '')
		FROM outbox.tx t LEFT JOIN outbox.resolution r USING (source_id, tx_id) ORDER BY t.source_id, t.tx_id`, func(row pgx.CollectableRow) error {
		var t dumpedTx
		var shards, digest int64
		err := row.Scan(&t.Key.Source, (*[16]byte)(&t.Key.Transaction), &t.State, &shards, &digest, &t.logXID, &t.decided, &t.resolved)
		t.Shards, t.Digest = store.ShardSet(shards), uint64(digest) //nolint:gosec // the same bits
		d.tx = append(d.tx, t)
		return err
	})
	collect(`SELECT shard, xid, seq, stale, body, gen FROM outbox.log ORDER BY shard, xid, seq`, func(row pgx.CollectableRow) error {
		var g segment
		err := row.Scan(&g.Shard, &g.XID, &g.Seq, &g.Stale, &g.Body, &g.generation)
		d.log = append(d.log, g)
		return err
	})
	collect(`SELECT shard, xid, seq, record, source_id, tx_id, aggregate_type, aggregate_id, state, cause, body, attempts, error, next_try, checks,
		coalesce(last_answer, ''), database, db_xid, system_identifier::text::xid8, timeline, database_oid, marker_oid, mode, check_at IS NOT NULL
		FROM outbox.parked ORDER BY shard, xid, seq, record`, func(row pgx.CollectableRow) error {
		var q dumpedParked
		var next *time.Time
		var name *string
		var xid, system *uint64
		var timeline, databaseOID, markerOID *int64
		var mode *int16
		err := row.Scan(&q.shard, &q.XID, &q.Seq, &q.Record, &q.Key.Source, (*[16]byte)(&q.Key.Transaction), &q.Aggregate.Type, &q.Aggregate.ID, &q.State,
			&q.Cause, &q.Body, &q.Attempts, &q.Error, &next, &q.Checks, &q.LastAnswer, &name, &xid, &system, &timeline, &databaseOID, &markerOID, &mode, &q.asked)
		q.Aggregate.Source = q.Key.Source
		if next != nil {
			q.NextTry = *next
		}
		if err == nil && mode != nil {
			q.Database = &store.DatabaseTransaction{
				Database: *name, XID: *xid, SystemIdentifier: *system, Timeline: uint32(*timeline), DatabaseOID: uint32(*databaseOID), //nolint:gosec // were that
				MarkerOID: uint32(*markerOID), Mode: store.Mode(*mode), //nolint:gosec // was that
			}
		}
		d.parked = append(d.parked, q)
		return err
	})
	collect(`SELECT xid, seq, record, shard, source_id, tx_id, aggregate_type, aggregate_id, body, error, attempts, queue
		FROM outbox.dead_letter ORDER BY shard, xid, seq, record`, func(row pgx.CollectableRow) error {
		var l store.DeadLetter
		err := row.Scan(&l.XID, &l.Seq, &l.Record, &l.Shard, &l.Key.Source, (*[16]byte)(&l.Key.Transaction), &l.Aggregate.Type, &l.Aggregate.ID, &l.Body,
			&l.Error, &l.Attempts, &l.Queue)
		l.Aggregate.Source = l.Key.Source
		d.dead = append(d.dead, l)
		return err
	})
	collect(`SELECT operation_id, shard, source_id, aggregate_type, aggregate_id, action, outcome, events FROM outbox.operation WHERE done_at IS NULL
		ORDER BY operation_id`, func(row pgx.CollectableRow) error {
		var o store.Operation
		err := row.Scan(&o.ID, &o.Shard, &o.Aggregate.Source, &o.Aggregate.Type, &o.Aggregate.ID, &o.Action, &o.Outcome, &o.Events)
		d.operations = append(d.operations, o)
		return err
	})
	collect(`SELECT xid, seq, oldest, pend, offsets, epoch, holder, lease_until > now() FROM outbox.shard ORDER BY shard`, func(row pgx.CollectableRow) error {
		var s dumpedShard
		err := row.Scan(&s.Position.XID, &s.Position.Seq, &s.Oldest, &s.Pend, &s.Offsets, &s.epoch, &s.holder, &s.leased)
		d.shards = append(d.shards, s)
		return err
	})
	collect(`SELECT gen FROM outbox.control`, func(row pgx.CollectableRow) error { return row.Scan(&d.open) })
	collect(`SELECT gen::int FROM outbox.generation WHERE used ORDER BY gen`, func(row pgx.CollectableRow) error {
		var g int
		err := row.Scan(&g)
		d.used = append(d.used, g)
		return err
	})
	if err := p.hands.SendBatch(p.tb.Context(), &b).Close(); err != nil {
		p.tb.Fatal("reading all that is stored:", err)
	}
	return d
}
