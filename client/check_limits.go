package client

import (
	"fmt"
	"math"
	"strings"
	"time"
	"unicode/utf8"

	"google.golang.org/grpc/codes"

	outboxv1 "github.com/outbox-platform/outbox/gen/go/outbox/v1"
)

// Rules that hold everywhere. They repeat what the proto says, so that a mistake is found before anything is sent, also
// while the platform cannot be reached and a request is about to be spilled.
const (
	maxName        = 255
	maxTopic       = 249
	maxKey         = 4096
	maxHeaders     = 64
	maxHeaderBytes = 16 << 10
	reservedHeader = "outbox-epoch"
)

// Limits are the limits of the platform. Until a session has told them, the platform's defaults hold.
type Limits struct {
	// EventsPerTransaction is the highest number of events in one transaction.
	EventsPerTransaction int
	// TransactionBytes bounds payloads, keys, headers and names of one transaction together.
	TransactionBytes int
	// EventBytes bounds the same of one event. A topic may allow less.
	EventBytes int
	// Headers is the highest number of headers of one event.
	Headers int
	// HeaderBytes bounds the names and values of the headers of one event.
	HeaderBytes int
	// OpenCalls is the highest number of calls of one session that are not yet answered.
	OpenCalls int
}

var defaultLimits = Limits{
	EventsPerTransaction: 1000,
	TransactionBytes:     4 << 20,
	EventBytes:           1<<20 - 64<<10,
	Headers:              maxHeaders,
	HeaderBytes:          maxHeaderBytes,
	OpenCalls:            1024,
}

// limitsOf reads the limits of a Welcome. What it leaves out keeps its default.
func limitsOf(l *outboxv1.Limits) Limits {
	out := defaultLimits
	set := func(to *int, v uint64) {
		if v != 0 {
			*to = int(min(v, 1<<40))
		}
	}
	set(&out.EventsPerTransaction, uint64(l.GetMaxEventsPerTransaction()))
	set(&out.TransactionBytes, l.GetMaxTransactionBytes())
	set(&out.EventBytes, l.GetMaxEventBytes())
	set(&out.Headers, uint64(l.GetMaxHeaders()))
	set(&out.HeaderBytes, uint64(l.GetMaxHeaderBytes()))
	set(&out.OpenCalls, uint64(l.GetMaxOpenCalls()))
	return out
}

// Limits returns the limits in force.
func (c *Client) Limits() Limits { return *c.limits.Load() }

// check refuses what the platform would refuse. The error is an *Error with code INVALID_ARGUMENT that names every field.
func (c *Client) check(events []*outboxv1.Event) error {
	v := violations{limits: c.Limits()}
	v.events(events)
	return v.err()
}

// violations collects the fields that break a rule. Nothing is allocated while there is none.
type violations struct {
	limits  Limits
	fields  []FieldViolation
	tooBig  bool
	invalid bool
}

// maxViolations bounds the list: a thousand broken events need not all be told.
const maxViolations = 16

func (v *violations) add(event int, field, format string, args ...any) {
	v.invalid = true
	if len(v.fields) == maxViolations {
		return
	}
	name := field
	if event >= 0 {
		name = fmt.Sprintf("events[%d].%s", event, field)
	}
	v.fields = append(v.fields, FieldViolation{Field: strings.TrimSuffix(name, "."), Description: fmt.Sprintf(format, args...)})
}

func (v *violations) large(event int, field string, size, limit int) {
	if size > limit {
		v.tooBig = true
		v.add(event, field, "has %d bytes, more than %d", size, limit)
	}
}

func (v *violations) err() error {
	if !v.invalid {
		return nil
	}
	reason := ReasonFieldInvalid
	if v.tooBig {
		reason = ReasonEventTooLarge
	}
	f := v.fields[0]
	return &Error{Code: codes.InvalidArgument, Reason: reason, Message: f.Field + " " + f.Description, Fields: v.fields, local: true}
}

func (v *violations) events(events []*outboxv1.Event) {
	switch n := len(events); {
	case n == 0:
		v.add(-1, "events", "is empty")
	case n > v.limits.EventsPerTransaction:
		v.add(-1, "events", "has %d entries, more than %d", n, v.limits.EventsPerTransaction)
		return
	}
	var seen map[[16]byte]struct{}
	if len(events) > 1 {
		seen = make(map[[16]byte]struct{}, len(events))
	}
	total := 0
	for i, e := range events {
		total += v.event(i, e)
		if seen == nil {
			continue
		}
		id := [16]byte(e.EventId)
		if _, again := seen[id]; again {
			v.add(i, "event_id", "is used twice in this transaction")
		}
		seen[id] = struct{}{}
	}
	v.large(-1, "events", total, v.limits.TransactionBytes)
}

// event checks one event and returns its size.
func (v *violations) event(i int, e *outboxv1.Event) int {
	if why := topicProblem(e.Topic); why != "" {
		v.add(i, "topic", "%s", why)
	}
	v.text(i, "aggregate_type", e.AggregateType, 1)
	v.text(i, "aggregate_id", e.AggregateId, 1)
	v.text(i, "event_type", e.EventType, 1)
	v.text(i, "content_type", e.ContentType, 0)
	v.large(i, "key", len(e.Key), maxKey)
	v.headers(i, e.Headers)
	// Kafka counts milliseconds from 1970, and the platform keeps nanoseconds in 63 bits.
	if t := e.OccurredAt; !t.IsValid() || t.AsTime().Compare(time.Unix(0, 0)) <= 0 || t.GetSeconds() >= math.MaxInt64/int64(time.Second) {
		v.add(i, "occurred_at", "is not a time after 1970-01-01 and before 2262")
	}
	size := len(e.Topic) + len(e.AggregateType) + len(e.AggregateId) + len(e.EventType) + len(e.ContentType) +
		len(e.Key) + len(e.Payload)
	for _, h := range e.Headers {
		size += len(h.Name) + len(h.Value)
	}
	v.large(i, "", size, v.limits.EventBytes)
	return size
}

func (v *violations) headers(i int, headers []*outboxv1.Header) {
	if limit := min(v.limits.Headers, maxHeaders); len(headers) > limit {
		v.add(i, "headers", "has %d entries, more than %d", len(headers), limit)
		return
	}
	size := 0
	for _, h := range headers {
		v.text(i, "headers.name", h.Name, 1)
		if h.Name == reservedHeader {
			v.add(i, "headers.name", "%q belongs to the platform", h.Name)
		}
		size += len(h.Name) + len(h.Value)
	}
	v.large(i, "headers", size, min(v.limits.HeaderBytes, maxHeaderBytes))
}

func (v *violations) text(i int, field, s string, least int) {
	switch {
	case len(s) < least:
		v.add(i, field, "is empty")
	case len(s) > maxName:
		v.add(i, field, "has %d bytes, more than %d", len(s), maxName)
	case !utf8.ValidString(s):
		v.add(i, field, "is not UTF-8")
	case strings.IndexByte(s, 0) >= 0:
		v.add(i, field, "contains NUL")
	}
}

// topicProblem says what is wrong with a topic's name; empty: nothing.
func topicProblem(s string) string {
	switch {
	case s == "":
		return "is empty"
	case len(s) > maxTopic:
		return fmt.Sprintf("has %d bytes, more than %d", len(s), maxTopic)
	case s == "." || s == "..":
		return `must not be "." or ".."`
	case strings.HasPrefix(s, "__"):
		return `must not start with "__"`
	}
	for i := range len(s) {
		switch b := s[i]; {
		case 'a' <= b && b <= 'z', 'A' <= b && b <= 'Z', '0' <= b && b <= '9', b == '.', b == '_', b == '-':
		default:
			return fmt.Sprintf("contains %q, which topic names do not allow", b)
		}
	}
	return ""
}
