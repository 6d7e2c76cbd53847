package sourcedb

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strconv"
	"time"

	"github.com/google/uuid"
	"github.com/jackc/pgx/v5/pgconn"

	"github.com/outbox-platform/outbox/client"
	"github.com/outbox-platform/outbox/internal/fault"
)

// verdictSQL judges many transactions in one snapshot: "has it ended?" and "is its marker there?" must not be asked at two
// moments. It must run outside of any transaction, on the primary. pg_xact_status is called only for xids that have ended in
// this snapshot: for one in the future it would fail, and the whole statement with it. Its answer decides nothing here; it
// only tells what a naive resolver would have said.
const verdictSQL = `
SELECT p.id,
       pg_is_in_recovery(),
       (SELECT system_identifier FROM pg_control_system()),
       CASE WHEN pg_is_in_recovery() THEN 0 ELSE ` + timelineSQL + ` END,
       (SELECT oid::bigint FROM pg_database WHERE datname = current_database()),
       'outbox_marker'::regclass::oid::bigint,
       row_security_active('outbox_marker'),
       EXISTS (SELECT 1 FROM outbox_marker m WHERE m.id = p.id),
       pg_visible_in_snapshot(p.xid, pg_current_snapshot()),
       coalesce(CASE WHEN pg_visible_in_snapshot(p.xid, pg_current_snapshot()) THEN pg_xact_status(p.xid) END, ''),
       pg_current_snapshot()::text
FROM   unnest($1::text[]::uuid[], $2::text[]::xid8[]) AS p(id, xid)`

// fencedSQL is the same for transactions without a marker (mode XID_FENCED): there may be no table.
const fencedSQL = `
SELECT p.id,
       pg_is_in_recovery(),
       (SELECT system_identifier FROM pg_control_system()),
       CASE WHEN pg_is_in_recovery() THEN 0 ELSE ` + timelineSQL + ` END,
       (SELECT oid::bigint FROM pg_database WHERE datname = current_database()),
       0::bigint, false, false,
       pg_visible_in_snapshot(p.xid, pg_current_snapshot()),
       coalesce(CASE WHEN pg_visible_in_snapshot(p.xid, pg_current_snapshot()) THEN pg_xact_status(p.xid) END, ''),
       pg_current_snapshot()::text
FROM   unnest($1::text[]::uuid[], $2::text[]::xid8[]) AS p(id, xid)`

// statusSQL is asked alone, one call per xid: an xid in the future is an error (SQLSTATE 22023).
const statusSQL = `SELECT pg_xact_status($1::text::xid8)`

// maxVerdicts bounds the transactions of one statement.
const maxVerdicts = 1000

// sighting is what the database says about one transaction in one snapshot.
type sighting struct {
	standby  bool
	sysid    uint64
	timeline uint32 // 0: of a standby
	dbOID    uint32
	marker   uint32
	rls      bool
	marked   bool
	ended    bool
	status   string // of an ended one; empty: forgotten
	snapshot string
}

// Verdicts says what became of transactions. It never guesses: what cannot be said for certain is UNKNOWN. q must run each
// statement outside of any transaction.
func Verdicts(ctx context.Context, q Queryer, transactions []client.CheckTransaction) []client.Verdict {
	out := make([]client.Verdict, 0, len(transactions))
	for len(transactions) > 0 {
		n := 1
		for sql := sqlOf(transactions[0]); n < min(len(transactions), maxVerdicts) && sqlOf(transactions[n]) == sql; {
			n++
		}
		out = append(out, verdicts(ctx, q, transactions[:n])...)
		transactions = transactions[n:]
	}
	return out
}

// sqlOf is the statement that judges a transaction.
func sqlOf(t client.CheckTransaction) string {
	if t.Database.Mode == client.ModeXIDFenced {
		return fencedSQL
	}
	return verdictSQL
}

// verdicts judges transactions of one statement.
func verdicts(ctx context.Context, q Queryer, transactions []client.CheckTransaction) []client.Verdict {
	seen, err := look(ctx, q, transactions)
	out := make([]client.Verdict, 0, len(transactions))
	for _, t := range transactions {
		if err != nil {
			out = append(out, client.Verdict{ID: t.ID, Outcome: client.OutcomeUnknown, Reason: "asking the database: " + err.Error()})
			continue
		}
		s, ok := seen[t.ID]
		if !ok {
			out = append(out, client.Verdict{ID: t.ID, Outcome: client.OutcomeUnknown, Reason: "the database did not answer for it"})
			continue
		}
		out = append(out, judge(ctx, q, t, s))
	}
	return out
}

func look(ctx context.Context, q Queryer, transactions []client.CheckTransaction) (map[uuid.UUID]sighting, error) {
	ids, xids := make([]string, 0, len(transactions)), make([]string, 0, len(transactions))
	for _, t := range transactions {
		ids = append(ids, t.ID.String())
		xids = append(xids, strconv.FormatUint(t.Database.XID, 10))
	}
	var (
		id                             uuid.UUID
		s                              sighting
		sysid, dbOID, marker, timeline int64
		status                         string
	)
	seen := make(map[uuid.UUID]sighting, len(transactions))
	rows, err := q.Query(ctx, sqlOf(transactions[0]), ids, xids)
	err = each(rows, err, func() {
		s.sysid, s.dbOID, s.marker, s.timeline, s.status = uint64(sysid), uint32(dbOID), uint32(marker), uint32(timeline), status
		seen[id] = s
	}, &id, &s.standby, &sysid, &timeline, &dbOID, &marker, &s.rls, &s.marked, &s.ended, &status, &s.snapshot)
	return seen, err
}

// judge applies the rules to one transaction.
func judge(ctx context.Context, q Queryer, t client.CheckTransaction, s sighting) client.Verdict {
	v, ask := rule(t, s)
	if v.FailedOverTo != 0 && !s.ended {
		return runsHere(ctx, q, t, s, v)
	}
	if !ask {
		return v
	}
	// It has not ended in that snapshot. Either it runs, or its xid was lost in a crash and is, so far, nobody's.
	for last := false; ; last = true {
		status, future, err := statusOf(ctx, q, t.Database.XID)
		switch {
		case err != nil:
			return verdict(t, s, client.OutcomeUnknown, "asking for its status: "+err.Error())
		case future && fault.Mutant("M1"):
			return verdict(t, s, client.OutcomeInProgress, "")
		case future && last:
			// Asked again and still in the future: no running transaction has it, and none with this marker ever will.
			return verdict(t, s, client.OutcomeAborted, "its xid was lost in a crash of the database")
		case !future && status == "in progress":
			return verdict(t, s, client.OutcomeInProgress, "")
		case !future && status == "":
			return verdict(t, s, client.OutcomeUnknown, "pg_xact_status has forgotten it")
		case !future && last:
			return verdict(t, s, client.OutcomeInProgress, "it has ended just now")
		}
		// In the future, or ended since: look once more, at everything.
		seen, err := look(ctx, q, []client.CheckTransaction{t})
		if err != nil {
			return verdict(t, s, client.OutcomeUnknown, "asking the database again: "+err.Error())
		}
		s = seen[t.ID]
		if v, ask = rule(t, s); !ask {
			return v
		}
	}
}

// runsHere looks whether a transaction that began before a failover runs on the new primary: it was prepared for two phases, and may
// commit yet, so that nobody may confirm that it did not. Or a stranger has its xid, which only delays.
func runsHere(ctx context.Context, q Queryer, t client.CheckTransaction, s sighting, v client.Verdict) client.Verdict {
	status, future, err := statusOf(ctx, q, t.Database.XID)
	switch {
	case err != nil:
		return verdict(t, s, client.OutcomeUnknown, "asking for its status: "+err.Error())
	case future: // its xid did not get here
		return v
	case status == "in progress":
		return verdict(t, s, client.OutcomeInProgress, "")
	}
	return verdict(t, s, client.OutcomeInProgress, "it has ended just now")
}

// rule decides what one snapshot can decide. ask: only pg_xact_status can tell more.
func rule(t client.CheckTransaction, s sighting) (v client.Verdict, ask bool) {
	d := t.Database
	if fault.Mutant("M1") && s.ended { // the xid decides
		return verdict(t, s, map[string]client.Outcome{"committed": client.OutcomeCommitted, "aborted": client.OutcomeAborted}[s.status], ""), false
	}
	switch {
	case s.standby:
		return verdict(t, s, client.OutcomeUnknown, "the database asked is a standby"), false
	case d.Mode == client.ModeXIDFenced:
		return ruleFenced(t, s)
	case d.Mode != client.ModeMarker:
		return verdict(t, s, client.OutcomeUnknown, "only the client or an operator can decide it"), false
	case s.marked:
		// Nobody else can have written this id: proof, wherever it is found.
		return verdict(t, s, client.OutcomeCommitted, ""), false
	}
	// From here on everything rests on not seeing the marker. That means something only in the right table, seen whole.
	switch why := otherPlace(d, s); {
	case why != "":
		return verdict(t, s, client.OutcomeUnknown, why), false
	case s.timeline != d.Timeline:
		v := verdict(t, s, client.OutcomeUnknown, fmt.Sprintf(
			"the server is on timeline %d, not %d: after a failover an operator has to confirm that the old primary is fenced", s.timeline, d.Timeline))
		v.FailedOverTo = s.timeline
		return v, false
	case s.ended:
		return verdict(t, s, client.OutcomeAborted, ""), false
	}
	return client.Verdict{}, true
}

// otherPlace says why this may not be the table that the marker was written to, or not all of it.
func otherPlace(d client.DatabaseTransaction, s sighting) string {
	switch {
	case s.sysid != d.SystemIdentifier:
		return fmt.Sprintf("another database server: system identifier %d, not %d", s.sysid, d.SystemIdentifier)
	case s.dbOID != d.DatabaseOID:
		return fmt.Sprintf("another database of the server: oid %d, not %d", s.dbOID, d.DatabaseOID)
	case s.marker != d.MarkerOID:
		return fmt.Sprintf("another marker table: oid %d, not %d; check the search_path", s.marker, d.MarkerOID)
	case s.rls:
		return "row security is active on the marker table: rows may be hidden"
	}
	return ""
}

// ruleFenced is the rule for transactions without a marker, whose xid was made durable before Prepare.
func ruleFenced(t client.CheckTransaction, s sighting) (v client.Verdict, ask bool) {
	d := t.Database
	switch {
	case s.sysid != d.SystemIdentifier || s.timeline != d.Timeline:
		return verdict(t, s, client.OutcomeUnknown, "another server or timeline: an xid proves nothing there"), false
	case !s.ended:
		return verdict(t, s, client.OutcomeInProgress, ""), false
	case s.status == "committed":
		return verdict(t, s, client.OutcomeCommitted, ""), false
	case s.status == "aborted":
		return verdict(t, s, client.OutcomeAborted, ""), false
	}
	return verdict(t, s, client.OutcomeUnknown, "pg_xact_status has forgotten it"), false
}

// statusOf asks for one xid. future: the database has not given it out (again) yet.
func statusOf(ctx context.Context, q Queryer, xid uint64) (status string, future bool, err error) {
	var s *string
	err = q.QueryRow(ctx, statusSQL, strconv.FormatUint(xid, 10)).Scan(&s)
	var pg *pgconn.PgError
	if errors.As(err, &pg) && pg.Code == "22023" {
		return "", true, nil
	}
	if err != nil || s == nil {
		return "", false, err
	}
	return *s, false, nil
}

// verdict puts an answer together with what it rests on.
func verdict(t client.CheckTransaction, s sighting, o client.Outcome, reason string) client.Verdict {
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
		Time             time.Time `json:"time"`
	}{
		strconv.FormatUint(s.sysid, 10), s.timeline, s.dbOID, s.marker, strconv.FormatUint(t.Database.XID, 10),
		s.marked, s.ended, s.status, s.snapshot, time.Now().UTC(),
	})
	v := client.Verdict{ID: t.ID, Outcome: o, Reason: reason}
	if err == nil && len(evidence) <= 4096 {
		v.Evidence = string(evidence)
	}
	v.NaiveWrong = o == client.OutcomeAborted && s.status == "committed" || o == client.OutcomeCommitted && s.status == "aborted"
	return v
}
