package resolver

import (
	"context"
	"encoding/json"
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/jackc/pgx/v5"

	outboxv1 "github.com/outbox-platform/outbox/gen/go/outbox/v1"
	"github.com/outbox-platform/outbox/store"
)

// between is the real database, with a test that acts between two statements of a verdict.
type between struct {
	queryer
	before []func() error // before the first, second, … statement; an error is the statement's
	asked  int
	from   string // what of the statements is to be another thing, and which
	to     string
}

func (b *between) act() error {
	b.asked++
	if b.asked > len(b.before) || b.before[b.asked-1] == nil {
		return nil
	}
	return b.before[b.asked-1]()
}

func (b *between) changed(sql string) string {
	if b.from == "" {
		return sql
	}
	return strings.Replace(sql, b.from, b.to, 1)
}

func (b *between) Query(ctx context.Context, sql string, args ...any) (pgx.Rows, error) {
	if err := b.act(); err != nil {
		return nil, err
	}
	return b.queryer.Query(ctx, b.changed(sql), args...)
}

func (b *between) QueryRow(ctx context.Context, sql string, args ...any) pgx.Row {
	if err := b.act(); err != nil {
		return failed{err}
	}
	return b.queryer.QueryRow(ctx, b.changed(sql), args...)
}

type failed struct{ err error }

func (f failed) Scan(...any) error { return f.err }

// What happens between the statements of a verdict may delay it and never makes it wrong; what a database that behaves says
// never, or no more, decides nothing.
func TestVerdictRaces(t *testing.T) {
	w := newWorld(t)
	s := w.source("orders", w.sourceDatabase(), "")
	cut := func() error { return errors.New("the connection is cut") }
	lost := func(a *attempt) { // an xid that the database has not given out: as after a crash
		if err := s.conn.QueryRow(t.Context(), "SELECT pg_snapshot_xmax(pg_current_snapshot())::text::bigint + 100000").Scan(&a.at.XID); err != nil {
			t.Fatal(err)
		}
	}
	never := func() *attempt {
		a := &attempt{s: s, key: store.Key{Source: s.row.ID, Transaction: store.TransactionID(uuid.Must(uuid.NewV7()))}}
		b := s.begin()
		a.at = b.at
		b.exec("ROLLBACK")
		lost(a)
		return a
	}
	failedOver := func() *attempt {
		a := s.begin()
		a.at.Timeline++
		return a
	}
	for _, tc := range []struct {
		name   string
		a      *attempt
		before func(a *attempt) []func() error
		from   string
		to     string
		want   outcome
		reason string
	}{
		{name: "lost", a: never(), want: aborted, reason: "lost in a crash"},
		{name: "the first look is cut", a: never(), before: func(*attempt) []func() error { return []func() error{cut} }, want: unknown, reason: "cut"},
		{name: "the status is cut", a: never(), before: func(*attempt) []func() error { return []func() error{nil, cut} }, want: unknown, reason: "cut"},
		{name: "the second look is cut", a: never(), before: func(*attempt) []func() error { return []func() error{nil, nil, cut} }, want: unknown, reason: "cut"},
		{name: "the marker appears", a: never(), before: func(a *attempt) []func() error {
			return []func() error{nil, nil, func() error {
				_, err := s.conn.Exec(t.Context(), "INSERT INTO outbox_marker (id) VALUES ($1)", [16]byte(a.key.Transaction))
				return err
			}}
		}, want: committed},
		{name: "the status is forgotten", a: never(), from: "pg_xact_status($1::text::xid8)", to: "nullif($1::text, $1::text)", want: unknown, reason: "forgotten"},
		{name: "no answer", a: never(), from: "AS p(id, xid)", to: "AS p(id, xid) WHERE false", want: unknown, reason: "did not answer"},
		{name: "an answer that is none", a: never(), from: "SELECT p.id", to: "SELECT 'no id'", want: unknown, reason: "asking the source database"},
		{name: "failed over, runs here", a: failedOver(), want: inProgress},
		{name: "failed over, the status is cut", a: failedOver(), before: func(*attempt) []func() error { return []func() error{nil, cut} }, want: unknown, reason: "cut"},
		{name: "failed over, ends at the last moment", a: failedOver(), before: func(a *attempt) []func() error {
			return []func() error{nil, func() error { a.commit(); return nil }}
		}, want: inProgress, reason: "just now"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			q := &between{queryer: s.conn, from: tc.from, to: tc.to}
			if tc.before != nil {
				q.before = tc.before(tc.a)
			}
			says(t, tc.a.judge(q), tc.want, tc.reason)
		})
	}
}

// An operator's word is kept, whatever a session sent as evidence.
func TestConfirmedEvidence(t *testing.T) {
	for evidence, there := range map[string]bool{`{"snapshot":"1:1:"}`: true, "": false, "{no JSON": false} {
		var got map[string]any
		if err := json.Unmarshal([]byte(confirmed(evidence, "switched off")), &got); err != nil || got["confirmed"] != "switched off" || (got["database"] != nil) != there {
			t.Errorf("%q became %v, %v", evidence, got, err)
		}
	}
}

// garbling is an instance whose answers carry evidence that PostgreSQL does not take, and that answers for others too.
type garbling struct{ instance }

func (g garbling) Ask(ctx context.Context, name, database string, txs []*outboxv1.SessionResponse_CheckTransaction) ([]*outboxv1.SessionRequest_CheckAnswer, error) {
	answers, err := g.instance.Ask(ctx, name, database, txs)
	for _, a := range answers {
		a.Evidence = `{"snapshot": "\u0000"}`
	}
	other := uuid.Must(uuid.NewV7())
	return append(answers, &outboxv1.SessionRequest_CheckAnswer{TransactionId: other[:], Outcome: committed}), err
}

// Evidence that the store refuses keeps no decision from being made, and an answer that nobody asked for is none.
func TestEvidenceThatTheStoreRefuses(t *testing.T) {
	w := newWorld(t)
	s := w.source("orders", w.sourceDatabase(), "")
	r, _ := w.resolver(garbling{instance{source: s}})
	a := s.begin().prepare().commit()
	r.SessionBroke("orders", "pod", []store.Parked{a.parked()})
	if tx := a.becomes(store.Committed, soon); tx.DecidedBy != methodCheckBack || string(tx.Evidence) != "{}" {
		t.Errorf("decided by %s: %s", tx.DecidedBy, tx.Evidence)
	}
}

// When both ways answer, the first conclusive answer is enough; when neither is conclusive, the second is no better than the first.
func TestBothWaysAnswer(t *testing.T) {
	w := newWorld(t)
	s := w.direct("orders", w.sourceDatabase())
	r, _ := w.resolver(instance{source: s}, func(c *Config) { c.Interval = time.Hour })
	a := s.begin().prepare().commit()
	if resp, err := r.Check(t.Context(), a.parked()); err != nil || resp.GetOutcome() != committed || a.state().State != store.Committed {
		t.Errorf("%v, %v", resp, err)
	}
	b := s.begin()
	b.at.MarkerOID++
	b.prepare()
	b.exec("ROLLBACK")
	if resp, err := r.Check(t.Context(), b.parked()); err != nil || resp.GetOutcome() != unknown || !strings.Contains(resp.GetReason(), "another marker table") {
		t.Errorf("%v, %v", resp, err)
	}
	if st := b.state().State; st != store.Prepared {
		t.Errorf("it is %s", st)
	}
}

// ended is a writer that has ended, as in a server that drains.
func (w *world) ended() *store.Writer {
	w.t.Helper()
	ctx, cancel := context.WithCancel(w.t.Context())
	cancel()
	writer := store.NewWriter(w.db.Store, store.WriterConfig{})
	if err := writer.Run(ctx); err != nil {
		w.t.Fatal(err)
	}
	return writer
}

// What cannot be written is not decided: an operator is told, and the transaction stays with its lane.
func TestDecisionsThatCannotBeWritten(t *testing.T) {
	w := newWorld(t)
	s := w.direct("orders", w.sourceDatabase())
	a := s.begin().prepare().commit()
	good := w.writer
	w.writer = w.ended()
	r, _ := w.resolver(nobody{}, func(c *Config) { c.Interval = time.Hour })
	w.writer = good
	if _, err := r.Check(t.Context(), a.parked()); !errors.Is(err, store.ErrUnavailable) {
		t.Errorf("check: %v", err)
	}
	direct := func(ctx context.Context, concerned []store.Parked) (map[store.Key]finding, error) {
		return judgeAll(ctx, s.conn, concerned)
	}
	resp := &outboxv1.ConfirmFailoverResponse{}
	if err := r.failOver(t.Context(), direct, []store.Parked{a.parked()}, 1, "ops", "r", false, resp); !errors.Is(err, store.ErrUnavailable) {
		t.Errorf("confirm: %v", err)
	}
	if st := a.state().State; st != store.Prepared {
		t.Fatalf("it is %s", st)
	}
	// A lane tries again. Its own loop does not run: the test looks at what is left.
	l := &lane{key: laneKey{source: s.row.ID, database: "default"}, resolver: r, wake: make(chan struct{}, 1), items: map[store.Key]*item{}, database: &sourceDatabase{}}
	defer l.database.close()
	l.add([]store.Parked{a.parked()}, time.Now())
	batch, _ := l.due(time.Now())
	l.round(t.Context(), batch)
	if len(r.writing) != 0 || l.size() != 1 || batch[0].due.After(time.Now().Add(time.Second)) {
		t.Errorf("%d are being written, %d are left, due %s", len(r.writing), l.size(), batch[0].due)
	}
	for err, left := range map[error]int{store.ErrUnavailable: 1, store.ErrContention: 1, store.ErrBacklogFull: 1, errors.New("a bug"): 0} {
		l.add([]store.Parked{a.parked()}, time.Now())
		batch, _ := l.due(time.Now().Add(time.Minute))
		r.writing <- struct{}{}
		r.decided(l, batch[0], answer{key: a.key, method: methodDirect, outcome: committed}, err)
		if len(r.writing) != 0 || l.size() != left {
			t.Errorf("%v: %d are being written, %d are left", err, len(r.writing), l.size())
		}
	}
	if !strings.Contains(w.log.String(), "a bug") {
		t.Error("the bug is not logged")
	}
	// Who stops asks no more, and decides nothing.
	r.writer = good
	l.add([]store.Parked{a.parked()}, time.Now())
	batch, _ = l.due(time.Now().Add(time.Minute))
	stopped, cancel := context.WithCancel(t.Context())
	cancel()
	l.round(stopped, batch)
	if st := a.state().State; st != store.Prepared || l.size() != 1 {
		t.Errorf("it is %s, %d are left", st, l.size())
	}
}

// An operator confirms a failover: what is decided already is not counted, and what stands in the way is told.
func TestConfirmFailoverFails(t *testing.T) {
	w := newWorld(t)
	t.Setenv("RESOLVER_TEST_NOWHERE", "postgres://u@127.0.0.1:1/x")
	s := w.source("orders", w.sourceDatabase(), "env:RESOLVER_TEST_NOWHERE")
	r, _ := w.resolver(nobody{}, func(c *Config) { c.Interval, c.AskTimeout = time.Hour, 500*time.Millisecond })
	a, done := s.begin().prepare(), s.begin().prepare()
	done.exec("ROLLBACK")
	if _, err := w.writer.Do(t.Context(), &store.Request{Kind: store.KindAbort, Key: done.key}); err != nil {
		t.Fatal(err)
	}
	direct := func(ctx context.Context, concerned []store.Parked) (map[store.Key]finding, error) {
		return judgeAll(ctx, s.conn, concerned)
	}
	resp := &outboxv1.ConfirmFailoverResponse{}
	if err := r.failOver(t.Context(), direct, []store.Parked{done.parked()}, 1, "ops", "r", false, resp); err != nil || resp.GetAborted() != 0 || resp.GetUndecided() != 0 {
		t.Errorf("decided already: %v, %v", resp, err)
	}
	w.park()
	var unfit *PreconditionError
	confirm := func(ctx context.Context, src store.Source) error {
		_, err := r.ConfirmFailover(ctx, &src, "default", a.at.Timeline, "ops", "r", false)
		return err
	}
	if err := confirm(t.Context(), *s.row); !errors.As(err, &unfit) || !unfit.FailedPrecondition() {
		t.Errorf("a database that is away: %v", err)
	}
	nowhere := *s.row
	nowhere.Databases = []store.SourceDatabase{{Name: "default", Mode: store.ModeMarker, DSNRef: "env:RESOLVER_TEST_NOT_SET"}}
	if err := confirm(t.Context(), nowhere); !errors.As(err, &unfit) {
		t.Errorf("no DSN: %v", err)
	}
	gone, cancel := context.WithCancel(t.Context())
	cancel()
	if err := confirm(gone, *s.row); !errors.Is(err, context.Canceled) {
		t.Errorf("an operator who has gone: %v", err)
	}
	if st := a.state().State; st != store.Prepared {
		t.Errorf("it is %s", st)
	}
}
