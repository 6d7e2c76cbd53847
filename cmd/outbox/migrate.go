package main

import (
	"context"
	"fmt"
	"io"
	"time"

	"github.com/outbox-platform/outbox/migrations"
)

type migrateCmd struct {
	Up     migrateUpCmd     `cmd:"" help:"Bring the schema to this binary's revision. Safe to repeat, and to run while others do."`
	Status migrateStatusCmd `cmd:"" help:"List the migrations and which are applied."`
	Down   migrateDownCmd   `cmd:"" help:"Take the newest migration back. With the first one goes everything stored."`
}

type migrateUpCmd struct {
	Shards int `default:"16" help:"Shards of a store that is made anew, 1 to 64. It can never be changed: it decides where events are found."`
	outputSettings
	Store storeSettings `embed:"" prefix:"store-" group:"store"`
}

// Help implements kong.HelpProvider.
func (*migrateUpCmd) Help() string {
	return `Run it before the new binaries start, or while the old ones run: a binary accepts a range of revisions.

Example:
  OUTBOX_STORE_DSN_FILE=/run/secrets/dsn outbox migrate up`
}

// Run migrates up.
func (c *migrateUpCmd) Run(ctx context.Context, s streams) error {
	if c.Shards < 1 || c.Shards > 64 {
		return usagef("shards must be between 1 and 64: %d", c.Shards)
	}
	dsn, err := c.Store.dsn()
	if err != nil {
		return err
	}
	var steps []migrations.Step
	err = migrations.Up(ctx, dsn, func(step migrations.Step) { steps = append(steps, step) }, migrations.WithShards(c.Shards))
	if c.json() {
		return firstOf(err, writeSteps(s.out, steps, true))
	}
	for _, step := range steps {
		fmt.Fprintf(s.out, "applied %s in %s\n", step.Name, step.Duration.Round(time.Millisecond))
	}
	if err == nil {
		fmt.Fprintf(s.out, "the schema is at revision %d\n", migrations.Revision)
	}
	return err
}

type migrateStatusCmd struct {
	outputSettings
	Store storeSettings `embed:"" prefix:"store-" group:"store"`
}

// Run shows which migrations are applied.
func (c *migrateStatusCmd) Run(ctx context.Context, s streams) error {
	dsn, err := c.Store.dsn()
	if err != nil {
		return err
	}
	steps, err := migrations.Status(ctx, dsn)
	if err != nil {
		return err
	}
	return writeSteps(s.out, steps, c.json())
}

type migrateDownCmd struct {
	Yes bool `help:"Yes, I know what it deletes."`
	outputSettings
	Store storeSettings `embed:"" prefix:"store-" group:"store"`
}

// Run takes the newest migration back.
func (c *migrateDownCmd) Run(ctx context.Context, s streams) error {
	if !c.Yes {
		return usagef("taking a migration back deletes what it made, and with the first one everything stored: repeat with --yes")
	}
	dsn, err := c.Store.dsn()
	if err != nil {
		return err
	}
	var steps []migrations.Step
	err = migrations.Down(ctx, dsn, func(step migrations.Step) { steps = append(steps, step) })
	if c.json() {
		return firstOf(err, writeSteps(s.out, steps, true))
	}
	for _, step := range steps {
		fmt.Fprintf(s.out, "took back %s in %s\n", step.Name, step.Duration.Round(time.Millisecond))
	}
	if err == nil && len(steps) == 0 {
		fmt.Fprintln(s.out, "nothing to take back")
	}
	return err
}

func firstOf(errs ...error) error {
	for _, err := range errs {
		if err != nil {
			return err
		}
	}
	return nil
}

func writeSteps(w io.Writer, steps []migrations.Step, asJSON bool) error {
	if asJSON {
		out := make([]map[string]any, len(steps))
		for i, step := range steps {
			out[i] = map[string]any{"revision": step.Revision, "name": step.Name, "up": step.Up, "applied": nil}
			if !step.AppliedAt.IsZero() {
				out[i]["applied"] = step.AppliedAt.UTC().Format(time.RFC3339)
			}
			if step.Duration > 0 {
				out[i]["seconds"] = step.Duration.Seconds()
			}
		}
		return writeJSON(w, out)
	}
	rows := make([][]string, len(steps))
	for i, step := range steps {
		applied := "pending"
		if !step.AppliedAt.IsZero() {
			applied = step.AppliedAt.UTC().Format(time.RFC3339)
		}
		rows[i] = []string{fmt.Sprint(step.Revision), step.Name, applied}
	}
	return table(w, "REVISION | MIGRATION | APPLIED", rows)
}
