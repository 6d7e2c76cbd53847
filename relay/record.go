package relay

import (
	"encoding/hex"
	"strconv"
	"time"

	"github.com/outbox-platform/outbox/store"
)

// Record profiles, numbered as in outbox.v1.RecordProfile and stored in Source.RecordProfile.
const (
	profileCloudEvents int16 = 1
	profileDebezium    int16 = 2
	profileHuleEdu     int16 = 3
	profilePlain       int16 = 4
)

// EpochHeader is the header that every record carries last: "shard:epoch" of the holder that delivered it. When the same
// event is found twice, it tells which holder wrote which.
const EpochHeader = "outbox-epoch"

// maxProfileHeaders is the most headers that a profile adds, EpochHeader included.
const maxProfileHeaders = 8

// Values that never change; sharing them saves copies. Nobody may write to them.
var (
	cloudEventsVersion = []byte("1.0")
	contentTypeJSON    = []byte("application/json")
	schemaVersionOne   = []byte("1")
)

// EventIDHeader names the header in which records of a profile carry the event's id in canonical UUID text; "" when the
// profile adds none. A caller may have given a header of this name itself: then its value is the caller's, not the id.
func EventIDHeader(profile int16) string {
	switch profile {
	case profileDebezium:
		return "id"
	case profileHuleEdu:
		return "event_id"
	case profilePlain:
		return ""
	default:
		return "ce_id"
	}
}

// BuildRecord makes the Kafka record of an event: its payload untouched as the value; its key, else its aggregate id; the
// time it happened, else the time it was prepared; the caller's headers in their order, then those of the source's
// profile that the caller did not give (names are case-sensitive, as in Kafka), then EpochHeader.
//
// The record shares memory with rec's payload, key and headers. Key and Value are never nil, and src must not be.
func BuildRecord(src *store.Source, shard int16, epoch int64, rec *store.Record) Record {
	e := &rec.Event
	at := e.OccurredAt
	if at == 0 {
		at = rec.PreparedAt
	}
	b := recordBuilder{
		given:   e.Headers,
		headers: make([]store.Header, len(e.Headers), len(e.Headers)+maxProfileHeaders),
		buf:     make([]byte, 0, bufferSize(src, e)),
	}
	copy(b.headers, e.Headers)

	key, value := e.Key, e.Payload
	if !e.HasKey {
		key = b.text(e.AggregateID)
	}
	// Empty is not absent: nil would make a record without a key, or a tombstone.
	if key == nil {
		key = []byte{}
	}
	if value == nil {
		value = []byte{}
	}
	b.profile(src, rec, at)
	b.epoch(shard, epoch)
	return Record{Topic: e.Topic, Key: key, Value: value, Headers: b.headers, Timestamp: time.Unix(0, at).UTC()}
}

// bufferSize is enough for everything that a builder writes, so that the buffer is allocated once: every string at most
// once, three UUIDs or times, the epoch.
func bufferSize(src *store.Source, e *store.Event) int {
	return 2*len(e.AggregateID) + len(e.AggregateType) + len(e.Type) + len(e.ContentType) +
		len(src.CloudEventsSource) + len(src.Name) + 3*36 + 28
}

// recordBuilder collects headers; the values it makes lie one after the other in one buffer, to save allocations.
type recordBuilder struct {
	given   []store.Header
	headers []store.Header
	buf     []byte
}

// profile adds the headers of the source's profile.
func (b *recordBuilder) profile(src *store.Source, rec *store.Record, at int64) {
	e := &rec.Event
	switch src.RecordProfile {
	case profilePlain:
	case profileDebezium:
		b.addUUID("id", e.ID)
		b.addText("eventType", e.Type)
		b.addText("aggregateType", e.AggregateType)
	case profileHuleEdu:
		// HuleEdu's consumers read event_id and event_type, both or neither, so both are always there. trace_id is their
		// correlation id and schema_version their envelope's: only the caller knows those. What is filled in here instead
		// is what all events of one transaction share, and the first version.
		b.addUUID("event_id", e.ID)
		b.addUUID("trace_id", rec.Key.Transaction)
		b.addShared("schema_version", schemaVersionOne)
		b.addTime("occurred_at", at)
		if e.ContentType == "" {
			b.addShared("content_type", contentTypeJSON)
		} else {
			b.addText("content_type", e.ContentType)
		}
		b.addText("source_service", src.Name)
		b.addText("event_type", e.Type)
	default:
		b.addShared("ce_specversion", cloudEventsVersion)
		b.addUUID("ce_id", e.ID)
		b.addText("ce_source", src.CloudEventsSource)
		b.addText("ce_type", e.Type)
		b.addTime("ce_time", at)
		b.addText("ce_subject", e.AggregateID)
		if e.ContentType != "" { // an attribute without a value must not be there
			b.addText("content-type", e.ContentType)
		}
	}
}

// isGiven reports whether the caller gave a header of this name: the caller's always win.
func (b *recordBuilder) isGiven(name string) bool {
	for i := range b.given {
		if b.given[i].Name == name {
			return true
		}
	}
	return false
}

func (b *recordBuilder) addShared(name string, value []byte) {
	if !b.isGiven(name) {
		b.headers = append(b.headers, store.Header{Name: name, Value: value})
	}
}

func (b *recordBuilder) addText(name, value string) {
	if !b.isGiven(name) {
		b.headers = append(b.headers, store.Header{Name: name, Value: b.text(value)})
	}
}

func (b *recordBuilder) addUUID(name string, id [16]byte) {
	if b.isGiven(name) {
		return
	}
	from := len(b.buf)
	b.buf = appendUUID(b.buf, id)
	b.headers = append(b.headers, store.Header{Name: name, Value: b.since(from)})
}

func (b *recordBuilder) addTime(name string, at int64) {
	if b.isGiven(name) {
		return
	}
	from := len(b.buf)
	b.buf = time.Unix(0, at).UTC().AppendFormat(b.buf, time.RFC3339Nano)
	b.headers = append(b.headers, store.Header{Name: name, Value: b.since(from)})
}

// epoch adds EpochHeader. The name is reserved, so what a caller may have given does not count.
func (b *recordBuilder) epoch(shard int16, epoch int64) {
	from := len(b.buf)
	b.buf = strconv.AppendInt(b.buf, int64(shard), 10)
	b.buf = append(b.buf, ':')
	b.buf = strconv.AppendInt(b.buf, epoch, 10)
	b.headers = append(b.headers, store.Header{Name: EpochHeader, Value: b.since(from)})
}

func (b *recordBuilder) text(s string) []byte {
	from := len(b.buf)
	b.buf = append(b.buf, s...)
	return b.since(from)
}

// since returns what was written from an offset on, with no room to grow: an append to it cannot touch its neighbour.
func (b *recordBuilder) since(from int) []byte { return b.buf[from:len(b.buf):len(b.buf)] }

// appendUUID appends the canonical text of id.
func appendUUID(b []byte, id [16]byte) []byte {
	for i, part := range [...][]byte{id[:4], id[4:6], id[6:8], id[8:10], id[10:]} {
		if i > 0 {
			b = append(b, '-')
		}
		b = hex.AppendEncode(b, part)
	}
	return b
}
