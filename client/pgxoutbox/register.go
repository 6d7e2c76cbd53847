package pgxoutbox

import (
	"context"

	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/outbox-platform/outbox/client"
	"github.com/outbox-platform/outbox/client/internal/sourcedb"
)

// Upkeep configures what the client does in the background for a registered database. The zero value has the defaults.
type Upkeep = client.Upkeep

// Register names a source database's pool to the client. From then on, until the client is closed, the client answers
// check-back questions from it, publishes spilled requests, and deletes old markers. The pool must lead to the primary, with the
// same search_path as the service's transactions, and stay open until the client is closed. An empty name is "default".
//
// Upkeep and answers take a few connections of their own from the pool, for a moment each. Where transactions may hold all of
// them for long, register a second, small pool.
//
// Every instance of a service registers its database. Pools through a pooler in transaction mode are fine.
func Register(c *client.Client, name string, p *pgxpool.Pool, u Upkeep) error {
	_, err := sourcedb.Register(c, name, pool{queryer{p}, p}, u)
	return err
}

// Verdicts says what became of transactions, by the same rules with which a registered database answers the platform. What
// cannot be said for certain is OutcomeUnknown. For tools; services do not need it.
func Verdicts(ctx context.Context, p *pgxpool.Pool, transactions []client.CheckTransaction) []client.Verdict {
	return sourcedb.Verdicts(ctx, queryer{p}, transactions)
}
