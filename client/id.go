package client

import (
	"time"

	"github.com/google/uuid"
)

// NewID returns a new UUIDv7, for a transaction or an event. Ids of one process sort by the time at which they were made.
// It panics only when the system's source of randomness fails, which Go itself treats as fatal.
func NewID() uuid.UUID { return uuid.Must(uuid.NewV7()) }

// IDTime returns the time at which a UUIDv7 was made, by the maker's clock, to the millisecond. It is good for retention,
// never for order. The zero time: id is not a UUIDv7.
func IDTime(id uuid.UUID) time.Time {
	if id.Version() != 7 {
		return time.Time{}
	}
	var ms int64
	for _, b := range id[:6] {
		ms = ms<<8 | int64(b)
	}
	return time.UnixMilli(ms)
}
