package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
)

type doctorCmd struct {
	DSN          secret        `name:"dsn" env:"OUTBOX_DOCTOR_DSN" placeholder:"DSN" help:"Source database, reached as the service reaches it: postgres://orders@db/orders."`
	DSNFile      string        `name:"dsn-file" type:"path" placeholder:"FILE" help:"File that holds it."`
	ServiceRole  string        `placeholder:"ROLE" help:"Role of the service. Default: the one that connects."`
	ResolverRole string        `default:"outbox_resolver" placeholder:"ROLE" help:"Read-only role with which servers ask the database themselves. It need not exist."`
	Timeout      time.Duration `default:"10s" help:"Limit of the whole look."`
	outputSettings
}

// Help implements kong.HelpProvider.
func (*doctorCmd) Help() string {
	return `Looks at a source database, changes nothing, and says for each mode whether the outcome of a transaction can be found out there for
certain, why, and which SQL to run. Connect as the service does (same host, same pooler, same role), or name its role.

Levels: error makes a mode unsafe, warning may hurt later, info is worth knowing. Each says what to do next.

Examples:
  outbox doctor --dsn "$ORDERS_DSN"
  outbox doctor --dsn-file /run/secrets/admin-dsn --service-role orders -o json

Exit codes: 0 mode marker is safe there, 1 failed, 2 wrong usage, 5 the database cannot be reached, 6 mode marker is not safe there
(yet: a missing marker table counts).`
}

// Validate is called by kong.
func (c *doctorCmd) Validate() error {
	if c.Timeout <= 0 {
		return fmt.Errorf("--timeout must be positive: %s", c.Timeout)
	}
	return nil
}

// Run looks and reports.
func (c *doctorCmd) Run(ctx context.Context, s streams) error {
	dsn, err := c.DSN.fromFile("dsn", c.DSNFile)
	if err == nil && dsn == "" {
		err = usagef("the database's address is missing: give --dsn, --dsn-file or OUTBOX_DOCTOR_DSN")
	}
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, c.Timeout)
	defer cancel()
	seen, err := examine(ctx, dsn, c.ServiceRole, c.ResolverRole)
	if err != nil {
		return err
	}
	d := diagnose(seen)
	if c.json() {
		err = writeJSON(s.out, d)
	} else {
		err = d.write(s.out)
	}
	if err != nil {
		return err
	}
	if !d.safe(modeMarker) {
		return codedError{exitViolation, errors.New("mode marker is not safe on this database")}
	}
	return nil
}

// examine connects and looks. Nothing is written: every transaction is READ ONLY.
func examine(ctx context.Context, dsn, serviceRole, resolverRole string) (*sourceView, error) {
	config, err := pgx.ParseConfig(dsn)
	if err != nil {
		return nil, usagef("the DSN cannot be used: it is not a PostgreSQL connection string") // the parser's error may show a password
	}
	// Nothing is prepared on the server, so that a pooler in transaction mode may be in between.
	config.DefaultQueryExecMode = pgx.QueryExecModeExec
	conn, err := pgx.ConnectConfig(ctx, config)
	if err != nil {
		var refused *pgconn.PgError
		if errors.As(err, &refused) && !strings.HasPrefix(refused.Code, "57P") && refused.Code != "53300" {
			return nil, fmt.Errorf("connecting to the source database: %w", err)
		}
		return nil, codedError{exitUnavailable, fmt.Errorf("connecting to the source database: %w", err)}
	}
	defer func() { _ = conn.Close(context.WithoutCancel(ctx)) }()
	return readSource(ctx, conn, serviceRole, resolverRole)
}

// The modes, as source files name them.
const (
	modeMarker     = "marker"
	modeXIDFenced  = "xid-fenced"
	modeClientOnly = "client-only"
)

var allModes = []string{modeMarker, modeXIDFenced, modeClientOnly}

// The levels of observations, worst last.
const (
	levelOK      = "ok"
	levelInfo    = "info"
	levelWarning = "warning"
	levelError   = "error"
)

// observation is one thing that was looked at.
type observation struct {
	Level string `json:"level"`
	Check string `json:"check"`
	Found string `json:"found"`
	// Next is what to do; empty when there is nothing.
	Next string `json:"next,omitempty"`
	// Breaks are the modes that are not safe because of it. Errors only.
	Breaks []string `json:"breaks,omitempty"`
}

// modeAdvice says whether a mode is safe.
type modeAdvice struct {
	Mode string   `json:"mode"`
	Safe bool     `json:"safe"`
	Why  []string `json:"why"`
}

// advice is SQL that a person may run.
type advice struct {
	Why string `json:"why"`
	SQL string `json:"sql"`
}

// diagnosis is the whole report.
type diagnosis struct {
	Database     databaseFacts `json:"database"`
	Modes        []modeAdvice  `json:"modes"`
	Observations []observation `json:"observations"`
	SQL          []advice      `json:"sql"`
}

// databaseFacts identify what was looked at.
type databaseFacts struct {
	Version          string `json:"version"`
	Name             string `json:"name"`
	SystemIdentifier string `json:"system_identifier,omitempty"`
	Timeline         uint32 `json:"timeline,omitempty"`
	OID              uint32 `json:"oid"`
	Standby          bool   `json:"standby"`
	Role             string `json:"role"`
	ServiceRole      string `json:"service_role"`
	ResolverRole     string `json:"resolver_role,omitempty"` // empty: it does not exist
	MarkerTable      string `json:"marker_table,omitempty"`
	MarkerOID        uint32 `json:"marker_oid,omitempty"`
}

func (d *diagnosis) safe(mode string) bool {
	return slices.ContainsFunc(d.Modes, func(m modeAdvice) bool { return m.Mode == mode && m.Safe })
}

func (d *diagnosis) write(w io.Writer) error {
	f := d.Database
	fmt.Fprintf(w, "%s\ndatabase %s (oid %d), system identifier %s, timeline %d\n", f.Version, f.Name, f.OID, dash(f.SystemIdentifier), f.Timeline)
	fmt.Fprintf(w, "connected as %s; the service is %s, the resolver's role is %s\n\n", f.Role, f.ServiceRole, dash(f.ResolverRole))
	rows := make([][]string, 0, len(d.Modes))
	for _, m := range d.Modes {
		verdict := "NOT SAFE"
		if m.Safe {
			verdict = "safe"
		}
		for i, why := range m.Why {
			if i == 0 {
				rows = append(rows, []string{m.Mode, verdict, why})
			} else {
				rows = append(rows, []string{"", "", why})
			}
		}
	}
	if err := table(w, "MODE | HERE | WHY", rows); err != nil {
		return err
	}
	fmt.Fprintln(w)
	for _, o := range d.Observations {
		fmt.Fprintf(w, "%-8s %s: %s\n", o.Level, o.Check, o.Found)
		if o.Next != "" {
			fmt.Fprintf(w, "         next: %s\n", o.Next)
		}
	}
	for _, a := range d.SQL {
		if _, err := fmt.Fprintf(w, "\n-- %s\n%s\n", a.Why, a.SQL); err != nil {
			return err
		}
	}
	return nil
}
