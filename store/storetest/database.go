package storetest

import (
	"context"
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
	cfg, err := pgx.ParseConfig(d.DSN)
	if err != nil {
		t.Fatal("storetest: parsing the DSN:", err)
	}
	cfg.RuntimeParams["search_path"] = ""
	conn, err := pgx.ConnectConfig(t.Context(), cfg)
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

// Exec runs one statement on a connection of its own and returns the number of rows.
func (d *Database) Exec(t testing.TB, sql string, args ...any) int64 {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), startTimeout)
	defer cancel()
	conn := d.dial(ctx, t)
	defer conn.Close(ctx) //nolint:errcheck // nothing depends on it
	tag, err := conn.Exec(ctx, sql, args...)
	if err != nil {
		t.Fatalf("storetest: %s: %v", sql, err)
	}
	return tag.RowsAffected()
}

// Query returns the first column of the rows of one statement, which is run on a connection of its own.
func Query[T any](t testing.TB, d *Database, sql string, args ...any) []T {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), startTimeout)
	defer cancel()
	conn := d.dial(ctx, t)
	defer conn.Close(ctx)                      //nolint:errcheck // nothing depends on it
	rows, err := conn.Query(ctx, sql, args...) //nolint:sqlclosecheck // CollectRows closes them
	if err != nil {
		t.Fatalf("storetest: %s: %v", sql, err)
	}
	values, err := pgx.CollectRows(rows, pgx.RowTo[T])
	if err != nil {
		t.Fatalf("storetest: %s: %v", sql, err)
	}
	return values
}

func (d *Database) dial(ctx context.Context, t testing.TB) *pgx.Conn {
	t.Helper()
	cfg, err := pgx.ParseConfig(d.DSN)
	if err != nil {
		t.Fatal("storetest: parsing the DSN:", err)
	}
	cfg.RuntimeParams["search_path"] = ""
	conn, err := pgx.ConnectConfig(ctx, cfg)
	if err != nil {
		t.Fatal("storetest: connecting:", err)
	}
	return conn
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
