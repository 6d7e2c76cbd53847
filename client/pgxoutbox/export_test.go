package pgxoutbox

import (
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/outbox-platform/outbox/client/internal/sourcedb"
)

// NewQueryer lends a pool to the protocol, for tests that come between its statements.
func NewQueryer(p *pgxpool.Pool) sourcedb.Queryer { return queryer{p} }
