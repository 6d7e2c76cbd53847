package orders

import (
	"context"
	"fmt"

	"github.com/google/uuid"
	"github.com/jackc/pgx/v5"

	"github.com/outbox-platform/outbox/client"
	"github.com/outbox-platform/outbox/test/system/history"
)

// schema has a row per aggregate, whose lock serialises its transactions, and a row per event.
const schema = `
CREATE TABLE aggregate (
    id      text PRIMARY KEY,
    version bigint NOT NULL DEFAULT 0   -- events so far
);
CREATE TABLE noted (
    event_id  uuid PRIMARY KEY,
    aggregate text NOT NULL,
    version   bigint NOT NULL,
    topic     text NOT NULL,
    key       bytea NOT NULL,
    payload   bytea NOT NULL,           -- digest
    header    text NOT NULL,
    UNIQUE (aggregate, version)
);
`

// headerName is the header that every event of the workload carries.
const headerName = "order-note"

// CreateSchema makes the service's tables, the SDK's marker table and the aggregates in an empty database.
func CreateSchema(ctx context.Context, dsn string, aggregates int) error {
	conn, err := pgx.Connect(ctx, dsn)
	if err != nil {
		return fmt.Errorf("create the service's schema: %w", err)
	}
	defer conn.Close(ctx)
	if _, err := conn.Exec(ctx, schema+client.MarkerDDL); err != nil {
		return fmt.Errorf("create the service's schema: %w", err)
	}
	for n := range aggregates {
		if _, err := conn.Exec(ctx, "INSERT INTO aggregate (id) VALUES ($1)", aggregateID(n)); err != nil {
			return fmt.Errorf("create aggregate %d: %w", n, err)
		}
	}
	return nil
}

func aggregateID(n int) string { return fmt.Sprintf("order-%d", n) }

// Committed reads what the service committed. It fails when the database's own rows contradict each other.
func Committed(ctx context.Context, dsn string) ([]history.Event, error) {
	conn, err := pgx.Connect(ctx, dsn)
	if err != nil {
		return nil, fmt.Errorf("read what was committed: %w", err)
	}
	defer conn.Close(ctx)
	rows, err := conn.Query(ctx, "SELECT event_id, aggregate, version, topic, key, payload, header FROM noted")
	if err != nil {
		return nil, fmt.Errorf("read what was committed: %w", err)
	}
	events, err := pgx.CollectRows(rows, func(row pgx.CollectableRow) (history.Event, error) {
		var (
			e      history.Event
			id     [16]byte
			digest []byte
			note   string
		)
		err := row.Scan(&id, &e.Aggregate, &e.Version, &e.Topic, &e.Key, &digest, &note)
		e.ID = uuid.UUID(id)
		copy(e.Payload[:], digest)
		e.Headers = []history.Header{{Name: headerName, Value: note}}
		return e, err
	})
	if err != nil {
		return nil, fmt.Errorf("read what was committed: %w", err)
	}
	var counted int
	if err := conn.QueryRow(ctx, "SELECT coalesce(sum(version), 0) FROM aggregate").Scan(&counted); err != nil {
		return nil, fmt.Errorf("read the aggregates: %w", err)
	}
	if counted != len(events) {
		return nil, fmt.Errorf("the aggregates count %d events, %d are noted", counted, len(events))
	}
	return events, nil
}

// Undelivered counts the requests that the SDK kept in the service's database because the platform could not be reached.
func Undelivered(ctx context.Context, dsn string) (int, error) {
	conn, err := pgx.Connect(ctx, dsn)
	if err != nil {
		return 0, fmt.Errorf("count spilled requests: %w", err)
	}
	defer conn.Close(ctx)
	var n int
	if err := conn.QueryRow(ctx, "SELECT count(*) FROM outbox_marker WHERE spilled IS NOT NULL").Scan(&n); err != nil {
		return 0, fmt.Errorf("count spilled requests: %w", err)
	}
	return n, nil
}
