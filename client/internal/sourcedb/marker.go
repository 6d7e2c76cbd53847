package sourcedb

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/google/uuid"
	"github.com/jackc/pgx/v5/pgconn"

	"github.com/outbox-platform/outbox/client"
	"github.com/outbox-platform/outbox/internal/fault"
)

// markSQL writes the marker and reads, in the same round trip, what ties it to its transaction. It is a plain INSERT: a
// conflict must kill the transaction. created_at is the time of the statement: markers are kept for a time that has to run from
// about Prepare, not from the BEGIN of a transaction that may take hours. Types are cast to those that every driver scans the
// same way.
const markSQL = `
INSERT INTO outbox_marker (id, created_at) VALUES ($1, clock_timestamp())
RETURNING pg_current_xact_id()::text::bigint,
          pg_postmaster_start_time(),
          current_database()::text,
          ` + timelineSQL + `,
          'outbox_marker'::regclass::oid::bigint,
          current_setting('synchronous_commit'),
          current_setting('transaction_isolation'),
          xmin::text::bigint = (pg_current_xact_id()::text::bigint & 4294967295),
          ` + spillsWait

// spillsWait asks for the first spilled request in order, because that is what the partial index answers. EXISTS would scan
// the whole table: without statistics PostgreSQL takes almost every marker for a spilled one.
const spillsWait = `(SELECT seq FROM outbox_marker WHERE spilled IS NOT NULL AND refused IS NULL ORDER BY seq LIMIT 1) IS NOT NULL`

// identitySQL reads what tells a database from all others. It is not cheap: PostgreSQL reads pg_control from its disk.
const identitySQL = `
SELECT (SELECT system_identifier FROM pg_control_system()), (SELECT oid::bigint FROM pg_database WHERE datname = current_database())`

// mustSpillSQL asks whether spilled requests wait.
const mustSpillSQL = `SELECT ` + spillsWait

// spillSQL stores the request in the marker of its own transaction.
const spillSQL = `UPDATE outbox_marker SET spilled = $2 WHERE id = $1`

// mark is what the marker statement returned.
type mark struct {
	tx        client.DatabaseTransaction
	sync      string
	isolation string
	topLevel  bool
	mustSpill bool
}

// fresh tells whether the marker statement saw what was committed until it ran: its snapshot was its own.
func (m *mark) fresh() bool {
	return m.isolation == "read committed" || m.isolation == "read uncommitted"
}

func writeMark(ctx context.Context, q Queryer, id uuid.UUID, database string, known *identities) (*mark, error) {
	var (
		m                          mark
		xid, timeline, markerTable int64
		at                         incarnation
		started                    time.Time
	)
	err := q.QueryRow(ctx, markSQL, id).Scan(&xid, &started, &at.database, &timeline, &markerTable, &m.sync, &m.isolation, &m.topLevel, &m.mustSpill)
	if err != nil {
		return nil, fmt.Errorf("outbox: writing the marker: %w", explain(err))
	}
	at.started = started.UnixMicro()
	who, err := known.of(ctx, q, at)
	if err != nil {
		return nil, err
	}
	switch {
	case m.sync == "off":
		return nil, client.ErrAsyncCommit
	case !m.topLevel && !fault.Mutant("M9"):
		return nil, client.ErrSavepoint
	}
	m.tx = client.DatabaseTransaction{
		Database: database, XID: uint64(xid), SystemIdentifier: uint64(who.system), Timeline: uint32(timeline),
		DatabaseOID: uint32(who.oid), MarkerOID: uint32(markerTable), Mode: client.ModeMarker,
	}
	return &m, nil
}

// explain adds what to do to an error that says that the marker table is not there.
func explain(err error) error {
	var pg *pgconn.PgError
	if errors.As(err, &pg) && pg.Code == "42P01" {
		return fmt.Errorf("%w (create the table with client.MarkerDDL in a schema that the search_path finds)", err)
	}
	return err
}
