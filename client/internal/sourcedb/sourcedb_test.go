package sourcedb

import (
	"context"
	"errors"
	"fmt"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"go.uber.org/goleak"
	"google.golang.org/grpc/codes"

	"github.com/outbox-platform/outbox/client"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// TestOutcomeOfCommit: only PostgreSQL's own refusal means that the transaction is rolled back.
func TestOutcomeOfCommit(t *testing.T) {
	pg := func(code, severity string) error {
		return fmt.Errorf("wrapped: %w", &pgconn.PgError{Code: code, Severity: severity, SeverityUnlocalized: severity})
	}
	for _, tc := range []struct {
		err        error
		rolledBack bool
	}{
		{pgx.ErrTxCommitRollback, true},
		{pg("40001", "ERROR"), true},                              // serialization failure
		{pg("40P01", "ERROR"), true},                              // deadlock
		{pg("23505", "ERROR"), true},                              // a deferred constraint
		{pg("P0001", "ERROR"), true},                              // a deferred trigger
		{&pgconn.PgError{Code: "23503", Severity: "ERROR"}, true}, // servers before 9.6 have one severity
		{pg("40003", "ERROR"), false},                             // statement_completion_unknown
		{pg("57P01", "FATAL"), false},                             // the server shuts down
		{pg("57014", "ERROR"), false},                             // cancelled, perhaps while waiting for a standby
		{pg("08P01", "ERROR"), false},                             // a pooler speaks
		{pg("58030", "ERROR"), false},                             // input or output
		{pg("XX000", "ERROR"), false},
		{pg("23505", "FATAL"), false},
		{&pgconn.PgError{}, false},
		{context.DeadlineExceeded, false},
		{errors.New("connection reset"), false},
	} {
		if got := certainlyRolledBack(tc.err); got != tc.rolledBack {
			t.Errorf("%v: %v", tc.err, got)
		}
	}
}

// TestRule is the table of verdicts, as far as one snapshot decides. What needs a real database is tested in pgxoutbox.
func TestRule(t *testing.T) {
	d := client.DatabaseTransaction{XID: 7, SystemIdentifier: 1, Timeline: 1, DatabaseOID: 2, MarkerOID: 3, Mode: client.ModeMarker}
	right := sighting{sysid: 1, timeline: 1, dbOID: 2, marker: 3}
	with := func(change func(*sighting)) sighting {
		s := right
		change(&s)
		return s
	}
	fenced, clientOnly := d, d
	fenced.Mode, clientOnly.Mode = client.ModeXIDFenced, client.ModeClientOnly
	const ask = client.Outcome(-1)
	for name, tc := range map[string]struct {
		d    client.DatabaseTransaction
		s    sighting
		want client.Outcome
	}{
		"marked":                  {d, with(func(s *sighting) { s.marked, s.ended = true, true }), client.OutcomeCommitted},
		"marked elsewhere":        {d, sighting{marked: true, sysid: 9, timeline: 9}, client.OutcomeCommitted},
		"marked, on a standby":    {d, with(func(s *sighting) { s.marked, s.standby = true, true }), client.OutcomeUnknown},
		"ended":                   {d, with(func(s *sighting) { s.ended = true }), client.OutcomeAborted},
		"ended, status committed": {d, with(func(s *sighting) { s.ended, s.status = true, "committed" }), client.OutcomeAborted},
		"ended, other server":     {d, with(func(s *sighting) { s.ended, s.sysid = true, 9 }), client.OutcomeUnknown},
		"ended, other database":   {d, with(func(s *sighting) { s.ended, s.dbOID = true, 9 }), client.OutcomeUnknown},
		"ended, other table":      {d, with(func(s *sighting) { s.ended, s.marker = true, 9 }), client.OutcomeUnknown},
		"ended, row security":     {d, with(func(s *sighting) { s.ended, s.rls = true, true }), client.OutcomeUnknown},
		"ended, other timeline":   {d, with(func(s *sighting) { s.ended, s.timeline = true, 2 }), client.OutcomeUnknown},
		"running":                 {d, right, ask},
		"running, other timeline": {d, with(func(s *sighting) { s.timeline = 2 }), client.OutcomeUnknown},
		"client only":             {clientOnly, with(func(s *sighting) { s.marked = true }), client.OutcomeUnknown},
		"fenced, committed":       {fenced, with(func(s *sighting) { s.ended, s.status = true, "committed" }), client.OutcomeCommitted},
		"fenced, aborted":         {fenced, with(func(s *sighting) { s.ended, s.status = true, "aborted" }), client.OutcomeAborted},
		"fenced, forgotten":       {fenced, with(func(s *sighting) { s.ended = true }), client.OutcomeUnknown},
		"fenced, running":         {fenced, right, client.OutcomeInProgress},
		"fenced, other timeline":  {fenced, with(func(s *sighting) { s.ended, s.status, s.timeline = true, "committed", 2 }), client.OutcomeUnknown},
		"fenced, other server":    {fenced, with(func(s *sighting) { s.ended, s.status, s.sysid = true, "aborted", 2 }), client.OutcomeUnknown},
	} {
		v, more := rule(client.CheckTransaction{ID: client.NewID(), Database: tc.d}, tc.s)
		got := v.Outcome
		if more {
			got = ask
		}
		if got != tc.want {
			t.Errorf("%s: %v (%s)", name, got, v.Reason)
		}
		if v.NaiveWrong != (v.Outcome == client.OutcomeAborted && tc.s.status == "committed") {
			t.Errorf("%s: NaiveWrong %v", name, v.NaiveWrong)
		}
	}
}

func TestRefusedForGood(t *testing.T) {
	for _, tc := range []struct {
		err  error
		want bool
	}{
		{&client.Error{Code: codes.InvalidArgument}, true},
		{&client.Error{Code: codes.AlreadyExists}, true},
		{&client.Error{Code: codes.FailedPrecondition}, true},
		{&client.Error{Code: codes.PermissionDenied, Reason: client.ReasonTopicDenied}, true},
		{&client.Error{Code: codes.PermissionDenied, Reason: client.ReasonSourceDenied}, false},
		{&client.Error{Code: codes.Unauthenticated}, false},
		{&client.Error{Code: codes.Unavailable}, false},
		{&client.Error{Code: codes.Internal}, false},
		{errors.New("x"), false},
	} {
		if got := refusedForGood(tc.err); got != tc.want {
			t.Errorf("%v: %v", tc.err, got)
		}
	}
}

func TestFirstID(t *testing.T) {
	at := time.UnixMilli(1_700_000_000_123)
	id := firstID(at)
	if !client.IDTime(id).Equal(at) || id.Version() != 7 {
		t.Errorf("%v is of %v", id, client.IDTime(id))
	}
}

// TestBoundedMemory: what is beyond the bound is left to the janitor.
func TestBoundedMemory(t *testing.T) {
	d := &Database{upkeep: client.Upkeep{MaxAcknowledged: 2}}
	for range 5 {
		d.acknowledged(client.NewID())
	}
	if len(d.acked) != 2 {
		t.Errorf("%d are remembered", len(d.acked))
	}
}

// TestNothingToClean: the database is not troubled.
func TestNothingToClean(t *testing.T) {
	d := &Database{} // without a pool
	if n, err := d.CleanOnce(t.Context()); n != 0 || err != nil {
		t.Errorf("%d, %v", n, err)
	}
}

// TestNobodyIsAskedAboutMarkersWhileThePlatformIsAway: the janitor does not even look for them.
func TestNobodyIsAskedAboutMarkersWhileThePlatformIsAway(t *testing.T) {
	c, err := client.New(client.Config{Target: "127.0.0.1:1", Source: "orders", Plaintext: true})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	c.AbortLater(client.NewID(), nil, nil) // so that it tries to connect
	for link, changed := c.Link(); link != client.LinkDown; link, changed = c.Link() {
		<-changed
	}
	d := &Database{c: c} // without a pool
	if err := d.tidyAll(t.Context()); err != nil {
		t.Error(err)
	}
}

// TestAPanicAfterCommitIsAnAlarm: and reaches nobody else.
func TestAPanicAfterCommitIsAnAlarm(t *testing.T) {
	var alarms []client.Alarm
	c, err := client.New(client.Config{Target: "127.0.0.1:1", Source: "orders", Plaintext: true, OnAlarm: func(a client.Alarm) { alarms = append(alarms, a) }})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	a := NewAttempt(c, Options{})
	a.quietly(func() { panic("broken") }) //nolint:forbidigo // on purpose
	if len(alarms) != 1 || alarms[0].Kind != client.AlarmBug || alarms[0].TransactionID != a.ID().String() {
		t.Errorf("alarms %+v", alarms)
	}
}
