package bench

import (
	"context"
	"fmt"
	"time"

	"github.com/twmb/franz-go/pkg/kgo"
)

// consume reads all partitions of the topic from the beginning and notes each record in the ledger, until ctx ends. It is
// a foreign client (franz-go), so that what is measured is what anybody would see.
func consume(ctx context.Context, brokers []string, topic string, l *ledger) error {
	return consumeEach(ctx, brokers, topic, l.arrived)
}

// consumeEach calls arrived for each record.
func consumeEach(ctx context.Context, brokers []string, topic string, arrived func(number uint64, aggregate uint32, version uint64, at time.Time)) error {
	cl, err := kgo.NewClient(kgo.SeedBrokers(brokers...), kgo.ConsumeTopics(topic),
		kgo.ConsumeResetOffset(kgo.NewOffset().AtStart()), kgo.FetchMaxWait(500*time.Millisecond), kgo.FetchMinBytes(1))
	if err != nil {
		return fmt.Errorf("opening the consumer: %w", err)
	}
	defer cl.Close()
	for {
		fetches := cl.PollFetches(ctx)
		if ctx.Err() != nil {
			return nil
		}
		var failed error
		fetches.EachError(func(_ string, p int32, err error) { failed = fmt.Errorf("consuming partition %d: %w", p, err) })
		if failed != nil {
			return failed
		}
		now := time.Now()
		fetches.EachRecord(func(r *kgo.Record) {
			if n, aggregate, version, ok := readPayload(r.Value); ok {
				arrived(n, aggregate, version, now)
			}
		})
	}
}
