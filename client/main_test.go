package client_test

import (
	"context"
	"sync"
	"testing"
	"time"

	"github.com/google/uuid"
	"go.uber.org/goleak"

	"github.com/outbox-platform/outbox/client"
	"github.com/outbox-platform/outbox/client/internal/fakeplatform"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// newClient returns a client of the platform that is closed with the test. change may be nil.
func newClient(tb testing.TB, p *fakeplatform.Platform, change func(*client.Config)) *client.Client {
	tb.Helper()
	cfg := client.Config{Target: p.Addr(), Source: "orders", Plaintext: true}
	if change != nil {
		change(&cfg)
	}
	c, err := client.New(cfg)
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() { c.Close() })
	return c
}

func connected(tb testing.TB, c *client.Client) {
	tb.Helper()
	ctx, cancel := context.WithTimeout(tb.Context(), 10*time.Second)
	defer cancel()
	if err := c.Connect(ctx); err != nil {
		tb.Fatal(err)
	}
}

func event(aggregate, payload string) client.Event {
	return client.Event{
		Topic: "orders", AggregateType: "order", AggregateID: aggregate, Type: "order.placed.v1",
		Payload: []byte(payload), ContentType: "text/plain",
	}
}

func prepare(tb testing.TB, c *client.Client, aggregate, payload string) (uuid.UUID, []byte) {
	tb.Helper()
	id := client.NewID()
	token, err := c.Prepare(tb.Context(), id, client.DatabaseTransaction{XID: 7}, event(aggregate, payload))
	if err != nil {
		tb.Fatal(err)
	}
	return id, token
}

// alarms collects alarms.
type alarms struct {
	mu  sync.Mutex
	all []client.Alarm
}

func (a *alarms) add(x client.Alarm) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.all = append(a.all, x)
}

func (a *alarms) kinds() []client.AlarmKind {
	a.mu.Lock()
	defer a.mu.Unlock()
	var out []client.AlarmKind
	for _, x := range a.all {
		out = append(out, x.Kind)
	}
	return out
}
