package sqloutbox

import (
	"context"
	"database/sql"

	"github.com/outbox-platform/outbox/client"
	"github.com/outbox-platform/outbox/client/internal/sourcedb"
)

// Upkeep configures what the client does in the background for a registered database. The zero value has the defaults.
type Upkeep = client.Upkeep

// Register names a source database to the client. From then on, until the client is closed, the client answers
// check-back questions from it, publishes spilled requests, and deletes old markers. The handle must lead to the primary, with the
// same search_path as the service's transactions, and stay open until the client is closed. An empty name is "default".
//
// Upkeep and answers take a few connections of their own from the pool, for a moment each. Where transactions may hold all of
// them for long, register a second, small pool.
//
// Every instance of a service registers its database. Connections through a pooler in transaction mode are fine.
func Register(c *client.Client, name string, db *sql.DB, u Upkeep) error {
	_, err := sourcedb.Register(c, name, pool{queryer{db}, db}, u)
	return err
}

// Verdicts says what became of transactions, by the same rules with which a registered database answers the platform. What
// cannot be said for certain is OutcomeUnknown. For tools; services do not need it.
func Verdicts(ctx context.Context, db *sql.DB, transactions []client.CheckTransaction) []client.Verdict {
	return sourcedb.Verdicts(ctx, queryer{db}, transactions)
}
