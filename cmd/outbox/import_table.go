package main

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
)

// What import writes into the column last_error of a row that it has taken over.
const (
	markTaken     = "outbox import: taken over; before: "
	markPublished = "outbox import: published as transaction "
	markDead      = "outbox import: dead letter of transaction "
	markLeft      = "outbox import: left: "
)

// largestPayload is the largest payload that is read at all.
const largestPayload = 16 << 20

// importTable is the table that is taken over.
type importTable struct {
	conn    *pgx.Conn
	name    string            // schema.table, as the database says
	quoted  string            // the same for SQL
	columns map[string]string // what a column is for → its quoted name; absent: there is none
	idType  string
	bytea   bool // the payload's type
}

// importColumns are the roles of columns: their names in HuleEdu's table are the defaults.
var importColumns = []struct {
	role, column string
	required     bool
}{
	{"id", "id", true},
	{"aggregate-type", "aggregate_type", true},
	{"aggregate-id", "aggregate_id", true},
	{"event-type", "event_type", true},
	{"payload", "event_data", true},
	{"created-at", "created_at", true},
	{"published-at", "published_at", true},
	{"last-error", "last_error", true},
	{"topic", "topic", false},
	{"key", "event_key", false},
	{"retry-count", "retry_count", false},
}

// openImportTable connects, finds the table and its columns, and makes sure that nobody else takes it over now.
func openImportTable(ctx context.Context, dsn, table string, mapping map[string]string) (*importTable, error) {
	config, err := pgx.ParseConfig(dsn)
	if err != nil {
		return nil, usagef("the DSN cannot be used: it is not a PostgreSQL connection string") // the parser's error may show a password
	}
	config.RuntimeParams["application_name"] = "outbox-import"
	conn, err := pgx.ConnectConfig(ctx, config)
	if err != nil {
		return nil, databaseError("connecting to the service's database", err)
	}
	t := &importTable{conn: conn}
	if err := t.find(ctx, table, mapping); err != nil {
		t.close(ctx)
		return nil, err
	}
	return t, nil
}

func (t *importTable) close(ctx context.Context) { _ = t.conn.Close(context.WithoutCancel(ctx)) }

// databaseError says what was being done. What may work at another time has the exit code for that.
func databaseError(doing string, err error) error {
	err = fmt.Errorf("%s: %w", doing, err)
	var refused *pgconn.PgError
	if errors.As(err, &refused) && !strings.HasPrefix(refused.Code, "57P") && !strings.HasPrefix(refused.Code, "53") {
		return err
	}
	if errors.Is(err, context.Canceled) {
		return err
	}
	return codedError{exitUnavailable, err}
}

func (t *importTable) find(ctx context.Context, table string, mapping map[string]string) error {
	var oid *uint32
	var name, quotedName *string
	err := t.conn.QueryRow(ctx, `
		SELECT c.oid, n.nspname || '.' || c.relname, quote_ident(n.nspname) || '.' || quote_ident(c.relname)
		FROM (SELECT to_regclass($1) AS oid) r LEFT JOIN pg_class c ON c.oid = r.oid LEFT JOIN pg_namespace n ON n.oid = c.relnamespace`, table).
		Scan(&oid, &name, &quotedName)
	if err != nil {
		return databaseError("looking for table "+table, err)
	}
	if oid == nil {
		return codedError{exitNotFound, fmt.Errorf("there is no table %s in that database (--table SCHEMA.NAME)", table)}
	}
	t.name, t.quoted = *name, *quotedName
	rows, err := t.conn.Query(ctx, `
		SELECT attname, quote_ident(attname), format_type(atttypid, atttypmod) FROM pg_attribute WHERE attrelid = $1 AND attnum > 0 AND NOT attisdropped`, *oid)
	if err != nil {
		return databaseError("reading the columns of "+t.name, err)
	}
	quoted, types := map[string]string{}, map[string]string{}
	var column, q, kind string
	_, err = pgx.ForEachRow(rows, []any{&column, &q, &kind}, func() error {
		quoted[column], types[column] = q, kind
		return nil
	})
	if err != nil {
		return databaseError("reading the columns of "+t.name, err)
	}
	t.columns = map[string]string{}
	known := map[string]bool{}
	var missing []string
	for _, c := range importColumns {
		known[c.role] = true
		column, mapped := mapping[c.role]
		if !mapped {
			column = c.column
		}
		switch found := quoted[column]; {
		case found != "":
			t.columns[c.role] = found
		case c.required || mapped && column != "":
			missing = append(missing, fmt.Sprintf("%s (--column %s=NAME)", column, c.role))
		}
		switch c.role {
		case "id":
			t.idType = types[column]
		case "payload":
			t.bytea = types[column] == "bytea"
		}
	}
	for role := range mapping {
		if !known[role] {
			return usagef("--column %s: there is no such role; see outbox import --help", role)
		}
	}
	if len(missing) > 0 {
		return usagef("%s lacks %s", t.name, strings.Join(missing, ", "))
	}
	return nil
}

// lock makes sure that one import of the table runs at a time. It is held as long as the connection.
func (t *importTable) lock(ctx context.Context) error {
	var got bool
	err := t.conn.QueryRow(ctx, `SELECT pg_try_advisory_lock(hashtextextended('outbox import ' || $1, 0))`, t.name).Scan(&got)
	if err != nil {
		return databaseError("locking "+t.name, err)
	}
	if !got {
		return codedError{exitRefused, fmt.Errorf("another import of %s is running", t.name)}
	}
	return nil
}

// sql fills the names of the table and its columns in: {table}, {id}, {payload} …
func (t *importTable) sql(text string) string {
	replace := []string{"{table}", t.quoted, "{id-type}", t.idType}
	for _, c := range importColumns {
		column := t.columns[c.role]
		if column == "" {
			column = "NULL"
		}
		replace = append(replace, "{"+c.role+"}", column)
	}
	return strings.NewReplacer(replace...).Replace(text)
}

// count says how many rows there are to take over.
func (t *importTable) count(ctx context.Context) (n int64, err error) {
	err = t.conn.QueryRow(ctx, t.sql(`SELECT count(*) FROM {table} WHERE `+unpublished)).Scan(&n)
	if err != nil {
		return 0, databaseError("counting the rows of "+t.name, err)
	}
	return n, nil
}

// unpublished are rows that nobody has published, and those that an import that was interrupted had taken.
const unpublished = `({published-at} IS NULL OR {last-error} LIKE '` + markTaken + `%')`

// forgetLeft gives rows that an earlier import had to leave another chance.
func (t *importTable) forgetLeft(ctx context.Context) error {
	_, err := t.conn.Exec(ctx, t.sql(`UPDATE {table} SET {last-error} = NULL WHERE {published-at} IS NULL AND {last-error} LIKE '`+markLeft+`%'`))
	if err != nil {
		return databaseError("looking for rows left by an earlier import", err)
	}
	return nil
}

// takenRows are rows that are taken over: their ids, and the times that stand in published_at since then.
type takenRows map[string]string

// interrupted are the rows that an import that did not end had taken.
func (t *importTable) interrupted(ctx context.Context) (takenRows, error) {
	return t.taken(ctx, "looking for an import that was interrupted",
		`SELECT {id}::text, {published-at}::text FROM {table} WHERE {last-error} LIKE '`+markTaken+`%'`)
}

// take marks the next rows as published, so that no relay of the service touches them from now on.
func (t *importTable) take(ctx context.Context, limit int) (takenRows, error) {
	return t.taken(ctx, "taking rows of "+t.name+" over", `
		WITH page AS (
		  SELECT {id} AS id FROM {table}
		  WHERE {published-at} IS NULL AND coalesce({last-error}, '') NOT LIKE '`+markLeft+`%'
		  ORDER BY {created-at}, {id} LIMIT $1 FOR UPDATE)
		UPDATE {table} AS t SET {published-at} = now(), {last-error} = '`+markTaken+`' || left(coalesce({last-error}, ''), 900)
		FROM page WHERE t.{id} = page.id
		RETURNING t.{id}::text, t.{published-at}::text`, limit)
}

func (t *importTable) taken(ctx context.Context, doing, sql string, arguments ...any) (takenRows, error) {
	rows, err := t.conn.Query(ctx, t.sql(sql), arguments...)
	if err != nil {
		return nil, databaseError(doing, err)
	}
	all := takenRows{}
	var id, at string
	_, err = pgx.ForEachRow(rows, []any{&id, &at}, func() error { all[id] = at; return nil })
	if err != nil {
		return nil, databaseError(doing, err)
	}
	return all, nil
}

// list returns the ids.
func (r takenRows) list() []string { return slices.Collect(maps.Keys(r)) }

// read calls yield for each row, in order. where is a condition with one argument, or none.
func (t *importTable) read(ctx context.Context, where string, argument any, yield func(*importRow) error) error {
	payload := "{payload}"
	if !t.bytea {
		payload = "convert_to({payload}::text, 'UTF8')"
	}
	arguments := []any{}
	if argument != nil {
		arguments = append(arguments, argument)
	}
	rows, err := t.conn.Query(ctx, t.sql(fmt.Sprintf(`
		SELECT r.id, r.atype, r.aid, r.etype, r.topic, r.key, CASE WHEN octet_length(r.payload) <= %d THEN r.payload END, coalesce(octet_length(r.payload), 0),
		       r.at, r.attempts, r.error
		FROM (SELECT {id}::text AS id, {aggregate-type}::text AS atype, {aggregate-id}::text AS aid, {event-type}::text AS etype,
		             coalesce({topic}::text, '') AS topic, {key}::text AS key, %s AS payload, {created-at}::timestamptz AS at,
		             coalesce({retry-count}::int, 0) AS attempts, coalesce({last-error}, '') AS error, {created-at} AS sort1, {id} AS sort2
		      FROM {table} WHERE %s) r ORDER BY r.sort1, r.sort2`, largestPayload, payload, where)), arguments...)
	if err != nil {
		return databaseError("reading the rows of "+t.name, err)
	}
	defer rows.Close()
	for rows.Next() {
		row := &importRow{}
		var kind, id, event *string
		var at *time.Time
		if err := rows.Scan(&row.id, &kind, &id, &event, &row.topic, &row.key, &row.payload, &row.payloadBytes, &at, &row.attempts, &row.lastError); err != nil {
			return databaseError("reading a row of "+t.name, err)
		}
		row.aggregateType, row.aggregateID, row.eventType = orEmpty(kind), orEmpty(id), orEmpty(event)
		if at != nil {
			row.createdAt = *at
		}
		row.lastError = strings.TrimPrefix(row.lastError, markTaken)
		if err := yield(row); err != nil {
			return err
		}
	}
	if err := rows.Err(); err != nil {
		return databaseError("reading the rows of "+t.name, err)
	}
	return nil
}

func orEmpty(s *string) string {
	if s == nil {
		return ""
	}
	return *s
}

// finish records what became of rows. It returns those that somebody else has changed since they were taken: a relay of the
// service that is still running has published them too.
func (t *importTable) finish(ctx context.Context, taken takenRows, done []importOutcome) (changed []string, err error) {
	n := len(done)
	ids, marks, times, left := make([]string, n), make([]string, n), make([]string, n), make([]bool, n)
	for i, o := range done {
		ids[i], marks[i], times[i], left[i] = o.Row, o.mark(), taken[o.Row], o.kind == rowLeft
	}
	rows, err := t.conn.Query(ctx, t.sql(`
		WITH done AS (
		  SELECT o.{id} AS id, d.mark, d.is_left, o.{published-at}::text IS NOT DISTINCT FROM d.taken AS same
		  FROM unnest($1::text[]::{id-type}[], $2::text[], $3::text[], $4::bool[]) d (id, mark, taken, is_left) JOIN {table} o ON o.{id} = d.id)
		UPDATE {table} AS t SET {last-error} = left(d.mark, 1000), {published-at} = CASE WHEN d.is_left AND d.same THEN NULL ELSE t.{published-at} END
		FROM done d WHERE t.{id} = d.id
		RETURNING t.{id}::text, d.same`), ids, marks, times, left)
	const doing = "recording what became of rows"
	if err != nil {
		return nil, databaseError(doing, err)
	}
	var id string
	var same bool
	_, err = pgx.ForEachRow(rows, []any{&id, &same}, func() error {
		if !same {
			changed = append(changed, id)
		}
		return nil
	})
	if err != nil {
		return nil, databaseError(doing, err)
	}
	return changed, nil
}
