package system_test

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/outbox-platform/outbox/client"
	"github.com/outbox-platform/outbox/client/pgxoutbox"
	"github.com/outbox-platform/outbox/embedded/kafka"
)

// forgetful are the settings under which transactions that nobody keeps are forgotten after half a second.
var forgetful = []string{"OUTBOX_SERVER_TX_RETENTION=500ms", "OUTBOX_SERVER_MAINTENANCE_INTERVAL=50ms"}

// TestSpilledRequestComesAgain: a spilled request is published, the OK is lost with the process that drained it, and another one
// finds the row when the platform has long forgotten what is not kept. Kafka has the event once.
func TestSpilledRequestComesAgain(t *testing.T) {
	const topic = "spilled-again"
	b := newFakeBroker(t)
	p := deploy(t, deployment{servers: 1, relays: 1, broker: b, lease: steadyTTL, env: forgetful})
	if err := b.CreateTopic(t.Context(), topic, 1, nil); err != nil {
		t.Fatal(err)
	}
	database := startPostgres(t, "")
	dsn, err := database.CreateDatabase(t.Context(), "shop")
	if err != nil {
		t.Fatal(err)
	}
	pool, err := pgxpool.New(t.Context(), dsn)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(pool.Close)
	exec := func(sql string, args ...any) {
		t.Helper()
		if _, err := pool.Exec(t.Context(), sql, args...); err != nil {
			t.Fatal(err)
		}
	}
	exec(client.MarkerDDL)

	event := func(payload string) client.Event {
		return client.Event{Topic: topic, AggregateType: "order", AggregateID: "1", Type: "order.changed.v1", Payload: []byte(payload)}
	}
	sdk := p.client(t, sourceName)
	request, err := sdk.Encode(t.Context(), client.NewID(), client.DatabaseTransaction{}, event("spilled"))
	if err != nil {
		t.Fatal(err)
	}
	exec("INSERT INTO outbox_marker (id, spilled) VALUES ($1, $2)", request.ID(), request.Bytes())
	drain := func(sdk *client.Client) {
		t.Helper()
		if err := pgxoutbox.Register(sdk, "", pool, pgxoutbox.Upkeep{DrainInterval: 20 * time.Millisecond}); err != nil {
			t.Fatal(err)
		}
		eventually(t, startLimit, "the spilled request to be drained", func() (bool, string) {
			var left int
			if err := pool.QueryRow(t.Context(), "SELECT count(*) FROM outbox_marker WHERE spilled IS NOT NULL").Scan(&left); err != nil {
				t.Fatal(err)
			}
			return left == 0, fmt.Sprintf("%d are left", left)
		})
	}
	drain(sdk)
	_ = sdk.Close() // always nil
	exec("UPDATE outbox_marker SET spilled = $2 WHERE id = $1", request.ID(), request.Bytes())

	other := p.client(t, sourceName)
	ordinary := client.NewID()
	if err := other.Publish(t.Context(), ordinary, event("not kept")); err != nil {
		t.Fatal(err)
	}
	eventually(t, startLimit, "what is not kept to be forgotten", func() (bool, string) {
		tx, err := other.GetTransaction(t.Context(), ordinary)
		return client.IsUnknownTransaction(err), fmt.Sprintf("%+v, %v", tx, err)
	})
	drain(other)
	if err := other.Publish(t.Context(), client.NewID(), event("last")); err != nil {
		t.Fatal(err)
	}

	ctx, cancel := context.WithTimeout(t.Context(), startLimit)
	defer cancel()
	records, err := kafka.ReadUntil(ctx, b.Bootstrap(), func(read []kafka.Record) bool {
		return slices.ContainsFunc(read, func(r kafka.Record) bool { return string(r.Value) == "last" })
	}, topic)
	if err != nil {
		t.Fatal(err)
	}
	var values []string
	times := 0
	for _, r := range records {
		values = append(values, string(r.Value))
		if string(r.Value) == "spilled" {
			times++
		}
	}
	if times != 1 {
		t.Errorf("it is on the topic %d times: %s", times, strings.Join(values, ", "))
	}
	p.verify()
}
