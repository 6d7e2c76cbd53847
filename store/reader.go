package store

import (
	"context"
	"time"
)

// Cursor is how far a shard has been read.
type Cursor struct {
	Shard int16
	Position
}

// Horizon tells how far reading is behind writing because of transactions that own an xid, anywhere in the cluster.
type Horizon struct {
	XID       uint64        // everything below it is final
	Held      time.Duration // how long the horizon has not moved although later xids exist; 0: it moves
	RoleAware bool          // foreign transactions were stepped over in the last read
}

// Reader reads the log for one relay over a connection of its own. Not safe for concurrent use.
type Reader struct{ reader }

// OpenReader connects a reader.
func (s *Store) OpenReader(ctx context.Context) (*Reader, error) { return s.openReader(ctx) }

// Read returns the segments after each cursor that are below the horizon, at most limit per shard, in order per shard.
// It never skips a segment: one that becomes visible later is never before one returned. When a foreign transaction (one
// that does not write the log) holds the horizon, it is stepped over.
//
// ErrUnavailable: the connection is gone; Read reconnects at the next call. If the server then is another one (system
// identifier or timeline changed), Read returns ErrStoreChanged once: drop all memory and start from the checkpoints.
func (r *Reader) Read(ctx context.Context, cursors []Cursor, limit int) ([]Segment, error) {
	return r.read(ctx, cursors, limit)
}

// ReadAt returns the named segments of one shard, in order; missing ones are left out.
func (r *Reader) ReadAt(ctx context.Context, shard int16, at []Position) ([]Segment, error) {
	return r.readAt(ctx, shard, at)
}

// Horizon returns what the last Read saw.
func (r *Reader) Horizon() Horizon { return r.horizon() }

// Close closes the connection.
func (r *Reader) Close(ctx context.Context) error { return r.close(ctx) }
