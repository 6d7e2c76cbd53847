package main

import (
	"fmt"
	"slices"
	"strings"

	"github.com/jackc/pgx/v5"

	"github.com/outbox-platform/outbox/client"
)

// sqlAdvice is the SQL that puts right what can be put right by SQL, and makes the resolver's role. The table's owner, or a
// superuser for roles and settings, runs it on the primary.
func sqlAdvice(v *sourceView) []advice {
	if v.version < oldestVersion {
		return nil
	}
	var out []advice
	service := pgx.Identifier{v.service.name}.Sanitize()
	table, schema := "outbox_marker", "public"
	switch m := v.marker; {
	case m != nil:
		table, schema = m.name, m.schema
	case len(v.others) > 0:
		schema = v.others[0]
		table = schema + ".outbox_marker"
		out = append(out, advice{"the marker table is there, but not found", fmt.Sprintf("ALTER ROLE %s IN DATABASE %s SET search_path = %s;", service, v.quotedName, schema)})
	default:
		out = append(out, advice{"the marker table, as the role that owns the service's tables, in a schema its search_path finds", strings.TrimSpace(client.MarkerDDL)})
	}
	if sql := repairs(v, service, table); len(sql) > 0 {
		out = append(out, advice{"what is wrong or missing", strings.Join(sql, "\n")})
	}
	if sql := serviceGrants(v, service, table, schema); len(sql) > 0 {
		out = append(out, advice{"what the service's role needs", strings.Join(sql, "\n")})
	}
	if sql := resolverGrants(v, table, schema); len(sql) > 0 {
		out = append(out, advice{"a read-only role, with which servers ask this database themselves (dsn_ref of the source)", strings.Join(sql, "\n")})
	}
	return out
}

// repairs are statements that change the table or settings.
func repairs(v *sourceView, service, table string) []string {
	var sql []string
	if m := v.marker; m != nil {
		if m.persistence == "u" {
			sql = append(sql, "ALTER TABLE "+table+" SET LOGGED;")
		}
		if v.service.rowSecurity(m) || v.resolver.exists && v.resolver.rowSecurity(m) {
			sql = append(sql, "ALTER TABLE "+table+" DISABLE ROW LEVEL SECURITY;")
		}
		if !m.spillIndex && slices.Contains(m.columns, "refused text") && slices.Contains(m.columns, "spilled bytea") {
			sql = append(sql, "CREATE INDEX CONCURRENTLY outbox_marker_spilled ON "+table+" (seq) WHERE spilled IS NOT NULL AND refused IS NULL;")
		}
	}
	if isOff(v.forRole(v.service, "synchronous_commit")) {
		sql = append(sql, "ALTER ROLE "+service+" IN DATABASE "+v.quotedName+" SET synchronous_commit = on;")
	}
	if limit := v.forRole(v.service, "idle_in_transaction_session_timeout"); limit == "0" || limit == "" {
		sql = append(sql, "ALTER ROLE "+service+" IN DATABASE "+v.quotedName+" SET idle_in_transaction_session_timeout = '60s';")
	}
	return sql
}

func serviceGrants(v *sourceView, service, table, schema string) []string {
	var sql []string
	for _, f := range v.service.cannot {
		sql = append(sql, "GRANT EXECUTE ON FUNCTION "+f+" TO "+service+";")
	}
	if v.marker == nil {
		return append(sql,
			"GRANT USAGE ON SCHEMA "+schema+" TO "+service+";   -- not needed by the owner",
			"GRANT SELECT, INSERT, UPDATE, DELETE ON "+table+" TO "+service+";")
	}
	if !v.service.usage {
		sql = append(sql, "GRANT USAGE ON SCHEMA "+schema+" TO "+service+";")
	}
	if missing := missingPrivileges(v.service); len(missing) > 0 {
		sql = append(sql, "GRANT "+strings.Join(missing, ", ")+" ON "+table+" TO "+service+";")
	}
	return sql
}

// resolverGrants leave out what is there. Only ids can be read: spilled rows hold events.
func resolverGrants(v *sourceView, table, schema string) []string {
	r := v.resolver
	name := pgx.Identifier{r.name}.Sanitize()
	var sql []string
	if !r.exists {
		sql = append(sql,
			"CREATE ROLE "+name+" LOGIN CONNECTION LIMIT 20;   -- then: \\password "+r.name,
			"ALTER ROLE "+name+" SET default_transaction_read_only = on;",
			"ALTER ROLE "+name+" IN DATABASE "+v.quotedName+" SET search_path = "+schema+";",
			"GRANT CONNECT ON DATABASE "+v.quotedName+" TO "+name+";")
	}
	for _, f := range r.cannot {
		if f != fenceFunction {
			sql = append(sql, "GRANT EXECUTE ON FUNCTION "+f+" TO "+name+";")
		}
	}
	if !r.exists || v.marker == nil || !r.usage || !r.seesID {
		sql = append(sql, "GRANT USAGE ON SCHEMA "+schema+" TO "+name+";", "GRANT SELECT (id) ON "+table+" TO "+name+";")
	}
	return sql
}
