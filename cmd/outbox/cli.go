package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strings"

	"github.com/alecthomas/kong"

	"github.com/outbox-platform/outbox/cmd/outbox/bench"
)

// cli is the command line. Every setting of a process has one name: the key relay.lease-ttl of the configuration file is
// the flag --relay-lease-ttl and the environment variable OUTBOX_RELAY_LEASE_TTL.
type cli struct {
	Config configPath `short:"c" placeholder:"FILE" help:"Configuration file (YAML). Flags go before environment variables, those before the file."`

	Dev         devCmd         `cmd:"" group:"run" help:"Run everything on this machine, with a demo source."`
	Server      serverCmd      `cmd:"" group:"run" help:"Run a server: the API that sources call."`
	Relay       relayCmd       `cmd:"" group:"run" help:"Run a relay: it moves committed events to Kafka."`
	Migrate     migrateCmd     `cmd:"" group:"run" help:"Make or change the store's schema."`
	Conf        configCmd      `cmd:"" name:"config" group:"run" help:"Print the effective configuration, secrets masked."`
	Source      sourceCmd      `cmd:"" group:"operate" help:"Register services and say what they may do."`
	Transaction transactionCmd `cmd:"" group:"operate" help:"Where a transaction is now, and why."`
	Shard       shardCmd       `cmd:"" group:"operate" help:"Who publishes what, and how far they are."`
	Aggregate   aggregateCmd   `cmd:"" group:"operate" help:"Aggregates that cannot go on by themselves."`
	Deadletter  deadletterCmd  `cmd:"" group:"operate" help:"Events that were set aside after a permanent failure."`
	Verify      verifyCmd      `cmd:"" group:"operate" help:"Check every invariant of the stored state."`
	Import      importCmd      `cmd:"" group:"operate" help:"Take over, once, what a service's own outbox table holds unpublished."`
	Doctor      doctorCmd      `cmd:"" group:"operate" help:"Which modes are safe on a source database, and why."`
	MarkerDDL   markerDDLCmd   `cmd:"" name:"marker-ddl" group:"other" help:"Print the marker table of a source database."`
	Bench       benchCmd       `cmd:"" group:"other" help:"Measure against what a team would write instead."`
	Completion  completionCmd  `cmd:"" group:"other" help:"Print a completion script for your shell."`
	Version     versionCmd     `cmd:"" group:"other" help:"Print the version."`
	Complete    completeCmd    `cmd:"" name:"__complete" hidden:""`

	BenchBroker     bench.BrokerCmd    `cmd:"" name:"bench-broker" hidden:""`
	BenchNaiveRelay benchNaiveRelayCmd `cmd:"" name:"bench-naive-relay" hidden:""`
	BenchVictim     benchVictimCmd     `cmd:"" name:"bench-victim" hidden:""`
}

// streams are where a command reads and writes.
type streams struct {
	in       io.Reader
	out, err io.Writer
}

const description = `A transactional outbox for every team: events reach Kafka if and only if the database transaction that
made them committed, in order per aggregate.`

// newParser builds the command line into c. exit is called by --help.
func newParser(c *cli, s streams, exit func(int)) (*kong.Kong, error) {
	return kong.New(c,
		kong.Name("outbox"),
		kong.Description(description),
		kong.Writers(s.out, s.err),
		kong.Exit(exit),
		kong.NamedMapper("path", kong.MapperFunc(decodePath)),
		kong.PostBuild(func(k *kong.Kong) error { nameVariables(k.Model.Node); return nil }),
		kong.ShortUsageOnError(),
		kong.ConfigureHelp(kong.HelpOptions{Compact: true, NoExpandSubcommands: true, WrapUpperBound: 110}),
		kong.ExplicitGroups([]kong.Group{
			{Key: "run", Title: "Run:"},
			{Key: "operate", Title: "Operate:"},
			{Key: "other", Title: "More:"},
			{Key: "api", Title: "How to reach the server:"},
			{Key: "store", Title: "Store (PostgreSQL):"},
			{Key: "kafka", Title: "Kafka:"},
			{Key: "server", Title: "Server:"},
			{Key: "relay", Title: "Relay:"},
			{Key: "writer", Title: "Group-commit writer:"},
			{Key: "resolver", Title: "Resolver of in-doubt transactions:"},
			{Key: "log", Title: "Log and traces:"},
		}),
	)
}

// errHelp stops the parsing after --help was printed.
var errHelp = errors.New("help printed")

// run is main without the process: it returns the exit code.
func run(ctx context.Context, args []string, in io.Reader, out, errOut io.Writer) (code int) {
	s := streams{in: in, out: out, err: errOut}
	var c cli
	// kong.Exit is called in the middle of parsing and must not return.
	defer func() {
		if r := recover(); r != nil {
			if r != errHelp { //nolint:errorlint // the very value, see below
				panic(r) //nolint:forbidigo // not ours
			}
			code = exitOK
		}
	}()
	parser, err := newParser(&c, s, func(int) { panic(errHelp) }) //nolint:forbidigo // the only way out of kong's help
	if err != nil {
		fmt.Fprintf(errOut, "outbox: the command line is broken: %v\n", err)
		return exitFailure
	}
	parsed, err := parser.Parse(args)
	if err != nil {
		fmt.Fprintf(errOut, "outbox: %v\n", err)
		var p *kong.ParseError
		if errors.As(err, &p) && p.Context != nil {
			fmt.Fprintf(errOut, "See 'outbox %s'.\n", helpOf(p.Context))
		}
		return exitUsage
	}
	parsed.BindTo(ctx, (*context.Context)(nil))
	parsed.Bind(s, &c, parser)
	if err := parsed.Run(); err != nil {
		fmt.Fprintf(errOut, "outbox: %v\n", explain(err))
		return exitCode(err)
	}
	return exitOK
}

func helpOf(ctx *kong.Context) string {
	if command := ctx.Selected(); command != nil {
		return strings.TrimPrefix(command.FullPath(), "outbox ") + " --help"
	}
	return "--help"
}
