package main

import (
	"context"
	"fmt"
	"slices"
	"strconv"
	"time"

	"github.com/jackc/pgx/v5"
)

// oldestVersion is the first PostgreSQL with xid8, pg_current_xact_id and pg_visible_in_snapshot.
const oldestVersion = 130000

// flushVersion is the first PostgreSQL in which pg_logical_emit_message can flush.
const flushVersion = 170000

// sourceView is what was read of a source database.
type sourceView struct {
	facts       databaseFacts
	version     int // as server_version_num
	aurora      bool
	quotedName  string // of the database
	firstPID    int64  // of the process that served the first transaction
	settings    map[string]sourceSetting
	service     roleView
	resolver    roleView // not there: exists is false
	marker      *markerView
	others      []string // schemas with tables of that name that the connected role does not find first
	standbys    []standby
	prepared    int // two-phase transactions in this database
	preparedAge time.Duration
	idle        int // sessions idle in a transaction for more than a minute
	idleAge     time.Duration
	pooled      bool          // a pooler is in between
	moves       bool          // and its server connections change between transactions
	clockAhead  time.Duration // the database's clock, less ours
	clockError  time.Duration // at most, from the round trip
}

// sourceSetting is a setting as the connected role has it.
type sourceSetting struct {
	text   string
	number int64 // in the base unit of the setting; 0 for those that are no numbers
}

// roleView is what a role may do and how it is set up.
type roleView struct {
	name     string
	exists   bool
	super    bool
	bypasses bool              // row security
	settings map[string]string // ALTER ROLE … SET, ALTER DATABASE … SET
	cannot   []string          // functions that it may not execute

	// Of the marker table, if it is there.
	owner     bool
	usage     bool // of its schema
	privilege map[string]bool
	seesID    bool // SELECT of the column id
}

// rowSecurity reports whether policies decide which rows of the marker table the role sees.
func (r roleView) rowSecurity(m *markerView) bool {
	return m.rowSecurity && !r.super && !r.bypasses && (!r.owner || m.forced)
}

// markerView is the marker table.
type markerView struct {
	oid         uint32
	schema      string
	name        string // quoted, with its schema
	kind        string
	persistence string
	rowSecurity bool
	forced      bool
	triggers    int
	unique      bool // id is
	spillIndex  bool
	columns     []string // "name type"
}

// standby is a client of replication.
type standby struct{ name, state, sync string }

// functions that the verdict, the marker statement and the fence call.
var (
	resolverFunctions = []string{
		"pg_control_system()", "pg_walfile_name(pg_lsn)", "pg_current_wal_insert_lsn()", "pg_current_snapshot()",
		"pg_visible_in_snapshot(xid8,pg_snapshot)", "pg_xact_status(xid8)",
	}
	serviceFunctions = append([]string{"pg_current_xact_id()"}, resolverFunctions...)
)

const fenceFunction = "pg_logical_emit_message(boolean,text,text,boolean)"

// readSource reads everything, each part in a short READ ONLY transaction.
func readSource(ctx context.Context, conn *pgx.Conn, serviceRole, resolverRole string) (*sourceView, error) {
	v := &sourceView{settings: make(map[string]sourceSetting)}
	var enough bool
	for _, part := range []struct {
		doing string
		read  func(context.Context, pgx.Tx) error
	}{
		{"the server", func(ctx context.Context, tx pgx.Tx) error {
			var err error
			enough, err = v.readServer(ctx, tx, conn.PgConn().PID())
			return err
		}},
		{"roles", func(ctx context.Context, tx pgx.Tx) error { return v.readRoles(ctx, tx, serviceRole, resolverRole) }},
		{"identity", v.readIdentity},
		{"settings", v.readSettings},
		{"the marker table", v.readMarker},
		{"replication", v.readReplication},
		{"transactions", v.readTransactions},
		{"the clock", v.readClock},
	} {
		err := readOnly(ctx, conn, part.read)
		if err != nil {
			return nil, fmt.Errorf("reading %s: %w", part.doing, err)
		}
		if !enough { // too old to be asked more
			return v, nil
		}
	}
	return v, nil
}

func readOnly(ctx context.Context, conn *pgx.Conn, read func(context.Context, pgx.Tx) error) error {
	return pgx.BeginTxFunc(ctx, conn, pgx.TxOptions{IsoLevel: pgx.ReadCommitted, AccessMode: pgx.ReadOnly}, func(tx pgx.Tx) error {
		return read(ctx, tx)
	})
}

// readServer reads what every server has. announced is the process that the connection was told it talks to.
func (v *sourceView) readServer(ctx context.Context, tx pgx.Tx, announced uint32) (enough bool, err error) {
	var oid int64
	err = tx.QueryRow(ctx, `
		SELECT version(), current_setting('server_version_num')::int, current_database()::text, quote_ident(current_database()),
		       (SELECT oid::bigint FROM pg_database WHERE datname = current_database()), current_user::text, pg_is_in_recovery(),
		       pg_backend_pid()::bigint, EXISTS (SELECT FROM pg_proc WHERE proname = 'aurora_version')`).
		Scan(&v.facts.Version, &v.version, &v.facts.Name, &v.quotedName, &oid, &v.facts.Role, &v.facts.Standby, &v.firstPID, &v.aurora)
	if err != nil {
		return false, err
	}
	v.facts.OID = uint32(oid) //nolint:gosec // oids are 32 bits
	// A pooler gives out process ids of its own.
	v.pooled = v.firstPID != int64(announced)
	return v.version >= oldestVersion, nil
}

// readRoles reads the two roles, but not what they may do with the marker table.
func (v *sourceView) readRoles(ctx context.Context, tx pgx.Tx, service, resolver string) error {
	if service == "" {
		service = v.facts.Role
	}
	v.facts.ServiceRole = service
	var err error
	if v.service, err = v.readRole(ctx, tx, service, serviceFunctions); err != nil {
		return err
	}
	if !v.service.exists {
		return usagef("role %q does not exist", service)
	}
	if v.resolver, err = v.readRole(ctx, tx, resolver, resolverFunctions); err != nil {
		return err
	}
	if v.resolver.exists {
		v.facts.ResolverRole = resolver
	}
	return nil
}

func (v *sourceView) readRole(ctx context.Context, tx pgx.Tx, name string, functions []string) (roleView, error) {
	r := roleView{name: name, settings: make(map[string]string)}
	rows, err := tx.Query(ctx, `SELECT rolsuper, rolbypassrls FROM pg_roles WHERE rolname = $1`, name)
	if err != nil {
		return r, err
	}
	if _, err = pgx.ForEachRow(rows, []any{&r.super, &r.bypasses}, func() error { r.exists = true; return nil }); err != nil || !r.exists {
		return r, err
	}
	// What is set for the role in this database goes before what is set for the role, and that before the database's.
	rows, err = tx.Query(ctx, `
		SELECT DISTINCT ON (1) split_part(c, '=', 1), substr(c, strpos(c, '=') + 1)
		FROM   pg_db_role_setting s, unnest(s.setconfig) c
		WHERE  s.setdatabase::bigint IN (0, $1) AND s.setrole IN (0, (SELECT oid FROM pg_roles WHERE rolname = $2))
		ORDER  BY 1, s.setrole = 0, s.setdatabase = 0`, int64(v.facts.OID), name)
	if err != nil {
		return r, err
	}
	var key, value string
	if _, err = pgx.ForEachRow(rows, []any{&key, &value}, func() error { r.settings[key] = value; return nil }); err != nil {
		return r, err
	}
	if v.version >= flushVersion {
		functions = append(slices.Clone(functions), fenceFunction)
	}
	rows, err = tx.Query(ctx, `SELECT f FROM unnest($2::text[]) f WHERE NOT has_function_privilege($1, f, 'EXECUTE')`, name, functions)
	if err != nil {
		return r, err
	}
	r.cannot, err = pgx.CollectRows(rows, pgx.RowTo[string])
	return r, err
}

// readIdentity reads what ties a transaction to this server, as far as the connected role may.
func (v *sourceView) readIdentity(ctx context.Context, tx pgx.Tx) error {
	var pid int64
	var mayControl, mayWAL bool
	err := tx.QueryRow(ctx, `
		SELECT pg_backend_pid()::bigint, has_function_privilege('pg_control_system()', 'EXECUTE'),
		       NOT pg_is_in_recovery() AND has_function_privilege('pg_walfile_name(pg_lsn)', 'EXECUTE')
		       AND has_function_privilege('pg_current_wal_insert_lsn()', 'EXECUTE')`).Scan(&pid, &mayControl, &mayWAL)
	if err != nil {
		return err
	}
	v.moves = v.pooled && pid != v.firstPID
	if mayControl {
		var system int64
		if err := tx.QueryRow(ctx, `SELECT system_identifier FROM pg_control_system()`).Scan(&system); err != nil {
			return err
		}
		v.facts.SystemIdentifier = strconv.FormatUint(uint64(system), 10) //nolint:gosec // the same bits
	}
	if mayWAL {
		var timeline string
		if err := tx.QueryRow(ctx, `SELECT substr(pg_walfile_name(pg_current_wal_insert_lsn()), 1, 8)`).Scan(&timeline); err != nil {
			return err
		}
		n, err := strconv.ParseUint(timeline, 16, 32)
		if err != nil {
			return fmt.Errorf("the timeline: %w", err)
		}
		v.facts.Timeline = uint32(n)
	}
	return nil
}

func (v *sourceView) readSettings(ctx context.Context, tx pgx.Tx) error {
	rows, err := tx.Query(ctx, `
		SELECT name, current_setting(name), CASE WHEN vartype = 'integer' THEN setting::bigint ELSE 0 END
		FROM   pg_settings WHERE name = ANY ($1)`, []string{
		"fsync", "synchronous_commit", "full_page_writes", "idle_in_transaction_session_timeout", "transaction_timeout",
		"synchronous_standby_names", "max_prepared_transactions", "search_path", "default_transaction_isolation",
		"tcp_keepalives_idle", "tcp_user_timeout",
	})
	if err != nil {
		return err
	}
	var name string
	var s sourceSetting
	_, err = pgx.ForEachRow(rows, []any{&name, &s.text, &s.number}, func() error { v.settings[name] = s; return nil })
	return err
}

// forRole is a setting as a role has it, as far as can be seen from the connected one.
func (v *sourceView) forRole(r roleView, name string) string {
	if s, set := r.settings[name]; set {
		return s
	}
	return v.settings[name].text
}

func (v *sourceView) readMarker(ctx context.Context, tx pgx.Tx) error {
	rows, err := tx.Query(ctx, `
		SELECT quote_ident(n.nspname) FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
		WHERE  c.relname = 'outbox_marker' AND c.relkind IN ('r', 'p', 'v', 'm', 'f') AND c.oid IS DISTINCT FROM to_regclass('outbox_marker')
		ORDER  BY 1`)
	if err != nil {
		return err
	}
	if v.others, err = pgx.CollectRows(rows, pgx.RowTo[string]); err != nil {
		return err
	}
	rows, err = tx.Query(ctx, `
		SELECT c.oid::bigint, quote_ident(n.nspname), quote_ident(n.nspname) || '.' || quote_ident(c.relname), c.relkind::text,
		       c.relpersistence::text, c.relrowsecurity, c.relforcerowsecurity,
		       (SELECT count(*) FROM pg_trigger t WHERE t.tgrelid = c.oid AND NOT t.tgisinternal)::int,
		       EXISTS (SELECT FROM pg_index i JOIN pg_attribute a ON a.attrelid = c.oid AND a.attnum = i.indkey[0]
		               WHERE i.indrelid = c.oid AND i.indisunique AND i.indisvalid AND i.indnkeyatts = 1 AND i.indpred IS NULL AND a.attname = 'id'),
		       EXISTS (SELECT FROM pg_index i JOIN pg_attribute a ON a.attrelid = c.oid AND a.attnum = i.indkey[0]
		               WHERE i.indrelid = c.oid AND i.indisvalid AND i.indpred IS NOT NULL AND a.attname = 'seq'),
		       ARRAY (SELECT a.attname || ' ' || format_type(a.atttypid, a.atttypmod) FROM pg_attribute a
		              WHERE a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped ORDER BY a.attnum)
		FROM   pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
		WHERE  c.oid = to_regclass('outbox_marker')`)
	if err != nil {
		return err
	}
	var m markerView
	var oid int64
	_, err = pgx.ForEachRow(rows, []any{
		&oid, &m.schema, &m.name, &m.kind, &m.persistence, &m.rowSecurity, &m.forced, &m.triggers, &m.unique, &m.spillIndex, &m.columns,
	}, func() error {
		m.oid = uint32(oid) //nolint:gosec // oids are 32 bits
		v.marker = &m
		return nil
	})
	if err != nil || v.marker == nil {
		return err
	}
	v.facts.MarkerTable, v.facts.MarkerOID = m.name, m.oid
	for _, r := range []*roleView{&v.service, &v.resolver} {
		if !r.exists {
			continue
		}
		if err := r.readMarker(ctx, tx, m.oid); err != nil {
			return err
		}
	}
	return nil
}

// readMarker reads what a role may do with the marker table.
func (r *roleView) readMarker(ctx context.Context, tx pgx.Tx, oid uint32) error {
	var may [4]bool
	err := tx.QueryRow(ctx, `
		SELECT pg_has_role($1, c.relowner, 'USAGE'), has_schema_privilege($1, c.relnamespace, 'USAGE'),
		       has_table_privilege($1, c.oid, 'SELECT'), has_table_privilege($1, c.oid, 'INSERT'),
		       has_table_privilege($1, c.oid, 'UPDATE'), has_table_privilege($1, c.oid, 'DELETE'),
		       COALESCE((SELECT has_column_privilege($1, c.oid, a.attnum, 'SELECT') FROM pg_attribute a
		                 WHERE a.attrelid = c.oid AND a.attname = 'id' AND NOT a.attisdropped), false)
		FROM   pg_class c WHERE c.oid::bigint = $2`, r.name, int64(oid)).
		Scan(&r.owner, &r.usage, &may[0], &may[1], &may[2], &may[3], &r.seesID)
	r.privilege = map[string]bool{"SELECT": may[0], "INSERT": may[1], "UPDATE": may[2], "DELETE": may[3]}
	return err
}

func (v *sourceView) readReplication(ctx context.Context, tx pgx.Tx) error {
	// Without pg_read_all_stats there are rows, but little in them.
	rows, err := tx.Query(ctx, `
		SELECT COALESCE(application_name, ''), COALESCE(state, ''), COALESCE(sync_state, '')
		FROM   pg_stat_replication WHERE COALESCE(state, '') <> 'backup' ORDER BY 1`)
	if err != nil {
		return err
	}
	var s standby
	_, err = pgx.ForEachRow(rows, []any{&s.name, &s.state, &s.sync}, func() error { v.standbys = append(v.standbys, s); return nil })
	return err
}

func (v *sourceView) readTransactions(ctx context.Context, tx pgx.Tx) error {
	var prepared, idle float64
	err := tx.QueryRow(ctx, `
		SELECT (SELECT count(*) FROM pg_prepared_xacts WHERE database = current_database())::int,
		       COALESCE((SELECT extract(epoch FROM now() - min(prepared)) FROM pg_prepared_xacts WHERE database = current_database()), 0)::float8,
		       count(*)::int, COALESCE(extract(epoch FROM now() - min(state_change)), 0)::float8
		FROM   pg_stat_activity
		WHERE  datname = current_database() AND state LIKE 'idle in transaction%' AND state_change < now() - interval '1 minute'`).
		Scan(&v.prepared, &prepared, &v.idle, &idle)
	v.preparedAge, v.idleAge = seconds(prepared), seconds(idle)
	return err
}

func seconds(s float64) time.Duration { return time.Duration(s * float64(time.Second)) }

func (v *sourceView) readClock(ctx context.Context, tx pgx.Tx) error {
	var theirs time.Time
	before := time.Now()
	if err := tx.QueryRow(ctx, `SELECT clock_timestamp()`).Scan(&theirs); err != nil {
		return err
	}
	took := time.Since(before)
	v.clockAhead, v.clockError = theirs.Sub(before.Add(took/2)), took/2
	return nil
}
