package store

import (
	"errors"
	"fmt"
)

// Errors that callers tell apart with errors.Is or errors.As. Everything else is a bug or a broken store.
var (
	// ErrUnknown: no such transaction, source or operation, or it is past retention.
	ErrUnknown = errors.New("unknown")
	// ErrReused: the transaction id was used before with other content.
	ErrReused = errors.New("transaction id used before with other content")
	// ErrBacklogFull: the writer's queue is full; nothing was stored. Try again later.
	ErrBacklogFull = errors.New("the writer's queue is full")
	// ErrUnavailable: the store cannot be reached, or the writer is closing. Whether it took effect is unknown; repeat it.
	ErrUnavailable = errors.New("store unavailable")
	// ErrContention: serialization failures or deadlocks that retries did not resolve. Nothing was stored.
	ErrContention = errors.New("contention")
	// ErrInvalid: PostgreSQL refused the data itself (class 22 or 23). Nothing was stored.
	ErrInvalid = errors.New("data refused by the store")
	// ErrFenced: the write carries an old epoch; somebody else holds the shard now. Drop the shard at once.
	ErrFenced = errors.New("fenced: another holder has the shard")
	// ErrRevision: the source's revision is not the given one.
	ErrRevision = errors.New("source revision differs")
	// ErrInUse: the source still has undecided transactions or unpublished events.
	ErrInUse = errors.New("source in use")
)

// DecidedError: a decision that contradicts the one already stored.
type DecidedError struct{ State State }

func (e *DecidedError) Error() string { return fmt.Sprintf("transaction is already %s", e.State) }
