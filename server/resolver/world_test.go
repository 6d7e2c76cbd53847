package resolver

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/prometheus/client_golang/prometheus"

	outboxv1 "github.com/outbox-platform/outbox/gen/go/outbox/v1"
	"github.com/outbox-platform/outbox/store"
	"github.com/outbox-platform/outbox/store/storetest"
)

func TestMain(m *testing.M) { storetest.Main(m) }

const markerTable = `CREATE TABLE outbox_marker (
	id uuid PRIMARY KEY, seq bigint GENERATED ALWAYS AS IDENTITY, created_at timestamptz NOT NULL DEFAULT now(), spilled bytea, refused text)`

// world is a platform's store, and source databases that decide.
type world struct {
	t      *testing.T
	db     *storetest.Database
	writer *store.Writer
	log    *lockedLog
	leases []store.Lease // of all shards, once they are taken
}

func newWorld(t *testing.T) *world {
	t.Helper()
	db := storetest.New(t)
	return &world{t: t, db: db, writer: db.Writer(t, store.WriterConfig{}), log: &lockedLog{}}
}

// lockedLog is a log that a test can read while it is written.
type lockedLog struct {
	mu   sync.Mutex
	text []byte
}

func (l *lockedLog) Write(b []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.text = append(l.text, b...)
	return len(b), nil
}

func (l *lockedLog) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return string(l.text)
}

// source is a registered source with a database of its own.
type source struct {
	w    *world
	dsn  string
	row  *store.Source
	conn *pgxpool.Pool // the service's own
}

// source registers a source whose database is d. ref "": the platform has no way to ask it directly.
func (w *world) source(name string, d *storetest.Database, ref string) *source {
	w.t.Helper()
	s := &source{w: w, dsn: d.DSN}
	conn, err := pgxpool.New(w.t.Context(), d.DSN)
	if err != nil {
		w.t.Fatal(err)
	}
	w.t.Cleanup(conn.Close)
	s.conn = conn
	s.exec(markerTable)
	s.row, _, err = w.db.Store.ApplySource(w.t.Context(), store.Source{
		Name: name, Topics: []string{"*"}, RecordProfile: 1, FailurePolicy: 1, CloudEventsSource: "/" + name,
		Databases: []store.SourceDatabase{{Name: "default", Mode: store.ModeMarker, DSNRef: ref}},
	}, "test", "test")
	if err != nil {
		w.t.Fatal(err)
	}
	return s
}

// direct registers a source that the platform may ask directly.
func (w *world) direct(name string, d *storetest.Database) *source {
	w.t.Helper()
	variable := "OUTBOX_TEST_DSN_" + name
	w.t.Setenv(variable, d.DSN)
	return w.source(name, d, "env:"+variable)
}

func (s *source) exec(sql string, args ...any) {
	s.w.t.Helper()
	if _, err := s.conn.Exec(s.w.t.Context(), sql, args...); err != nil {
		s.w.t.Fatal(sql, err)
	}
}

// attempt is one transaction of a service.
type attempt struct {
	s    *source
	conn *pgx.Conn
	key  store.Key
	at   store.DatabaseTransaction
}

// begin opens a transaction and writes its marker.
func (s *source) begin() *attempt {
	s.w.t.Helper()
	ctx := s.w.t.Context()
	conn, err := pgx.Connect(ctx, s.dsn)
	if err != nil {
		s.w.t.Fatal(err)
	}
	a := &attempt{s: s, conn: conn, key: store.Key{Source: s.row.ID, Transaction: store.TransactionID(uuid.Must(uuid.NewV7()))}}
	s.w.t.Cleanup(func() { _ = conn.Close(context.WithoutCancel(ctx)) })
	a.exec("BEGIN")
	a.at = s.mark(conn, a.key)
	return a
}

// mark writes a marker and reads what Prepare says.
func (s *source) mark(conn *pgx.Conn, k store.Key) store.DatabaseTransaction {
	s.w.t.Helper()
	d := store.DatabaseTransaction{Database: "default", Mode: store.ModeMarker}
	var xid, timeline string
	var system int64
	err := conn.QueryRow(s.w.t.Context(), `
		WITH m AS (INSERT INTO outbox_marker (id) VALUES ($1) RETURNING id)
		SELECT pg_current_xact_id()::text, (SELECT system_identifier FROM pg_control_system()),
		       substr(pg_walfile_name(pg_current_wal_insert_lsn()), 1, 8),
		       (SELECT oid FROM pg_database WHERE datname = current_database()), 'outbox_marker'::regclass::oid FROM m`,
		uuid.UUID(k.Transaction)).Scan(&xid, &system, &timeline, &d.DatabaseOID, &d.MarkerOID)
	if err != nil {
		s.w.t.Fatal(err)
	}
	d.SystemIdentifier = uint64(system)
	d.XID, _ = strconv.ParseUint(xid, 10, 64)
	n, _ := strconv.ParseUint(timeline, 16, 32)
	d.Timeline = uint32(n)
	return d
}

func (a *attempt) exec(sql string) {
	a.s.w.t.Helper()
	if _, err := a.conn.Exec(a.s.w.t.Context(), sql); err != nil {
		a.s.w.t.Fatal(sql, err)
	}
}

// prepare tells the platform.
func (a *attempt) prepare() *attempt {
	a.s.w.t.Helper()
	at := a.at
	_, err := a.s.w.writer.Do(a.s.w.t.Context(), &store.Request{
		Kind: store.KindPrepare, Key: a.key, Database: &at,
		Events: []store.Event{storetest.Event("t", "order", a.key.Transaction.String(), "{}")},
	})
	if err != nil {
		a.s.w.t.Fatal("prepare:", err)
	}
	return a
}

// parked is the attempt as a broken session reports it.
func (a *attempt) parked() store.Parked {
	at := a.at
	return store.Parked{Key: a.key, Database: &at}
}

// die is what a killed service looks like to its database.
func (a *attempt) die() *attempt {
	_ = a.conn.Close(context.WithoutCancel(a.s.w.t.Context()))
	return a
}

func (a *attempt) commit() *attempt {
	a.s.w.t.Helper()
	a.exec("COMMIT")
	return a
}

// state is what the store knows.
func (a *attempt) state() *store.Transaction {
	a.s.w.t.Helper()
	tx, err := a.s.w.db.Store.Transaction(a.s.w.t.Context(), a.key)
	if err != nil {
		a.s.w.t.Fatal(err)
	}
	return tx
}

// becomes waits until the store has the state, and returns the transaction.
func (a *attempt) becomes(want store.State, within time.Duration) *store.Transaction {
	a.s.w.t.Helper()
	storetest.Eventually(a.s.w.t, within, func() bool { return a.state().State == want })
	return a.state()
}

// park copies everything undecided out of the log, as the holders of all shards would.
func (w *world) park() {
	w.t.Helper()
	ctx := w.t.Context()
	st := w.db.Store
	if w.leases == nil {
		var err error
		if w.leases, err = st.AcquireShards(ctx, "relay", 10*time.Minute, 64); err != nil {
			w.t.Fatal(err)
		}
	}
	reader, err := st.OpenReader(ctx)
	if err != nil {
		w.t.Fatal(err)
	}
	defer reader.Close(ctx) //nolint:errcheck // the test goes on
	// The source's open transactions are in the same cluster: what was prepared is readable once they are known as foreign.
	last := storetest.Query[int64](w.t, w.db, "SELECT coalesce(max(xid::text::bigint), 0) FROM outbox.log")[0]
	storetest.Eventually(w.t, soon, func() bool {
		if _, err := reader.Read(ctx, []store.Cursor{{Shard: 0}}, 1); err != nil {
			w.t.Fatal(err)
		}
		return reader.Horizon().XID > uint64(last) //nolint:gosec // an xid
	})
	for i := range w.leases {
		l := &w.leases[i]
		step := store.Step{Shard: l.Shard, Epoch: l.Epoch, Checkpoint: l.Checkpoint}
		for more := true; more; {
			segments, err := reader.Read(ctx, []store.Cursor{{Shard: l.Shard, Position: step.Checkpoint.Position}}, 1000)
			if err != nil {
				w.t.Fatal(err)
			}
			more = len(segments) > 0
			for i := range segments {
				step.Checkpoint.Position, step.Checkpoint.Oldest = segments[i].Position, segments[i].XID
				err := segments[i].Records(func(rec *store.Record) bool {
					if rec.IsDecision {
						return true
					}
					var at *store.DatabaseTransaction
					if rec.Database != nil {
						d := *rec.Database
						at = &d
					}
					step.Park = append(step.Park, store.Parked{
						EventPosition: store.EventPosition{Position: segments[i].Position, Record: rec.Number}, Key: rec.Key, State: store.Prepared,
						Aggregate: store.Aggregate{Source: rec.Key.Source, Type: rec.Event.AggregateType, ID: rec.Event.AggregateID},
						Body:      store.EncodeEvent(nil, rec), Cause: store.CauseInDoubt, Database: at,
					})
					return true
				})
				if err != nil {
					w.t.Fatal(err)
				}
			}
		}
		if len(step.Park) == 0 {
			continue
		}
		if fenced, err := st.Steps(ctx, 10*time.Minute, []store.Step{step}); err != nil || len(fenced) != 0 {
			w.t.Fatalf("parking: %v, %v", fenced, err)
		}
		l.Checkpoint = step.Checkpoint
	}
}

// nobody has no sessions.
type nobody struct{}

func (nobody) Ask(context.Context, string, string, []*outboxv1.SessionResponse_CheckTransaction) ([]*outboxv1.SessionRequest_CheckAnswer, error) {
	return nil, errors.New("no live session")
}

// instance is a live session of one source, answering from its own connections as an SDK does.
type instance struct {
	source *source
	asked  chan int // how many were asked about at once; nil: nobody wants to know
}

func (i instance) Ask(ctx context.Context, name, database string, txs []*outboxv1.SessionResponse_CheckTransaction) ([]*outboxv1.SessionRequest_CheckAnswer, error) {
	if name != i.source.row.Name || database != "default" {
		return nil, errors.New("no live session")
	}
	if i.asked != nil {
		i.asked <- len(txs)
	}
	parked := make([]store.Parked, len(txs))
	for n, tx := range txs {
		d := tx.GetDatabaseTransaction()
		parked[n] = store.Parked{Key: store.Key{Transaction: store.TransactionID(tx.GetTransactionId())}, Database: &store.DatabaseTransaction{
			Database: d.GetDatabase(), XID: d.GetXid(), SystemIdentifier: d.GetSystemIdentifier(), Timeline: d.GetTimeline(),
			DatabaseOID: d.GetDatabaseOid(), MarkerOID: d.GetMarkerOid(), Mode: store.Mode(d.GetMode()),
		}}
	}
	seen, err := judgeAll(ctx, i.source.conn, parked)
	if err != nil {
		return nil, err
	}
	answers := make([]*outboxv1.SessionRequest_CheckAnswer, 0, len(seen))
	for k, f := range seen {
		answers = append(answers, &outboxv1.SessionRequest_CheckAnswer{
			TransactionId: k.Transaction[:], Outcome: f.outcome, Reason: f.reason, Evidence: f.evidence, NaiveWrong: f.naiveWrong, FailedOverTo: f.failedOver,
		})
	}
	return answers, nil
}

// resolver runs a resolver until the test ends.
func (w *world) resolver(sessions Sessions, change ...func(*Config)) (*Resolver, *prometheus.Registry) {
	w.t.Helper()
	cfg := Config{Interval: 10 * time.Millisecond}
	for _, f := range change {
		f(&cfg)
	}
	reg := prometheus.NewRegistry()
	r, err := New(cfg, w.db.Store, w.writer, sessions, slog.New(slog.NewTextHandler(io.MultiWriter(w.log, w.t.Output()), nil)), reg)
	if err != nil {
		w.t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.WithoutCancel(w.t.Context()))
	done := make(chan error, 1)
	go func() { done <- r.Run(ctx) }()
	w.t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			w.t.Error("the resolver ended with", err)
		}
	})
	storetest.Eventually(w.t, 10*time.Second, func() bool {
		r.mu.Lock()
		defer r.mu.Unlock()
		return r.ctx != nil && len(r.sources) > 0
	})
	return r, reg
}

// metric returns the value of a counter or gauge.
func metric(t testing.TB, reg *prometheus.Registry, name string, labels ...string) float64 {
	t.Helper()
	families, err := reg.Gather()
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range families {
		if f.GetName() != name {
			continue
		}
		for _, m := range f.GetMetric() {
			fits := 0
			for _, l := range m.GetLabel() {
				for i := 0; i+1 < len(labels); i += 2 {
					if l.GetName() == labels[i] && l.GetValue() == labels[i+1] {
						fits++
					}
				}
			}
			if 2*fits == len(labels) {
				return m.GetCounter().GetValue() + m.GetGauge().GetValue()
			}
		}
	}
	return 0
}

// sourceDatabase makes a database without the platform's schema on the shared server.
func (w *world) sourceDatabase() *storetest.Database {
	w.t.Helper()
	return storetest.New(w.t, storetest.WithoutSchema())
}

func says(t *testing.T, f finding, o outcome, reason string) {
	t.Helper()
	if f.outcome != o || (reason != "") != (f.reason != "") || !strings.Contains(f.reason, reason) {
		t.Errorf("%s (%s), want %s (%s)", outcomeName(f.outcome), f.reason, outcomeName(o), reason)
	}
}

// judge asks one source database directly.
func (a *attempt) judge(q queryer, change ...func(*store.DatabaseTransaction)) finding {
	a.s.w.t.Helper()
	p := a.parked()
	for _, f := range change {
		f(p.Database)
	}
	seen, err := judgeAll(a.s.w.t.Context(), q, []store.Parked{p})
	if err != nil {
		return finding{outcome: unknown, reason: err.Error()}
	}
	if len(seen) != 1 {
		a.s.w.t.Fatalf("%d findings", len(seen))
	}
	return seen[a.key]
}

// switchable has sessions once they are switched on.
type switchable struct{ on atomic.Pointer[instance] }

func (s *switchable) Ask(ctx context.Context, name, database string, txs []*outboxv1.SessionResponse_CheckTransaction) ([]*outboxv1.SessionRequest_CheckAnswer, error) {
	if i := s.on.Load(); i != nil {
		return i.Ask(ctx, name, database, txs)
	}
	return nobody{}.Ask(ctx, name, database, txs)
}
