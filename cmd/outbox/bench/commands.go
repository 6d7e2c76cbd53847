package bench

import (
	"context"
	"fmt"

	"github.com/outbox-platform/outbox/embedded/kafka"
)

// BrokerCmd is the fake broker as a process of its own, so that its CPU time is counted apart. The bench starts it.
type BrokerCmd struct {
	Port int `help:"Port on 127.0.0.1." required:""`
}

// Run serves until ctx ends.
func (c *BrokerCmd) Run(ctx context.Context) error {
	fake, err := kafka.StartFake(kafka.FakeConfig{Port: c.Port})
	if err != nil {
		return fmt.Errorf("starting the broker: %w", err)
	}
	<-ctx.Done()
	fake.Close()
	return nil
}
