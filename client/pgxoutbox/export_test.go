package pgxoutbox

import (
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/outbox-platform/outbox/client/internal/sourcedb"
)

// NewQueryer lends a pool or a transaction to the protocol, for tests that come between its statements.
func NewQueryer(s statements) sourcedb.Queryer { return queryer{s} }

// NewPool lends a pool to the protocol.
func NewPool(p *pgxpool.Pool) sourcedb.Pool { return pool{queryer{p}, p} }
