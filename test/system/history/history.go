package history

import (
	"crypto/sha256"
	"time"

	"github.com/google/uuid"
)

// Event is one committed event: a row that the source wrote about it in the same transaction. An event of a transaction
// that rolled back has no row.
type Event struct {
	// ID is the event's id, by which a record is recognised.
	ID uuid.UUID
	// Aggregate is type and id of the aggregate, in any unambiguous form.
	Aggregate string
	// Version counts the aggregate's events, without gaps, in the order in which the source's row lock let them happen.
	Version int64
	// Topic, Key, Payload and Headers are what was prepared.
	Topic   string
	Key     []byte
	Payload Digest
	Headers []Header
}

// Record is one record as it was read.
type Record struct {
	// ID is the event id in its headers; zero when there is none.
	ID        uuid.UUID
	Topic     string
	Partition int32
	Offset    int64
	Key       []byte
	Payload   Digest
	// Headers are all but the one with the epoch.
	Headers []Header
	// Shard and Epoch name the holder that wrote the record.
	Shard int
	Epoch int64
	// AppendedAt is the broker's time, on a topic that keeps it; zero elsewhere. It orders records across topics.
	AppendedAt time.Time
}

// Header is one header of a record.
type Header struct {
	Name  string
	Value string
}

// Digest stands for a payload.
type Digest [sha256.Size]byte

// DigestOf makes a payload's digest.
func DigestOf(payload []byte) Digest { return sha256.Sum256(payload) }
