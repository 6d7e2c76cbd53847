package client

import (
	"time"

	"github.com/google/uuid"
	"google.golang.org/protobuf/types/known/timestamppb"

	outboxv1 "github.com/outbox-platform/outbox/gen/go/outbox/v1"
)

// Event is one fact to publish. Once prepared it never changes: payload, key and headers reach Kafka byte for byte.
// Strings are UTF-8 without NUL; sizes are bytes.
type Event struct {
	// ID is what consumers de-duplicate by. Zero: the SDK makes one. It must be unique within its transaction.
	ID uuid.UUID
	// Topic is the Kafka topic, 1 to 249 of a-z, A-Z, 0-9, ".", "_" and "-". Required.
	Topic string
	// AggregateType is the kind of aggregate, for example "order". With AggregateID it names the unit of order. 1 to 255.
	AggregateType string
	// AggregateID names the aggregate, for example by its order number. 1 to 255.
	AggregateID string
	// Type says what happened, for example "order.placed.v1". 1 to 255.
	Type string
	// Key is the record's key, at most 4096. Nil: AggregateID. Empty but not nil: an empty key.
	Key []byte
	// Payload is the record's value. It is never parsed and may be empty.
	Payload []byte
	// ContentType is the media type of Payload, for example "application/json". At most 255; empty: not stated.
	ContentType string
	// Headers are the record's headers, in order; names may repeat. At most 64, names and values together 16 KiB.
	Headers []Header
	// OccurredAt becomes the record's timestamp. Zero: now.
	OccurredAt time.Time
}

// Header is one header of a record.
type Header struct {
	// Name is not empty. "outbox-epoch" belongs to the platform.
	Name string
	// Value is any bytes, at most 16 KiB.
	Value []byte
}

// protoEvents converts events, fills in what they leave out (id, time, trace context), and checks them.
func (c *Client) protoEvents(events []Event, trace []Header) ([]*outboxv1.Event, error) {
	var (
		now   = time.Now()
		slab  = make([]outboxv1.Event, len(events))
		stamp = make([]timestamppb.Timestamp, len(events))
		out   = make([]*outboxv1.Event, len(events))
	)
	for i := range events {
		e, p := &events[i], &slab[i]
		id := e.ID
		if id == uuid.Nil {
			id = NewID()
		}
		at := e.OccurredAt
		if at.IsZero() {
			// The SDK says when, not the platform: a spilled event keeps its time and its content.
			at = now
		}
		stamp[i].Seconds, stamp[i].Nanos = at.Unix(), int32(at.Nanosecond())
		p.EventId = id[:]
		p.Topic = e.Topic
		p.AggregateType = e.AggregateType
		p.AggregateId = e.AggregateID
		p.EventType = e.Type
		p.Key = e.Key
		p.Payload = e.Payload
		p.ContentType = e.ContentType
		p.Headers = protoHeaders(e.Headers, trace)
		p.OccurredAt = &stamp[i]
		out[i] = p
	}
	return out, c.check(out)
}

// protoHeaders converts headers and adds the trace context, unless they bring their own or have no room for it.
func protoHeaders(headers, trace []Header) []*outboxv1.Header {
	if hasTrace(headers) || !roomFor(headers, trace) {
		trace = nil
	}
	n := len(headers) + len(trace)
	if n == 0 {
		return nil
	}
	slab := make([]outboxv1.Header, n)
	out := make([]*outboxv1.Header, n)
	for i := range slab {
		var h Header
		if i < len(headers) {
			h = headers[i]
		} else {
			h = trace[i-len(headers)]
		}
		slab[i].Name, slab[i].Value = h.Name, h.Value
		out[i] = &slab[i]
	}
	return out
}

// eventsOf is the way back.
func eventsOf(events []*outboxv1.Event) []Event {
	out := make([]Event, 0, len(events))
	for _, p := range events {
		e := Event{
			Topic: p.GetTopic(), AggregateType: p.GetAggregateType(), AggregateID: p.GetAggregateId(), Type: p.GetEventType(),
			Key: p.GetKey(), Payload: p.GetPayload(), ContentType: p.GetContentType(), OccurredAt: p.GetOccurredAt().AsTime(),
		}
		e.ID, _ = uuid.FromBytes(p.GetEventId())
		for _, h := range p.GetHeaders() {
			e.Headers = append(e.Headers, Header{Name: h.GetName(), Value: h.GetValue()})
		}
		out = append(out, e)
	}
	return out
}
