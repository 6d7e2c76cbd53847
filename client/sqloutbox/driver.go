package sqloutbox

import (
	"context"
	"database/sql"

	"github.com/outbox-platform/outbox/client/internal/sourcedb"
)

// statements is what *sql.Tx and *sql.DB have in common.
type statements interface {
	ExecContext(ctx context.Context, query string, args ...any) (sql.Result, error)
	QueryContext(ctx context.Context, query string, args ...any) (*sql.Rows, error)
	QueryRowContext(ctx context.Context, query string, args ...any) *sql.Row
}

// queryer lends them to the protocol.
type queryer struct{ s statements }

func (q queryer) Exec(ctx context.Context, query string, args ...any) (int64, error) {
	res, err := q.s.ExecContext(ctx, query, args...)
	if err != nil {
		return 0, err
	}
	return res.RowsAffected()
}

func (q queryer) QueryRow(ctx context.Context, query string, args ...any) sourcedb.Row {
	return q.s.QueryRowContext(ctx, query, args...)
}

func (q queryer) Query(ctx context.Context, query string, args ...any) (sourcedb.Rows, error) {
	r, err := q.s.QueryContext(ctx, query, args...) //nolint:rowserrcheck,sqlclosecheck // the protocol reads and closes them
	if err != nil {
		return nil, err
	}
	return rows{r}, nil
}

type rows struct{ *sql.Rows }

func (r rows) Close() { _ = r.Rows.Close() }

// transaction is a transaction that the protocol ends.
type transaction struct {
	queryer
	tx *sql.Tx
}

func newTransaction(tx *sql.Tx) transaction { return transaction{queryer{tx}, tx} }

func (t transaction) Commit(context.Context) error   { return t.tx.Commit() }
func (t transaction) Rollback(context.Context) error { return t.tx.Rollback() }

// pool is a database handle.
type pool struct {
	queryer
	db *sql.DB
}

func (p pool) Begin(ctx context.Context) (sourcedb.Tx, error) {
	tx, err := p.db.BeginTx(ctx, &sql.TxOptions{Isolation: sql.LevelReadCommitted})
	if err != nil {
		return nil, err
	}
	return newTransaction(tx), nil
}
