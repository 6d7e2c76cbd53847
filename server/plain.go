package server

import (
	"strings"

	outboxv1 "github.com/outbox-platform/outbox/gen/go/outbox/v1"
)

// The rules of the data calls live in the proto, and protovalidate is what decides. Evaluating them is a fifth of the
// cost of a call, though, so what is plainly valid is recognised here first. These functions may only say true for what
// the rules accept, never the other way round: a test compares them with protovalidate over everything that a fuzzer
// finds, and another fails when a rule in the proto changes.

// plainTransaction recognises a valid source and transaction id.
func plainTransaction(source string, id []byte) bool {
	return len(id) == 16 && plainName(source)
}

// plainName recognises a string of 1 to 255 bytes without NUL.
func plainName(s string) bool {
	return len(s) >= 1 && len(s) <= 255 && strings.IndexByte(s, 0) < 0
}

// plainPrepare recognises a valid Prepare.
func plainPrepare(req *outboxv1.PrepareRequest) bool {
	d := req.GetDatabaseTransaction()
	return plainTransaction(req.GetSource(), req.GetTransactionId()) &&
		d != nil && len(d.GetDatabase()) <= 255 && strings.IndexByte(d.GetDatabase(), 0) < 0 &&
		d.GetMode() >= 0 && d.GetMode() <= outboxv1.DatabaseMode_DATABASE_MODE_CLIENT_ONLY &&
		plainEvents(req.GetEvents())
}

// plainPublish recognises a valid Publish.
func plainPublish(req *outboxv1.PublishRequest) bool {
	return plainTransaction(req.GetSource(), req.GetTransactionId()) && plainEvents(req.GetEvents())
}

// plainDecision recognises a valid Commit or Abort.
func plainDecision(req decisionRequest) bool {
	return plainTransaction(req.GetSource(), req.GetTransactionId()) && len(req.GetToken()) <= 64
}

func plainEvents(events []*outboxv1.Event) bool {
	if len(events) == 0 || len(events) > maxEventsOfProto {
		return false
	}
	for _, e := range events {
		if !plainEvent(e) {
			return false
		}
	}
	return true
}

func plainEvent(e *outboxv1.Event) bool {
	if e == nil || len(e.GetEventId()) != 16 || !plainTopic(e.GetTopic()) ||
		!plainName(e.GetAggregateType()) || !plainName(e.GetAggregateId()) || !plainName(e.GetEventType()) ||
		len(e.GetKey()) > 4096 || len(e.GetContentType()) > 255 || strings.IndexByte(e.GetContentType(), 0) >= 0 ||
		len(e.GetHeaders()) > maxHeadersOfProto {
		return false
	}
	for _, h := range e.GetHeaders() {
		if h == nil || !plainName(h.GetName()) || len(h.GetValue()) > 16384 {
			return false
		}
	}
	return true
}

// plainTopic recognises a valid topic that does not begin with a dot or an underscore: those are left to the rules.
func plainTopic(t string) bool {
	if len(t) == 0 || len(t) > 249 || t[0] == '.' || t[0] == '_' {
		return false
	}
	for i := range len(t) {
		switch c := t[i]; {
		case c >= 'a' && c <= 'z', c >= 'A' && c <= 'Z', c >= '0' && c <= '9', c == '.', c == '_', c == '-':
		default:
			return false
		}
	}
	return true
}
