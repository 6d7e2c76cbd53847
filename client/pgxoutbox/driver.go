package pgxoutbox

import (
	"context"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/outbox-platform/outbox/client/internal/sourcedb"
)

// statements is what pgx.Tx and pgxpool.Pool have in common.
type statements interface {
	Exec(ctx context.Context, sql string, args ...any) (pgconn.CommandTag, error)
	Query(ctx context.Context, sql string, args ...any) (pgx.Rows, error)
	QueryRow(ctx context.Context, sql string, args ...any) pgx.Row
}

// queryer lends them to the protocol.
type queryer struct{ s statements }

func (q queryer) Exec(ctx context.Context, sql string, args ...any) (int64, error) {
	tag, err := q.s.Exec(ctx, sql, args...)
	return tag.RowsAffected(), err
}

func (q queryer) QueryRow(ctx context.Context, sql string, args ...any) sourcedb.Row {
	return q.s.QueryRow(ctx, sql, args...)
}

func (q queryer) Query(ctx context.Context, sql string, args ...any) (sourcedb.Rows, error) {
	return q.s.Query(ctx, sql, args...) //nolint:rowserrcheck // the protocol reads them to the end
}

// transaction is a pgx transaction that the protocol ends.
type transaction struct {
	queryer
	tx pgx.Tx
}

func newTransaction(tx pgx.Tx) transaction { return transaction{queryer{tx}, tx} }

func (t transaction) Commit(ctx context.Context) error   { return t.tx.Commit(ctx) }
func (t transaction) Rollback(ctx context.Context) error { return t.tx.Rollback(ctx) }

// pool is a pgx pool.
type pool struct {
	queryer
	p *pgxpool.Pool
}

func (p pool) Begin(ctx context.Context) (sourcedb.Tx, error) {
	tx, err := p.p.BeginTx(ctx, pgx.TxOptions{IsoLevel: pgx.ReadCommitted})
	if err != nil {
		return nil, err
	}
	return newTransaction(tx), nil
}
