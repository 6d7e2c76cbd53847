package client

import (
	"errors"
	"fmt"

	"github.com/google/uuid"
)

// Errors of pgxoutbox and sqloutbox that come before anything was prepared. The local transaction is rolled back.
var (
	// ErrSavepoint: events were about to be prepared inside a savepoint. If it were rolled back later, the transaction would
	// commit without them. Prepare at the top level of the transaction.
	ErrSavepoint = errors.New("outbox: the transaction is inside a savepoint; prepare events at its top level")
	// ErrAsyncCommit: synchronous_commit is off. A commit that the client was told of can be lost in a crash, after its events
	// were published. Set it to on (or local) for this transaction.
	ErrAsyncCommit = errors.New("outbox: synchronous_commit is off; a crash could lose the transaction after its events were published")
	// ErrMustSpill: requests of earlier transactions wait in the database, spilled while the platform was away. Prepared now,
	// this one would overtake them, and spilling is not allowed for it. Try again when they are drained.
	ErrMustSpill = errors.New("outbox: earlier requests wait in the database, and this transaction may not spill behind them")
	// ErrFence: the database cannot make a transaction id durable before COMMIT, which mode XID_FENCED rests on: it is older than
	// PostgreSQL 17. Use the marker table (ModeMarker, client.MarkerDDL).
	ErrFence = errors.New("outbox: mode XID_FENCED needs PostgreSQL 17 or newer; use mode MARKER with its table (client.MarkerDDL)")
	// ErrManaged: Commit or Rollback was called on a transaction that InTx ends.
	ErrManaged = errors.New("outbox: InTx ends this transaction; return nil to commit and an error to roll back")
)

// OutcomeUnknownError: COMMIT was sent and its outcome is not known, because the connection broke or the database did not
// answer. The transaction may be committed, and its events published. Do not simply run it again: find out first, for example
// by the keys it would have written.
type OutcomeUnknownError struct {
	// TransactionID is the id under which its events were prepared; zero: it had none.
	TransactionID uuid.UUID
	// Err is what COMMIT returned.
	Err error
}

// Error says that the outcome is unknown, and why.
func (e *OutcomeUnknownError) Error() string {
	return fmt.Sprintf("outbox: the outcome of COMMIT is unknown: %v", e.Err)
}

// Unwrap returns what COMMIT returned.
func (e *OutcomeUnknownError) Unwrap() error { return e.Err }
