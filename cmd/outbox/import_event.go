package main

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"regexp"
	"slices"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/google/uuid"
	"google.golang.org/protobuf/types/known/timestamppb"

	outboxv1 "github.com/outbox-platform/outbox/gen/go/outbox/v1"
)

// importRow is an unpublished row of a service's own outbox table.
type importRow struct {
	id            string
	aggregateType string
	aggregateID   string
	eventType     string
	topic         string // "": the row has none
	key           *string
	payload       []byte
	payloadBytes  int64 // may be more than payload holds: huge ones are not read
	createdAt     time.Time
	attempts      int32
	lastError     string
}

// rowConverter makes events of rows.
type rowConverter struct {
	source, table string
	huleedu       bool // event_data is an envelope; else the payload goes out as it is
	giveUpAfter   int32
}

// convertedRow is what becomes of a row.
type convertedRow struct {
	row         *importRow
	transaction [16]byte
	event       *outboxv1.Event
	poison      string // why it cannot be published; "": it can
}

var topicName = regexp.MustCompile(`^[a-zA-Z0-9._-]{1,249}$`)

// convert never fails: a row that cannot be published says why, and its event is what can be kept of it.
func (c *rowConverter) convert(row *importRow) *convertedRow {
	out := &convertedRow{row: row, transaction: c.derived("transaction", row.id)}
	e := &outboxv1.Event{
		Topic:         row.topic,
		AggregateType: platformName(row.aggregateType),
		AggregateId:   platformName(row.aggregateID),
		EventType:     platformName(row.eventType),
		Payload:       row.payload,
	}
	out.event = e
	if row.key != nil {
		e.Key = []byte(*row.key)
	}
	if !row.createdAt.IsZero() && row.createdAt.Unix() > 0 {
		e.OccurredAt = timestamppb.New(row.createdAt)
	}
	id, err := uuid.Parse(row.id)
	if err != nil {
		id = c.derived("event", row.id)
	}
	e.EventId = id[:]
	switch {
	case row.payloadBytes > int64(len(row.payload)):
		out.poison = fmt.Sprintf("the payload has %d bytes", row.payloadBytes)
	case row.payload == nil:
		out.poison = "the payload is NULL"
	case c.huleedu:
		out.poison = c.envelope(row, e)
	}
	switch topic := e.GetTopic(); {
	case out.poison != "":
	case topic == "":
		out.poison = "it has no topic"
	case !topicName.MatchString(topic) || topic == "." || topic == ".." || strings.HasPrefix(topic, "__"):
		out.poison = fmt.Sprintf("%q is not the name of a topic", topic)
	case len(e.GetKey()) > 4096:
		out.poison = fmt.Sprintf("the key has %d bytes", len(e.GetKey()))
	case c.giveUpAfter > 0 && row.attempts >= c.giveUpAfter:
		out.poison = fmt.Sprintf("its relay gave it up after %d attempts: %s", row.attempts, row.lastError)
	}
	return out
}

// derived is an id that is always the same for a row: a repetition is found by it.
func (c *rowConverter) derived(what, row string) uuid.UUID {
	sum := sha256.Sum256([]byte(strings.Join([]string{"outbox import", what, c.source, c.table, row}, "\x00")))
	id := uuid.UUID(sum[:16])
	id[6], id[8] = id[6]&0x0f|0x80, id[8]&0x3f|0x80 // version 8: made by a rule of one's own
	return id
}

// platformName fits a name of a service into what the platform allows, 1 to 255 bytes. Which names mean the same stays as it
// was: a long one ends with a hash of itself. The Python drop-in does the same, so old and new events share an aggregate.
func platformName(name string) string {
	const most, kept = 255, 255 - 1 - 2*sha256.Size
	switch {
	case name == "":
		return "-"
	case len(name) <= most:
		return name
	}
	cut := kept
	for !utf8.RuneStart(name[cut]) {
		cut--
	}
	sum := sha256.Sum256([]byte(name))
	return name[:cut] + "#" + hex.EncodeToString(sum[:])
}

// envelope makes the record of a HuleEdu event: the envelope without what the library put beside it (topic, headers) as the
// value, and the seven headers, of which those that were given win. It returns why the row is poison, or "".
func (c *rowConverter) envelope(row *importRow, e *outboxv1.Event) (poison string) {
	members, err := objectMembers(row.payload)
	if err != nil {
		return err.Error()
	}
	fields := map[string]string{} // of the envelope; text as it is, the rest as written
	value := []byte{'{'}
	var given []*outboxv1.Header
	for _, m := range members {
		var text string
		isText := json.Unmarshal(m.value, &text) == nil && m.value[0] == '"'
		switch {
		case m.name == "topic":
			if e.GetTopic() == "" && isText {
				e.Topic = text
			}
			continue
		case m.name == "headers":
			if given, err = givenHeaders(m.value); err != nil {
				return "headers: " + err.Error()
			}
			continue
		case isText:
			fields[m.name] = text
		case string(m.value) != "null":
			fields[m.name] = string(m.value)
		}
		if len(value) > 1 {
			value = append(value, ", "...)
		}
		value = appendPythonJSON(value, m.raw)
		value = append(value, ": "...)
		value = appendPythonJSON(value, m.value)
	}
	e.Payload = append(value, '}')
	e.ContentType = "application/json"
	if id, err := uuid.Parse(fields["event_id"]); err == nil {
		e.EventId = id[:]
	}
	if at, err := time.Parse(time.RFC3339Nano, fields["event_timestamp"]); err == nil && at.Unix() > 0 {
		e.OccurredAt = timestamppb.New(at)
	}
	e.Headers = c.sevenHeaders(row, e, fields, given)
	return ""
}

func givenHeaders(object []byte) ([]*outboxv1.Header, error) {
	members, err := objectMembers(object)
	if err != nil {
		return nil, err
	}
	headers := make([]*outboxv1.Header, 0, len(members))
	for _, m := range members {
		var text string
		if json.Unmarshal(m.value, &text) != nil {
			text = string(m.value)
		}
		headers = append(headers, &outboxv1.Header{Name: m.name, Value: []byte(text)})
	}
	return headers, nil
}

// sevenHeaders are the given headers and those of the seven that are missing, filled from the envelope.
func (*rowConverter) sevenHeaders(row *importRow, e *outboxv1.Event, envelope map[string]string, headers []*outboxv1.Header) []*outboxv1.Header {
	or := func(value, instead string) string {
		if value == "" {
			return instead
		}
		return value
	}
	for _, h := range [...]struct{ name, value string }{
		{"event_id", or(envelope["event_id"], uuid.UUID(e.GetEventId()).String())},
		{"trace_id", envelope["correlation_id"]},
		{"schema_version", or(envelope["schema_version"], "1")},
		{"occurred_at", envelope["event_timestamp"]},
		{"content_type", "application/json"},
		{"source_service", envelope["source_service"]},
		{"event_type", or(envelope["event_type"], row.eventType)},
	} {
		known := slices.ContainsFunc(headers, func(given *outboxv1.Header) bool { return given.GetName() == h.name })
		if !known && h.value != "" { // the source's record profile fills the rest
			headers = append(headers, &outboxv1.Header{Name: h.name, Value: []byte(h.value)})
		}
	}
	return headers
}

// size is what the platform counts of an event.
func eventSize(e *outboxv1.Event) int64 {
	n := len(e.GetPayload()) + len(e.GetKey()) + len(e.GetTopic()) + len(e.GetAggregateType()) + len(e.GetAggregateId()) + len(e.GetEventType()) + len(e.GetContentType())
	for _, h := range e.GetHeaders() {
		n += len(h.GetName()) + len(h.GetValue())
	}
	return int64(n)
}

// deadLetter is a row that cannot be published, as the API takes it.
func (c *convertedRow) deadLetter(source, reason string) *outboxv1.AddDeadLetterRequest {
	e := c.event
	return &outboxv1.AddDeadLetterRequest{
		Source: source, TransactionId: c.transaction[:], EventId: e.GetEventId(), Topic: e.GetTopic(),
		AggregateType: e.GetAggregateType(), AggregateId: e.GetAggregateId(), EventType: e.GetEventType(), Key: e.Key,
		Payload: e.GetPayload(), ContentType: e.GetContentType(), Headers: fittingHeaders(e.GetHeaders()),
		Error: reason, Attempts: max(0, c.row.attempts),
	}
}

// fittingHeaders leaves out what no record can have: it may be what makes the row poison.
func fittingHeaders(headers []*outboxv1.Header) []*outboxv1.Header {
	var kept []*outboxv1.Header
	for _, h := range headers {
		if n := h.GetName(); n != "" && len(n) <= 255 && len(h.GetValue()) <= 16<<10 && !strings.ContainsRune(n, 0) && len(kept) < 64 {
			kept = append(kept, h)
		}
	}
	return kept
}
