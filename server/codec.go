package server

import (
	"errors"
	"unicode/utf8"

	"google.golang.org/grpc/encoding"
	protocodec "google.golang.org/grpc/encoding/proto"
	"google.golang.org/grpc/mem"
	"google.golang.org/protobuf/encoding/protowire"

	outboxv1 "github.com/outbox-platform/outbox/gen/go/outbox/v1"
)

// scanFrom is the size from which on messages are scanned before they are decoded: a smaller one cannot grow to more than
// a few megabytes.
const scanFrom = 16 << 10

// Field numbers that the scan follows.
const (
	prepareEvents  = 4
	publishEvents  = 3
	eventHeaders   = 9
	requestCalls   = 2
	requestAnswers = 3
	callsCall      = 1
	answersAnswer  = 2
	callPrepare    = 2
	callPublish    = 5
)

// errTooMany: a message with more elements than any valid one has. An empty event is two bytes on the wire and a hundred
// times that in memory, so such a message must not be decoded.
var errTooMany = errors.New("more events, headers or calls than any valid message has")

// guardedCodec is grpc's protobuf codec with a scan before decoding.
type guardedCodec struct {
	encoding.CodecV2
	events  int // allowed in one transaction
	counted func()
}

func newGuardedCodec(events int, counted func()) encoding.CodecV2 {
	return &guardedCodec{CodecV2: encoding.GetCodecV2(protocodec.Name), events: events, counted: counted}
}

// Unmarshal decodes a message. A Prepare or Publish with too many events is decoded without them, so that the validator
// answers as for any other field; any other message with absurdly many elements is refused.
func (c *guardedCodec) Unmarshal(data mem.BufferSlice, v any) error {
	if data.Len() >= scanFrom {
		buf := data.MaterializeToBuffer(mem.DefaultBufferPool())
		defer buf.Free()
		data = mem.BufferSlice{buf}
		skip, err := c.scan(buf.ReadOnlyData(), v)
		if err != nil {
			c.counted()
			return err
		}
		if skip {
			return nil
		}
	}
	err := c.CodecV2.Unmarshal(data, v)
	if err != nil {
		c.counted()
	}
	return err
}

// scan reports whether the message is not to be decoded, and has filled in what the validator needs to refuse it.
func (c *guardedCodec) scan(b []byte, v any) (skip bool, err error) {
	var events, nested int
	switch m := v.(type) {
	case *outboxv1.PrepareRequest:
		if events, nested = countTransaction(b, prepareEvents); events > c.events {
			m.Source = firstString(b, 1)
			m.Events = make([]*outboxv1.Event, c.events+1)
			return true, nil
		}
	case *outboxv1.PublishRequest:
		if events, nested = countTransaction(b, publishEvents); events > c.events {
			m.Source = firstString(b, 1)
			m.Events = make([]*outboxv1.Event, c.events+1)
			return true, nil
		}
	case *outboxv1.SessionRequest:
		nested = countSession(b)
	}
	return false, c.enough(nested)
}

// firstString returns a string field for authorisation; "" if it is not valid text.
func firstString(b []byte, field protowire.Number) (found string) {
	eachMessage(b, func(n protowire.Number, v []byte) {
		if n == field && utf8.Valid(v) {
			found = string(v)
		}
	})
	return found
}

// enough refuses more nested messages than a valid message can have.
func (c *guardedCodec) enough(nested int) error {
	if nested > c.events*(1+maxHeadersOfProto)+2*maxCallsOfProto {
		return errTooMany
	}
	return nil
}

// countTransaction counts the events of a Prepare or Publish, and all messages in it.
func countTransaction(b []byte, eventField protowire.Number) (events, nested int) {
	eachMessage(b, func(n protowire.Number, v []byte) {
		nested++
		if n != eventField {
			return
		}
		events++
		eachMessage(v, func(n protowire.Number, _ []byte) {
			if n == eventHeaders {
				nested++
			}
		})
	})
	return events, nested
}

// countSession counts all messages in a SessionRequest.
func countSession(b []byte) (nested int) {
	eachMessage(b, func(n protowire.Number, v []byte) {
		switch n {
		case requestAnswers:
			eachMessage(v, func(n protowire.Number, _ []byte) {
				if n == answersAnswer {
					nested++
				}
			})
		case requestCalls:
			eachMessage(v, func(n protowire.Number, call []byte) {
				if n != callsCall {
					return
				}
				nested++
				eachMessage(call, func(n protowire.Number, tx []byte) {
					switch n {
					case callPrepare:
						_, more := countTransaction(tx, prepareEvents)
						nested += more
					case callPublish:
						_, more := countTransaction(tx, publishEvents)
						nested += more
					}
				})
			})
		}
	})
	return nested
}

// eachMessage calls fn for each length-delimited field of a message. It stops at what is not valid; the decoder will
// say so.
func eachMessage(b []byte, fn func(protowire.Number, []byte)) {
	for len(b) > 0 {
		n, t, size := protowire.ConsumeTag(b)
		if size < 0 {
			return
		}
		b = b[size:]
		if t != protowire.BytesType {
			size = protowire.ConsumeFieldValue(n, t, b)
			if size < 0 {
				return
			}
			b = b[size:]
			continue
		}
		v, size := protowire.ConsumeBytes(b)
		if size < 0 {
			return
		}
		fn(n, v)
		b = b[size:]
	}
}
