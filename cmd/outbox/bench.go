package main

import (
	"context"
	"errors"

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

The workload kill prints one result per step of the protocol and way of finding out: services killed there, the time from
their death to the decision, and how often it contradicted the source database, which must be never. --concurrency,
--duration and the options of load do not apply to it.

Examples:
  outbox bench --workload events --concurrency 256 -o json
  outbox bench --workload orders --target naive --concurrency 16,64
  outbox bench --workload orders --concurrency 64 --transactions 100000
  outbox bench --workload kill --runs 200 -o json

` + exitCodesHelp
}

// Run measures.
func (c *benchCmd) Run(ctx context.Context, s streams) error {
	err := c.Cmd.Run(ctx, s.out, s.err, c.json())
	if errors.Is(err, bench.ErrWrong) {
		return codedError{exitViolation, err}
	}
	return err
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

// benchVictimCmd is a service that the bench starts to die.
type benchVictimCmd struct{ bench.VictimCmd }

// Run lives until it dies.
func (c *benchVictimCmd) Run(ctx context.Context, s streams) error {
	return c.VictimCmd.Run(ctx, s.in, s.out)
}
