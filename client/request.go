package client

import (
	"context"
	"fmt"

	"github.com/google/uuid"
	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/proto"

	outboxv1 "github.com/outbox-platform/outbox/gen/go/outbox/v1"
)

// Request is a checked and encoded Prepare.
type Request struct {
	id   uuid.UUID
	body encoded
}

// ID returns the transaction's id.
func (r *Request) ID() uuid.UUID { return r.id }

// Bytes returns the serialized outbox.v1.PrepareRequest: what is spilled. Do not change it.
func (r *Request) Bytes() []byte { return r.body }

// CheckEvents refuses, with an [Error] for which IsInvalid is true, what the platform would refuse by its rules and limits.
// Encode does the same; this asks without a database transaction.
func (c *Client) CheckEvents(events ...Event) error {
	_, err := c.protoEvents(events, nil)
	return err
}

// Encode checks a Prepare and puts it into the form in which it is sent or spilled.
func (c *Client) Encode(ctx context.Context, id uuid.UUID, db DatabaseTransaction, events ...Event) (*Request, error) {
	pe, err := c.protoEvents(events, c.traceOf(ctx))
	if err != nil {
		return nil, err
	}
	body, err := proto.Marshal(&outboxv1.PrepareRequest{
		Source: c.cfg.Source, TransactionId: id[:], DatabaseTransaction: db.proto(), Events: pe,
	})
	if err != nil {
		return nil, fmt.Errorf("encoding the request: %w", err)
	}
	return &Request{id: id, body: body}, nil
}

// PrepareRequest is Prepare for an encoded request. failFast: when the link is down, fail at once with IsUnavailable instead
// of waiting for it until the deadline; for callers that can spill.
func (c *Client) PrepareRequest(ctx context.Context, r *Request, failFast bool) (token []byte, err error) {
	return c.do(ctx, kindPrepare, r.body, c.cfg.PrepareTimeout, failFast)
}

// PublishSpilled publishes a request that was spilled by a transaction that has committed since.
func (c *Client) PublishSpilled(ctx context.Context, spilled []byte) error {
	var p outboxv1.PrepareRequest
	if err := proto.Unmarshal(spilled, &p); err != nil {
		return &Error{Code: codes.InvalidArgument, Message: "the spilled request cannot be read", cause: err, local: true}
	}
	// It may have been spilled before any session had told the limits. Too large a message would end the session.
	if err := c.check(p.GetEvents()); err != nil {
		return err
	}
	return c.publish(ctx, &outboxv1.PublishRequest{
		Source: p.GetSource(), TransactionId: p.GetTransactionId(), Events: p.GetEvents(), KeptByCaller: true,
	})
}

// SpilledEvents reads the events of a spilled request, for people who look into the marker table.
func (c *Client) SpilledEvents(spilled []byte) ([]Event, error) {
	var p outboxv1.PrepareRequest
	if err := proto.Unmarshal(spilled, &p); err != nil {
		return nil, fmt.Errorf("reading a spilled request: %w", err)
	}
	return eventsOf(p.GetEvents()), nil
}
