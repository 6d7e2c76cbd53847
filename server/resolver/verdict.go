package resolver

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strconv"
	"time"

	"github.com/google/uuid"
	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"

	outboxv1 "github.com/outbox-platform/outbox/gen/go/outbox/v1"
	"github.com/outbox-platform/outbox/internal/fault"
	"github.com/outbox-platform/outbox/store"
)

// outcome is what can be said about a transaction.
type outcome = outboxv1.SessionRequest_CheckAnswer_Outcome

// The outcomes.
const (
	committed  = outboxv1.SessionRequest_CheckAnswer_OUTCOME_COMMITTED
	aborted    = outboxv1.SessionRequest_CheckAnswer_OUTCOME_ABORTED
	inProgress = outboxv1.SessionRequest_CheckAnswer_OUTCOME_IN_PROGRESS
	unknown    = outboxv1.SessionRequest_CheckAnswer_OUTCOME_UNKNOWN
)

// verdictSQL judges many transactions in one snapshot: "has it ended?" and "is its marker there?" must not be asked at two
// moments. It runs outside of any transaction, on the primary. pg_xact_status is called only for xids that have ended in
// this snapshot: for one in the future it would fail, and the whole statement with it. In mode MARKER its answer decides
// nothing; it only tells what a naive resolver would have said.
const verdictSQL = `
SELECT p.id,
       pg_is_in_recovery(),
       (SELECT system_identifier FROM pg_control_system()),
       CASE WHEN pg_is_in_recovery() THEN 0 ELSE ('x' || substr(pg_walfile_name(pg_current_wal_insert_lsn()), 1, 8))::bit(32)::bigint END,
       (SELECT oid::bigint FROM pg_database WHERE datname = current_database()),
       'outbox_marker'::regclass::oid::bigint,
       row_security_active('outbox_marker'),
       EXISTS (SELECT 1 FROM outbox_marker m WHERE m.id = p.id),
       pg_visible_in_snapshot(p.xid, pg_current_snapshot()),
       p.xid < pg_snapshot_xmax(pg_current_snapshot()),
       coalesce(CASE WHEN pg_visible_in_snapshot(p.xid, pg_current_snapshot()) THEN pg_xact_status(p.xid) END, ''),
       pg_current_snapshot()::text
FROM   unnest($1::text[]::uuid[], $2::text[]::xid8[]) AS p(id, xid)`

// fencedSQL is the same for databases without a marker table (mode XID_FENCED).
const fencedSQL = `
SELECT p.id,
       pg_is_in_recovery(),
       (SELECT system_identifier FROM pg_control_system()),
       CASE WHEN pg_is_in_recovery() THEN 0 ELSE ('x' || substr(pg_walfile_name(pg_current_wal_insert_lsn()), 1, 8))::bit(32)::bigint END,
       (SELECT oid::bigint FROM pg_database WHERE datname = current_database()),
       0::bigint, false, false,
       pg_visible_in_snapshot(p.xid, pg_current_snapshot()),
       p.xid < pg_snapshot_xmax(pg_current_snapshot()),
       coalesce(CASE WHEN pg_visible_in_snapshot(p.xid, pg_current_snapshot()) THEN pg_xact_status(p.xid) END, ''),
       pg_current_snapshot()::text
FROM   unnest($1::text[]::uuid[], $2::text[]::xid8[]) AS p(id, xid)`

// statusSQL is asked alone, one call per xid: an xid in the future is an error (SQLSTATE 22023).
const statusSQL = `SELECT pg_xact_status($1::text::xid8)`

// clientOnly is why nobody is asked about transactions of mode CLIENT_ONLY.
const clientOnly = "only the client or an operator can decide it"

// queryer is a pool of plain connections to a source database, each statement in a transaction of its own.
type queryer interface {
	Query(ctx context.Context, sql string, args ...any) (pgx.Rows, error)
	QueryRow(ctx context.Context, sql string, args ...any) pgx.Row
}

// finding is what a source database says about one transaction.
type finding struct {
	outcome  outcome
	reason   string
	evidence string // JSON object
	method   string // ""; direct
	// naiveWrong: pg_xact_status alone would have said something else that is wrong.
	naiveWrong bool
	// otherTimeline: nothing but its timeline keeps an unmarked transaction from being ABORTED. failedOver is the timeline
	// that the database is on.
	otherTimeline bool
	failedOver    uint32
}

// sighting is what the database shows of one transaction in one snapshot.
type sighting struct {
	standby     bool
	system      uint64
	timeline    uint32 // 0: of a standby
	databaseOID uint32
	markerOID   uint32
	rowSecurity bool
	marked      bool
	ended       bool
	givenOut    bool   // its xid was given out before the snapshot: if it has not ended, it runs
	status      string // of an ended one; "": forgotten
	snapshot    string
}

// judgeAll says what became of transactions of one source database. It never guesses. An error means that the database
// could not be asked; nothing is known then.
func judgeAll(ctx context.Context, q queryer, transactions []store.Parked) (map[store.Key]finding, error) {
	found := make(map[store.Key]finding, len(transactions))
	var marker, fenced []store.Parked
	for _, t := range transactions {
		switch t.Database.Mode {
		case store.ModeClientOnly:
			found[t.Key] = finding{outcome: unknown, reason: clientOnly}
		case store.ModeXIDFenced:
			fenced = append(fenced, t)
		default:
			marker = append(marker, t)
		}
	}
	for _, part := range []struct {
		sql          string
		transactions []store.Parked
	}{{verdictSQL, marker}, {fencedSQL, fenced}} {
		if len(part.transactions) == 0 {
			continue
		}
		seen, err := look(ctx, q, part.sql, part.transactions)
		if err != nil {
			return nil, err
		}
		for _, t := range part.transactions {
			found[t.Key] = judge(ctx, q, part.sql, t, seen[t.Key.Transaction])
		}
	}
	return found, nil
}

// look takes one snapshot.
func look(ctx context.Context, q queryer, sql string, transactions []store.Parked) (map[store.TransactionID]*sighting, error) {
	ids, xids := make([]string, len(transactions)), make([]string, len(transactions))
	for i, t := range transactions {
		ids[i], xids[i] = t.Key.Transaction.String(), strconv.FormatUint(t.Database.XID, 10)
	}
	var (
		id                                       uuid.UUID
		s                                        sighting
		system, databaseOID, markerOID, timeline int64
	)
	seen := make(map[store.TransactionID]*sighting, len(transactions))
	rows, err := q.Query(ctx, sql, ids, xids)
	if err == nil {
		into := []any{&id, &s.standby, &system, &timeline, &databaseOID, &markerOID, &s.rowSecurity, &s.marked, &s.ended, &s.givenOut, &s.status, &s.snapshot}
		_, err = pgx.ForEachRow(rows, into, func() error {
			one := s
			one.system, one.timeline, one.databaseOID, one.markerOID = uint64(system), uint32(timeline), uint32(databaseOID), uint32(markerOID) //nolint:gosec // the same bits; oids are 32 bits
			seen[store.TransactionID(id)] = &one
			return nil
		})
	}
	if err != nil {
		return nil, fmt.Errorf("asking the source database: %w", err)
	}
	return seen, nil
}

// judge applies the rules to one transaction.
func judge(ctx context.Context, q queryer, sql string, t store.Parked, s *sighting) finding {
	f, ask := rule(t.Database, s)
	if !ask {
		return runsHere(ctx, q, t, s, f)
	}
	// In that snapshot its xid was nobody's. Either it was given out since, or it was lost in a crash.
	for last := false; ; last = true {
		status, future, err := statusOf(ctx, q, t.Database.XID)
		switch {
		case err != nil:
			return found(t.Database, s, unknown, "asking for its status: "+err.Error())
		case future && fault.Mutant("M1"):
			return found(t.Database, s, inProgress, "")
		case future && last:
			// Asked again and still in the future: no running transaction has it, and none with this marker ever will.
			return found(t.Database, s, aborted, "its xid was lost in a crash of the database")
		case !future && status == "in progress":
			return found(t.Database, s, inProgress, "")
		case !future && status == "":
			return found(t.Database, s, unknown, "pg_xact_status has forgotten it")
		case !future && last:
			return found(t.Database, s, inProgress, "it has ended just now")
		}
		// In the future, or ended since: look once more, at everything.
		seen, err := look(ctx, q, sql, []store.Parked{t})
		if err != nil {
			return found(t.Database, s, unknown, err.Error())
		}
		s = seen[t.Key.Transaction]
		if f, ask = rule(t.Database, s); !ask {
			return runsHere(ctx, q, t, s, f)
		}
	}
}

// runsHere looks whether a transaction that began before a failover runs on the new primary: it was prepared for two phases, and may
// commit yet, so that nobody may confirm that it did not. Or a stranger has its xid, which only delays. The snapshot cannot tell: the
// newest xid is not below its end although somebody has it.
func runsHere(ctx context.Context, q queryer, t store.Parked, s *sighting, f finding) finding {
	if f.failedOver == 0 || s.ended {
		return f
	}
	status, future, err := statusOf(ctx, q, t.Database.XID)
	switch {
	case err != nil:
		return found(t.Database, s, unknown, "asking for its status: "+err.Error())
	case future: // its xid did not get here
		return f
	case status == "in progress":
		return found(t.Database, s, inProgress, "")
	}
	return found(t.Database, s, inProgress, "it has ended just now")
}

// rule decides what one snapshot can decide; s is nil when the transaction was not in the answer. ask: only pg_xact_status can tell
// more.
func rule(d *store.DatabaseTransaction, s *sighting) (f finding, ask bool) {
	if s == nil {
		return finding{outcome: unknown, reason: "the database did not answer for it"}, false
	}
	if fault.Mutant("M1") && s.ended { // the xid decides
		return found(d, s, map[string]outcome{"committed": committed, "aborted": aborted}[s.status], ""), false
	}
	if fault.Mutant("M12") && s.standby { // a standby is as good as its primary
		s.standby, s.timeline = false, d.Timeline
	}
	switch {
	case s.standby:
		return found(d, s, unknown, "the database asked is a standby"), false
	case d.Mode == store.ModeXIDFenced:
		return ruleFenced(d, s)
	case s.marked:
		// Nobody else can have written this id: proof, wherever it is found.
		return found(d, s, committed, ""), false
	}
	// From here on everything rests on not seeing the marker. That means something only in the right table, seen whole.
	if why := otherPlace(d, s); why != "" {
		return found(d, s, unknown, why), false
	}
	if s.timeline != d.Timeline {
		f = found(d, s, unknown, fmt.Sprintf(
			"the server is on timeline %d, not %d: after a failover an operator has to confirm that the old primary is fenced", s.timeline, d.Timeline))
		f.otherTimeline, f.failedOver = true, s.timeline
		return f, false
	}
	switch {
	case s.ended:
		return found(d, s, aborted, ""), false
	case s.givenOut && fault.Mutant("M2"): // it had its time
		return found(d, s, aborted, ""), false
	case s.givenOut:
		return found(d, s, inProgress, ""), false
	}
	return finding{}, true
}

// otherPlace says why this may not be the table that the marker was written to, or not all of it.
func otherPlace(d *store.DatabaseTransaction, s *sighting) string {
	switch {
	case s.system != d.SystemIdentifier:
		return fmt.Sprintf("another database server: system identifier %d, not %d", s.system, d.SystemIdentifier)
	case s.databaseOID != d.DatabaseOID:
		return fmt.Sprintf("another database of the server: oid %d, not %d", s.databaseOID, d.DatabaseOID)
	case s.markerOID != d.MarkerOID:
		return fmt.Sprintf("another marker table: oid %d, not %d; check the search_path", s.markerOID, d.MarkerOID)
	case s.rowSecurity:
		return "row security is active on the marker table: rows may be hidden"
	}
	return ""
}

// ruleFenced is the rule for transactions without a marker, whose xid was made durable before Prepare.
func ruleFenced(d *store.DatabaseTransaction, s *sighting) (f finding, ask bool) {
	switch {
	case s.system != d.SystemIdentifier || s.timeline != d.Timeline:
		return found(d, s, unknown, "another server or timeline: an xid proves nothing there"), false
	case !s.ended:
		return found(d, s, inProgress, ""), false
	case s.status == "committed":
		return found(d, s, committed, ""), false
	case s.status == "aborted":
		return found(d, s, aborted, ""), false
	}
	return found(d, s, unknown, "pg_xact_status has forgotten it"), false
}

// statusOf asks for one xid. future: the database has not given it out (again) yet.
func statusOf(ctx context.Context, q queryer, xid uint64) (status string, future bool, err error) {
	var s *string
	err = q.QueryRow(ctx, statusSQL, strconv.FormatUint(xid, 10)).Scan(&s)
	var refused *pgconn.PgError
	if errors.As(err, &refused) && refused.Code == "22023" {
		return "", true, nil
	}
	if err != nil || s == nil {
		return "", false, err
	}
	return *s, false, nil
}

// found puts an outcome together with what it rests on.
func found(d *store.DatabaseTransaction, s *sighting, o outcome, reason string) finding {
	evidence, err := json.Marshal(struct {
		SystemIdentifier string    `json:"system_identifier"`
		Timeline         uint32    `json:"timeline"`
		DatabaseOID      uint32    `json:"database_oid"`
		MarkerOID        uint32    `json:"marker_oid"`
		XID              string    `json:"xid"`
		Marked           bool      `json:"marked"`
		Ended            bool      `json:"ended"`
		XactStatus       string    `json:"xact_status,omitempty"`
		Snapshot         string    `json:"snapshot"`
		Reason           string    `json:"reason,omitempty"`
		Time             time.Time `json:"time"`
	}{
		strconv.FormatUint(s.system, 10), s.timeline, s.databaseOID, s.markerOID, strconv.FormatUint(d.XID, 10),
		s.marked, s.ended, s.status, s.snapshot, reason, time.Now().UTC(),
	})
	f := finding{
		outcome: o, reason: reason,
		naiveWrong: o == aborted && s.status == "committed" || o == committed && s.status == "aborted",
	}
	if err == nil { // these types can always be encoded
		f.evidence = string(evidence)
	}
	return f
}

// confirmed adds an operator's word to the evidence of a finding. What is no JSON, which a session may send, is left out.
func confirmed(evidence, reason string) string {
	said := map[string]any{"confirmed": reason}
	if json.Valid([]byte(evidence)) {
		said["database"] = json.RawMessage(evidence)
	}
	b, _ := json.Marshal(said) // these can always be encoded
	return string(b)
}
