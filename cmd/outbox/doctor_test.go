package main

import (
	"context"
	"encoding/json"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/uuid"
	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/outbox-platform/outbox/client"
	"github.com/outbox-platform/outbox/client/pgxoutbox"
	"github.com/outbox-platform/outbox/embedded/postgres"
)

// doctored is a PostgreSQL with a database per case.
type doctored struct {
	*postgres.Server
	t *testing.T
}

func startDoctored(t *testing.T, version string, settings map[string]string) doctored {
	t.Helper()
	pg, err := postgres.Start(t.Context(), postgres.Config{Version: version, Settings: settings})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := pg.Stop(context.WithoutCancel(t.Context())); err != nil {
			t.Error(err)
		}
	})
	d := doctored{pg, t}
	d.exec(pg.DSN("postgres"), `CREATE ROLE orders LOGIN PASSWORD 'orders'`)
	return d
}

// database makes a database in which the service may make tables, and returns the service's and the superuser's DSN of it.
func (d doctored) database(name string) (service, super string) {
	d.t.Helper()
	super, err := d.CreateDatabase(d.t.Context(), name)
	if err != nil {
		d.t.Fatal(err)
	}
	d.exec(super, `GRANT CREATE, USAGE ON SCHEMA public TO orders`)
	return as(d.t, super, "orders", "orders"), super
}

func as(t *testing.T, dsn, role, password string) string {
	t.Helper()
	u, err := url.Parse(dsn)
	if err != nil {
		t.Fatal(err)
	}
	u.User = url.UserPassword(role, password)
	return u.String()
}

func (d doctored) exec(dsn, sql string) {
	d.t.Helper()
	conn, err := pgx.Connect(d.t.Context(), dsn)
	if err != nil {
		d.t.Fatal(err)
	}
	defer func() { _ = conn.Close(context.WithoutCancel(d.t.Context())) }()
	if _, err := conn.Exec(d.t.Context(), sql, pgx.QueryExecModeSimpleProtocol); err != nil {
		d.t.Fatalf("%s: %v", sql, err)
	}
}

// diagnose runs the command and reads its report. The text report is made too.
func (d doctored) diagnose(code int, args ...string) diagnosis {
	d.t.Helper()
	r := outbox(d.t, "", append([]string{"doctor", "-o", "json"}, args...)...)
	if r.code != code {
		d.t.Fatalf("exit %d, want %d: %s%s", r.code, code, r.err, r.out)
	}
	var found diagnosis
	if err := json.Unmarshal([]byte(r.out), &found); err != nil {
		d.t.Fatalf("%v: %s", err, r.out)
	}
	for _, o := range found.Observations {
		if o.Found == "" || o.Level != levelOK && o.Next == "" || (o.Level == levelError) != (len(o.Breaks) > 0) {
			d.t.Errorf("half an observation: %+v", o)
		}
	}
	text := outbox(d.t, "", append([]string{"doctor"}, args...)...)
	if text.code != code || !strings.Contains(text.out, "MODE") {
		d.t.Errorf("as text: %+v", text)
	}
	return found
}

// says fails unless there is an observation of that check and level that contains text.
func (d diagnosis) says(t *testing.T, level, check, text string) {
	t.Helper()
	if !slices.ContainsFunc(d.Observations, func(o observation) bool {
		return o.Level == level && o.Check == check && strings.Contains(o.Found, text)
	}) {
		t.Errorf("no %s of %s with %q in %+v", level, check, text, d.Observations)
	}
}

func (d diagnosis) isSafe(t *testing.T, marker, fenced, clientOnly bool) {
	t.Helper()
	for mode, want := range map[string]bool{modeMarker: marker, modeXIDFenced: fenced, modeClientOnly: clientOnly} {
		if d.safe(mode) != want {
			t.Errorf("%s: safe is %t: %+v", mode, !want, d.Modes)
		}
	}
}

// errors are the observations that make a mode unsafe.
func (d diagnosis) errors() (found []observation) {
	for _, o := range d.Observations {
		if o.Level == levelError {
			found = append(found, o)
		}
	}
	return found
}

func (d diagnosis) sql() string {
	var b strings.Builder
	for _, a := range d.SQL {
		b.WriteString(a.SQL + "\n")
	}
	return b.String()
}

func TestDoctor(t *testing.T) {
	for _, version := range []string{"15", "18"} {
		t.Run(version, func(t *testing.T) {
			t.Parallel()
			d := startDoctored(t, version, map[string]string{"max_prepared_transactions": "5"})
			fenced := version == "18"
			t.Run("from nothing to healthy", func(t *testing.T) { doctored{d.Server, t}.fromNothing(fenced) })
			t.Run("settings of roles and databases", func(t *testing.T) { doctored{d.Server, t}.settings() })
			t.Run("the table", func(t *testing.T) { doctored{d.Server, t}.tables(fenced) })
			t.Run("prepared", func(t *testing.T) { doctored{d.Server, t}.twoPhase() })
			t.Run("standby", func(t *testing.T) { doctored{d.Server, t}.standby() })
		})
	}
}

// fromNothing runs the SQL that doctor prints, until there is nothing left to run.
func (d doctored) fromNothing(fenced bool) {
	service, super := d.database("healthy")
	bare := d.diagnose(exitViolation, "--dsn", service)
	bare.isSafe(d.t, false, fenced, true)
	bare.says(d.t, levelError, "marker table", "there is none")
	if len(bare.errors()) != 1 && fenced {
		d.t.Errorf("more than one error: %+v", bare.errors())
	}

	// The table is the service's; roles are made by the superuser.
	d.exec(service, bare.SQL[0].SQL)
	for _, a := range bare.SQL[1:] {
		d.exec(super, strings.ReplaceAll(a.SQL, "-- then: \\password outbox_resolver", ""))
	}
	d.exec(super, `ALTER ROLE outbox_resolver PASSWORD 'reads'`)
	healthy := d.diagnose(exitOK, "--dsn", service)
	healthy.isSafe(d.t, true, fenced, true)
	healthy.says(d.t, levelOK, "resolver", "only that")
	healthy.says(d.t, levelOK, "privileges", "orders")
	healthy.says(d.t, levelOK, "idle_in_transaction_session_timeout", "60s")
	if len(healthy.SQL) != 0 {
		d.t.Errorf("there is SQL left: %+v", healthy.SQL)
	}
	if f := healthy.Database; f.MarkerTable != "public.outbox_marker" || f.MarkerOID == 0 || f.SystemIdentifier == "" || f.Timeline != 1 || f.Standby {
		d.t.Errorf("facts: %+v", f)
	}

	// The resolver's role can do what it is for.
	resolver := as(d.t, super, "outbox_resolver", "reads")
	d.diagnose(exitOK, "--dsn", resolver, "--service-role", "orders")
	id := uuid.New()
	d.exec(service, `INSERT INTO outbox_marker (id) VALUES ('`+id.String()+`')`)
	pool, err := pgxpool.New(d.t.Context(), resolver)
	if err != nil {
		d.t.Fatal(err)
	}
	defer pool.Close()
	verdicts := pgxoutbox.Verdicts(d.t.Context(), pool, []client.CheckTransaction{{ID: id, Database: client.DatabaseTransaction{XID: 3, Mode: client.ModeMarker}}})
	if len(verdicts) != 1 || verdicts[0].Outcome != client.OutcomeCommitted {
		d.t.Errorf("the resolver's role cannot resolve: %+v", verdicts)
	}
	if _, err := pool.Exec(d.t.Context(), `SELECT spilled FROM outbox_marker`); err == nil {
		d.t.Error("the resolver's role reads spilled events")
	}

	// Asked with the resolver's DSN and no more said, its role is taken for the service's.
	d.diagnose(exitViolation, "--dsn", resolver).says(d.t, levelError, "privileges", "lacks SELECT, INSERT, UPDATE, DELETE")
	if r := outbox(d.t, "", "doctor", "--dsn", service, "--service-role", "nobody-there"); r.code != exitUsage || !strings.Contains(r.err, "nobody-there") {
		d.t.Errorf("a role that is not there: %+v", r)
	}
}

func (d doctored) settings() {
	service, super := d.database("settings")
	d.exec(service, client.MarkerDDL)
	d.exec(super, `ALTER ROLE orders IN DATABASE settings SET synchronous_commit = FALSE`)
	for _, args := range [][]string{{"--dsn", service}, {"--dsn", super, "--service-role", "orders"}} {
		off := d.diagnose(exitViolation, args...)
		off.isSafe(d.t, false, false, false)
		off.says(d.t, levelError, "synchronous_commit", "off for orders")
		if !strings.Contains(off.sql(), `ALTER ROLE "orders" IN DATABASE settings SET synchronous_commit = on;`) {
			d.t.Errorf("SQL: %s", off.sql())
		}
	}
	d.exec(super, `ALTER DATABASE settings SET synchronous_commit = off; ALTER ROLE orders IN DATABASE settings SET synchronous_commit = on;
		ALTER ROLE orders IN DATABASE settings SET default_transaction_isolation = 'repeatable read'`)
	on := d.diagnose(exitOK, "--dsn", service)
	on.says(d.t, levelOK, "synchronous_commit", "on")
	on.says(d.t, levelInfo, "default_transaction_isolation", "repeatable read")
	on.says(d.t, levelOK, "pooler", "none")
	on.says(d.t, levelOK, "clock", "differs")
}

// tables are marker tables that are there and of no use.
func (d doctored) tables(fenced bool) {
	service, super := d.database("tables")
	d.exec(service, client.MarkerDDL)
	for _, c := range []struct{ breaks, mends, check, says, sql string }{
		{
			`ALTER TABLE outbox_marker ENABLE ROW LEVEL SECURITY; ALTER TABLE outbox_marker FORCE ROW LEVEL SECURITY`,
			`ALTER TABLE outbox_marker NO FORCE ROW LEVEL SECURITY; ALTER TABLE outbox_marker DISABLE ROW LEVEL SECURITY`,
			"row security", "active for orders", "DISABLE ROW LEVEL SECURITY",
		},
		{`ALTER TABLE outbox_marker SET UNLOGGED`, `ALTER TABLE outbox_marker SET LOGGED`, "marker table", "UNLOGGED", "SET LOGGED"},
		{`ALTER TABLE outbox_marker RENAME refused TO why`, `ALTER TABLE outbox_marker RENAME why TO refused`, "marker table", "lacks refused text", ""},
		{
			`ALTER TABLE outbox_marker DROP CONSTRAINT outbox_marker_pkey`, `ALTER TABLE outbox_marker ADD PRIMARY KEY (id)`,
			"marker table", "not unique", "",
		},
		{
			`ALTER TABLE outbox_marker OWNER TO postgres`, `ALTER TABLE outbox_marker OWNER TO orders`,
			"privileges", "orders lacks SELECT, INSERT, UPDATE, DELETE", `GRANT SELECT, INSERT, UPDATE, DELETE ON public.outbox_marker TO "orders"`,
		},
		{
			`CREATE SCHEMA shop; ALTER TABLE outbox_marker SET SCHEMA shop`, `ALTER TABLE shop.outbox_marker SET SCHEMA public; DROP SCHEMA shop`,
			"marker table", "not on its search_path", "SET search_path = shop",
		},
	} {
		d.exec(super, c.breaks)
		bad := d.diagnose(exitViolation, "--dsn", service)
		bad.isSafe(d.t, false, fenced, true)
		bad.says(d.t, levelError, c.check, c.says)
		if !strings.Contains(bad.sql(), c.sql) {
			d.t.Errorf("%s: SQL %s", c.breaks, bad.sql())
		}
		d.exec(super, c.mends)
	}
	// The owner sees every row as long as row security is not forced.
	d.exec(super, `ALTER TABLE outbox_marker ENABLE ROW LEVEL SECURITY`)
	d.diagnose(exitOK, "--dsn", service, "--resolver-role", "none")
	// What is no error is told all the same.
	d.exec(super, `CREATE SCHEMA other; CREATE TABLE other.outbox_marker (id uuid); DROP INDEX outbox_marker_spilled;
		CREATE FUNCTION skip() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NULL; END';
		CREATE TRIGGER skip BEFORE INSERT ON outbox_marker FOR EACH ROW EXECUTE FUNCTION skip()`)
	odd := d.diagnose(exitOK, "--dsn", service, "--resolver-role", "none")
	odd.says(d.t, levelWarning, "marker table", "others in other")
	odd.says(d.t, levelWarning, "marker table", "partial index")
	odd.says(d.t, levelWarning, "marker table", "1 triggers")
	odd.says(d.t, levelInfo, "resolver", "no role none")
	d.exec(super, `REVOKE EXECUTE ON FUNCTION pg_control_system() FROM PUBLIC`)
	poor := d.diagnose(exitViolation, "--dsn", service)
	poor.isSafe(d.t, false, false, true)
	poor.says(d.t, levelError, "functions", "pg_control_system()")
	if !strings.Contains(poor.sql(), `GRANT EXECUTE ON FUNCTION pg_control_system() TO "orders";`) {
		d.t.Errorf("SQL: %s", poor.sql())
	}
}

func (d doctored) twoPhase() {
	service, super := d.database("prepared")
	d.exec(service, client.MarkerDDL)
	d.exec(super, `BEGIN; CREATE TABLE t (); PREPARE TRANSACTION 'left'`)
	d.diagnose(exitOK, "--dsn", service).says(d.t, levelOK, "prepared transactions", "1; at most 5")
	d.exec(super, `ROLLBACK PREPARED 'left'`)
}

// standby looks at the same server once it is a standby of nobody. It is the last one on it.
func (d doctored) standby() {
	service, _ := d.database("standby")
	d.exec(service, client.MarkerDDL)
	if err := os.WriteFile(filepath.Join(d.DataDir(), "standby.signal"), nil, 0o644); err != nil {
		d.t.Fatal(err)
	}
	if err := d.Restart(d.t.Context()); err != nil {
		d.t.Fatal(err)
	}
	seen := d.diagnose(exitViolation, "--dsn", service)
	seen.isSafe(d.t, false, false, true)
	seen.says(d.t, levelError, "recovery", "standby")
	if !seen.Database.Standby || seen.Database.Timeline != 0 {
		d.t.Errorf("facts: %+v", seen.Database)
	}
}

func TestDoctorWithoutFsync(t *testing.T) {
	d := startDoctored(t, "", map[string]string{"fsync": "off", "full_page_writes": "off", "synchronous_standby_names": "nobody", "synchronous_commit": "local"})
	service, _ := d.database("orders")
	d.exec(service, client.MarkerDDL)
	off := d.diagnose(exitViolation, "--dsn", service)
	off.isSafe(t, false, false, false)
	off.says(t, levelError, "fsync", "off")
	off.says(t, levelWarning, "full_page_writes", "off")
	off.says(t, levelWarning, "synchronous_commit", "local")
	off.says(t, levelWarning, "replication", "no standby is connected")
}

func TestDoctorWithoutDatabase(t *testing.T) {
	for name, c := range map[string]struct {
		code int
		args []string
		says string
	}{
		"no address": {exitUsage, nil, "OUTBOX_DOCTOR_DSN"},
		"two":        {exitUsage, []string{"--dsn", "x", "--dsn-file", "y"}, "keep one"},
		"no DSN":     {exitUsage, []string{"--dsn", "postgres://orders:s3cret@db:port/x"}, "connection string"},
		"nobody":     {exitUnavailable, []string{"--dsn", "postgres://orders:s3cret@127.0.0.1:1/x"}, "connecting"},
		"no time":    {exitUsage, []string{"--dsn", "x", "--timeout", "0s"}, "positive"},
	} {
		t.Run(name, func(t *testing.T) {
			r := outbox(t, "", append([]string{"doctor"}, c.args...)...)
			if r.code != c.code || !strings.Contains(r.err, c.says) || strings.Contains(r.err, "s3cret") || r.out != "" {
				t.Errorf("%+v", r)
			}
		})
	}
}

// What real servers of these tests cannot show: other makes, versions and replication.
func TestDoctorRules(t *testing.T) {
	healthy := func() *sourceView {
		return &sourceView{
			facts:    databaseFacts{Version: "PostgreSQL 18.1 on x86_64", Role: "orders"},
			version:  180001,
			settings: map[string]sourceSetting{"synchronous_commit": {text: "on"}, "idle_in_transaction_session_timeout": {text: "1min"}},
			service: roleView{
				name: "orders", exists: true, owner: true, usage: true, seesID: true,
				privilege: map[string]bool{"SELECT": true, "INSERT": true, "UPDATE": true, "DELETE": true},
			},
			resolver: roleView{name: "outbox_resolver"},
			marker:   &markerView{name: "public.outbox_marker", kind: "r", persistence: "p", unique: true, spillIndex: true, columns: wanted},
		}
	}
	for name, c := range map[string]struct {
		change             func(*sourceView)
		marker, fenced     bool
		level, check, says string
	}{
		"healthy":   {func(*sourceView) {}, true, true, levelOK, "version", "18"},
		"14":        {func(v *sourceView) { v.version = 140012 }, true, false, levelError, "version", "durable"},
		"12":        {func(v *sourceView) { v.version = 120012 }, false, false, levelError, "version", "before 13"},
		"cockroach": {func(v *sourceView) { v.facts.Version = "CockroachDB CCL v24.1" }, false, false, levelError, "server", "not PostgreSQL"},
		"yugabyte":  {func(v *sourceView) { v.facts.Version = "PostgreSQL 15.2-YB-2.25 on x" }, false, false, levelError, "server", "not PostgreSQL"},
		"aurora":    {func(v *sourceView) { v.aurora = true }, true, true, levelWarning, "server", "Aurora"},
		"asynchronous standby": {
			func(v *sourceView) { v.standbys = []standby{{"b", "streaming", "async"}} }, true, true, levelWarning, "replication", "asynchronous",
		},
		"synchronous standby": {func(v *sourceView) {
			v.standbys = []standby{{"b", "streaming", "sync"}}
			v.settings["synchronous_standby_names"] = sourceSetting{text: "b"}
		}, true, true, levelOK, "replication", "1 standbys"},
		"synchronous standby away": {func(v *sourceView) {
			v.standbys = []standby{{"c", "streaming", "async"}}
			v.settings["synchronous_standby_names"] = sourceSetting{text: "b"}
		}, true, true, levelWarning, "replication", "commits wait"},
		"forgotten two-phase": {func(v *sourceView) { v.prepared, v.preparedAge = 1, 2*oldTransaction }, true, true, levelWarning, "prepared transactions", "1, the oldest"},
		"idle":                {func(v *sourceView) { v.idle, v.idleAge = 2, oldTransaction }, true, true, levelWarning, "open transactions", "2 idle"},
		"pooler":              {func(v *sourceView) { v.pooled, v.moves = true, true }, true, true, levelInfo, "pooler", "transaction mode"},
		"session pooler":      {func(v *sourceView) { v.pooled = true }, true, true, levelInfo, "pooler", "seems"},
		"clock":               {func(v *sourceView) { v.clockAhead = -2 * clockTolerance }, true, true, levelWarning, "clock", "-1m0s"},
		"a view":              {func(v *sourceView) { v.marker.kind = "v" }, false, true, levelError, "marker table", "not a table"},
		"resolver sees less":  {func(v *sourceView) { v.resolver.exists = true }, true, true, levelWarning, "resolver", "cannot read"},
		"resolver does more": {func(v *sourceView) {
			v.resolver = roleView{name: "r", exists: true, super: true, usage: true, seesID: true}
		}, true, true, levelWarning, "resolver", "more than read"},
	} {
		t.Run(name, func(t *testing.T) {
			v := healthy()
			c.change(v)
			d := *diagnose(v)
			d.isSafe(t, c.marker, c.fenced, true)
			d.says(t, c.level, c.check, c.says)
		})
	}
}
