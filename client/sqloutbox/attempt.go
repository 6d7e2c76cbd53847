package sqloutbox

import (
	"context"
	"database/sql"

	"github.com/google/uuid"

	"github.com/outbox-platform/outbox/client"
	"github.com/outbox-platform/outbox/client/internal/sourcedb"
)

// Attempt is one attempt of a transaction that its caller begins and ends. Every attempt needs its own, made by [Mark]: a retry
// loop must not use one twice. It is used by one goroutine.
type Attempt struct {
	a  *sourcedb.Attempt
	tx *sql.Tx
}

// Mark writes the marker into an open transaction, at its top level, after the row locks of the aggregates were taken. It fails
// with client.ErrSavepoint or client.ErrAsyncCommit when events cannot be prepared safely. After an error the transaction
// has to be rolled back. TxOptions are not used.
func Mark(ctx context.Context, tx *sql.Tx, c *client.Client, o Options) (*Attempt, error) {
	a := sourcedb.NewAttempt(c, o.shared())
	if err := a.Mark(ctx, queryer{tx}, o.Database); err != nil {
		return nil, err
	}
	return &Attempt{a, tx}, nil
}

// ID returns the id under which the events are prepared.
func (a *Attempt) ID() uuid.UUID { return a.a.ID() }

// Prepare prepares the events, all events of the transaction at once, or spills them. Call it right before COMMIT: row locks
// are held while it runs. After an error the transaction has to be rolled back.
func (a *Attempt) Prepare(ctx context.Context, events ...client.Event) error {
	return a.a.Prepare(ctx, queryer{a.tx}, events)
}

// AfterCommit tells the platform that COMMIT succeeded. It neither waits nor fails. Do not call it when COMMIT returned an
// error.
func (a *Attempt) AfterCommit() { a.a.Committed() }

// AfterRollback tells the platform that the transaction is rolled back for certain: ROLLBACK succeeded. It neither waits nor
// fails. Call neither AfterCommit nor AfterRollback when COMMIT returned an error: its outcome may be unknown, and the
// platform finds it out.
func (a *Attempt) AfterRollback() { a.a.RolledBack() }
