package store

import "fmt"

// Position is the place of a segment in its shard's log: the xid of the transaction that wrote it, then its number in
// that batch. Positions of one shard are totally ordered.
type Position struct {
	XID uint64
	Seq int32
}

// Compare returns -1, 0 or +1.
func (p Position) Compare(q Position) int {
	switch {
	case p.XID != q.XID:
		if p.XID < q.XID {
			return -1
		}
		return 1
	case p.Seq != q.Seq:
		if p.Seq < q.Seq {
			return -1
		}
		return 1
	}
	return 0
}

// String returns "xid/seq".
func (p Position) String() string { return fmt.Sprintf("%d/%d", p.XID, p.Seq) }

// EventPosition is the place of an event: its segment, and the number of its record there.
type EventPosition struct {
	Position
	Record int32
}

// Compare returns -1, 0 or +1.
func (p EventPosition) Compare(q EventPosition) int {
	if c := p.Position.Compare(q.Position); c != 0 {
		return c
	}
	switch {
	case p.Record < q.Record:
		return -1
	case p.Record > q.Record:
		return 1
	}
	return 0
}

// Segment is one log row: the events and decisions of one batch for one shard.
type Segment struct {
	Shard int16
	Position
	Stale []int32 // ordinals of the requests of the batch that lost: +n the n-th Prepare or Publish, -n the n-th decision
	Body  []byte
}

// Record is one entry of a segment: an event, or the decision of a transaction.
type Record struct {
	Number     int32 // its number in the segment, stale ones counted
	Key        Key
	IsDecision bool
	// State: for a decision COMMITTED or ABORTED; for an event PREPARED, or COMMITTED when it came by Publish.
	State      State
	Event      Event                // only for events
	PreparedAt int64                // only for events: Unix nanoseconds
	Database   *DatabaseTransaction // only for events of a Prepare
}
