package main

import (
	"fmt"
	"slices"
	"strings"
	"time"
)

const (
	// oldTransaction is when an open transaction is worth a word.
	oldTransaction = 5 * time.Minute
	// clockTolerance is how far clocks may be apart. Ids carry the service's time, retention (1 h and more) is by the database's.
	clockTolerance = 30 * time.Second
	// longKeepalive is when a connection to a host that vanished keeps its transaction open for too long.
	longKeepalive = 120
)

// diagnosing collects observations.
type diagnosing struct {
	v   *sourceView
	out []observation
}

func (d *diagnosing) ok(check, found string) {
	d.out = append(d.out, observation{Level: levelOK, Check: check, Found: found})
}

func (d *diagnosing) info(check, found, next string) {
	d.out = append(d.out, observation{Level: levelInfo, Check: check, Found: found, Next: next})
}

func (d *diagnosing) warn(check, found, next string) {
	d.out = append(d.out, observation{Level: levelWarning, Check: check, Found: found, Next: next})
}

func (d *diagnosing) fail(breaks []string, check, found, next string) {
	d.out = append(d.out, observation{Level: levelError, Check: check, Found: found, Next: next, Breaks: breaks})
}

var (
	onlyMarker = []string{modeMarker}
	onlyFenced = []string{modeXIDFenced}
	askedModes = []string{modeMarker, modeXIDFenced}
)

// diagnose draws conclusions from what was read.
func diagnose(v *sourceView) *diagnosis {
	d := &diagnosing{v: v}
	d.server()
	if v.version >= oldestVersion {
		d.durability()
		d.functions()
		d.markerTable()
		d.privileges()
		d.replication()
		d.transactions()
		d.connection()
	}
	out := &diagnosis{Database: v.facts, Observations: d.out, SQL: sqlAdvice(v)}
	if out.SQL == nil {
		out.SQL = []advice{}
	}
	for _, mode := range allModes {
		m := modeAdvice{Mode: mode}
		for _, o := range d.out {
			if slices.Contains(o.Breaks, mode) {
				m.Why = append(m.Why, o.Check+": "+o.Found)
			}
		}
		if m.Safe = len(m.Why) == 0; m.Safe {
			m.Why = []string{whySafe[mode]}
		}
		out.Modes = append(out.Modes, m)
	}
	return out
}

var whySafe = map[string]string{
	modeMarker: "the marker is committed or not together with the events' transaction, and is read whole, on the primary",
	modeXIDFenced: "the xid can be made durable before Prepare; an answer counts only on the same server and timeline, so a failover " +
		"leaves it to an operator. The SDKs do not write this mode: it is for clients of your own",
	modeClientOnly: "nothing is asked and nothing guessed: what the client does not tell stays in doubt until an operator decides",
}

// server looks at what kind of server it is.
func (d *diagnosing) server() {
	v := d.v
	switch {
	case !strings.HasPrefix(v.facts.Version, "PostgreSQL ") || strings.Contains(v.facts.Version, "-YB-"):
		d.fail(askedModes, "server", "it is not PostgreSQL itself but "+v.facts.Version, "use mode client-only: what is known of PostgreSQL's transactions does not hold there")
	case v.version < oldestVersion:
		d.fail(askedModes, "version", "PostgreSQL before 13 has no 64-bit transaction ids to ask about", "upgrade, or use mode client-only")
	case v.aurora:
		d.warn("server", "Amazon Aurora: its storage is not PostgreSQL's, and nobody has tested failovers of it here", "test a failover with `outbox transaction list --in-doubt` at hand before you rely on it")
	default:
		d.ok("version", fmt.Sprintf("PostgreSQL %d", v.version/10000))
	}
	if v.version >= oldestVersion && v.version < flushVersion {
		d.fail(onlyFenced, "version", fmt.Sprintf("PostgreSQL %d cannot make an xid durable before the commit (17 and newer can): after a crash it is given out again", v.version/10000), "use mode marker")
	}
	if v.facts.Standby {
		d.fail(askedModes, "recovery", "this is a standby: it says nothing certain about transactions, and a service cannot write there",
			"use a DSN that leads to the primary: target_session_attrs=read-write, or the primary's own name")
	}
}

// durability looks at settings that make commits reliable.
func (d *diagnosing) durability() {
	v := d.v
	if v.settings["fsync"].text == "off" {
		d.fail(allModes, "fsync", "off: a crash of the machine may take back commits whose events are published", "fsync = on, and restore from a backup if it ever crashed")
	} else {
		d.ok("fsync", "on")
	}
	switch commit := v.forRole(v.service, "synchronous_commit"); {
	case isOff(commit):
		d.fail(allModes, "synchronous_commit", "off for "+v.service.name+": a crash may take back a commit that was acknowledged, and its events are published by then; the SDK refuses such transactions",
			"set it to on, for the server or for the role (see SQL)")
	case commit == "local" || commit == "remote_write":
		if v.settings["synchronous_standby_names"].text != "" {
			d.warn("synchronous_commit", commit+": a failover may lose commits that were acknowledged, in spite of the synchronous standbys", "set it to on or remote_apply")
		} else {
			d.ok("synchronous_commit", commit)
		}
	default:
		d.ok("synchronous_commit", commit)
	}
	if v.settings["full_page_writes"].text == "off" {
		d.warn("full_page_writes", "off: a crash may tear pages, unless the file system never does", "full_page_writes = on")
	} else {
		d.ok("full_page_writes", "on")
	}
	if isolation := v.forRole(v.service, "default_transaction_isolation"); isolation != "" && isolation != "read committed" {
		d.info("default_transaction_isolation", isolation+": the SDK then asks for spilled requests on a second connection",
			"register the database with the client (pgxoutbox.Register), with a pool that has a connection to spare")
	}
}

// isOff reports whether a setting is off, as people write it: ALTER ROLE keeps what was written.
func isOff(value string) bool {
	return slices.Contains([]string{"off", "of", "false", "no", "0"}, strings.ToLower(value))
}

// functions looks at what may be executed. PUBLIC may, as PostgreSQL comes.
func (d *diagnosing) functions() {
	for _, r := range []struct {
		role  roleView
		title string
	}{{d.v.service, "service"}, {d.v.resolver, "resolver"}} {
		rest := slices.DeleteFunc(slices.Clone(r.role.cannot), func(f string) bool { return f == fenceFunction })
		switch {
		case len(rest) > 0 && r.title == "service":
			d.fail(askedModes, "functions", r.role.name+" may not execute "+strings.Join(rest, ", "), "GRANT EXECUTE on them (see SQL)")
		case len(rest) > 0:
			d.warn("functions", r.role.name+" may not execute "+strings.Join(rest, ", ")+": servers cannot ask the database themselves", "GRANT EXECUTE on them (see SQL)")
		}
		if len(rest) < len(r.role.cannot) && r.title == "service" {
			d.fail(onlyFenced, "functions", r.role.name+" may not execute "+fenceFunction, "GRANT EXECUTE on it, or use mode marker")
		}
	}
}

// wanted are the marker table's columns.
var wanted = []string{"id uuid", "seq bigint", "created_at timestamp with time zone", "spilled bytea", "refused text"}

// markerTable looks at the table itself.
func (d *diagnosing) markerTable() {
	const check = "marker table"
	v, m := d.v, d.v.marker
	if m == nil {
		found, next := "there is none", "create it (see SQL), or let your migrations do it: outbox marker-ddl"
		if len(v.others) > 0 {
			found = fmt.Sprintf("%s finds none: the ones in %s are not on its search_path (%s)", v.facts.Role, strings.Join(v.others, ", "), v.settings["search_path"].text)
			next = "put that schema on the role's search_path"
		}
		d.fail(onlyMarker, check, found, next)
		return
	}
	d.ok(check, fmt.Sprintf("%s, oid %d", m.name, m.oid))
	if m.kind != "r" && m.kind != "p" {
		d.fail(onlyMarker, check, m.name+" is not a table", "create the table (outbox marker-ddl) in its place")
	}
	switch m.persistence {
	case "u":
		d.fail(onlyMarker, check, m.name+" is UNLOGGED: a crash empties it, and committed transactions would look aborted", "ALTER TABLE … SET LOGGED (see SQL)")
	case "t":
		d.fail(onlyMarker, check, m.name+" is a temporary table of this session", "connect without creating one")
	}
	if missing := slices.DeleteFunc(slices.Clone(wanted), func(c string) bool { return slices.Contains(m.columns, c) }); len(missing) > 0 {
		d.fail(onlyMarker, check, fmt.Sprintf("%s lacks %s", m.name, strings.Join(missing, ", ")), "make it as outbox marker-ddl prints it")
	}
	if !m.unique {
		d.fail(onlyMarker, check, "id is not unique: a repeated attempt would not be stopped, and looking a marker up reads the whole table", "make id the primary key")
	}
	if !m.spillIndex {
		d.warn(check, "the partial index on seq is missing: each transaction looks through the whole table for spilled requests", "create it as outbox marker-ddl prints it")
	}
	if m.triggers > 0 {
		d.warn(check, fmt.Sprintf("it has %d triggers: one that skips or moves rows would make committed transactions look aborted", m.triggers), "drop them")
	}
	if len(v.others) > 0 {
		d.warn(check, fmt.Sprintf("there are others in %s: whoever has another search_path gets another one (the resolver then answers UNKNOWN, never wrongly)", strings.Join(v.others, ", ")),
			"drop those that nobody uses, and set search_path for both roles")
	}
	for _, r := range []roleView{v.service, v.resolver} {
		if path := r.settings["search_path"]; r.exists && path != "" && path != v.settings["search_path"].text && r.name != v.facts.Role {
			d.info("search_path", fmt.Sprintf("%s has %s, and you are connected with %s", r.name, path, v.settings["search_path"].text), "run doctor as "+r.name+" too, or compare")
		}
	}
}

// privileges looks at what the roles may do with the table.
func (d *diagnosing) privileges() {
	v, m := d.v, d.v.marker
	if m == nil {
		return
	}
	if !v.service.usage {
		d.fail(onlyMarker, "privileges", v.service.name+" may not use the schema "+m.schema, "GRANT USAGE (see SQL)")
	}
	if missing := missingPrivileges(v.service); len(missing) > 0 {
		d.fail(onlyMarker, "privileges", fmt.Sprintf("%s lacks %s on %s", v.service.name, strings.Join(missing, ", "), m.name),
			"GRANT them (see SQL), or name the service's role with --service-role")
	} else if v.service.usage {
		d.ok("privileges", v.service.name+" may write, read, change and delete markers")
	}
	if v.service.rowSecurity(m) {
		d.fail(onlyMarker, "row security", "active for "+v.service.name+": a hidden marker looks like an aborted transaction, so that every such answer is UNKNOWN", "ALTER TABLE … DISABLE ROW LEVEL SECURITY (see SQL)")
	}
	switch r := v.resolver; {
	case !r.exists:
		d.info("resolver", fmt.Sprintf("there is no role %s: only live instances of the service can be asked (check-back)", r.name),
			"make a read-only role (see SQL) and register its DSN as dsn_ref, so that servers find out what a service left behind that has no instance left")
	case !r.usage || !r.seesID:
		d.warn("resolver", fmt.Sprintf("%s cannot read the ids in %s: servers cannot ask the database themselves", r.name, m.name), "GRANT USAGE and SELECT (see SQL)")
	case r.rowSecurity(m):
		d.fail(onlyMarker, "row security", "active for "+r.name+": servers that ask themselves get no conclusive answer", "ALTER TABLE … DISABLE ROW LEVEL SECURITY, or ALTER ROLE … BYPASSRLS")
	case r.super || r.privilege["INSERT"] || r.privilege["UPDATE"] || r.privilege["DELETE"]:
		d.warn("resolver", r.name+" may do more than read", "give servers a role that can only SELECT (see SQL)")
	default:
		d.ok("resolver", r.name+" may read markers, and only that")
	}
}

func missingPrivileges(r roleView) []string {
	return slices.DeleteFunc([]string{"SELECT", "INSERT", "UPDATE", "DELETE"}, func(p string) bool { return r.privilege[p] })
}

// replication looks at what a failover would do.
func (d *diagnosing) replication() {
	const check = "replication"
	v := d.v
	names := v.settings["synchronous_standby_names"].text
	var sync int
	for _, s := range v.standbys {
		if s.sync == "sync" || s.sync == "quorum" {
			sync++
		}
	}
	const fence = "after a failover fence the old primary for good, then: outbox source failover SOURCE --timeline N"
	switch {
	case len(v.standbys) == 0 && names == "":
		d.info(check, "no standby is connected", "if there is one all the same: "+fence)
	case names == "":
		d.warn(check, fmt.Sprintf("%d standbys, all asynchronous: a failover may lose commits that were acknowledged and whose events are published", len(v.standbys)),
			"name synchronous standbys (synchronous_standby_names), or accept it; "+fence)
	case len(v.standbys) == 0:
		d.warn(check, fmt.Sprintf("synchronous_standby_names is %q and no standby is connected: commits wait, and their transactions are IN_PROGRESS meanwhile", names), "connect a standby")
	case sync == 0 && v.standbys[0].sync != "":
		d.warn(check, fmt.Sprintf("none of %d standbys is synchronous, though synchronous_standby_names is %q: commits wait, and their transactions are IN_PROGRESS meanwhile", len(v.standbys), names), "see pg_stat_replication")
	default:
		d.ok(check, fmt.Sprintf("%d standbys, synchronous_standby_names %q; %s", len(v.standbys), names, fence))
	}
}

// transactions looks at what keeps transactions open: while one runs its events wait, and those behind them.
func (d *diagnosing) transactions() {
	v := d.v
	if v.prepared > 0 && v.preparedAge > oldTransaction {
		d.warn("prepared transactions", fmt.Sprintf("%d, the oldest for %s: events of one are IN_PROGRESS until it is finished", v.prepared, ageText(v.preparedAge)),
			"SELECT * FROM pg_prepared_xacts; COMMIT PREPARED or ROLLBACK PREPARED those that were forgotten")
	} else {
		d.ok("prepared transactions", fmt.Sprintf("%d; at most %s", v.prepared, v.settings["max_prepared_transactions"].text))
	}
	if v.idle > 0 {
		d.warn("open transactions", fmt.Sprintf("%d idle for more than a minute, the oldest for %s", v.idle, ageText(v.idleAge)),
			"SELECT * FROM pg_stat_activity WHERE state LIKE 'idle in transaction%'; look for who forgot to end them")
	}
	limit := v.forRole(v.service, "idle_in_transaction_session_timeout")
	if limit == "0" || limit == "" {
		d.warn("idle_in_transaction_session_timeout", "off for "+v.service.name+": a service that hangs with an open transaction holds its aggregates for as long as it hangs", "set it, for instance to 60s (see SQL)")
	} else {
		d.ok("idle_in_transaction_session_timeout", limit)
	}
	if s, there := v.settings["tcp_keepalives_idle"]; there && s.number > longKeepalive && v.settings["tcp_user_timeout"].number == 0 {
		d.info("tcp_keepalives_idle", fmt.Sprintf("%d s: a service whose host vanishes keeps its transaction IN_PROGRESS for that long", s.number), "tcp_keepalives_idle = 10, tcp_keepalives_interval = 5, tcp_keepalives_count = 3 on the server")
	}
}

// connection looks at what lies in between.
func (d *diagnosing) connection() {
	v := d.v
	switch {
	case v.moves:
		d.info("pooler", "one is in between, in transaction mode", "that is fine; let the service's driver not prepare statements on the server (pgx: QueryExecModeExec), and set roles' settings with ALTER ROLE, not SET")
	case v.pooled:
		d.info("pooler", "one seems to be in between (the process that answers is not the one the connection was told of)", "pooling by session or transaction is fine, pooling by statement is not")
	default:
		d.ok("pooler", "none was noticed")
	}
	off := v.clockAhead.Abs()
	switch found := fmt.Sprintf("the database's differs from this machine's by %s (± %s)", v.clockAhead.Round(time.Millisecond), v.clockError.Round(time.Millisecond)); {
	case off > clockTolerance+v.clockError:
		d.warn("clock", found, "run NTP on both: nothing is decided by clocks, but markers are kept by them")
	default:
		d.ok("clock", found)
	}
}
