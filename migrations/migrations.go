// Package migrations holds the schema of the store and moves a database to it. Files are embedded, so that a binary
// always carries the schema that it was built for.
//
// Migrations expand first and contract a release later: a binary accepts a range of revisions (see package store), so the
// order of deploying it and of migrating is free.
package migrations

import (
	"context"
	"database/sql"
	"embed"
	"errors"
	"fmt"
	"io/fs"
	"strconv"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/stdlib"
	"github.com/pressly/goose/v3"
	"github.com/pressly/goose/v3/database"
	"github.com/pressly/goose/v3/lock"
)

//go:embed *.sql
var files embed.FS

// Files are the migrations, for people who run them with tools of their own.
func Files() fs.FS { return files }

// Revision is the newest revision in this package.
const Revision = 3

// Table is where the applied revisions are kept.
const Table = "outbox.schema_version"

// lockID is the advisory lock that makes concurrent migrations wait for each other: "outbox" in ASCII.
const lockID = 0x6f7574626f78

// Step is one migration and what became of it.
type Step struct {
	Revision  int64
	Name      string        // file name
	Up        bool          // false: taken back
	Duration  time.Duration // 0 from Status
	AppliedAt time.Time     // zero: pending, or not asked for
}

// Option changes how a migration is run.
type Option func(*options)

type options struct{ shards int }

// WithShards sets the number of shards of a store that is made anew: 1 to 64, default 16. It decides where events are
// found, so it is fixed from then on; for a store that exists it is ignored.
func WithShards(n int) Option { return func(o *options) { o.shards = n } }

// Up migrates the database at dsn to Revision and calls progress (if not nil) for each migration applied. Several
// processes may call it at once: one works, the others wait and then find nothing left to do.
func Up(ctx context.Context, dsn string, progress func(Step), opts ...Option) error {
	return with(ctx, dsn, opts, func(p *goose.Provider) error {
		done, err := p.Up(ctx)
		report(done, progress)
		return applied("migrating up", err, progress)
	})
}

// Down takes back the newest migration; with the first one goes everything stored.
func Down(ctx context.Context, dsn string, progress func(Step)) error {
	return with(ctx, dsn, nil, func(p *goose.Provider) error {
		done, err := p.Down(ctx)
		if errors.Is(err, goose.ErrNoNextVersion) {
			return nil
		}
		if done != nil {
			report([]*goose.MigrationResult{done}, progress)
		}
		return applied("migrating down", err, progress)
	})
}

// Status lists all migrations of this package by revision and says which are applied. It changes nothing but, in a
// database that was never migrated, makes the schema and the empty table of revisions.
func Status(ctx context.Context, dsn string) ([]Step, error) {
	var steps []Step
	err := with(ctx, dsn, nil, func(p *goose.Provider) error {
		status, err := p.Status(ctx)
		if err != nil {
			return fmt.Errorf("reading the migration status: %w", err)
		}
		for _, s := range status {
			steps = append(steps, Step{Revision: s.Source.Version, Name: s.Source.Path, Up: true, AppliedAt: s.AppliedAt})
		}
		return nil
	})
	return steps, err
}

// with runs fn with a provider over one connection of its own.
func with(ctx context.Context, dsn string, opts []Option, fn func(*goose.Provider) error) (err error) {
	var o options
	for _, opt := range opts {
		opt(&o)
	}
	db, err := connect(dsn, o)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, db.Close()) }()
	if err := makeSchema(ctx, db); err != nil {
		return err
	}
	locker, err := lock.NewPostgresSessionLocker(lock.WithLockID(lockID), lock.WithLockTimeout(1, 600))
	if err != nil {
		return fmt.Errorf("preparing the migration lock: %w", err)
	}
	p, err := goose.NewProvider(database.DialectPostgres, db, files,
		goose.WithSessionLocker(locker), goose.WithTableName(Table), goose.WithDisableGlobalRegistry(true))
	if err != nil {
		return fmt.Errorf("reading the migrations: %w", err)
	}
	return fn(p)
}

func connect(dsn string, o options) (*sql.DB, error) {
	cfg, err := pgx.ParseConfig(dsn)
	if err != nil {
		return nil, fmt.Errorf("parsing the store's DSN: %w", err)
	}
	// A migration takes as long as it takes; what the caller's role or database says about that does not apply.
	cfg.RuntimeParams["statement_timeout"] = "0"
	cfg.RuntimeParams["lock_timeout"] = "30s"
	cfg.RuntimeParams["application_name"] = "outbox migrate"
	if o.shards != 0 {
		if o.shards < 1 || o.shards > 64 {
			return nil, fmt.Errorf("number of shards %d: not between 1 and 64", o.shards)
		}
		cfg.RuntimeParams["outbox.shards"] = strconv.Itoa(o.shards)
	}
	return stdlib.OpenDB(*cfg), nil
}

// makeSchema makes the schema before goose needs it for its table. The lock keeps two first migrations from racing:
// CREATE SCHEMA IF NOT EXISTS alone fails then.
func makeSchema(ctx context.Context, db *sql.DB) error {
	tx, err := db.BeginTx(ctx, nil)
	if err != nil {
		return fmt.Errorf("connecting to the store: %w", err)
	}
	defer tx.Rollback() //nolint:errcheck // after Commit it does nothing, and before it the error is already known
	if _, err := tx.ExecContext(ctx, `SELECT pg_advisory_xact_lock($1)`, lockID); err != nil {
		return fmt.Errorf("waiting for another migration: %w", err)
	}
	if _, err := tx.ExecContext(ctx, `CREATE SCHEMA IF NOT EXISTS outbox`); err != nil {
		return fmt.Errorf("making the schema: %w", err)
	}
	if err := tx.Commit(); err != nil {
		return fmt.Errorf("making the schema: %w", err)
	}
	return nil
}

// applied unwraps what goose applied before it failed.
func applied(doing string, err error, progress func(Step)) error {
	if err == nil {
		return nil
	}
	var partial *goose.PartialError
	if errors.As(err, &partial) {
		report(partial.Applied, progress)
	}
	return fmt.Errorf("%s: %w", doing, err)
}

func report(done []*goose.MigrationResult, progress func(Step)) {
	if progress == nil {
		return
	}
	for _, r := range done {
		progress(Step{Revision: r.Source.Version, Name: r.Source.Path, Up: r.Direction == "up", Duration: r.Duration})
	}
}
