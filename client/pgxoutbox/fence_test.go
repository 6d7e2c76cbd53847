package pgxoutbox_test

import (
	"errors"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/outbox-platform/outbox/client"
	"github.com/outbox-platform/outbox/client/pgxoutbox"
	"github.com/outbox-platform/outbox/store"
	"github.com/outbox-platform/outbox/store/storetest"
)

// Mode XID_FENCED: no table in the service's database; the xid, made durable before Prepare, decides.

func newFenced(t *testing.T) *phantoms {
	t.Helper()
	p := newPhantoms(t, storetest.NewCluster(t, storetest.WithVersion("18")))
	p.exec("DROP TABLE outbox_marker")
	return p
}

var fencedOptions = pgxoutbox.Options{Mode: client.ModeXIDFenced}

// fence prepares an order in mode XID_FENCED.
func (o *order) fence() *order {
	o.p.t.Helper()
	ctx := o.p.t.Context()
	if err := upsert(ctx, o.tx, o.name); err != nil {
		o.p.t.Fatal(err)
	}
	a, err := pgxoutbox.Mark(ctx, o.tx, o.p.client(), fencedOptions)
	if err != nil {
		o.p.t.Fatal(err)
	}
	if err := a.Prepare(ctx, event(o.name, "a")); err != nil {
		o.p.t.Fatal(err)
	}
	o.stored(a.ID())
	if o.at.Mode != client.ModeXIDFenced || o.at.MarkerOID != 0 {
		o.p.t.Fatalf("%+v", o.at)
	}
	return o
}

// What the transaction did is found out by its xid, by check-back and directly, without a table.
func TestFenced(t *testing.T) {
	p := newFenced(t)
	o := p.begin().fence()
	o.says(client.OutcomeInProgress, "", false)
	o.commit()
	o.says(client.OutcomeCommitted, "", false)
	if st := o.state(); st != store.Committed {
		t.Errorf("it is %s", st)
	}
	gone := p.begin().fence()
	gone.die()
	storetest.Eventually(t, 20*time.Second, func() bool {
		return pgxoutbox.Verdicts(t.Context(), p.pool, []client.CheckTransaction{{ID: gone.id, Database: gone.at}})[0].Outcome != client.OutcomeInProgress
	})
	gone.says(client.OutcomeAborted, "", false)

	// With others in one question; those need the table, and it is not there.
	marked := client.CheckTransaction{ID: client.NewID(), Database: gone.at}
	marked.Database.Mode = client.ModeMarker
	fenced := client.CheckTransaction{ID: o.id, Database: o.at}
	var got []client.Outcome
	for _, v := range pgxoutbox.Verdicts(t.Context(), p.pool, []client.CheckTransaction{fenced, marked, marked, fenced}) {
		got = append(got, v.Outcome)
	}
	if len(got) != 4 || got[0] != client.OutcomeCommitted || got[1] != client.OutcomeUnknown || got[2] != client.OutcomeUnknown || got[3] != client.OutcomeCommitted {
		t.Errorf("%v", got)
	}
}

// After a crash the xid is not given out again: that is what the fence is for. With a marker instead it would be
// (TestPhantomCrashWithXIDReuse).
func TestFencedXIDSurvivesACrash(t *testing.T) {
	p := newFenced(t)
	for range 3 {
		p.exec("CHECKPOINT")
		o := p.begin()
		a, err := pgxoutbox.Mark(t.Context(), o.tx, p.client(), fencedOptions) // nothing but the fence writes
		if err != nil {
			t.Fatal(err)
		}
		if err := a.Prepare(t.Context(), event(o.name, "a")); err != nil {
			t.Fatal(err)
		}
		o.stored(a.ID())
		p.crash()
		p.exec("INSERT INTO stranger VALUES (1)")
		o.naive("aborted")
		o.says(client.OutcomeAborted, "", false)
	}
}

// On another timeline an xid proves nothing, whatever its status.
func TestFencedFailover(t *testing.T) {
	p := newFenced(t)
	standby := p.cluster.Standby(t, "standby")
	replicated := p.begin().fence().commit()
	p.catchUp(standby)
	standby.Kill()
	lost := p.begin().fence().commit()
	p.cluster.Kill()
	standby.Restart(t)
	standby.Promote(t)
	p.onto(standby)
	replicated.says(client.OutcomeUnknown, "another server or timeline", false)
	stranger := p.takeXID(lost.at.XID)
	if err := stranger.Commit(t.Context()); err != nil {
		t.Fatal(err)
	}
	lost.naive("committed")
	lost.says(client.OutcomeUnknown, "another server or timeline", false)
}

// What would not be safe is refused.
func TestFencedRefuses(t *testing.T) {
	p := newFenced(t)
	c := p.client()
	mark := func(tx pgx.Tx) error {
		_, err := pgxoutbox.Mark(t.Context(), tx, c, fencedOptions)
		return err
	}
	o := p.begin("SET synchronous_commit = off")
	if err := mark(o.tx); !errors.Is(err, client.ErrAsyncCommit) {
		t.Errorf("synchronous_commit = off: %v", err)
	}
	for name, tc := range map[string]struct {
		sql  []string
		want error
	}{
		"top level":              {nil, nil},
		"at once in a savepoint": {[]string{"SAVEPOINT s"}, client.ErrSavepoint},
		"a savepoint":            {[]string{"INSERT INTO stranger VALUES (1)", "SAVEPOINT s", "INSERT INTO stranger VALUES (2)"}, client.ErrSavepoint},
		"two":                    {[]string{"SAVEPOINT s", "SAVEPOINT t"}, client.ErrSavepoint},
		"rolled back to":         {[]string{"SAVEPOINT s", "INSERT INTO stranger VALUES (2)", "ROLLBACK TO s"}, client.ErrSavepoint},
		"released":               {[]string{"SAVEPOINT s", "INSERT INTO stranger VALUES (2)", "RELEASE s"}, nil},
	} {
		o := p.begin()
		for _, sql := range tc.sql {
			o.exec(sql)
		}
		if err := mark(o.tx); !errors.Is(err, tc.want) {
			t.Errorf("%s: %v, want %v", name, err, tc.want)
		}
		o.die()
	}
}

// Before PostgreSQL 17 there is no way to flush the xid, and the error says so.
func TestFencedNeedsPostgreSQL17(t *testing.T) {
	p := newPhantoms(t, storetest.NewCluster(t, storetest.WithVersion("15")))
	err := pgxoutbox.InTx(t.Context(), p.pool, p.client(), fencedOptions, ordered(t.Context(), "1", "a"))
	if !errors.Is(err, client.ErrFence) {
		t.Errorf("%v", err)
	}
	var n int
	if err := p.pool.QueryRow(t.Context(), "SELECT count(*) FROM orders").Scan(&n); err != nil || n != 0 {
		t.Errorf("%d orders, %v", n, err)
	}
}

// A registered database says it for all its transactions. There is nowhere to spill to: while the platform is away, they fail.
func TestFencedDatabase(t *testing.T) {
	w := newWorld(t, options{cluster: storetest.NewCluster(t, storetest.WithVersion("18")), config: brisk, detached: true})
	w.exec("DROP TABLE outbox_marker")
	w.register(w.c, pgxoutbox.Upkeep{Mode: client.ModeXIDFenced, DrainInterval: time.Millisecond, MarkerRetention: time.Millisecond})
	w.place("1", "a")
	w.published("1", "a")
	id := w.p.Transactions()[0].ID
	if outcome, reason := w.verdict(id); outcome != "COMMITTED" {
		t.Errorf("check-back: %s (%s)", outcome, reason)
	}
	repeatable := pgxoutbox.Options{TxOptions: pgx.TxOptions{IsoLevel: pgx.RepeatableRead}}
	if err := pgxoutbox.InTx(t.Context(), w.pool, w.c, repeatable, ordered(t.Context(), "1", "b")); err != nil {
		t.Error(err)
	}
	w.down()
	if err := pgxoutbox.InTx(t.Context(), w.pool, w.c, pgxoutbox.Options{}, ordered(t.Context(), "2", "c")); !client.IsUnavailable(err) {
		t.Errorf("away: %v", err)
	}
	if n := value[int](w, "SELECT count(*) FROM orders WHERE id = '2'"); n != 0 {
		t.Errorf("%d orders", n)
	}
	w.p.Restart()
	w.place("2", "d")
	w.published("2", "d")
	if s := w.c.Stats(); s.Spilled != 0 || s.Alarms != 0 {
		t.Errorf("%+v", s)
	}
	if err := pgxoutbox.Register(w.c, "other", w.pool, pgxoutbox.Upkeep{Mode: client.ModeClientOnly}); err == nil {
		t.Error("a registered database can be CLIENT_ONLY")
	}
	none := pgxoutbox.Options{Mode: client.ModeClientOnly}
	if err := pgxoutbox.InTx(t.Context(), w.pool, w.c, none, ordered(t.Context(), "3", "e")); err == nil {
		t.Error("a transaction can be CLIENT_ONLY")
	}
}
