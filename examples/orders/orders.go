package orders

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"

	"github.com/google/uuid"
	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/outbox-platform/outbox/client"
	"github.com/outbox-platform/outbox/client/pgxoutbox"
)

const (
	// Source is the name under which the service is registered.
	Source = "orders"
	// Topic is where its events go.
	Topic = "orders"
)

// ErrDeclined is why an order is rolled back.
var ErrDeclined = errors.New("the payment was declined")

// Order is an order, and the payload of its event.
type Order struct {
	ID       uuid.UUID `json:"order"`
	Customer string    `json:"customer"`
	Cents    int64     `json:"cents"`
	// Version counts the committed orders of the customer: consumers see it grow by one.
	Version int64 `json:"version"`
}

// Shop places orders. Safe for concurrent use.
type Shop struct {
	pool   *pgxpool.Pool
	outbox *client.Client
}

const schema = `
CREATE TABLE IF NOT EXISTS customer (
  id      text   PRIMARY KEY,
  version bigint NOT NULL DEFAULT 0,
  spent   bigint NOT NULL DEFAULT 0
);
CREATE TABLE IF NOT EXISTS customer_order (
  id        uuid        PRIMARY KEY,
  customer  text        NOT NULL REFERENCES customer,
  cents     bigint      NOT NULL,
  placed_at timestamptz NOT NULL DEFAULT now()
);`

// migrateLock keeps instances that start at the same time from making the tables twice.
const migrateLock = 0x6f7264657273 // "orders"

// Migrate makes the service's own tables and the marker table, unless they are there.
func Migrate(ctx context.Context, pool *pgxpool.Pool) error {
	return pgx.BeginFunc(ctx, pool, func(tx pgx.Tx) error {
		if _, err := tx.Exec(ctx, `SELECT pg_advisory_xact_lock($1)`, int64(migrateLock)); err != nil {
			return fmt.Errorf("waiting for other instances: %w", err)
		}
		if _, err := tx.Exec(ctx, schema); err != nil {
			return fmt.Errorf("making the tables of the order service: %w", err)
		}
		var there bool
		if err := tx.QueryRow(ctx, `SELECT to_regclass('outbox_marker') IS NOT NULL`).Scan(&there); err != nil {
			return fmt.Errorf("looking for the marker table: %w", err)
		}
		if there {
			return nil
		}
		if _, err := tx.Exec(ctx, client.MarkerDDL); err != nil {
			return fmt.Errorf("making the marker table: %w", err)
		}
		return nil
	})
}

// New returns a shop over its database and the platform. The client answers the platform's questions about transactions from
// the same database from then on. Pool and client stay the caller's to close, the client first.
func New(pool *pgxpool.Pool, outbox *client.Client) (*Shop, error) {
	if err := pgxoutbox.Register(outbox, "", pool, pgxoutbox.Upkeep{}); err != nil {
		return nil, fmt.Errorf("registering the database: %w", err)
	}
	return &Shop{pool: pool, outbox: outbox}, nil
}

// Place stores an order and publishes it, both or neither. It returns the order with its version, and ErrDeclined when the
// payment is declined, after everything was written: what was written, and the event, are then rolled back.
func (s *Shop) Place(ctx context.Context, order Order, decline bool) (Order, error) {
	err := pgxoutbox.InTx(ctx, s.pool, s.outbox, pgxoutbox.Options{}, func(tx *pgxoutbox.Tx) error {
		placed, err := store(ctx, tx, &order)
		if err != nil {
			return err
		}
		if err := tx.Publish(placed); err != nil {
			return err
		}
		if decline {
			return ErrDeclined
		}
		return nil
	})
	return order, err
}

// store writes an order, sets its version, and returns the event to publish.
func store(ctx context.Context, tx pgx.Tx, order *Order) (client.Event, error) {
	// The row lock of the aggregate comes first: from here on the customer's orders are one after the other.
	err := tx.QueryRow(ctx, `
		INSERT INTO customer AS c (id, version, spent) VALUES ($1, 1, $2)
		ON CONFLICT (id) DO UPDATE SET version = c.version + 1, spent = c.spent + excluded.spent
		RETURNING version`, order.Customer, order.Cents).Scan(&order.Version)
	if err != nil {
		return client.Event{}, fmt.Errorf("updating customer %s: %w", order.Customer, err)
	}
	if _, err := tx.Exec(ctx, `INSERT INTO customer_order (id, customer, cents) VALUES ($1, $2, $3)`,
		order.ID, order.Customer, order.Cents); err != nil {
		return client.Event{}, fmt.Errorf("inserting order %s: %w", order.ID, err)
	}
	payload, err := json.Marshal(order)
	if err != nil {
		return client.Event{}, fmt.Errorf("encoding order %s: %w", order.ID, err)
	}
	return client.Event{
		Topic: Topic, AggregateType: "customer", AggregateID: order.Customer, Type: "order.placed.v1",
		Payload: payload, ContentType: "application/json",
	}, nil
}
