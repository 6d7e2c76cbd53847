package sourcedb

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/jackc/pgx/v5/pgconn"

	"github.com/outbox-platform/outbox/client"
)

// fenceSQL makes the transaction's id durable, without a table (mode XID_FENCED): a message that is flushed carries the id into
// the WAL, so that after a crash or on a replica it is not given out again. What each part needs of the one before keeps them in
// order: the id; a message that gives the present subtransaction, if this is one, an id too; the message that is flushed; and the
// ids that this session holds, of which there is a second one inside a savepoint only.
const fenceSQL = `
SELECT x.xid::text::bigint,
       pg_postmaster_start_time(),
       current_database()::text,
       ` + timelineSQL + `,
       current_setting('synchronous_commit'),
       (SELECT count(*) FROM pg_locks l
        WHERE l.pid = pg_backend_pid() AND l.locktype = 'transactionid' AND l.mode = 'ExclusiveLock' AND l.granted AND f.at IS NOT NULL) = 1
FROM   (SELECT pg_current_xact_id() AS xid OFFSET 0) x,
       LATERAL (SELECT pg_logical_emit_message(x.xid IS NOT NULL, 'outbox', '') AS at OFFSET 0) s,
       LATERAL (SELECT pg_logical_emit_message(false, 'outbox', '', s.at IS NOT NULL) AS at OFFSET 0) f`

// raiseFence makes the id of a transaction durable and reads what ties it to the server.
func raiseFence(ctx context.Context, q Queryer, database string, known *identities) (*mark, error) {
	var (
		m             mark
		xid, timeline int64
		at            incarnation
		started       time.Time
	)
	err := q.QueryRow(ctx, fenceSQL).Scan(&xid, &started, &at.database, &timeline, &m.sync, &m.topLevel)
	var pg *pgconn.PgError
	if errors.As(err, &pg) && pg.Code == "42883" { // no function of that name with a flush argument
		return nil, client.ErrFence
	}
	if err != nil {
		return nil, fmt.Errorf("outbox: making the transaction's id durable: %w", err)
	}
	at.started = started.UnixMicro()
	who, err := known.of(ctx, q, at)
	if err != nil {
		return nil, err
	}
	switch {
	case m.sync == "off":
		return nil, client.ErrAsyncCommit
	case !m.topLevel:
		return nil, client.ErrSavepoint
	}
	m.tx = client.DatabaseTransaction{
		Database: database, XID: uint64(xid), SystemIdentifier: uint64(who.system), Timeline: uint32(timeline),
		DatabaseOID: uint32(who.oid), Mode: client.ModeXIDFenced,
	}
	return &m, nil
}
