package main

import (
	"context"
	"fmt"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/outbox-platform/outbox/test/robustness/driver"
)

// mutant is a fault that is put in on purpose, with the conditions under which it must show.
type mutant struct {
	name, what string
	faults     []string
	profiles   map[string]int
	lagging    bool
	retention  time.Duration // of the log
	seconds    int
}

// simple is a mix without what takes long.
var simple = map[string]int{driver.Plain: 80, driver.Forget: 10, driver.Undo: 5, driver.Sync: 2, driver.Duplicate: 3}

// mutants are those of reliability.md; internal/fault says where they are.
var mutants = []mutant{
	{name: "M1", what: "the resolver believes pg_xact_status", faults: []string{"source-crash-xid-reuse"}, profiles: simple, seconds: 10},
	{name: "M2", what: "a transaction that runs for long is aborted", faults: []string{"pause-driver"}, profiles: map[string]int{driver.Plain: 90, driver.Long: 5, driver.TwoPhase: 5}, seconds: 6},
	{name: "M3", what: "published before Kafka acknowledged it", faults: []string{"kill-relay-with-records-under-way"}, profiles: simple, seconds: 6},
	{name: "M4", what: "a checkpoint is written whatever its epoch", faults: []string{"pause-relay-beyond-lease"}, profiles: simple, seconds: 10},
	{name: "M5", what: "an event that Kafka refuses is skipped", faults: []string{"broker-record-error"}, profiles: simple, seconds: 8},
	{name: "M6", what: "published in the order of Commits", faults: []string{"pause-driver"}, profiles: map[string]int{driver.Plain: 60, driver.Late: 20, driver.Forget: 20}, seconds: 6},
	{name: "M7", what: "Prepare is acknowledged before it is flushed", faults: []string{"store-kill"}, profiles: simple, seconds: 6},
	{name: "M8", what: "another partitioner than Java's", faults: []string{"pause-driver"}, profiles: simple, seconds: 4},
	{name: "M9", what: "events may be prepared inside a savepoint", faults: []string{"pause-driver"}, profiles: map[string]int{driver.Plain: 80, driver.Misused: 20}, seconds: 4},
	{name: "M10", what: "the log is truncated before it was published", faults: []string{"broker-pause-long-and-kill-relays"}, profiles: simple, seconds: 12, retention: 6 * time.Second},
	{name: "M11", what: "a call that is repeated is a new one", faults: []string{"pause-driver"}, profiles: map[string]int{driver.Plain: 80, driver.Direct: 20}, seconds: 4},
	{name: "M12", what: "the resolver asks a standby", faults: []string{"kill-driver"}, profiles: map[string]int{driver.Plain: 70, driver.Forget: 30}, lagging: true, seconds: 6},
}

type mutantsCmd struct {
	Program string        `required:"" type:"existingfile" help:"The outbox binary, built with -tags failpoints,mutant, as this one must be."`
	Only    []string      `help:"Only these."`
	Seed    uint64        `default:"1" help:"Of workload and faults."`
	Budget  time.Duration `default:"90s" help:"How long a mutant may live."`
	Readme  string        `help:"Write the table into this file, between the lines mutants:begin and mutants:end."`
	Out     string        `default:"bin/robustness-results" help:"Where the results go."`
}

// Run tries each mutant until it is caught or its time is up.
func (c *mutantsCmd) Run(ctx context.Context) error {
	var table strings.Builder
	table.WriteString("| mutant | what is wrong | caught by | seconds |\n|---|---|---|---|\n")
	alive := 0
	for _, m := range mutants {
		if len(c.Only) > 0 && !slices.Contains(c.Only, m.name) {
			continue
		}
		by, took, err := c.hunt(ctx, m)
		if err != nil {
			return fmt.Errorf("%s: %w", m.name, err)
		}
		if by == "" {
			alive++
			by = "**nobody**"
		}
		say("%s (%s): caught by %s in %.0f s", m.name, m.what, by, took.Seconds())
		fmt.Fprintf(&table, "| %s | %s | %s | %.0f |\n", m.name, m.what, by, took.Seconds())
	}
	if c.Readme != "" {
		if err := writeTable(c.Readme, table.String()); err != nil {
			return err
		}
	}
	if err := printLast(map[string]any{"mutants": len(mutants), "alive": alive}); err != nil {
		return err
	}
	if alive > 0 {
		return errNotValid
	}
	return nil
}

// hunt returns the invariants that a mutant broke, and how long it took to notice.
func (c *mutantsCmd) hunt(ctx context.Context, m mutant) (by string, took time.Duration, err error) {
	begun := time.Now()
	for round := range uint64(4) {
		run := runCmd{
			Length: time.Duration(m.seconds) * time.Second, Seed: 2*(c.Seed+round) + 1, Program: c.Program, Rate: 240, Workers: 6, Aggregates: 40, Hot: 100,
			Faults: m.faults, Out: c.Out, Patience: 6 * time.Second, mutant: m.name, profiles: m.profiles, lagging: m.lagging, retention: m.retention, small: true, quiet: true,
		}
		v, err := run.once(ctx)
		if err != nil && v.Verdict != "invalid" {
			return "", 0, err
		}
		if v.Verdict == "invalid" {
			var names []string
			for _, violation := range v.Violations {
				names = append(names, violation.Invariant)
			}
			return strings.Join(names, ", "), time.Since(begun), nil
		}
		if time.Since(begun) > c.Budget {
			break
		}
	}
	return "", time.Since(begun), nil
}

// writeTable replaces what is between the marks.
func writeTable(path, table string) error {
	content, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	const begin, end = "<!-- mutants:begin -->\n", "<!-- mutants:end -->"
	before, rest, ok1 := strings.Cut(string(content), begin)
	_, after, ok2 := strings.Cut(rest, end)
	if !ok1 || !ok2 {
		return fmt.Errorf("%s has no marks for the table", path)
	}
	return os.WriteFile(path, []byte(before+begin+table+end+after), 0o644) //nolint:gosec // it is in the repository
}
