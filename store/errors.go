package store

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"

	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/puddle/v2"
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

// storeError says what was being done and puts a driver's error into one of the classes above. SQLSTATEs are looked at
// here and nowhere else.
func storeError(doing string, err error) error {
	if err == nil {
		return nil
	}
	if class := classOf(err); class != nil {
		return fmt.Errorf("%s: %w: %w", doing, class, err)
	}
	return fmt.Errorf("%s: %w", doing, err)
}

// classOf returns the class of a driver's error, or nil for one that should not happen.
func classOf(err error) error {
	var pg *pgconn.PgError
	if errors.As(err, &pg) {
		return classOfState(pg.Code)
	}
	var connect *pgconn.ConnectError
	var network net.Error
	switch {
	case errors.As(err, &connect), errors.As(err, &network), pgconn.SafeToRetry(err), errors.Is(err, pgconn.ErrConnClosed),
		errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF), errors.Is(err, net.ErrClosed), errors.Is(err, puddle.ErrClosedPool),
		errors.Is(err, context.Canceled), errors.Is(err, context.DeadlineExceeded):
		return ErrUnavailable
	}
	return nil
}

func classOfState(code string) error {
	switch code {
	case "40001", "40P01": // serialization failure, deadlock
		return ErrContention
	case "55P03": // lock not available
		return ErrContention
	case "25006": // read only: it became a standby
		return ErrUnavailable
	case "58030": // I/O error
		return ErrUnavailable
	}
	switch code[:min(2, len(code))] {
	case "22", "23":
		return ErrInvalid
	case "08", "53", "57", "28": // connection, resources (disk full), operator intervention and timeouts, authorisation
		return ErrUnavailable
	}
	return nil
}
