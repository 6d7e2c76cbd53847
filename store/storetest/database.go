package storetest

import (
	"context"
	"sync"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/outbox-platform/outbox/store"
)

// Database is a database of one test, with the schema in it, and a store opened on it. It ends with the test.
type Database struct {
	DSN     string       // as superuser
	Store   *store.Store // nil with WithoutSchema
	Cluster *Cluster

	config func(*store.Config)

	mu   sync.Mutex
	conn *pgx.Conn // of Exec and Query; opened when needed
}

// New makes a database on the shared server.
func New(t testing.TB, opts ...Option) *Database {
	t.Helper()
	return sharedCluster(t).New(t, opts...)
}

// New makes a database on this server.
func (c *Cluster) New(t testing.TB, opts ...Option) *Database {
	t.Helper()
	o := collect(opts)
	ctx, cancel := context.WithTimeout(t.Context(), startTimeout)
	defer cancel()
	name, err := c.create(ctx, o)
	if err != nil {
		t.Fatal("storetest: making a database:", err)
	}
	d := &Database{DSN: c.server.DSN(name), Cluster: c, config: o.config}
	t.Cleanup(d.close)
	if !o.empty {
		d.Store = d.Open(t)
	}
	return d
}

// Open opens another store on the database, as another process would. It is closed with the test.
func (d *Database) Open(t testing.TB) *store.Store {
	t.Helper()
	cfg := store.Config{DSN: d.DSN}
	if d.config != nil {
		d.config(&cfg)
	}
	st, err := store.Open(t.Context(), cfg)
	if err != nil {
		t.Fatal("storetest: opening the store:", err)
	}
	t.Cleanup(st.Close)
	return st
}

// Connect opens a plain connection with an empty search_path, so that a table without its schema is an error. It is
// closed with the test.
func (d *Database) Connect(t testing.TB) *pgx.Conn {
	t.Helper()
	conn, err := d.dial(t.Context())
	if err != nil {
		t.Fatal("storetest: connecting:", err)
	}
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(t.Context()), stopTimeout)
		defer cancel()
		_ = conn.Close(ctx)
	})
	return conn
}

// Exec runs one statement and returns the number of rows.
func (d *Database) Exec(t testing.TB, sql string, args ...any) int64 {
	t.Helper()
	var n int64
	d.with(t, sql, func(ctx context.Context, conn *pgx.Conn) error {
		tag, err := conn.Exec(ctx, sql, args...)
		n = tag.RowsAffected()
		return err
	})
	return n
}

// Query returns the first column of the rows of one statement.
func Query[T any](t testing.TB, d *Database, sql string, args ...any) []T {
	t.Helper()
	var values []T
	d.with(t, sql, func(ctx context.Context, conn *pgx.Conn) error {
		rows, err := conn.Query(ctx, sql, args...)
		if err != nil {
			return err
		}
		values, err = pgx.CollectRows(rows, pgx.RowTo[T])
		return err
	})
	return values
}

// with runs fn on the connection that all calls share, and opens it again if it broke.
func (d *Database) with(t testing.TB, sql string, fn func(context.Context, *pgx.Conn) error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.WithoutCancel(t.Context()), startTimeout)
	defer cancel()
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.conn == nil || d.conn.Ping(ctx) != nil { // the server may have been killed
		conn, err := d.dial(ctx)
		if err != nil {
			t.Fatal("storetest: connecting:", err)
		}
		d.conn = conn
	}
	if err := fn(ctx, d.conn); err != nil {
		t.Fatalf("storetest: %s: %v", sql, err)
	}
}

func (d *Database) dial(ctx context.Context) (*pgx.Conn, error) {
	cfg, err := pgx.ParseConfig(d.DSN)
	if err != nil {
		return nil, err
	}
	cfg.RuntimeParams["search_path"] = ""
	// Tests change schemas under its feet.
	cfg.DefaultQueryExecMode = pgx.QueryExecModeDescribeExec
	return pgx.ConnectConfig(ctx, cfg)
}

func (d *Database) close() {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.conn != nil {
		ctx, cancel := context.WithTimeout(context.Background(), stopTimeout)
		defer cancel()
		_ = d.conn.Close(ctx) // the server may be gone, and nothing depends on it
	}
}

// pollInterval is the pause between two looks at something that offers no signal.
const pollInterval = 2 * time.Millisecond

// Eventually waits until a condition that offers no signal holds, and fails the test if it does not hold in time. The
// condition runs in the test's goroutine and may fail the test itself.
func Eventually(t testing.TB, within time.Duration, condition func() bool) {
	t.Helper()
	deadline := time.NewTimer(within)
	defer deadline.Stop()
	tick := time.NewTicker(pollInterval)
	defer tick.Stop()
	for !condition() {
		select {
		case <-deadline.C:
			// The condition may have come true while the last look and the deadline raced.
			if condition() {
				return
			}
			t.Fatalf("condition did not hold within %s", within)
		case <-tick.C:
		}
	}
}
