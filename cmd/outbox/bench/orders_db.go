package bench

import (
	"context"
	"fmt"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgxpool"
)

// The business side of the orders workload: an order is inserted and its aggregate's row is updated, which takes the row
// lock and gives the version that orders the events of the aggregate.
const ordersDDL = `
CREATE TABLE aggregate (aggregate_id int PRIMARY KEY, version bigint NOT NULL DEFAULT 0, total bigint NOT NULL DEFAULT 0) WITH (fillfactor = 50);
CREATE TABLE orders (order_id bigint PRIMARY KEY GENERATED ALWAYS AS IDENTITY, aggregate_id int NOT NULL, amount int NOT NULL,
  note text NOT NULL, placed_at timestamptz NOT NULL DEFAULT now());
INSERT INTO aggregate (aggregate_id) SELECT g FROM generate_series(0, %d) g`

const insertOrder = `INSERT INTO orders (aggregate_id, amount, note) VALUES ($1, $2, $3)`

const bumpAggregate = `UPDATE aggregate SET version = version + 1, total = total + $2 WHERE aggregate_id = $1 RETURNING version`

// bumpBare is the same work for a transaction without an event: the version, which counts events, stays.
const bumpBare = `UPDATE aggregate SET version = version + 0, total = total + $2 WHERE aggregate_id = $1 RETURNING version`

// querier is what a transaction offers.
type querier interface {
	Exec(ctx context.Context, sql string, args ...any) (pgconn.CommandTag, error)
	QueryRow(ctx context.Context, sql string, args ...any) pgx.Row
}

// placeOrder does the business part of a transaction and returns the aggregate's version.
func placeOrder(ctx context.Context, tx querier, bump string, aggregate, amount int) (version uint64, err error) {
	if _, err := tx.Exec(ctx, insertOrder, aggregate, amount, "bench"); err != nil {
		return 0, fmt.Errorf("inserting an order: %w", err)
	}
	if err := tx.QueryRow(ctx, bump, aggregate, amount).Scan(&version); err != nil {
		return 0, fmt.Errorf("updating the aggregate: %w", err)
	}
	return version, nil
}

// lastVersions reads the truth: the committed version of each aggregate.
func lastVersions(ctx context.Context, db *pgxpool.Pool, aggregates int) ([]uint64, error) {
	rows, err := db.Query(ctx, `SELECT aggregate_id, version FROM aggregate`)
	if err != nil {
		return nil, fmt.Errorf("reading the truth: %w", err)
	}
	last := make([]uint64, aggregates)
	for rows.Next() {
		var id int
		var version uint64
		if err := rows.Scan(&id, &version); err != nil {
			return nil, fmt.Errorf("reading the truth: %w", err)
		}
		last[id] = version
	}
	if err := rows.Err(); err != nil {
		return nil, fmt.Errorf("reading the truth: %w", err)
	}
	return last, nil
}
