package store

import (
	"context"
	"errors"
	"fmt"

	"github.com/jackc/pgx/v5"
)

// ErrStoreChanged: the store is another server than before, or on another timeline: what was read from it may be gone.
var ErrStoreChanged = errors.New("the store's server or timeline changed")

// server is what a connection finds at its other end.
type server struct {
	systemIdentifier  uint64
	timeline          string // as in WAL file names; "" on a standby
	standby           bool
	fsync             string
	synchronousCommit string
	version           int // server_version_num
}

const oldestServer = 140000

func serverOf(ctx context.Context, conn *pgx.Conn) (server, error) {
	var s server
	err := conn.QueryRow(ctx, `
		SELECT (SELECT system_identifier::text::xid8 FROM pg_control_system()), pg_is_in_recovery(),
		       CASE WHEN pg_is_in_recovery() THEN '' ELSE substr(pg_walfile_name(pg_current_wal_insert_lsn()), 1, 8) END,
		       current_setting('fsync'), current_setting('synchronous_commit'), current_setting('server_version_num')::int`).
		Scan(&s.systemIdentifier, &s.standby, &s.timeline, &s.fsync, &s.synchronousCommit, &s.version)
	if err != nil {
		return server{}, storeError("asking the store's server who it is", err)
	}
	return s, nil
}

// same reports whether both are one server with one history.
func (s server) same(t server) bool {
	return s.systemIdentifier == t.systemIdentifier && s.timeline == t.timeline
}

// usable refuses a server that could lose what it acknowledged, or cannot be written.
func (s server) usable(unsafe bool) error {
	switch {
	case s.version < oldestServer:
		return fmt.Errorf("the store's PostgreSQL is %d.%d: 14 or newer is needed", s.version/10000, s.version%10000)
	case s.standby:
		return fmt.Errorf("%w: the server is a standby; connect to the primary (target_session_attrs=read-write)", ErrUnavailable)
	case s.fsync == "off" && !unsafe:
		return errors.New("the store has fsync=off and may lose what it acknowledged: switch it on, or allow it with --store-unsafe")
	case s.synchronousCommit == "off" && !unsafe:
		return errors.New("the store has synchronous_commit=off and may lose what it acknowledged: switch it on for this role and database, or allow it with --store-unsafe")
	}
	return nil
}
