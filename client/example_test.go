package client_test

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/outbox-platform/outbox/client"
	"github.com/outbox-platform/outbox/client/internal/fakeplatform"
)

func Example() {
	var example fakeplatform.Example // a platform for this example
	defer example.End()
	platform := fakeplatform.Start(&example)

	c, err := client.New(client.Config{Target: platform.Addr(), Source: "orders", Plaintext: true})
	if err != nil {
		panic(err)
	}
	defer c.Close()

	// Events that belong to no database transaction. With one, use pgxoutbox.InTx or sqloutbox.InTx.
	err = c.Publish(context.Background(), client.NewID(), client.Event{
		Topic: "orders", AggregateType: "order", AggregateID: "4711", Type: "order.placed.v1",
		Payload: []byte(`{"total": 99}`), ContentType: "application/json",
	})
	fmt.Println(err, platform.Published("4711"))
	// Output: <nil> [{"total": 99}]
}

// Errors say what to do (the Is functions), why (Reason), and where (Fields).
func ExampleError() {
	c, err := client.New(client.Config{Target: "localhost:7070", Source: "orders", Plaintext: true})
	if err != nil {
		panic(err)
	}
	defer c.Close()

	err = c.Publish(context.Background(), client.NewID(), client.Event{
		Topic: "__internal", AggregateType: "order", AggregateID: "4711", Type: "order.placed.v1",
	})
	var e *client.Error
	if client.IsInvalid(err) && errors.As(err, &e) {
		for _, f := range e.Fields {
			fmt.Println(e.Reason, f.Field, f.Description)
		}
	}
	// Output: FIELD_INVALID events[0].topic must not start with "__"
}

// A repeated Publish is safe when it carries the same id and the same content.
func ExampleClient_Publish_again() {
	var example fakeplatform.Example // a platform for this example
	defer example.End()
	platform := fakeplatform.Start(&example)
	c, err := client.New(client.Config{Target: platform.Addr(), Source: "orders", Plaintext: true})
	if err != nil {
		panic(err)
	}
	defer c.Close()

	id := client.NewID()
	event := client.Event{
		ID: client.NewID(), OccurredAt: time.Now(), // set, so that a repetition has the same content
		Topic: "orders", AggregateType: "order", AggregateID: "4711", Type: "order.placed.v1", Payload: []byte("placed"),
	}
	for range 3 {
		if err := c.Publish(context.Background(), id, event); err != nil {
			panic(err)
		}
	}
	fmt.Println(platform.Published("4711"))
	// Output: [placed]
}
