package main

import (
	"context"

	"github.com/outbox-platform/outbox/cmd/outbox/bench"
)

type benchCmd struct {
	bench.Cmd
	outputSettings
}

// Help implements kong.HelpProvider.
func (*benchCmd) Help() string {
	return `Starts what is not given by address: PostgreSQL for the source, PostgreSQL for the store, Apache Kafka (Java and Maven
must be there; --broker fake does without), server and relay. Prints one result per concurrency; lost, phantom, reordered
and duplicates must be 0. Progress goes to stderr.

Examples:
  outbox bench --workload events --concurrency 256 -o json
  outbox bench --workload orders --target naive --concurrency 16,64
  outbox bench --workload orders --concurrency 64 --transactions 100000

` + exitCodesHelp
}

// Run measures.
func (c *benchCmd) Run(ctx context.Context, s streams) error {
	return c.Cmd.Run(ctx, s.out, s.err, c.json())
}

// benchNaiveRelayCmd is a process that the bench starts, to count its CPU time apart.
type benchNaiveRelayCmd struct {
	bench.NaiveRelayCmd
	Log logSettings `embed:"" prefix:"log-"`
}

// Run relays until a signal.
func (c *benchNaiveRelayCmd) Run(ctx context.Context, s streams) error {
	return c.NaiveRelayCmd.Run(ctx, c.Log.logger(s.err))
}
