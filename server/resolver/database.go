package resolver

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strings"
	"sync"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
)

const (
	// databaseConns is how many connections one server opens to one source database at most.
	databaseConns = 2
	// firstProbePause is how long a database that cannot be reached is left alone first; it doubles up to maxProbePause.
	firstProbePause = 100 * time.Millisecond
	maxProbePause   = time.Second // one attempt to connect a second: what is in doubt must not wait longer once it is back
)

// sourceDatabase is one server's direct way to a source database. Safe for concurrent use.
type sourceDatabase struct {
	mu    sync.Mutex
	pool  *pgxpool.Pool
	ref   string // what pool was opened with
	probe time.Time
	pause time.Duration // > 0: it could not be reached, and is left alone until probe
}

// connections returns the pool for a reference to a DSN; nil when there is no reference, or when the database could not be
// reached a moment ago. ctx is the pool's.
func (d *sourceDatabase) connections(ctx context.Context, ref string, timeout time.Duration) (*pgxpool.Pool, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if ref != d.ref {
		d.closeLocked()
		d.ref, d.pause = ref, 0
	}
	if ref == "" || d.pause > 0 && time.Now().Before(d.probe) {
		return nil, nil
	}
	if d.pool == nil {
		pool, err := openDatabase(ctx, ref, timeout)
		if err != nil {
			return nil, err
		}
		d.pool = pool
	}
	return d.pool, nil
}

// failed notes that the database could not be reached; first: it could before.
func (d *sourceDatabase) failed() (first bool) {
	d.mu.Lock()
	defer d.mu.Unlock()
	first = d.pause == 0
	d.pause = min(max(2*d.pause, firstProbePause), maxProbePause)
	d.probe = time.Now().Add(jitter(d.pause))
	return first
}

// worked notes that the database answered; again: it could not be reached before.
func (d *sourceDatabase) worked() (again bool) {
	d.mu.Lock()
	defer d.mu.Unlock()
	again = d.pause > 0
	d.pause = 0
	return again
}

// away reports whether the database cannot be reached, and when it is tried next.
func (d *sourceDatabase) away() (probe time.Time, away bool) {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.probe, d.pause > 0
}

func (d *sourceDatabase) close() {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.closeLocked()
}

// closeLocked closes the pool without waiting for those that still ask: they hold connections until their time is up.
func (d *sourceDatabase) closeLocked() {
	if d.pool != nil {
		go d.pool.Close()
		d.pool = nil
	}
}

// openDatabase prepares connections to a source database; it connects when it is first asked. ref is "env:NAME" or
// "file:/path". Errors never tell the DSN.
func openDatabase(ctx context.Context, ref string, timeout time.Duration) (*pgxpool.Pool, error) {
	dsn, err := readDSN(ref)
	if err != nil {
		return nil, err
	}
	cfg, err := pgxpool.ParseConfig(dsn)
	if err != nil {
		return nil, fmt.Errorf("%s does not hold a usable DSN", ref)
	}
	cfg.MaxConns = databaseConns
	cfg.MaxConnIdleTime = time.Minute
	cfg.ConnConfig.ConnectTimeout = timeout
	// Statements are not prepared on the server, so that a pooler in transaction mode may be in between.
	cfg.ConnConfig.DefaultQueryExecMode = pgx.QueryExecModeExec
	pool, err := pgxpool.NewWithConfig(ctx, cfg)
	if err != nil {
		return nil, fmt.Errorf("preparing connections for %s: %w", ref, err)
	}
	return pool, nil
}

// readDSN follows a reference.
func readDSN(ref string) (string, error) {
	switch kind, at, _ := strings.Cut(ref, ":"); kind {
	case "env":
		if dsn := os.Getenv(at); dsn != "" {
			return dsn, nil
		}
		return "", fmt.Errorf("the environment variable %s is not set in this server", at)
	case "file":
		b, err := os.ReadFile(at) //nolint:gosec // the platform team names the file
		if err != nil {
			return "", fmt.Errorf("reading a DSN: %w", err)
		}
		if dsn := strings.TrimSpace(string(b)); dsn != "" {
			return dsn, nil
		}
		return "", fmt.Errorf("%s is empty", at)
	}
	return "", errors.New("a DSN reference is env:NAME or file:/path")
}
