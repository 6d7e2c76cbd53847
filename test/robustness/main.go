package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"strings"
	"syscall"

	"github.com/alecthomas/kong"
	"github.com/rs/zerolog"

	"github.com/outbox-platform/outbox/test/robustness/cluster"
	"github.com/outbox-platform/outbox/test/robustness/driver"
)

type cli struct {
	Run      runCmd      `cmd:"" help:"One run: deploy, work, break, heal, judge. The last line is the verdict as JSON; the exit code is 0 only for valid."`
	Campaign campaignCmd `cmd:"" help:"Many runs, one seed after the other, and their sum."`
	Totals   totalsCmd   `cmd:"" help:"The sum of runs, from their results."`
	Mutants  mutantsCmd  `cmd:"" help:"Put each of the twelve known faults in and see that the suite notices."`
	Driver   roleCmd     `cmd:"" hidden:""`
	Broker   brokerCmd   `cmd:"" hidden:""`
}

type roleCmd struct {
	Config string `arg:""`
}

type brokerCmd struct {
	Config string `arg:""`
}

func (c *roleCmd) Run(ctx context.Context) error   { return driver.Main(ctx, c.Config) }
func (c *brokerCmd) Run(ctx context.Context) error { return cluster.BrokerMain(ctx, c.Config) }

func main() {
	os.Exit(run())
}

func run() int {
	zerolog.SetGlobalLevel(zerolog.Disabled) // toxiproxy traces every toxic
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, syscall.SIGINT)
	defer stop()
	var c cli
	k := kong.Parse(&c, kong.Name("robustness"), kong.Description("Proves the promises of docs/guarantees.md, or finds the run that breaks one."),
		kong.BindTo(ctx, (*context.Context)(nil)))
	err := k.Run()
	if err != nil && !errors.Is(err, errNotValid) {
		fmt.Fprintln(os.Stderr, err)
	}
	if err != nil {
		return 1
	}
	return 0
}

// errNotValid: the verdict was printed, and it is not valid.
var errNotValid = errors.New("not valid")

// say prints a line for a person.
func say(format string, args ...any) { fmt.Fprintf(os.Stderr, format+"\n", args...) }

// printLast prints the last line.
func printLast(v any) error {
	line, err := json.Marshal(v)
	if err != nil {
		return err
	}
	fmt.Println(string(line))
	return nil
}

// revision is the commit that this binary was built from; the Makefile says it.
var revision = "unknown"

// command is the line that does the same again.
func (c *runCmd) command() string {
	parts := []string{"make robustness", fmt.Sprintf("SECONDS=%d SEED=%d", int(c.Length.Seconds()), c.Seed)}
	var flags []string
	if c.Apache > 0 {
		parts = append(parts, fmt.Sprintf("BROKER=apache%d", c.Apache))
	}
	if c.Rate != 300 {
		flags = append(flags, fmt.Sprintf("--rate=%g", c.Rate))
	}
	if c.Workers != defaultWorkers {
		flags = append(flags, fmt.Sprintf("--workers=%d", c.Workers))
	}
	if c.Aggregates != 200 || c.Hot != 100 {
		flags = append(flags, fmt.Sprintf("--aggregates=%d --hot=%d", c.Aggregates, c.Hot))
	}
	if c.Data != "" {
		flags = append(flags, "--data="+c.Data)
	}
	if c.Processors > 0 {
		flags = append(flags, fmt.Sprintf("--processors=%d", c.Processors))
	}
	if c.Python {
		flags = append(flags, "--python")
	}
	if c.Clocks {
		flags = append(flags, "--clocks")
	}
	if c.Transactional {
		flags = append(flags, "--transactional")
	}
	for _, e := range c.Env {
		flags = append(flags, "--env="+e)
	}
	if len(c.Faults) > 0 {
		flags = append(flags, "--faults="+strings.Join(c.Faults, ","))
	}
	if len(flags) > 0 {
		parts = append(parts, fmt.Sprintf("FLAGS=%q", strings.Join(flags, " ")))
	}
	return strings.Join(parts, " ")
}
