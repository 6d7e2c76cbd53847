package sourcedb

import "context"

// Row is a row that was asked for.
type Row interface{ Scan(dest ...any) error }

// Rows are the rows of a query. They are closed by reading to the end or by Close.
type Rows interface {
	Next() bool
	Scan(dest ...any) error
	Err() error
	Close()
}

// each reads the rows of a query into dest, one after the other, and calls row for each.
func each(rows Rows, err error, row func(), dest ...any) error {
	if err != nil {
		return err
	}
	defer rows.Close()
	for rows.Next() {
		if err := rows.Scan(dest...); err != nil {
			return err
		}
		row()
	}
	return rows.Err()
}

// timelineSQL is the timeline of a primary as a number: the first part of the name of its WAL file.
const timelineSQL = `('x' || substr(pg_walfile_name(pg_current_wal_insert_lsn()), 1, 8))::bit(32)::bigint`

// Queryer runs statements: in one transaction, or each in its own.
type Queryer interface {
	Exec(ctx context.Context, sql string, args ...any) (affected int64, err error)
	QueryRow(ctx context.Context, sql string, args ...any) Row
	Query(ctx context.Context, sql string, args ...any) (Rows, error)
}

// Tx is an open transaction that this package ends.
type Tx interface {
	Queryer
	Commit(ctx context.Context) error
	// Rollback returns nil only when the server has confirmed it.
	Rollback(ctx context.Context) error
}

// Pool is a pool of connections to the primary of a source database.
type Pool interface {
	Queryer
	// Begin opens a READ COMMITTED transaction.
	Begin(ctx context.Context) (Tx, error)
}
