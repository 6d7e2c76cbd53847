package client

import "time"

// Upkeep configures what happens in the background for a registered database. Zero values are the defaults.
type Upkeep struct {
	// Mode says how the decision of this database's transactions is found out. Default ModeMarker. ModeXIDFenced needs PostgreSQL
	// 17 and no table: there is nowhere to spill to, so transactions fail while the platform is away, and nothing to clean up.
	Mode Mode
	// MarkerRetention is how long a marker stays after its Commit was acknowledged. It must not be less than the platform's.
	// Default 1 h.
	MarkerRetention time.Duration
	// SpillRetention is the age at which a spilled request is refused instead of published: the platform may have forgotten
	// that it had it already. It must not be more than the platform's server.resolution-retention. Default 7 days.
	SpillRetention time.Duration
	// DrainInterval is how often spilled requests are looked for, when nothing has said that there are any. Default 1 s.
	DrainInterval time.Duration
	// JanitorInterval is how often markers that nobody has deleted are looked through. Default 10 min.
	JanitorInterval time.Duration
	// MaxAcknowledged bounds the markers that this process remembers to delete, 16 bytes each; the janitor finds the others.
	// Default 1,000,000.
	MaxAcknowledged int
}

// Spill says what happens when the platform cannot be reached in time.
type Spill int

// The policies.
const (
	// SpillDefault stores the request in the marker, in the same transaction, to be published later and in order. Without a
	// registered database, whose client would publish it, the transaction fails instead.
	SpillDefault Spill = iota
	// SpillNever fails the transaction.
	SpillNever
)
