package store

import (
	"encoding/binary"
	"fmt"
	"slices"
	"unsafe"
)

// The format of a segment's body. Stored bytes outlive binaries: a change needs a new format byte, and the golden test
// keeps the old one readable.
//
//	body    = format record*
//	record  = kind ordinal length content            kind, format: 1 byte; ordinal, length: uvarint
//	        | more length event                      another event of the transaction of the record before it
//	content = head event                             prepared, published
//	        | source transaction                     commit, abort
//	head    = source transaction prepared_at mode [database xid system_identifier timeline database_oid marker_oid]
//	event   = id topic aggregate_type aggregate_id type content_type occurred_at key headers payload
//
// source, xid, timeline, oids: uvarint; transaction, id: 16 bytes; prepared_at, system_identifier: 8 bytes, big endian;
// mode: 1 byte, 0: no database follows; occurred_at: varint; text and bytes: uvarint length, then bytes; key: uvarint
// length + 1, 0: none; headers: uvarint count, then name and value each.
const (
	segmentFormat = 1

	recordPrepared  = 1
	recordPublished = 2
	recordCommit    = 3
	recordAbort     = 4
	recordMore      = 5
)

// segmentBytes is how long the body of a segment may get before the next one is begun, so that its row stays inline in a
// page of 8 KiB. An event that is longer alone has a segment of its own, which PostgreSQL stores out of line.
const segmentBytes = 8000

// uvarintLen returns how many bytes v takes as a uvarint.
func uvarintLen(v uint64) int {
	n := 1
	for ; v >= 0x80; v >>= 7 {
		n++
	}
	return n
}

func appendString[T string | []byte](b []byte, s T) []byte {
	b = binary.AppendUvarint(b, uint64(len(s)))
	return append(b, s...)
}

func appendKey(b []byte, k Key) []byte {
	b = binary.AppendUvarint(b, uint64(uint32(k.Source))) //nolint:gosec // ids of sources are positive
	return append(b, k.Transaction[:]...)
}

func appendHead(b []byte, k Key, preparedAt int64, db *DatabaseTransaction) []byte {
	b = appendKey(b, k)
	b = binary.BigEndian.AppendUint64(b, uint64(preparedAt)) //nolint:gosec // bytes of an int64
	if db == nil {
		return append(b, 0)
	}
	b = append(b, byte(db.Mode)) //nolint:gosec // modes are 1 to 3
	b = appendString(b, db.Database)
	b = binary.AppendUvarint(b, db.XID)
	b = binary.BigEndian.AppendUint64(b, db.SystemIdentifier)
	b = binary.AppendUvarint(b, uint64(db.Timeline))
	b = binary.AppendUvarint(b, uint64(db.DatabaseOID))
	return binary.AppendUvarint(b, uint64(db.MarkerOID))
}

// appendEvent is canonical: equal events have equal bytes, so the digest of a transaction is a hash of them.
func appendEvent(b []byte, e *Event) []byte {
	b = append(b, e.ID[:]...)
	b = appendString(b, e.Topic)
	b = appendString(b, e.AggregateType)
	b = appendString(b, e.AggregateID)
	b = appendString(b, e.Type)
	b = appendString(b, e.ContentType)
	b = binary.AppendVarint(b, e.OccurredAt)
	if e.HasKey {
		b = binary.AppendUvarint(b, uint64(len(e.Key))+1)
		b = append(b, e.Key...)
	} else {
		b = append(b, 0)
	}
	b = binary.AppendUvarint(b, uint64(len(e.Headers)))
	for i := range e.Headers {
		b = appendString(b, e.Headers[i].Name)
		b = appendString(b, e.Headers[i].Value)
	}
	return appendString(b, e.Payload)
}

// recordKind is how an event record says whether it came by Prepare or by Publish.
func recordKind(s State) byte {
	if s == Committed {
		return recordPublished
	}
	return recordPrepared
}

// EncodeEvent appends one event record to b in the format of a segment body with ordinal 0: what parked and dead-letter
// rows keep. DecodeEvent reads it back. Of the state only whether it is COMMITTED is kept.
func EncodeEvent(b []byte, r *Record) []byte {
	b = append(b, segmentFormat, recordKind(r.State), 0)
	start := len(b)
	b = appendHead(b, r.Key, r.PreparedAt, r.Database)
	b = appendEvent(b, &r.Event)
	var prefix [binary.MaxVarintLen64]byte
	return slices.Insert(b, start, prefix[:binary.PutUvarint(prefix[:], uint64(len(b)-start))]...)
}

// DecodeEvent decodes a body written by EncodeEvent. The record points into body.
func DecodeEvent(body []byte) (*Record, error) {
	var found *Record
	s := Segment{Body: body}
	err := s.Records(func(r *Record) bool {
		if found == nil {
			found = r
			return true
		}
		found = nil
		return false
	})
	switch {
	case err != nil:
		return nil, err
	case found == nil || found.IsDecision:
		return nil, fmt.Errorf("decoding an event: the body does not hold exactly one event record")
	}
	return found, nil
}

// Records decodes the segment and calls yield for each record that is not stale, in order, until it returns false. The
// record and what it points to live as long as the segment's body; the Record struct itself is reused between calls.
func (s *Segment) Records(yield func(*Record) bool) error {
	d := decoder{b: s.Body}
	if f := d.byte(); d.bad || f != segmentFormat {
		return fmt.Errorf("decoding segment %s of shard %d: format %d is not known", s.Position, s.Shard, f)
	}
	stale := staleSet(s.Stale)
	var (
		r       = new(Record)
		ordinal int64
	)
	for n := int32(0); d.left() > 0; n++ {
		ok := d.record(r, &ordinal)
		if !ok {
			return fmt.Errorf("decoding segment %s of shard %d: corrupt at byte %d", s.Position, s.Shard, d.pos)
		}
		r.Number = n
		if stale(ordinal) {
			continue
		}
		if !yield(r) {
			return nil
		}
	}
	return nil
}

// staleSet returns a test for membership in the ordinals that lost.
func staleSet(stale []int32) func(int64) bool {
	if len(stale) <= 16 {
		return func(o int64) bool {
			for _, s := range stale {
				if int64(s) == o {
					return true
				}
			}
			return false
		}
	}
	set := make(map[int64]struct{}, len(stale))
	for _, s := range stale {
		set[int64(s)] = struct{}{}
	}
	return func(o int64) bool { _, found := set[o]; return found }
}

// decoder reads a body and never beyond it. After a violation bad is set and everything reads as zero.
type decoder struct {
	b   []byte
	pos int
	bad bool

	events    bool // the record before was an event: one with recordMore may follow
	databases []DatabaseTransaction
	headers   []Header
}

func (d *decoder) left() int { return len(d.b) - d.pos }

func (d *decoder) fail() { d.bad, d.pos = true, min(d.pos, len(d.b)) }

// take returns the next n bytes, without room to append.
func (d *decoder) take(n uint64) []byte {
	if d.bad || n > uint64(d.left()) { //nolint:gosec // left is not negative
		d.fail()
		return nil
	}
	b := d.b[d.pos : d.pos+int(n) : d.pos+int(n)] //nolint:gosec // n ≤ left
	d.pos += int(n)                               //nolint:gosec // n ≤ left
	return b
}

func (d *decoder) byte() byte {
	if b := d.take(1); b != nil {
		return b[0]
	}
	return 0
}

func (d *decoder) uint64() uint64 {
	if b := d.take(8); b != nil {
		return binary.BigEndian.Uint64(b)
	}
	return 0
}

func (d *decoder) id() (id [16]byte) {
	copy(id[:], d.take(16))
	return id
}

func (d *decoder) uvarint() uint64 {
	if d.bad {
		return 0
	}
	v, n := binary.Uvarint(d.b[d.pos:])
	if n <= 0 {
		d.fail()
		return 0
	}
	d.pos += n
	return v
}

func (d *decoder) uint32() uint32 {
	v := d.uvarint()
	if v > 1<<32-1 {
		d.fail()
		return 0
	}
	return uint32(v)
}

func (d *decoder) varint() int64 {
	if d.bad {
		return 0
	}
	v, n := binary.Varint(d.b[d.pos:])
	if n <= 0 {
		d.fail()
		return 0
	}
	d.pos += n
	return v
}

func (d *decoder) bytes() []byte { return d.take(d.uvarint()) }

// string shares the body's memory: bodies are never written to once they are decoded.
func (d *decoder) string() string {
	b := d.bytes()
	return unsafe.String(unsafe.SliceData(b), len(b)) //nolint:gosec // as above; it saves six copies per event
}

// record decodes one record into r. A record of kind more keeps what it shares with the one before.
func (d *decoder) record(r *Record, ordinal *int64) bool {
	kind := d.byte()
	if kind != recordMore {
		*ordinal = int64(d.uint32())
	} else if !d.events {
		d.fail()
	}
	length := d.uvarint()
	if d.bad || length > uint64(d.left()) { //nolint:gosec // left is not negative
		d.fail()
		return false
	}
	end := d.pos + int(length) //nolint:gosec // length ≤ left
	whole := d.b
	d.b = d.b[:end]
	switch kind {
	case recordPrepared, recordPublished:
		*r = Record{State: Prepared}
		if kind == recordPublished {
			r.State = Committed
		}
		d.head(r)
		d.event(&r.Event)
	case recordMore:
		d.event(&r.Event)
	case recordCommit, recordAbort:
		*r = Record{IsDecision: true, State: Committed}
		if kind == recordAbort {
			r.State = Aborted
		}
		d.key(&r.Key)
		*ordinal = -*ordinal
	default:
		d.fail()
	}
	d.events = kind != recordCommit && kind != recordAbort
	ok := !d.bad && d.pos == end
	d.b = whole
	return ok
}

func (d *decoder) key(k *Key) {
	k.Source = int32(d.uint32()) //nolint:gosec // written from an int32
	k.Transaction = d.id()
}

func (d *decoder) head(r *Record) {
	d.key(&r.Key)
	r.PreparedAt = int64(d.uint64()) //nolint:gosec // written from an int64
	mode := d.byte()
	if d.bad || mode == 0 {
		return
	}
	// One allocation for several: they live about as long as the body.
	if len(d.databases) == cap(d.databases) {
		d.databases = make([]DatabaseTransaction, 0, 16)
	}
	d.databases = append(d.databases, DatabaseTransaction{
		Mode: Mode(mode), Database: d.string(), XID: d.uvarint(), SystemIdentifier: d.uint64(),
		Timeline: d.uint32(), DatabaseOID: d.uint32(), MarkerOID: d.uint32(),
	})
	r.Database = &d.databases[len(d.databases)-1]
}

func (d *decoder) event(e *Event) {
	e.ID = d.id()
	e.Topic = d.string()
	e.AggregateType = d.string()
	e.AggregateID = d.string()
	e.Type = d.string()
	e.ContentType = d.string()
	e.OccurredAt = d.varint()
	e.Key, e.HasKey = nil, false
	if n := d.uvarint(); n > 0 {
		e.Key, e.HasKey = d.take(n-1), true
	}
	e.Headers = d.someHeaders(d.uvarint())
	e.Payload = d.bytes()
}

func (d *decoder) someHeaders(n uint64) []Header {
	// A header takes two bytes at least: a count beyond that is garbage and must not become an allocation.
	if d.bad || n > uint64(d.left())/2 { //nolint:gosec // left is not negative
		d.fail()
		return nil
	}
	if n == 0 {
		return nil
	}
	if uint64(cap(d.headers)-len(d.headers)) < n { //nolint:gosec // not negative
		d.headers = make([]Header, 0, max(n, 32))
	}
	start := len(d.headers)
	for range n {
		d.headers = append(d.headers, Header{Name: d.string(), Value: d.bytes()})
	}
	return d.headers[start:len(d.headers):len(d.headers)]
}
