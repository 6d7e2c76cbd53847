package bench

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"strconv"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/outbox-platform/outbox/relay"
	"github.com/outbox-platform/outbox/relay/kafka"
)

// The design that the platform replaces: an outbox table in the service's own database, and a relay that polls it.
const naiveDDL = `
CREATE TABLE naive_outbox (
  id             bigint      PRIMARY KEY GENERATED ALWAYS AS IDENTITY,
  event_id       uuid        NOT NULL,
  topic          text        NOT NULL,
  aggregate_type text        NOT NULL,
  aggregate_id   text        NOT NULL,
  event_type     text        NOT NULL,
  payload        bytea       NOT NULL,
  created_at     timestamptz NOT NULL DEFAULT now(),
  published_at   timestamptz);
CREATE INDEX naive_outbox_unpublished ON naive_outbox (id) WHERE published_at IS NULL`

const naiveInsert = `
INSERT INTO naive_outbox (event_id, topic, aggregate_type, aggregate_id, event_type, payload)
VALUES ($1, $2, $3, $4, $5, $6)`

const naiveRead = `
SELECT id, topic, aggregate_id, payload FROM naive_outbox
WHERE published_at IS NULL ORDER BY id LIMIT 200 FOR UPDATE SKIP LOCKED`

const naiveMark = `UPDATE naive_outbox SET published_at = now() WHERE id = $1`

// naivePoll is how long the naive relay waits when it found nothing.
const naivePoll = 10 * time.Millisecond

// NaiveRelayCmd is the naive relay as a process of its own, so that its CPU time is counted apart. The bench starts it.
type NaiveRelayCmd struct {
	DSN     string   `help:"Source database." required:""`
	Brokers []string `help:"Kafka bootstrap servers." required:""`
}

// Run relays until ctx ends.
func (c *NaiveRelayCmd) Run(ctx context.Context, log *slog.Logger) error {
	conn, err := pgx.Connect(ctx, c.DSN)
	if err != nil {
		return fmt.Errorf("connecting to the source database: %w", err)
	}
	defer conn.Close(context.WithoutCancel(ctx)) //nolint:errcheck // the process ends
	sink, err := kafka.New(ctx, kafka.Config{Brokers: c.Brokers, Logger: log})
	if err != nil {
		return fmt.Errorf("opening the producer: %w", err)
	}
	defer sink.Close(ctx) //nolint:errcheck // the process ends
	for ctx.Err() == nil {
		n, err := naivePass(ctx, conn, sink)
		if err != nil && ctx.Err() == nil {
			return err
		}
		if n == 0 {
			select {
			case <-ctx.Done():
			case <-time.After(naivePoll):
			}
		}
	}
	return nil
}

// naivePass publishes one batch in one transaction: read, publish, wait for all acknowledgements, mark each row.
func naivePass(ctx context.Context, conn *pgx.Conn, sink relay.Sink) (int, error) {
	tx, err := conn.Begin(ctx)
	if err != nil {
		return 0, fmt.Errorf("beginning a pass: %w", err)
	}
	defer tx.Rollback(context.WithoutCancel(ctx)) //nolint:errcheck // after Commit a no-op
	rows, err := tx.Query(ctx, naiveRead)
	if err != nil {
		return 0, fmt.Errorf("reading the outbox: %w", err)
	}
	var ids []int64
	for rows.Next() {
		var id int64
		var topic, aggregate string
		var payload []byte
		if err := rows.Scan(&id, &topic, &aggregate, &payload); err != nil {
			return 0, fmt.Errorf("reading the outbox: %w", err)
		}
		d := &relay.Delivery{Record: relay.Record{Topic: topic, Key: []byte(aggregate), Value: payload, Timestamp: time.Now()}}
		if err := sink.Deliver(d); err != nil {
			return 0, fmt.Errorf("publishing row %s: %w", strconv.FormatInt(id, 10), err)
		}
		ids = append(ids, id)
	}
	if err := rows.Err(); err != nil {
		return 0, fmt.Errorf("reading the outbox: %w", err)
	}
	for range ids {
		select {
		case d, ok := <-sink.Reports():
			if !ok {
				return 0, errors.New("the producer is closed")
			}
			if d.Err != nil {
				return 0, fmt.Errorf("publishing: %w", d.Err)
			}
		case <-ctx.Done():
			return 0, ctx.Err()
		}
	}
	var marks pgx.Batch
	for _, id := range ids {
		marks.Queue(naiveMark, id)
	}
	if err := tx.SendBatch(ctx, &marks).Close(); err != nil {
		return 0, fmt.Errorf("marking rows: %w", err)
	}
	if err := tx.Commit(ctx); err != nil {
		return 0, fmt.Errorf("committing a pass: %w", err)
	}
	return len(ids), nil
}
