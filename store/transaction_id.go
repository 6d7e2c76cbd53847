package store

import "github.com/google/uuid"

// TransactionID names a transaction within its source: a UUIDv7, new for every attempt.
type TransactionID [16]byte

// String returns the canonical UUID text.
func (id TransactionID) String() string { return uuid.UUID(id).String() }

// Key names a transaction: the id of its source in the store, and its own id.
type Key struct {
	Source      int32
	Transaction TransactionID
}

// State of a transaction. COMMITTED and ABORTED are terminal and write-once.
type State int16

// The states, as stored.
const (
	Prepared  State = 0
	Committed State = 1
	Aborted   State = 2
)

// String returns the name used in the API: PREPARED, COMMITTED, ABORTED.
func (s State) String() string {
	switch s {
	case Prepared:
		return "PREPARED"
	case Committed:
		return "COMMITTED"
	case Aborted:
		return "ABORTED"
	}
	return "INVALID"
}
