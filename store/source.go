package store

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
)

// Source is a registered service that prepares transactions.
type Source struct {
	ID                int32
	Name              string
	Topics            []string // exact names, or a prefix and "*"
	RecordProfile     int16    // numbered as outbox.v1.RecordProfile, never 0
	FailurePolicy     int16    // numbered as outbox.v1.FailurePolicy, never 0
	CloudEventsSource string   // never empty
	Databases         []SourceDatabase
	Revision          int64
	CreatedAt         time.Time
	UpdatedAt         time.Time
}

// SourceDatabase is one database whose local transactions decide.
type SourceDatabase struct {
	Name   string `json:"name"`
	Mode   Mode   `json:"mode"`
	DSNRef string `json:"dsn_ref,omitempty"`
}

// sourceColumns are what scanSource reads.
const sourceColumns = `source_id, name, topics, record_profile, failure_policy, cloudevents_source, databases, revision, created_at, updated_at`

func scanSource(row pgx.CollectableRow) (Source, error) {
	var src Source
	err := row.Scan(&src.ID, &src.Name, &src.Topics, &src.RecordProfile, &src.FailurePolicy, &src.CloudEventsSource,
		&src.Databases, &src.Revision, &src.CreatedAt, &src.UpdatedAt)
	return src, err
}

// Sources returns up to limit sources whose name is greater than after, by name. limit 0: all.
func (s *Store) Sources(ctx context.Context, after string, limit int) ([]Source, error) {
	rows, err := s.pool.Query(ctx, `
		SELECT `+sourceColumns+` FROM outbox.source WHERE deleted_at IS NULL AND name > $1
		ORDER BY name LIMIT nullif($2::bigint, 0)`, after, limit)
	if err != nil {
		return nil, storeError("listing sources", err)
	}
	found, err := pgx.CollectRows(rows, scanSource)
	return found, storeError("listing sources", err)
}

// Source returns one source by name, or ErrUnknown.
func (s *Store) Source(ctx context.Context, name string) (*Source, error) {
	return sourceByName(ctx, s.pool, name, "")
}

// querier is a pool, a connection or a transaction.
type querier interface {
	Query(ctx context.Context, sql string, args ...any) (pgx.Rows, error)
}

// sourceByName reads a source; lock is empty or a locking clause.
func sourceByName(ctx context.Context, q querier, name, lock string) (*Source, error) {
	rows, err := q.Query(ctx, `SELECT `+sourceColumns+` FROM outbox.source WHERE name = $1 AND deleted_at IS NULL `+lock, name)
	if err != nil {
		return nil, storeError("reading a source", err)
	}
	src, err := pgx.CollectExactlyOneRow(rows, scanSource)
	if errors.Is(err, pgx.ErrNoRows) {
		return nil, fmt.Errorf("source %q: %w", name, ErrUnknown)
	}
	if err != nil {
		return nil, storeError("reading a source", err)
	}
	return &src, nil
}

// ApplySource creates or changes a source (ID and times are ignored; Revision 0 or the stored one, else ErrRevision) and
// writes an audit row. It returns it as it is now and as it was before (nil: it is new). When nothing would change, nothing
// is written and both are the same.
func (s *Store) ApplySource(ctx context.Context, src Source, actor, reason string) (now, before *Source, err error) {
	for {
		now, before, err = s.applySourceOnce(ctx, src, actor, reason)
		// Somebody else created the name between our look and our insert: the next look sees it.
		var pg *pgconn.PgError
		if !errors.As(err, &pg) || pg.ConstraintName != "source_name" {
			return now, before, err
		}
	}
}

func (s *Store) applySourceOnce(ctx context.Context, src Source, actor, reason string) (now, before *Source, err error) {
	err = s.transact(ctx, "applying a source", func(tx pgx.Tx) error {
		before, err = sourceByName(ctx, tx, src.Name, "FOR UPDATE")
		if errors.Is(err, ErrUnknown) {
			before, err = nil, nil
		}
		switch {
		case err != nil:
			return err
		case src.Revision != 0 && before == nil:
			return fmt.Errorf("source %q does not exist, but revision %d of it was given: %w", src.Name, src.Revision, ErrRevision)
		case src.Revision != 0 && src.Revision != before.Revision:
			return fmt.Errorf("source %q has revision %d, not %d: %w", src.Name, before.Revision, src.Revision, ErrRevision)
		case before != nil && src.sameSettings(before):
			now = before
			return nil
		}
		if now, err = writeSource(ctx, tx, src, before == nil); err != nil {
			return err
		}
		action := "source.update"
		if before == nil {
			action = "source.create"
		}
		return audit(ctx, tx, actor, action, src.Name, reason, map[string]any{"before": before, "after": now})
	})
	if err != nil {
		return nil, nil, err
	}
	return now, before, nil
}

func writeSource(ctx context.Context, tx pgx.Tx, src Source, isNew bool) (*Source, error) {
	sql := `UPDATE outbox.source SET topics = $2, record_profile = $3, failure_policy = $4, cloudevents_source = $5, databases = $6,
	               revision = revision + 1, updated_at = now()
	        WHERE name = $1 AND deleted_at IS NULL RETURNING ` + sourceColumns
	if isNew {
		sql = `INSERT INTO outbox.source (name, topics, record_profile, failure_policy, cloudevents_source, databases)
		       VALUES ($1, $2, $3, $4, $5, $6) RETURNING ` + sourceColumns
	}
	// Empty lists are stored as such, not as NULL.
	topics := append([]string{}, src.Topics...)
	databases := append([]SourceDatabase{}, src.Databases...)
	rows, err := tx.Query(ctx, sql, src.Name, topics, src.RecordProfile, src.FailurePolicy, src.CloudEventsSource, databases)
	if err != nil {
		return nil, storeError("writing a source", err)
	}
	now, err := pgx.CollectExactlyOneRow(rows, scanSource)
	if err != nil {
		return nil, storeError("writing a source", err)
	}
	return &now, nil
}

// sameSettings reports whether applying src to a source that is as other would change nothing.
func (src *Source) sameSettings(other *Source) bool {
	return slices.Equal(src.Topics, other.Topics) && src.RecordProfile == other.RecordProfile &&
		src.FailurePolicy == other.FailurePolicy && src.CloudEventsSource == other.CloudEventsSource &&
		slices.Equal(src.Databases, other.Databases)
}

// DeleteSource takes a registration away and writes an audit row. ErrUnknown; ErrInUse while it has undecided
// transactions, committed events that are not published yet, parked events or dead letters: the error says which. The id
// is never given out again, and the row stays.
//
// Servers learn of it within seconds. What they accept meanwhile is stored under the id, stays there and is not lost.
func (s *Store) DeleteSource(ctx context.Context, name, actor, reason string) error {
	return s.transact(ctx, "deleting a source", func(tx pgx.Tx) error {
		src, err := sourceByName(ctx, tx, name, "FOR UPDATE")
		if err != nil {
			return err
		}
		use, err := sourceInUse(ctx, tx, src.ID)
		if err != nil {
			return err
		}
		if use != "" {
			return fmt.Errorf("source %q has %s: %w", name, use, ErrInUse)
		}
		if _, err := tx.Exec(ctx, `UPDATE outbox.source SET deleted_at = now(), updated_at = now() WHERE source_id = $1`, src.ID); err != nil {
			return storeError("deleting a source", err)
		}
		return audit(ctx, tx, actor, "source.delete", name, reason, map[string]any{"before": src})
	})
}

// sourceInUse says what a source still has in the store, or "". Transactions behind the checkpoints are found through tx:
// their rows are not purged before they are published.
func sourceInUse(ctx context.Context, tx pgx.Tx, id int32) (string, error) {
	checkpoints, err := readCheckpoints(ctx, tx)
	if err != nil {
		return "", err
	}
	for _, c := range checkpoints {
		if slices.ContainsFunc(c.pend, func(e PendEntry) bool { return e.Key.Source == id && e.State != Aborted }) {
			return "events that wait for Kafka", nil
		}
	}
	// There is no index by source and state: a busy source's transactions are all looked at, which may take a while.
	if _, err := tx.Exec(ctx, `SET LOCAL statement_timeout = '1min'`); err != nil {
		return "", storeError("looking what a source still has", err)
	}
	var use string
	err = tx.QueryRow(ctx, `
		SELECT CASE
		  WHEN EXISTS (SELECT FROM outbox.parked WHERE source_id = $1) THEN 'parked events'
		  WHEN EXISTS (SELECT FROM outbox.dead_letter WHERE source_id = $1) THEN 'dead letters'
		  WHEN EXISTS (SELECT FROM outbox.tx WHERE source_id = $1 AND state = 0) THEN 'undecided transactions'
		  WHEN EXISTS (
		    SELECT FROM outbox.tx t JOIN outbox.shard s ON (t.shards >> s.shard) & 1 = 1
		    WHERE t.source_id = $1 AND t.state = 1
		      AND (t.log_xid > s.xid OR t.log_xid = s.xid AND EXISTS (
		        SELECT FROM outbox.log l WHERE l.shard = s.shard AND l.xid = s.xid AND l.seq > s.seq)))
		  THEN 'committed events that are not published' ELSE '' END`, id).Scan(&use)
	return use, storeError("looking what a source still has", err)
}

// transact runs fn in a transaction.
func (s *Store) transact(ctx context.Context, doing string, fn func(pgx.Tx) error) error {
	tx, err := s.pool.Begin(ctx)
	if err != nil {
		return storeError(doing, err)
	}
	defer tx.Rollback(ctx) //nolint:errcheck // after Commit it does nothing, and before it the error is already known
	if err := fn(tx); err != nil {
		return err
	}
	return storeError(doing, tx.Commit(ctx))
}

// audit records an administrative action in the transaction that does it.
func audit(ctx context.Context, tx pgx.Tx, actor, action, subject, reason string, detail map[string]any) error {
	encoded, err := json.Marshal(detail)
	if err != nil {
		return fmt.Errorf("encoding an audit row: %w", err)
	}
	_, err = tx.Exec(ctx, `INSERT INTO outbox.audit (actor, action, subject, reason, detail) VALUES ($1, $2, $3, $4, $5)`,
		actor, action, subject, reason, string(encoded))
	return storeError("writing an audit row", err)
}
