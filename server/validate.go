package server

import (
	"errors"
	"fmt"
	"math"
	"strconv"
	"strings"
	"time"

	"buf.build/go/protovalidate"
	"github.com/google/uuid"
	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/reflect/protoregistry"

	outboxv1 "github.com/outbox-platform/outbox/gen/go/outbox/v1"
	"github.com/outbox-platform/outbox/internal/fault"
	"github.com/outbox-platform/outbox/store"
)

const (
	// reservedHeader is added to every record by the relay.
	reservedHeader = "outbox-epoch"
	// defaultDatabase is the name of a source database that has none.
	defaultDatabase = "default"
	// recordReserve is what a record may need beside what an event counts: Kafka's framing and the profile's fixed headers.
	recordReserve = 1024
	// maxViolations is how many violations one answer names.
	maxViolations = 20
)

// validator holds the rules of the proto, compiled once, and the limits of this deployment.
type validator struct {
	rules  protovalidate.Validator
	limits limits
}

// limits are the configured ones.
type limits struct {
	events, headers, headerBytes int
	transactionBytes, eventBytes int64
}

// newValidator compiles the rules of every request message.
func newValidator(c Config) (*validator, error) {
	var messages []proto.Message
	for _, f := range []protoreflect.FileDescriptor{outboxv1.File_outbox_v1_outbox_service_proto, outboxv1.File_outbox_v1_admin_service_proto} {
		for i := range f.Services().Len() {
			methods := f.Services().Get(i).Methods()
			for j := range methods.Len() {
				m, err := newMessage(methods.Get(j).Input())
				if err != nil {
					return nil, err
				}
				messages = append(messages, m)
			}
		}
	}
	rules, err := protovalidate.New(protovalidate.WithMessages(messages...), protovalidate.WithDisableLazy())
	if err != nil {
		return nil, fmt.Errorf("compiling the validation rules: %w", err)
	}
	return &validator{rules: rules, limits: limits{
		events: c.MaxEvents, headers: c.MaxHeaders, headerBytes: c.MaxHeaderBytes,
		transactionBytes: c.MaxTransactionBytes, eventBytes: c.MaxEventBytes,
	}}, nil
}

// message checks the rules written in the proto.
func (v *validator) message(m proto.Message) *apiError {
	err := v.rules.Validate(m)
	if err == nil {
		return nil
	}
	var broken *protovalidate.ValidationError
	if !errors.As(err, &broken) || len(broken.Violations) == 0 {
		return otherError(fmt.Errorf("validating %s: %w", m.ProtoReflect().Descriptor().FullName(), err))
	}
	violations := make([]*errdetails.BadRequest_FieldViolation, 0, min(len(broken.Violations), maxViolations))
	for _, b := range broken.Violations[:cap(violations)] {
		violations = append(violations, &errdetails.BadRequest_FieldViolation{
			Field:       protovalidate.FieldPathString(b.Proto.GetField()),
			Description: b.Proto.GetMessage(),
		})
	}
	return violationsError(violations)
}

// adminMessage checks the rules of the proto, and that no string holds a NUL, which PostgreSQL cannot store.
func (v *validator) adminMessage(m proto.Message) *apiError {
	if e := v.message(m); e != nil {
		return e
	}
	if field := nulField(m.ProtoReflect()); field != "" {
		return fieldError(field, "must not contain NUL")
	}
	return nil
}

// nulField names the first string field that holds a NUL; "" if none does.
func nulField(m protoreflect.Message) (found string) {
	m.Range(func(f protoreflect.FieldDescriptor, val protoreflect.Value) bool {
		switch {
		case f.IsList():
			for i := range val.List().Len() {
				if p, bad := nulValue(f, val.List().Get(i)); bad {
					found = fmt.Sprintf("%s[%d]%s", f.Name(), i, p)
					return false
				}
			}
		case !f.IsMap():
			if p, bad := nulValue(f, val); bad {
				found = string(f.Name()) + p
				return false
			}
		}
		return true
	})
	return found
}

func nulValue(f protoreflect.FieldDescriptor, val protoreflect.Value) (path string, bad bool) {
	switch f.Kind() {
	case protoreflect.StringKind:
		return "", strings.IndexByte(val.String(), 0) >= 0
	case protoreflect.MessageKind:
		if p := nulField(val.Message()); p != "" {
			return "." + p, true
		}
	}
	return "", false
}

// prepare checks a Prepare and fills c's request.
func (v *validator) prepare(c *call, req *outboxv1.PrepareRequest, src *source, topics *catalogue) *apiError {
	if e := v.eventCount(len(req.GetEvents())); e != nil {
		return e
	}
	if !plainPrepare(req) {
		if e := v.message(req); e != nil {
			return e
		}
	}
	c.key(store.KindPrepare, src, req.GetTransactionId())
	if e := databaseTransaction(&c.database, req.GetDatabaseTransaction(), src); e != nil {
		return e
	}
	c.request.Database = &c.database
	return v.events(c, req.GetEvents(), src, topics)
}

// publish checks a Publish and fills c's request.
func (v *validator) publish(c *call, req *outboxv1.PublishRequest, src *source, topics *catalogue) *apiError {
	if e := v.eventCount(len(req.GetEvents())); e != nil {
		return e
	}
	if !plainPublish(req) {
		if e := v.message(req); e != nil {
			return e
		}
	}
	c.key(store.KindPublish, src, req.GetTransactionId())
	if fault.Mutant("M11") { // every call is a new one
		c.request.Key.Transaction = store.TransactionID(uuid.New())
	}
	if req.GetKeptByCaller() {
		c.request.Resolution = store.KeptByCaller(src.Name)
	}
	return v.events(c, req.GetEvents(), src, topics)
}

// decisionRequest is a CommitRequest or an AbortRequest.
type decisionRequest interface {
	proto.Message
	GetSource() string
	GetTransactionId() []byte
	GetToken() []byte
}

// decision checks a Commit or an Abort and fills c's request.
func (v *validator) decision(c *call, kind store.Kind, req decisionRequest, src *source, shards int) *apiError {
	if !plainDecision(req) {
		if e := v.message(req); e != nil {
			return e
		}
	}
	c.key(kind, src, req.GetTransactionId())
	c.request.Shards = readToken(req.GetToken(), c.request.Key, shards)
	return nil
}

// eventCount comes before everything else, so that a million events cost nothing more.
func (v *validator) eventCount(n int) *apiError {
	if n > v.limits.events {
		return fieldError("events", "at most %d events are allowed in a transaction", v.limits.events)
	}
	return nil
}

// databaseTransaction converts and checks what ties a transaction to its source's database transaction.
func databaseTransaction(to *store.DatabaseTransaction, from *outboxv1.DatabaseTransaction, src *source) *apiError {
	name := from.GetDatabase()
	if name == "" {
		name = defaultDatabase
	}
	registered := src.database(name)
	if registered == nil {
		return fieldError("database_transaction.database", "source %q has no database %q", src.Name, name)
	}
	*to = store.DatabaseTransaction{
		Database:         registered.Name,
		XID:              from.GetXid(),
		SystemIdentifier: from.GetSystemIdentifier(),
		Timeline:         from.GetTimeline(),
		DatabaseOID:      from.GetDatabaseOid(),
		MarkerOID:        from.GetMarkerOid(),
		Mode:             store.Mode(from.GetMode()), //nolint:gosec // a defined value of a small enum
	}
	if to.Mode == 0 {
		to.Mode = registered.Mode
	}
	if to.XID == 0 && to.Mode != store.ModeClientOnly {
		return fieldError("database_transaction.xid", "required in mode %s", outboxv1.DatabaseMode(to.Mode))
	}
	return nil
}

// events checks the events one by one and converts them without copying what they point to.
func (v *validator) events(c *call, from []*outboxv1.Event, src *source, topics *catalogue) *apiError {
	to := c.one[:]
	if len(from) != len(to) {
		to = make([]store.Event, len(from))
	}
	var total int64
	for i, e := range from {
		size, err := v.event(&to[i], e, i, src, topics)
		if err != nil {
			return err
		}
		total += size
	}
	if total > v.limits.transactionBytes {
		return tooLargeError("events", total, v.limits.transactionBytes)
	}
	if i := duplicateEvent(to); i >= 0 {
		return fieldError(eventField(i, "event_id"), "another event of the transaction has the same id")
	}
	c.request.Events = to
	c.bytes = total
	return nil
}

// event checks and converts one event and returns its size.
func (v *validator) event(to *store.Event, e *outboxv1.Event, i int, src *source, topics *catalogue) (int64, *apiError) {
	if e == nil {
		return 0, fieldError("events["+strconv.Itoa(i)+"]", "required")
	}
	if !src.allows(e.GetTopic()) {
		return 0, topicDenied(src.Name, e.GetTopic())
	}
	*to = store.Event{
		ID:            [16]byte(e.GetEventId()),
		Topic:         e.GetTopic(),
		AggregateType: e.GetAggregateType(),
		AggregateID:   e.GetAggregateId(),
		Type:          e.GetEventType(),
		ContentType:   e.GetContentType(),
		Key:           e.GetKey(),
		HasKey:        e.Key != nil,
		Payload:       e.GetPayload(),
	}
	if ts := e.GetOccurredAt(); ts != nil {
		// Kafka's timestamps start in 1970, and the store keeps nanoseconds in 63 bits: until the year 2262.
		if !ts.IsValid() || ts.GetSeconds() < 0 || ts.GetSeconds() >= math.MaxInt64/int64(time.Second) || (ts.GetSeconds() == 0 && ts.GetNanos() == 0) {
			return 0, fieldError(eventField(i, "occurred_at"), "must be a valid time after 1970-01-01 and before 2262")
		}
		to.OccurredAt = ts.GetSeconds()*1e9 + int64(ts.GetNanos())
	}
	headerBytes, err := v.headers(to, e.GetHeaders(), i)
	if err != nil {
		return 0, err
	}
	size := int64(len(to.Payload)) + int64(headerBytes) +
		int64(len(to.Key)+len(to.Topic)+len(to.AggregateType)+len(to.AggregateID)+len(to.Type)+len(to.ContentType))
	limit := v.limits.eventBytes
	if most, known := topics.maxBytes(to.Topic); known {
		limit = min(limit, max(0, most-recordReserve-int64(len(src.CloudEventsSource))))
	}
	if size > limit {
		return 0, tooLargeError(eventField(i, "payload"), size, limit)
	}
	return size, nil
}

// headers checks and converts the headers of one event and returns their size.
func (v *validator) headers(to *store.Event, from []*outboxv1.Header, i int) (size int, _ *apiError) {
	if len(from) == 0 {
		return 0, nil
	}
	if len(from) > v.limits.headers {
		return 0, fieldError(eventField(i, "headers"), "%d headers, allowed are %d", len(from), v.limits.headers)
	}
	to.Headers = make([]store.Header, len(from))
	for j, h := range from {
		name := h.GetName()
		if strings.EqualFold(name, reservedHeader) {
			return 0, fieldError(eventField(i, "headers["+strconv.Itoa(j)+"].name"), "%q is reserved for the platform", reservedHeader)
		}
		size += len(name) + len(h.GetValue())
		to.Headers[j] = store.Header{Name: name, Value: h.GetValue()}
	}
	if size > v.limits.headerBytes {
		return 0, fieldError(eventField(i, "headers"), "%d bytes of headers, allowed are %d", size, v.limits.headerBytes)
	}
	return size, nil
}

// duplicateEvent returns the number of the first event whose id an earlier one has, or -1.
func duplicateEvent(events []store.Event) int {
	const few = 8 // comparing all pairs of few is faster than a map
	if len(events) <= few {
		for i := range events {
			for j := range i {
				if events[i].ID == events[j].ID {
					return i
				}
			}
		}
		return -1
	}
	seen := make(map[[16]byte]struct{}, len(events))
	for i := range events {
		if _, dup := seen[events[i].ID]; dup {
			return i
		}
		seen[events[i].ID] = struct{}{}
	}
	return -1
}

func eventField(i int, field string) string { return "events[" + strconv.Itoa(i) + "]." + field }

func itoa(i int) string { return strconv.Itoa(i) }

// newMessage makes an empty message of a type.
func newMessage(d protoreflect.MessageDescriptor) (proto.Message, error) {
	t, err := protoregistry.GlobalTypes.FindMessageByName(d.FullName())
	if err != nil {
		return nil, fmt.Errorf("looking up message %s: %w", d.FullName(), err)
	}
	return t.New().Interface(), nil
}
