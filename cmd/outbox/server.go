package main

import (
	"context"
	"errors"
	"log/slog"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/outbox-platform/outbox/relay"
	"github.com/outbox-platform/outbox/relay/kafka"
	"github.com/outbox-platform/outbox/server"
	"github.com/outbox-platform/outbox/server/resolver"
	"github.com/outbox-platform/outbox/store"
)

// serverSettings are the settings of a server process beside store and log.
type serverSettings struct {
	Server   server.Config   `embed:"" prefix:"server-" group:"server"`
	Writer   writerSettings  `embed:"" prefix:"writer-" group:"writer"`
	Resolver resolver.Config `embed:"" prefix:"resolver-" group:"resolver"`
}

type serverCmd struct {
	WithRelay bool          `help:"Run a relay in this process too. It is told of new events at once."`
	Log       logSettings   `embed:"" prefix:"log-" group:"log"`
	Store     storeSettings `embed:"" prefix:"store-" group:"store"`
	serverSettings
	Kafka kafkaSettings `embed:"" prefix:"kafka-" group:"kafka"`
	relaySettings
}

// Help implements kong.HelpProvider.
func (*serverCmd) Help() string {
	return `Servers keep nothing but what the store holds: run any number. SIGTERM drains: health says NOT_SERVING, sessions are
asked to move, calls under way are answered, within --server-drain-timeout.
A store that is away at the start is waited for. The Kafka and relay settings are for --with-relay.

Examples:
  outbox server -c /etc/outbox.yaml
  OUTBOX_STORE_DSN=postgres://outbox@db/outbox outbox server --server-grpc-listen :7070 --server-tokens-file tokens.yaml
  outbox server --with-relay --kafka-brokers kafka:9092

` + exitCodesHelp
}

// Run serves until a signal, then drains.
func (c *serverCmd) Run(ctx context.Context, s streams) error {
	log := c.Log.logger(s.err)
	p, err := newPlatform(ctx, c.Store, log)
	if err != nil {
		return err
	}
	defer p.close()
	if c.WithRelay {
		if err := p.addRelay(ctx, c.Kafka, c.relaySettings); err != nil {
			return err
		}
	}
	if err := p.addServer(c.serverSettings); err != nil {
		return err
	}
	return p.run(ctx)
}

// platform is a server, a relay or both over one store.
type platform struct {
	log      *slog.Logger
	registry *prometheus.Registry
	store    *store.Store
	writer   *store.Writer
	server   *server.Server
	resolver *resolver.Resolver
	relay    *relay.Relay
	sink     *kafka.Sink
	admin    *adminPort
}

// newPlatform opens the store, and waits for it.
func newPlatform(ctx context.Context, settings storeSettings, log *slog.Logger) (*platform, error) {
	config, err := settings.config("outbox")
	if err != nil {
		return nil, err
	}
	st, err := openStore(ctx, config, log)
	if err != nil {
		return nil, err
	}
	return &platform{log: log, registry: newRegistry(), store: st}, nil
}

// addServer makes a server with its resolver; a relay that was added before is told of new events.
func (p *platform) addServer(settings serverSettings) error {
	if err := settings.Server.Validate(); err != nil {
		return usagef("server: %w", err)
	}
	if err := settings.Resolver.Validate(); err != nil {
		return usagef("resolver: %w", err)
	}
	config, err := settings.Writer.config()
	if err != nil {
		return err
	}
	if config.OnBatch, err = server.WriterHooks(p.registry); err != nil {
		return err
	}
	if p.relay != nil {
		config.OnDecided = p.relay.Hint
	}
	p.writer = store.NewWriter(p.store, config)
	if p.server, err = server.New(settings.Server, p.store, p.writer, p.log, p.registry); err != nil {
		return err
	}
	p.resolver, err = resolver.New(settings.Resolver, p.store, p.writer, p.server.Sessions(), p.log, p.registry)
	if err != nil {
		return err
	}
	p.server.UseResolver(p.resolver)
	return nil
}

// run works until ctx ends. Then the server drains while writer and relay go on, the relay finishes what it delivers, and
// the writer ends last.
func (p *platform) run(ctx context.Context) error {
	p.log.Info("starting", "version", version, "shards", p.store.ShardCount(), "server", p.server != nil, "relay", p.relay != nil)
	g := newGroup(ctx)
	stopWriter := func() error { return nil }
	if p.writer != nil {
		stopWriter = g.detached("writer", p.writer.Run)
		g.run("server", p.server.Serve)
		g.run("resolver", p.resolver.Run)
	}
	if p.relay != nil {
		g.run("relay", p.relay.Run)
	}
	if p.admin != nil {
		g.run("HTTP port", p.admin.serve)
	}
	err := errors.Join(g.wait(), stopWriter())
	if err == nil {
		p.log.Info("stopped")
	}
	return err
}

// close ends what was opened; what the producer still has queued is dropped after a while: the store has it.
func (p *platform) close() {
	if p.sink != nil {
		ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
		defer cancel()
		if err := p.sink.Close(ctx); err != nil {
			p.log.Warn("closing the Kafka producer", "error", err)
		}
	}
	p.store.Close()
}
