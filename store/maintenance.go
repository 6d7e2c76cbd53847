package store

import (
	"cmp"
	"context"
	"sync"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
)

// MaintenanceConfig sets up maintenance. The zero value of a field means its default.
type MaintenanceConfig struct {
	Interval            time.Duration // between passes. Default 1 s
	GenerationBytes     int64         // size at which a log generation is closed. Default 512 MiB
	LogRetention        time.Duration // how long published events stay readable, if the ring is large enough. Default 1 h
	TxRetention         time.Duration // how long tx rows decided by the client are kept after the decision. Default 15 min
	ResolutionRetention time.Duration // … decided by anybody else, or kept by their callers. Default 7 days
}

func (c MaintenanceConfig) withDefaults() MaintenanceConfig {
	c.Interval = cmp.Or(c.Interval, time.Second)
	c.GenerationBytes = cmp.Or(c.GenerationBytes, 512<<20)
	c.LogRetention = cmp.Or(c.LogRetention, time.Hour)
	c.TxRetention = cmp.Or(c.TxRetention, 15*time.Minute)
	c.ResolutionRetention = cmp.Or(c.ResolutionRetention, 7*24*time.Hour)
	return c
}

// MaintenanceReport says what a pass did and saw.
type MaintenanceReport struct {
	Leader     bool // false: another process holds the maintenance lock; nothing was done
	Rotated    bool
	Truncated  int
	Purged     int64
	RingFull   bool  // the next generation is needed and cannot be reused yet: a shard is behind, or it was closed just now
	LogBytes   int64 // all generations
	Unreleased int   // generations that are not empty
}

// maintenanceLock is the advisory lock of the process that does maintenance: "outboxmt" in ASCII.
const maintenanceLock = 0x6f7574626f786d74

// finishedRetention is how long finished operations and relay instances that are gone are kept, for people who look.
const finishedRetention = 24 * time.Hour

// maintenanceState is what a process remembers between passes. Another leader begins anew: nothing depends on it.
type maintenanceState struct {
	sync.Mutex              // one pass at a time
	page          int64     // of tx, where the next purge begins
	truncateAfter time.Time // no generation is locked before, because the last attempt found it in use
}

// MaintainOnce makes one pass: rotates and truncates the log ring, purges tx in chunks, and removes what is left of
// finished operations and relay instances. One process at a time does it (advisory lock); any may call it, every
// Interval. ErrUnavailable: try again at the next interval; what was done stays done.
func (s *Store) MaintainOnce(ctx context.Context, cfg MaintenanceConfig) (report MaintenanceReport, err error) {
	s.maintenance.Lock()
	defer s.maintenance.Unlock()
	conn, err := s.pool.Acquire(ctx)
	if err != nil {
		return report, storeError("connecting for maintenance", err)
	}
	defer conn.Release()
	err = conn.QueryRow(ctx, `SELECT pg_try_advisory_lock($1)`, int64(maintenanceLock)).Scan(&report.Leader)
	if err != nil || !report.Leader {
		return report, storeError("taking the maintenance lock", err)
	}
	defer s.releaseMaintenance(ctx, conn)
	if _, err := conn.Exec(ctx, maintenanceSettings); err != nil {
		return report, storeError("preparing for maintenance", err)
	}

	m := maintenance{store: s, cfg: cfg.withDefaults(), conn: conn.Conn(), report: &report}
	if err := m.ring(ctx); err != nil {
		return report, err
	}
	if err := m.purge(ctx); err != nil {
		return report, err
	}
	return report, m.cleanUp(ctx)
}

// maintenanceSettings: nothing waits for the disk, because the next pass does again what a crash undoes (TRUNCATE waits
// nevertheless, because it removes files); and rows are found by index or address, whatever the planner thinks of a table
// that nobody has analysed yet.
const maintenanceSettings = `SELECT set_config('synchronous_commit', 'off', false), set_config('enable_seqscan', 'off', false),
	set_config('enable_hashjoin', 'off', false), set_config('enable_mergejoin', 'off', false)`

// releaseMaintenance gives the lock and the settings back. A connection that cannot is closed, which does the same.
func (s *Store) releaseMaintenance(ctx context.Context, conn *pgxpool.Conn) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), s.cfg.StatementTimeout)
	defer cancel()
	_, err := conn.Exec(ctx, `SELECT pg_advisory_unlock($1)`, int64(maintenanceLock))
	if err == nil {
		_, err = conn.Exec(ctx, `RESET ALL`)
	}
	if err != nil {
		_ = conn.Conn().Close(ctx) // the pool drops it
	}
}

// maintenance is one pass.
type maintenance struct {
	store  *Store
	cfg    MaintenanceConfig
	conn   *pgx.Conn
	report *MaintenanceReport
}

// cleanUp removes what nobody looks at any more. Both tables are small.
func (m *maintenance) cleanUp(ctx context.Context) error {
	_, err := m.conn.Exec(ctx, `DELETE FROM outbox.operation WHERE done_at < now() - $1::interval`, finishedRetention)
	if err == nil {
		_, err = m.conn.Exec(ctx, `DELETE FROM outbox.relay WHERE live_until < now() - $1::interval`, finishedRetention)
	}
	return storeError("cleaning up", err)
}
