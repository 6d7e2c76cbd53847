package pgxoutbox

import (
	"github.com/outbox-platform/outbox/client/internal/sourcedb"
)

// NewQueryer lends a pool or a transaction to the protocol, for tests that come between its statements.
func NewQueryer(s statements) sourcedb.Queryer { return queryer{s} }
