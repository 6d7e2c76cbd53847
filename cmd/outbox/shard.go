package main

import (
	"context"
	"fmt"
	"time"

	outboxv1 "github.com/outbox-platform/outbox/gen/go/outbox/v1"
)

type shardCmd struct {
	List shardListCmd `cmd:"" help:"List all shards: holder, epoch, checkpoint, lag and age."`
}

type shardListCmd struct {
	outputSettings
	API apiSettings `embed:"" group:"api"`
}

// Help implements kong.HelpProvider.
func (*shardListCmd) Help() string {
	return `A shard without holder is published by nobody: is a relay running? OLDEST is the age of the oldest segment behind the
checkpoint: alarm on it, not on LAG.`
}

// Run lists the shards.
func (c *shardListCmd) Run(ctx context.Context, s streams) error {
	server, err := c.API.dial()
	if err != nil {
		return err
	}
	defer server.close()
	ctx, cancel := server.call(ctx)
	defer cancel()
	r, err := server.admin.ListShards(ctx, &outboxv1.ListShardsRequest{})
	if err != nil {
		return err
	}
	if c.json() {
		return writeMessage(s.out, r)
	}
	rows := make([][]string, 0, len(r.GetShards()))
	for _, shard := range r.GetShards() {
		rows = append(rows, []string{
			fmt.Sprint(shard.GetShard()), dash(shard.GetHolder()), fmt.Sprint(shard.GetEpoch()), timeText(shard.GetLeaseUntil()),
			shard.GetCheckpoint(), fmt.Sprint(shard.GetLagSegments()),
			ageText(time.Duration(shard.GetOldestAgeSeconds() * float64(time.Second))), fmt.Sprint(shard.GetParked()),
		})
	}
	return table(s.out, "SHARD | HOLDER | EPOCH | LEASE UNTIL | CHECKPOINT | LAG | OLDEST | PARKED", rows)
}
