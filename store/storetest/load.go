package storetest

import (
	"context"
	"errors"
	"testing"
	"time"

	"github.com/google/uuid"

	"github.com/outbox-platform/outbox/store"
)

// Writer runs a writer on the database's store until the test ends.
func (d *Database) Writer(t testing.TB, cfg store.WriterConfig) *store.Writer {
	t.Helper()
	w := store.NewWriter(d.Store, cfg)
	ctx, cancel := context.WithCancel(context.WithoutCancel(t.Context()))
	done := make(chan error, 1)
	go func() { done <- w.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		select {
		case err := <-done:
			if err != nil && !errors.Is(err, context.Canceled) {
				t.Error("storetest: the writer ended with", err)
			}
		case <-time.After(stopTimeout):
			t.Error("storetest: the writer did not end")
		}
	})
	return w
}

// Source registers a source that may use every topic and returns it. Its name is unique within the database only if the
// caller makes it so.
func (d *Database) Source(t testing.TB, name string) *store.Source {
	t.Helper()
	src, _, err := d.Store.ApplySource(t.Context(), store.Source{
		Name: name, Topics: []string{"*"}, RecordProfile: 1, FailurePolicy: 1, CloudEventsSource: "/outbox/" + name,
		Databases: []store.SourceDatabase{{Name: "default", Mode: store.ModeMarker}},
	}, "storetest", "test")
	if err != nil {
		t.Fatal("storetest: registering a source:", err)
	}
	return src
}

// Key returns a new transaction id of a source.
func Key(source int32) store.Key {
	return store.Key{Source: source, Transaction: store.TransactionID(uuid.Must(uuid.NewV7()))}
}

// Event returns an event with a new id.
func Event(topic, aggregateType, aggregateID, payload string) store.Event {
	return store.Event{
		ID: uuid.Must(uuid.NewV7()), Topic: topic, AggregateType: aggregateType, AggregateID: aggregateID,
		Type: aggregateType + ".changed", ContentType: "application/json", Payload: []byte(payload),
		Headers: []store.Header{{Name: "traceparent", Value: []byte("00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01")}},
	}
}

// DatabaseTransaction returns what a Prepare of a source database in mode MARKER carries.
func DatabaseTransaction(xid uint64) *store.DatabaseTransaction {
	return &store.DatabaseTransaction{
		Database: "default", XID: xid, SystemIdentifier: 7_000_000_000_000_000_001, Timeline: 1, DatabaseOID: 16384,
		MarkerOID: 16385, Mode: store.ModeMarker,
	}
}
