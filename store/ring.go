package store

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/outbox-platform/outbox/internal/fault"
)

// generation is one partition of the log ring.
type generation struct {
	number  int16
	used    bool
	closed  bool
	age     time.Duration // since it was closed, or, of the open one, since it was opened
	bytes   int64         // everything
	content int64         // with segments that are stored out of line, without the index
	empty   bool
}

func (g *generation) table() string {
	return pgx.Identifier{"outbox", fmt.Sprintf("log_%d", g.number)}.Sanitize()
}

// ring truncates the generations whose time has come and rotates when the open one is large or old enough.
func (m *maintenance) ring(ctx context.Context) error {
	open, ring, err := m.generations(ctx)
	if err != nil {
		return err
	}
	current, next := &ring[open], &ring[(int(open)+1)%len(ring)]
	due := !current.empty && (current.content >= m.cfg.GenerationBytes || current.age >= m.cfg.LogRetention/6)
	for i := range ring {
		g := &ring[i]
		// The next generation is emptied before its retention is over: the ring needs it.
		if g != current && g.used && g.closed && (g.age >= m.cfg.LogRetention || due && g == next) {
			if err := m.truncate(ctx, g); err != nil {
				return err
			}
		}
	}
	switch {
	case !due:
	case next.used:
		// Never reopen a generation before it was truncated: the open one just grows.
		m.report.RingFull = true
	default:
		if err := m.rotate(ctx, current, next); err != nil {
			return err
		}
	}
	for i := range ring {
		m.report.LogBytes += ring[i].bytes
		if ring[i].used && !ring[i].empty {
			m.report.Unreleased++
		}
	}
	return nil
}

func (m *maintenance) generations(ctx context.Context) (open int16, ring []generation, err error) {
	const doing = "reading the log ring"
	if err := m.conn.QueryRow(ctx, `SELECT gen FROM outbox.control`).Scan(&open); err != nil {
		return 0, nil, storeError(doing, err)
	}
	rows, err := m.conn.Query(ctx, `
		SELECT g.gen, g.used, g.closed_at IS NOT NULL, extract(epoch FROM now() - coalesce(g.closed_at, c.gen_since))::float8,
		       pg_total_relation_size('outbox.log_' || g.gen), pg_table_size('outbox.log_' || g.gen), pg_relation_size('outbox.log_' || g.gen) = 0
		FROM outbox.generation g, outbox.control c ORDER BY g.gen`)
	if err != nil {
		return 0, nil, storeError(doing, err)
	}
	ring, err = pgx.CollectRows(rows, func(row pgx.CollectableRow) (g generation, err error) {
		var age float64
		err = row.Scan(&g.number, &g.used, &g.closed, &age, &g.bytes, &g.content, &g.empty)
		g.age = time.Duration(age * float64(time.Second))
		return g, err
	})
	if err == nil && int(open) >= len(ring) {
		err = fmt.Errorf("generation %d is open, of %d", open, len(ring))
	}
	return open, ring, storeError(doing, err)
}

// rotate closes a generation and opens the next. Statements that began before still write to the closed one, for as long
// as the statement timeout lets them.
func (m *maintenance) rotate(ctx context.Context, current, next *generation) error {
	const doing = "rotating the log"
	err := pgx.BeginFunc(ctx, m.conn, func(tx pgx.Tx) error {
		_, err := tx.Exec(ctx, `UPDATE outbox.generation SET used = true, closed_at = CASE WHEN gen = $1 THEN now() END WHERE gen IN ($1, $2)`,
			current.number, next.number)
		if err == nil {
			_, err = tx.Exec(ctx, `UPDATE outbox.control SET gen = $1, gen_since = now()`, next.number)
		}
		return storeError(doing, err)
	})
	if err != nil {
		return storeError(doing, err)
	}
	m.report.Rotated = true
	next.used = true
	return nil
}

// errGenerationNeeded: a shard has not finished with the generation. Not an error of the pass.
var errGenerationNeeded = errors.New("generation is needed")

// Settings of truncation. Everybody who wants the log queues up behind a waiting ACCESS EXCLUSIVE lock, so it does not
// wait for long, and not again soon: a backup or a verification may hold a lock for hours.
const (
	truncateLockTimeout = "200ms"
	truncatePause       = 10 * time.Second
)

// truncate empties a closed generation if every shard has finished with it and no statement can still write to it: it has
// been closed for twice the statement timeout. The check is made again under the lock.
func (m *maintenance) truncate(ctx context.Context, g *generation) error {
	const doing = "truncating a log generation"
	state := &m.store.maintenance
	if g.age < 2*m.store.cfg.StatementTimeout || time.Now().Before(state.truncateAfter) {
		return nil
	}
	if needed, err := generationNeeded(ctx, m.conn, g); err != nil || needed {
		return err
	}
	fault.Point("maintenance.before-truncate")
	err := pgx.BeginFunc(ctx, m.conn, func(tx pgx.Tx) error {
		if _, err := tx.Exec(ctx, `SET LOCAL lock_timeout = '`+truncateLockTimeout+`'`); err != nil {
			return storeError(doing, err)
		}
		if _, err := tx.Exec(ctx, `LOCK TABLE `+g.table()+` IN ACCESS EXCLUSIVE MODE`); err != nil {
			return storeError(doing, err)
		}
		needed, err := generationNeeded(ctx, tx, g)
		if err != nil {
			return err
		}
		if needed {
			return errGenerationNeeded
		}
		if _, err := tx.Exec(ctx, `TRUNCATE `+g.table()); err != nil {
			return storeError(doing, err)
		}
		_, err = tx.Exec(ctx, `UPDATE outbox.generation SET used = false, closed_at = NULL WHERE gen = $1`, g.number)
		return storeError(doing, err)
	})
	switch {
	case errors.Is(err, ErrContention):
		state.truncateAfter = time.Now().Add(truncatePause)
		return nil
	case errors.Is(err, errGenerationNeeded):
		return nil
	case err != nil:
		return storeError(doing, err)
	}
	m.report.Truncated++
	*g = generation{number: g.number, empty: true}
	return nil
}

// generationNeeded reports whether a shard may still read from the generation. In doubt or blocked events do not count:
// their payload is in parked.
func generationNeeded(ctx context.Context, q interface {
	QueryRow(ctx context.Context, sql string, args ...any) pgx.Row
}, g *generation) (needed bool, err error) {
	if fault.Mutant("M10") { // published or not
		return false, nil
	}
	err = q.QueryRow(ctx, generationNeededSQL(g)).Scan(&needed)
	return needed, storeError("looking whether a log generation is needed", err)
}

// generationNeededSQL asks for the last row of each shard only, by the log's index: rows before it are needed only if it is.
func generationNeededSQL(g *generation) string {
	return `
	SELECT EXISTS (
	  SELECT FROM outbox.shard s,
	  LATERAL (SELECT l.xid, l.seq FROM ` + g.table() + ` l WHERE l.shard = s.shard ORDER BY l.xid DESC, l.seq DESC LIMIT 1) l
	  WHERE ` + neededFromLog + `)`
}
