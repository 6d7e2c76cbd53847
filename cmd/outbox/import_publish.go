package main

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/cenkalti/backoff/v5"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	outboxv1 "github.com/outbox-platform/outbox/gen/go/outbox/v1"
)

// row hands one row to the platform. An error means that no row can be handed over now.
func (r *importRun) row(ctx context.Context, row *importRow) (importOutcome, error) {
	converted := r.converter.convert(row)
	reason := r.unfit(converted)
	if reason == "" {
		err := r.persist(ctx, func(ctx context.Context) error {
			_, err := r.server.data.Publish(ctx, &outboxv1.PublishRequest{
				Source: r.cmd.Source, TransactionId: converted.transaction[:], Events: []*outboxv1.Event{converted.event}, KeptByCaller: true,
			})
			return err
		})
		switch status.Code(err) {
		case codes.OK:
			return converted.outcome(rowPublished, ""), nil
		case codes.InvalidArgument:
			reason = explain(err).Error()
		case codes.AlreadyExists:
			return converted.outcome(rowLeft, "it was imported before, and has been changed since"), nil
		default:
			return importOutcome{}, fmt.Errorf("row %s: %w", row.id, err)
		}
	}
	err := r.persist(ctx, func(ctx context.Context) error {
		_, err := r.server.admin.AddDeadLetter(ctx, converted.deadLetter(r.cmd.Source, reason))
		return err
	})
	switch status.Code(err) {
	case codes.OK:
		return converted.outcome(rowDead, reason), nil
	case codes.InvalidArgument:
		return converted.outcome(rowLeft, reason+"; and no dead letter can be made of it: "+explain(err).Error()), nil
	case codes.AlreadyExists:
		return converted.outcome(rowLeft, reason+"; it was imported before, and has been changed since"), nil
	}
	return importOutcome{}, fmt.Errorf("row %s, which becomes a dead letter (%s): %w", row.id, reason, err)
}

// persist makes a call until it succeeds, is refused, or patience ends. All calls are idempotent.
func (r *importRun) persist(ctx context.Context, call func(context.Context) error) error {
	delays := backoff.NewExponentialBackOff()
	delays.InitialInterval, delays.MaxInterval = 20*time.Millisecond, 2*time.Second
	until := time.Now().Add(r.cmd.Patience)
	for {
		attempt, cancel := r.server.call(ctx)
		err := call(attempt)
		cancel()
		switch status.Code(err) {
		case codes.Unavailable, codes.ResourceExhausted, codes.DeadlineExceeded, codes.Aborted:
		default:
			return err
		}
		wait := delays.NextBackOff()
		if ctx.Err() != nil || time.Now().Add(wait).After(until) {
			return err
		}
		timer := time.NewTimer(wait)
		select {
		case <-timer.C:
		case <-ctx.Done():
			timer.Stop()
			return errors.Join(ctx.Err(), err)
		}
	}
}

func (c *convertedRow) outcome(kind rowKind, reason string) importOutcome {
	return importOutcome{
		Row: c.row.id, TransactionID: idText(c.transaction[:]), AggregateType: c.row.aggregateType, AggregateID: c.row.aggregateID,
		Topic: c.event.GetTopic(), Reason: strings.ToValidUTF8(reason, "�"), kind: kind,
	}
}

// allowedTopics returns whether the source may use a topic. Who is not of the platform team cannot ask: then Publish tells.
func (r *importRun) allowedTopics(ctx context.Context) (func(string) bool, error) {
	ctx, cancel := r.server.call(ctx)
	defer cancel()
	answer, err := r.server.admin.GetSource(ctx, &outboxv1.GetSourceRequest{Name: r.cmd.Source})
	if status.Code(err) == codes.PermissionDenied {
		return func(string) bool { return true }, nil
	}
	if err != nil {
		return nil, err
	}
	return func(topic string) bool {
		for _, allowed := range answer.GetSource().GetTopics() {
			if prefix, open := strings.CutSuffix(allowed, "*"); allowed == topic || open && strings.HasPrefix(topic, prefix) {
				return true
			}
		}
		return false
	}, nil
}
