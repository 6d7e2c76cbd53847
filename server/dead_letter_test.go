package server

import (
	"strings"
	"testing"

	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/proto"

	outboxv1 "github.com/outbox-platform/outbox/gen/go/outbox/v1"
)

func TestAddDeadLetter(t *testing.T) {
	r := start(t)
	r.register(t, "orders")
	id := []byte("0123456789abcdef")
	req := &outboxv1.AddDeadLetterRequest{
		Source: "orders", TransactionId: id, EventId: id, Topic: "not a topic", AggregateType: "order", AggregateId: "7", EventType: "order.placed",
		Payload: []byte("{"), Headers: []*outboxv1.Header{{Name: "a", Value: []byte{0}}}, Error: strings.Repeat("å", 2000), Attempts: 5,
	}
	for range 2 {
		if _, err := r.admin.AddDeadLetter(t.Context(), req); err != nil {
			t.Fatal(err)
		}
	}
	all, err := r.admin.ListDeadLetters(t.Context(), &outboxv1.ListDeadLettersRequest{Source: "orders"})
	if err != nil || len(all.GetDeadLetters()) != 1 {
		t.Fatalf("%v, %v", all, err)
	}
	if d := all.GetDeadLetters()[0]; d.GetTopic() != "not a topic" || d.GetAggregateId() != "7" || d.GetAttempts() != 5 || d.GetPayloadBytes() != 1 ||
		len(d.GetError()) > maxDeadLetterError+3 || !strings.HasPrefix(d.GetError(), "åå") {
		t.Errorf("%v", d)
	}
	for name, c := range map[string]struct {
		change func(*outboxv1.AddDeadLetterRequest)
		code   codes.Code
		reason outboxv1.ErrorReason
	}{
		"other content":  {func(q *outboxv1.AddDeadLetterRequest) { q.Payload = []byte("[") }, codes.AlreadyExists, outboxv1.ErrorReason_ERROR_REASON_TRANSACTION_ID_REUSED},
		"no error":       {func(q *outboxv1.AddDeadLetterRequest) { q.Error = "" }, codes.InvalidArgument, outboxv1.ErrorReason_ERROR_REASON_FIELD_INVALID},
		"NUL":            {func(q *outboxv1.AddDeadLetterRequest) { q.Topic = "\x00" }, codes.InvalidArgument, outboxv1.ErrorReason_ERROR_REASON_FIELD_INVALID},
		"no aggregate":   {func(q *outboxv1.AddDeadLetterRequest) { q.AggregateId = "" }, codes.InvalidArgument, outboxv1.ErrorReason_ERROR_REASON_FIELD_INVALID},
		"too large":      {func(q *outboxv1.AddDeadLetterRequest) { q.Payload = make([]byte, 4<<20) }, codes.InvalidArgument, outboxv1.ErrorReason_ERROR_REASON_EVENT_TOO_LARGE},
		"unknown source": {func(q *outboxv1.AddDeadLetterRequest) { q.Source = "nobody" }, codes.NotFound, outboxv1.ErrorReason_ERROR_REASON_NOT_FOUND},
	} {
		q, _ := proto.Clone(req).(*outboxv1.AddDeadLetterRequest)
		c.change(q)
		_, err := r.admin.AddDeadLetter(t.Context(), q)
		t.Log(name, err)
		wantError(t, err, c.code, c.reason)
	}
}
