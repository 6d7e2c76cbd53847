package storetest

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/outbox-platform/outbox/embedded/postgres"
	"github.com/outbox-platform/outbox/migrations"
)

// VersionEnv names the environment variable with the major version of PostgreSQL that tests run on.
const VersionEnv = "OUTBOX_TEST_POSTGRES"

// startTimeout bounds the start of a server, the one download included.
const startTimeout = 3 * time.Minute

// Cluster is a PostgreSQL server. Its methods may be called from parallel tests, but Kill and Restart end everybody's
// connections.
type Cluster struct {
	server *postgres.Server
	names  atomic.Int64

	mu        sync.Mutex
	templates map[int]string // by number of shards; migrated, never connected to
}

// NewCluster starts a server for this test alone, to be killed and restarted. It ends with the test.
func NewCluster(t testing.TB, opts ...Option) *Cluster {
	t.Helper()
	o := collect(opts)
	c, err := startCluster(o.version, "", o.settings)
	if err != nil {
		t.Fatal("storetest: starting a PostgreSQL of its own:", err)
	}
	c.stopWith(t)
	return c
}

// stopWith stops the server with the test.
func (c *Cluster) stopWith(t testing.TB) {
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(t.Context()), stopTimeout)
		defer cancel()
		if err := c.stop(ctx); err != nil {
			t.Error("storetest: stopping PostgreSQL:", err)
		}
	})
}

// startCluster starts a server. version "": of the environment. dir "": a temporary one.
func startCluster(version, dir string, settings map[string]string) (*Cluster, error) {
	ctx, cancel := context.WithTimeout(context.Background(), startTimeout)
	defer cancel()
	// Prepared transactions and many connections are there for tests that need them.
	all := map[string]string{
		"shared_buffers": "128MB", "max_prepared_transactions": "16", "max_connections": "300",
		"max_wal_size": "4GB", "checkpoint_timeout": "30min", "track_activity_query_size": "4096",
	}
	maps.Copy(all, settings)
	server, err := postgres.Start(ctx, postgres.Config{
		Version: cmp.Or(version, os.Getenv(VersionEnv)), Dir: dir, Settings: all,
		Log: func(line string) { fmt.Fprintln(os.Stderr, "storetest:", line) },
	})
	if err != nil {
		return nil, err
	}
	return &Cluster{server: server, templates: map[int]string{}}, nil
}

// stop ends the server at once: nobody needs the checkpoint of a clean shutdown, which takes long with many databases.
func (c *Cluster) stop(ctx context.Context) error {
	return errors.Join(c.server.StopImmediate(ctx), c.server.Stop(ctx))
}

// Server is the server itself, for CPU time, version, log file and process id.
func (c *Cluster) Server() *postgres.Server { return c.server }

// Kill ends the server with SIGKILL: connections break, and what was not flushed is lost.
func (c *Cluster) Kill() { c.server.Kill() }

// Restart starts the server again on its data and port, after stopping it if it runs. It returns when it answers.
func (c *Cluster) Restart(t testing.TB) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), startTimeout)
	defer cancel()
	if err := c.server.Restart(ctx); err != nil {
		t.Fatal("storetest: restarting PostgreSQL:", err)
	}
}

// create makes a database with the schema in it, as a copy of a template, which takes a tenth of the time of migrating.
func (c *Cluster) create(ctx context.Context, o options) (name string, err error) {
	name = fmt.Sprintf("test_%d", c.names.Add(1))
	if o.empty {
		_, err := c.server.CreateDatabase(ctx, name)
		return name, err
	}
	template, err := c.template(ctx, cmp.Or(o.shards, 16))
	if err != nil {
		return "", err
	}
	return name, c.exec(ctx, fmt.Sprintf("CREATE DATABASE %s TEMPLATE %s", name, template))
}

func (c *Cluster) template(ctx context.Context, shards int) (string, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if name := c.templates[shards]; name != "" {
		return name, nil
	}
	name := fmt.Sprintf("template_%d", shards)
	dsn, err := c.server.CreateDatabase(ctx, name)
	if err != nil {
		return "", err
	}
	if err := migrations.Up(ctx, dsn, nil, migrations.WithShards(shards)); err != nil {
		return "", fmt.Errorf("migrating the template database: %w", err)
	}
	c.templates[shards] = name
	return name, nil
}

// exec runs a statement outside of any test's database.
func (c *Cluster) exec(ctx context.Context, sql string) error {
	conn, err := pgx.Connect(ctx, c.server.DSN("postgres"))
	if err != nil {
		return fmt.Errorf("connecting to PostgreSQL: %w", err)
	}
	defer conn.Close(ctx) //nolint:errcheck // nothing depends on it
	if _, err := conn.Exec(ctx, sql); err != nil {
		return fmt.Errorf("%s: %w", sql, err)
	}
	return nil
}
