package store

import (
	"cmp"
	"context"
	"fmt"
	"strconv"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
)

// The revisions of the schema that this package works with. A range, so that binaries and schema can be rolled out in any
// order; migrations.Revision lies in it.
const (
	oldestRevision = 3
	newestRevision = 3
)

// Config says how to reach the store. The zero value of a field means its default.
type Config struct {
	DSN string // libpq connection string or URL
	// Unsafe allows fsync=off and synchronous_commit=off. For tests and benchmarks of something else.
	Unsafe bool
	// MaxConns of the pool for everything but the writers and readers, which have their own connections. Default 8.
	MaxConns int32
	// StatementTimeout of every connection; also the grace after which a closed generation has no straggler. Default 5 s.
	StatementTimeout time.Duration
	// ApplicationName as pg_stat_activity shows it. Default "outbox".
	ApplicationName string
}

func (c Config) withDefaults() Config {
	c.MaxConns = cmp.Or(c.MaxConns, 8)
	c.StatementTimeout = cmp.Or(c.StatementTimeout, 5*time.Second)
	c.ApplicationName = cmp.Or(c.ApplicationName, "outbox")
	return c
}

// Store is a PostgreSQL database with the platform's schema. Safe for concurrent use.
type Store struct {
	cfg        Config
	pool       *pgxpool.Pool
	server     server // as Open found it
	shardCount int

	maintenance maintenanceState
}

// Open connects, and refuses a store that may lose commits (fsync or synchronous_commit off, unless Unsafe), a standby,
// and a schema revision that this binary does not accept: the error names the command to run. It also refuses a schema
// that was copied into another cluster, whose transaction ids do not continue those of the log.
func Open(ctx context.Context, cfg Config) (*Store, error) {
	s := &Store{cfg: cfg.withDefaults()}
	pc, err := pgxpool.ParseConfig(cfg.DSN)
	if err != nil {
		return nil, fmt.Errorf("parsing the store's DSN: %w", err)
	}
	s.configure(pc.ConnConfig)
	pc.MaxConns = s.cfg.MaxConns
	if s.pool, err = pgxpool.NewWithConfig(ctx, pc); err != nil {
		return nil, storeError("opening the store", err)
	}
	if err := s.check(ctx); err != nil {
		s.pool.Close()
		return nil, err
	}
	return s, nil
}

// configure sets what every connection has in common. The isolation level is set because the statements rely on READ
// COMMITTED (a decision is re-checked under the row lock), whatever the role's default is.
func (s *Store) configure(cc *pgx.ConnConfig) {
	p := cc.RuntimeParams
	p["application_name"] = s.cfg.ApplicationName
	p["statement_timeout"] = strconv.FormatInt(s.cfg.StatementTimeout.Milliseconds(), 10)
	p["idle_in_transaction_session_timeout"] = p["statement_timeout"]
	p["default_transaction_isolation"] = "read committed"
	p["default_transaction_read_only"] = "off"
	p["search_path"] = "pg_catalog"
	p["timezone"] = "UTC"
	p["jit"] = "off"
	cc.ConnectTimeout = cmp.Or(cc.ConnectTimeout, s.cfg.StatementTimeout)
}

// check refuses a store that must not be used.
func (s *Store) check(ctx context.Context) error {
	conn, err := s.pool.Acquire(ctx)
	if err != nil {
		return storeError("connecting to the store", err)
	}
	defer conn.Release()
	if s.server, err = serverOf(ctx, conn.Conn()); err != nil {
		return err
	}
	if err := s.server.usable(s.cfg.Unsafe); err != nil {
		return err
	}
	if err := checkRevision(ctx, conn.Conn()); err != nil {
		return err
	}
	shards, made, _, err := controlOf(ctx, conn.Conn())
	if err != nil {
		return err
	}
	s.shardCount = shards
	if made != s.server.systemIdentifier {
		return fmt.Errorf("this store was made in the cluster with system identifier %d and is now in %d: transaction ids start anew there, "+
			"so events would be skipped; copy whole clusters (pg_basebackup), not dumps", made, s.server.systemIdentifier)
	}
	return nil
}

// checkRevision refuses a schema that this package does not know.
func checkRevision(ctx context.Context, conn *pgx.Conn) error {
	var migrated bool
	if err := conn.QueryRow(ctx, `SELECT to_regclass('outbox.schema_version') IS NOT NULL`).Scan(&migrated); err != nil {
		return storeError("looking for the schema", err)
	}
	revision := int64(0)
	if migrated {
		if err := conn.QueryRow(ctx, `SELECT coalesce(max(version_id), 0) FROM outbox.schema_version WHERE is_applied`).Scan(&revision); err != nil {
			return storeError("reading the schema revision", err)
		}
	}
	switch {
	case revision < oldestRevision:
		return fmt.Errorf("the store has schema revision %d, this binary needs %d to %d: run `outbox migrate up`", revision, oldestRevision, newestRevision)
	case revision > newestRevision:
		return fmt.Errorf("the store has schema revision %d, this binary knows %d to %d: run a newer binary", revision, oldestRevision, newestRevision)
	}
	return nil
}

// Close closes the pool. Writers and readers have connections of their own: end them first.
func (s *Store) Close() { s.pool.Close() }

// ShardCount is the number of shards, fixed when the schema was made.
func (s *Store) ShardCount() int { return s.shardCount }

// Ping reports whether the store answers and is writable: ErrUnavailable.
func (s *Store) Ping(ctx context.Context) error {
	ctx, cancel := s.bound(ctx)
	defer cancel()
	var readOnly bool
	err := s.pool.QueryRow(ctx, `SELECT pg_is_in_recovery() OR current_setting('transaction_read_only')::bool`).Scan(&readOnly)
	if err != nil {
		return storeError("asking the store", err)
	}
	if readOnly {
		return fmt.Errorf("%w: it is read-only", ErrUnavailable)
	}
	return nil
}
