package store

// Event is one fact to publish, as a source prepared it. Strings are UTF-8 without NUL. Slices are not copied: the
// caller of Writer.Submit must leave them alone until Done; events decoded from a segment point into its body.
type Event struct {
	ID            [16]byte
	Topic         string
	AggregateType string
	AggregateID   string
	Type          string
	ContentType   string
	Key           []byte // the record's key, if HasKey
	HasKey        bool   // false: the key is AggregateID
	Payload       []byte
	Headers       []Header
	OccurredAt    int64 // Unix nanoseconds; 0: not stated
}

// Header is one record header; names may repeat.
type Header struct {
	Name  string
	Value []byte
}

// Aggregate is the unit of order.
type Aggregate struct {
	Source int32
	Type   string
	ID     string
}

// Mode says how the decision of a transaction can be found out from its source database.
type Mode int16

// The modes, numbered as in outbox.v1.DatabaseMode.
const (
	ModeMarker     Mode = 1
	ModeXIDFenced  Mode = 2
	ModeClientOnly Mode = 3
)

// DatabaseTransaction ties a prepared transaction to the source's own database transaction.
type DatabaseTransaction struct {
	Database         string
	XID              uint64
	SystemIdentifier uint64
	Timeline         uint32
	DatabaseOID      uint32
	MarkerOID        uint32
	Mode             Mode
}
