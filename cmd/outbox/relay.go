package main

import (
	"context"
	"fmt"
	"os"
	"time"

	"github.com/google/uuid"

	"github.com/outbox-platform/outbox/relay"
	"github.com/outbox-platform/outbox/relay/kafka"
)

// relaySettings are the settings of a relay process beside store, Kafka and log.
type relaySettings struct {
	Relay relayFlags `embed:"" prefix:"relay-" group:"relay"`
}

type relayFlags struct {
	HTTPListen          string        `name:"http-listen" default:"127.0.0.1:7072" help:"Address of the HTTP port of a relay process: /metrics, /healthz, /readyz. Empty: none."`
	Instance            string        `name:"instance" help:"Name of this relay, unique among all. Default: host name, process id and a random part."`
	LeaseTTL            time.Duration `name:"lease-ttl" default:"5s" help:"How long a shard stays with a relay that does not renew its lease: the longest pause when a machine dies. At most 1m."`
	RenewEvery          time.Duration `name:"renew-every" default:"1s" help:"How often leases are renewed."`
	CheckpointEvery     time.Duration `name:"checkpoint-every" default:"50ms" help:"Least time between two checkpoints of a shard."`
	ParkAfter           time.Duration `name:"park-after" default:"500ms" help:"How long an undecided head stays in memory before it is parked."`
	ParkFollowerAfter   time.Duration `name:"park-follower-after" default:"50ms" help:"The same when a later event waits behind it."`
	MemoryBytes         int64         `name:"memory-bytes" default:"67108864" help:"Bytes of the log kept in memory; beyond it reading waits."`
	MaxUnacked          int           `name:"max-unacked" default:"10000" help:"Records handed to Kafka and not acknowledged yet."`
	PollMin             time.Duration `name:"poll-min" default:"1ms" help:"Least pause between two reads when there is little to read."`
	PollMax             time.Duration `name:"poll-max" default:"20ms" help:"Longest pause between two reads; a hint of a server in the same process ends it."`
	RetryMin            time.Duration `name:"retry-min" default:"100ms" help:"First pause before a topic or the cluster is tried again; doubles."`
	RetryMax            time.Duration `name:"retry-max" default:"10s" help:"Longest such pause."`
	OperationsEvery     time.Duration `name:"operations-every" default:"250ms" help:"How often operators' requests are looked for."`
	SourcesEvery        time.Duration `name:"sources-every" default:"5s" help:"How often the sources are read again."`
	TopicsEvery         time.Duration `name:"topics-every" default:"30s" help:"How often the topic catalogue is written."`
	DrainTimeout        time.Duration `name:"drain-timeout" default:"5s" help:"How long a relay that stops, or gives a shard up, waits for acknowledgements."`
	TakeoverTailLimit   int           `name:"takeover-tail-limit" default:"200000" help:"Records read at a takeover to find those that the last holder delivered."`
	TakeoverTailTimeout time.Duration `name:"takeover-tail-timeout" default:"10s" help:"The same in time; what is not found is delivered again."`
}

func (f relayFlags) config() (relay.Config, error) {
	if f.Instance == "" {
		host, err := os.Hostname()
		if err != nil {
			return relay.Config{}, fmt.Errorf("asking for the host's name: %w", err)
		}
		f.Instance = fmt.Sprintf("%s-%d-%s", host, os.Getpid(), uuid.NewString()[:8])
	}
	// relay.New takes zero for "default": here zero is what somebody wrote.
	for _, d := range []struct {
		name  string
		value int64
	}{
		{"lease-ttl", int64(f.LeaseTTL)}, {"renew-every", int64(f.RenewEvery)}, {"checkpoint-every", int64(f.CheckpointEvery)},
		{"park-after", int64(f.ParkAfter)}, {"park-follower-after", int64(f.ParkFollowerAfter)}, {"memory-bytes", f.MemoryBytes},
		{"max-unacked", int64(f.MaxUnacked)}, {"poll-min", int64(f.PollMin)}, {"poll-max", int64(f.PollMax)},
		{"retry-min", int64(f.RetryMin)}, {"retry-max", int64(f.RetryMax)}, {"operations-every", int64(f.OperationsEvery)},
		{"sources-every", int64(f.SourcesEvery)}, {"topics-every", int64(f.TopicsEvery)}, {"drain-timeout", int64(f.DrainTimeout)},
		{"takeover-tail-limit", int64(f.TakeoverTailLimit)}, {"takeover-tail-timeout", int64(f.TakeoverTailTimeout)},
	} {
		if d.value <= 0 {
			return relay.Config{}, usagef("relay-%s must be positive: %d", d.name, d.value)
		}
	}
	return relay.Config{
		Instance: f.Instance, LeaseTTL: f.LeaseTTL, RenewEvery: f.RenewEvery, CheckpointEvery: f.CheckpointEvery,
		ParkAfter: f.ParkAfter, ParkFollowerAfter: f.ParkFollowerAfter, MemoryBytes: f.MemoryBytes, MaxUnacked: f.MaxUnacked,
		PollMin: f.PollMin, PollMax: f.PollMax, RetryMin: f.RetryMin, RetryMax: f.RetryMax, OperationsEvery: f.OperationsEvery,
		SourcesEvery: f.SourcesEvery, TopicsEvery: f.TopicsEvery, DrainTimeout: f.DrainTimeout,
		TakeoverTailLimit: f.TakeoverTailLimit, TakeoverTailTimeout: f.TakeoverTailTimeout,
	}, nil
}

type relayCmd struct {
	Log   logSettings   `embed:"" prefix:"log-" group:"log"`
	Store storeSettings `embed:"" prefix:"store-" group:"store"`
	Kafka kafkaSettings `embed:"" prefix:"kafka-" group:"kafka"`
	relaySettings
}

// Help implements kong.HelpProvider.
func (*relayCmd) Help() string {
	return `Relays share the shards among them: run any number, two at least for high availability. SIGTERM gives the shards back once
what was handed to Kafka is acknowledged, so that others go on at once.

Examples:
  outbox relay -c /etc/outbox.yaml
  outbox relay --store-dsn postgres://outbox@db/outbox --kafka-brokers kafka-1:9092,kafka-2:9092

` + exitCodesHelp
}

// Run relays until a signal, then gives the shards back.
func (c *relayCmd) Run(ctx context.Context, s streams) error {
	p, err := newPlatform(ctx, c.Store, c.Log.logger(s.err))
	if err != nil {
		return err
	}
	defer p.close()
	if err := p.addRelay(ctx, c.Kafka, c.relaySettings); err != nil {
		return err
	}
	if c.Relay.HTTPListen != "" {
		if err := p.addAdminPort(ctx, c.Relay.HTTPListen); err != nil {
			return err
		}
	}
	return p.run(ctx)
}

// addRelay makes a relay with its producer.
func (p *platform) addRelay(ctx context.Context, settings kafkaSettings, flags relaySettings) error {
	config, err := flags.Relay.config()
	if err != nil {
		return err
	}
	sinkConfig, err := settings.config(p.log, p.registry)
	if err != nil {
		return err
	}
	if p.sink, err = kafka.New(ctx, sinkConfig); err != nil {
		return fmt.Errorf("making the Kafka producer: %w", err)
	}
	p.relay, err = relay.New(config, p.store, p.sink, p.log, p.registry)
	return err
}

// addAdminPort opens the HTTP port of a relay that has no server beside it.
func (p *platform) addAdminPort(ctx context.Context, address string) (err error) {
	p.admin, err = openAdminPort(ctx, address, p.registry, p.log, func(ctx context.Context) error {
		if err := p.store.Ping(ctx); err != nil {
			return fmt.Errorf("store: %w", err)
		}
		if healthy, why := p.sink.Healthy(); !healthy {
			return fmt.Errorf("the Kafka cluster: %s", why)
		}
		return nil
	})
	return err
}
