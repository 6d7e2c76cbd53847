package kafka

import (
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"slices"
	"strconv"
	"strings"
	"time"

	ck "github.com/confluentinc/confluent-kafka-go/v2/kafka"
	"github.com/prometheus/client_golang/prometheus"

	"github.com/outbox-platform/outbox/internal/fault"
)

// Config of a Sink. The zero value of every field but Brokers means its default.
type Config struct {
	// Brokers to start from, "host:port". At least one.
	Brokers []string
	// ClientID by which brokers know us in logs and quotas. Default "outbox-relay".
	ClientID string
	// Compression of batches: "none", "lz4", "zstd", "snappy" or "gzip". Default "lz4".
	Compression string
	// Linger is how long a record may wait for company before a batch is sent. Default 0: batches form by themselves while
	// earlier ones are under way. BenchmarkSettings found no CPU or throughput gained by 1 or 2 ms, only the delay added.
	Linger time.Duration
	// MaxQueued is how many deliveries may be queued or reported and not read yet. Default 10,000.
	MaxQueued int
	// MaxQueuedBytes is how much keys, values and headers of what is queued may take. Default 128 MiB.
	MaxQueuedBytes int64
	// MaxMessageBytes is the largest record handed to a broker. It must be at least what the topics allow, so that the topic's
	// own limit decides. Default 10 MiB.
	MaxMessageBytes int
	// MetadataRefresh is how often topics in use are looked up again. Default 10 s.
	MetadataRefresh time.Duration
	// TopicRecheck is how long a topic that was not there is refused without asking the cluster again. Default 1 s.
	TopicRecheck time.Duration
	// StallAfter is how long records may be queued without a single acknowledgement before Healthy says so. Default 10 s.
	StallAfter time.Duration
	// StatsInterval is how often librdkafka's own figures are read. Default 5 s.
	StatsInterval time.Duration
	// Transactional has records written in transactions, by one transactional producer per shard, so that consumers with
	// isolation.level=read_committed never see what a former holder of a shard writes. See transactions.go. Default false.
	Transactional bool
	// TransactionalIDPrefix begins the transactional ids: prefix, "-", number of the shard. All relays of a store must have the
	// same, those of another store that writes to the same cluster another: who has the same id fences the other. Default
	// "outbox".
	TransactionalIDPrefix string
	// TransactionTimeout is how long a transaction may take before the cluster aborts it. When a relay dies and no other takes
	// over, read_committed consumers wait that long for its last transactions to end. Default 10 s.
	TransactionTimeout time.Duration
	// Properties of librdkafka (its CONFIGURATION.md), for TLS, SASL and the like. They may hold secrets and are never
	// logged. Those that carry the promises of this package are refused.
	Properties map[string]string
	// Logger for what librdkafka and this package have to say. Default: discarded.
	Logger *slog.Logger
	// Registerer for metrics. Default: none are registered.
	Registerer prometheus.Registerer
}

// MaxMessageBytesLimit is the largest Config.MaxMessageBytes that librdkafka accepts.
const MaxMessageBytesLimit = 1_000_000_000

func (c Config) withDefaults() Config {
	setDefault(&c.ClientID, "outbox-relay")
	setDefault(&c.Compression, "lz4")
	setDefault(&c.MaxQueued, 10_000)
	setDefault(&c.MaxQueuedBytes, 128<<20)
	setDefault(&c.MaxMessageBytes, 10<<20)
	setDefault(&c.MetadataRefresh, 10*time.Second)
	setDefault(&c.TopicRecheck, time.Second)
	setDefault(&c.StallAfter, 10*time.Second)
	setDefault(&c.StatsInterval, 5*time.Second)
	setDefault(&c.TransactionalIDPrefix, "outbox")
	setDefault(&c.TransactionTimeout, 10*time.Second)
	if c.Logger == nil {
		c.Logger = slog.New(slog.DiscardHandler)
	}
	return c
}

func setDefault[T comparable](v *T, def T) {
	var zero T
	if *v == zero {
		*v = def
	}
}

// Validate checks the configuration without contacting anybody. Properties that librdkafka does not know are found by New.
func (c Config) Validate() error {
	c = c.withDefaults()
	if len(c.Brokers) == 0 {
		return errors.New("kafka: no brokers given")
	}
	for _, b := range c.Brokers {
		if b == "" || strings.ContainsAny(b, ", \t\n") {
			return fmt.Errorf("kafka: broker %q is not one host:port", b)
		}
	}
	if !slices.Contains([]string{"none", "lz4", "zstd", "snappy", "gzip"}, c.Compression) {
		return fmt.Errorf("kafka: compression %q is none of none, lz4, zstd, snappy, gzip", c.Compression)
	}
	if c.Linger < 0 || c.Linger > time.Second {
		return fmt.Errorf("kafka: linger %s is not between 0 and 1s", c.Linger)
	}
	if c.MaxQueued < 1 || c.MaxQueued > 1_000_000 {
		return fmt.Errorf("kafka: max queued %d is not between 1 and 1000000", c.MaxQueued)
	}
	if c.MaxMessageBytes < 1000 || c.MaxMessageBytes > MaxMessageBytesLimit {
		return fmt.Errorf("kafka: max message bytes %d is not between 1000 and %d", c.MaxMessageBytes, MaxMessageBytesLimit)
	}
	if c.MaxQueuedBytes < 1 {
		return fmt.Errorf("kafka: max queued bytes %d is not positive", c.MaxQueuedBytes)
	}
	for name, d := range map[string]time.Duration{
		"metadata refresh": c.MetadataRefresh, "stats interval": c.StatsInterval, "topic recheck": c.TopicRecheck, "stall after": c.StallAfter,
	} {
		if d < 10*time.Millisecond || d > time.Hour {
			return fmt.Errorf("kafka: %s %s is not between 10ms and 1h", name, d)
		}
	}
	if c.TransactionTimeout < 2*time.Second || c.TransactionTimeout > 15*time.Minute {
		return fmt.Errorf("kafka: transaction timeout %s is not between 2s and 15m", c.TransactionTimeout)
	}
	for _, name := range slices.Sorted(maps.Keys(c.Properties)) {
		if why := reserved(name); why != "" {
			return fmt.Errorf("kafka: property %q may not be set: %s", name, why)
		}
	}
	return nil
}

// reservedProperties may not be given in Config.Properties, and why.
var reservedProperties = map[string]string{
	"enable.idempotence":                    "records must not be duplicated or reordered by retries",
	"enable.gapless.guarantee":              "one refused record would stop all others",
	"acks":                                  "acknowledged must mean replicated",
	"request.required.acks":                 "acknowledged must mean replicated",
	"partitioner":                           "all producers must agree on the partition of a key",
	"message.timeout.ms":                    "a record that times out leaves a gap that later ones overtake",
	"delivery.timeout.ms":                   "a record that times out leaves a gap that later ones overtake",
	"message.send.max.retries":              "retries must not end",
	"retries":                               "retries must not end",
	"max.in.flight":                         "the idempotent producer decides it",
	"max.in.flight.requests.per.connection": "the idempotent producer decides it",
	"queuing.strategy":                      "the order of records must be kept",
	"transactional.id":                      "it is Config.TransactionalIDPrefix and the shard",
	"transaction.timeout.ms":                "it is Config.TransactionTimeout",
	"allow.auto.create.topics":              "the relay never creates topics",
	"bootstrap.servers":                     "it is Config.Brokers",
	"metadata.broker.list":                  "it is Config.Brokers",
	"client.id":                             "it is Config.ClientID",
	"compression.codec":                     "it is Config.Compression",
	"compression.type":                      "it is Config.Compression",
	"linger.ms":                             "it is Config.Linger",
	"queue.buffering.max.ms":                "it is Config.Linger",
	"queue.buffering.max.messages":          "it is Config.MaxQueued",
	"queue.buffering.max.kbytes":            "it is Config.MaxQueuedBytes",
	"message.max.bytes":                     "it is Config.MaxMessageBytes",
	"topic.metadata.refresh.interval.ms":    "it is Config.MetadataRefresh",
	"statistics.interval.ms":                "it is Config.StatsInterval",
	"batch.num.messages":                    "the solo lane sets it",
	"dr_cb":                                 "reports are needed",
	"dr_msg_cb":                             "reports are needed",
	"delivery.report.only.error":            "reports are needed",
	"enabled_events":                        "reports are needed",
	"log.queue":                             "logs go to Config.Logger",
	"group.id":                              "the tail reader joins no group",
	"group.instance.id":                     "the tail reader joins no group",
	"isolation.level":                       "the tail must be seen whole",
	"enable.auto.commit":                    "the tail reader commits nothing",
	"auto.commit.enable":                    "the tail reader commits nothing",
	"enable.auto.offset.store":              "the tail reader commits nothing",
	"auto.offset.reset":                     "the tail reader decides where it starts",
	"enable.partition.eof":                  "the tail reader needs it",
	"plugin.library.paths":                  "no code is loaded",
	"topic.metadata.propagation.max.ms":     "an unknown topic must be reported soon",
	"metadata.recovery.strategy":            "the sink must find the cluster again by itself",
}

// reserved says why a property may not be set, or "".
func reserved(name string) string {
	switch {
	case strings.HasPrefix(name, "test.mock"):
		return "mock brokers acknowledge what nobody stores"
	case strings.HasPrefix(name, "go."), strings.HasPrefix(name, "{topic}."):
		return "it is this package's own"
	}
	return reservedProperties[name]
}

// base is what every client gets, producers and the reader of tails.
func (c Config) base() ck.ConfigMap {
	m := ck.ConfigMap{
		"bootstrap.servers":        strings.Join(c.Brokers, ","),
		"client.id":                c.ClientID,
		"allow.auto.create.topics": false,
		"enable.metrics.push":      false,
		"socket.keepalive.enable":  true,
		// Broken connections must be noticed and replaced within seconds, not a minute.
		"socket.connection.setup.timeout.ms": 10_000,
		"reconnect.backoff.max.ms":           2_000,
		"go.logs.channel.enable":             true,
	}
	for name, value := range c.Properties {
		m[name] = value
	}
	return m
}

// producer is the configuration of one lane; solo: every record in a batch of its own.
func (c Config) producer(solo bool) ck.ConfigMap {
	m := c.base()
	maps.Copy(m, ck.ConfigMap{
		"enable.idempotence":                 true,
		"acks":                               "all",
		"partitioner":                        "murmur2_random",
		"message.timeout.ms":                 0,
		"compression.codec":                  c.Compression,
		"linger.ms":                          strconv.FormatFloat(float64(c.Linger)/float64(time.Millisecond), 'f', -1, 64),
		"message.max.bytes":                  c.MaxMessageBytes,
		"topic.metadata.refresh.interval.ms": int(c.MetadataRefresh.Milliseconds()),
		"topic.metadata.propagation.max.ms":  2_000, // topics are looked up before: it only delays the news that one is gone
		// The sink bounds what is queued; these only must not be reached first. librdkafka counts a message until its report
		// is thrown away, a little longer than the sink does.
		"queue.buffering.max.messages": 2*c.MaxQueued + 10_000,
		"queue.buffering.max.kbytes":   2_147_483_647,
		"statistics.interval.ms":       int(c.StatsInterval.Milliseconds()),
		"go.delivery.report.fields":    "none",
		"go.events.channel.size":       c.MaxQueued,
		"go.produce.channel.size":      0,
	})
	if solo {
		m["batch.num.messages"] = 1
	}
	if fault.Mutant("M8") {
		m["partitioner"] = "consistent_random"
	}
	return m
}

// transactor is the configuration of a shard's transactional producer.
func (c Config) transactor(shard int16) ck.ConfigMap {
	m := c.producer(false)
	delete(m, "message.timeout.ms") // that of the transaction: a record that times out takes its transaction with it
	m["transactional.id"] = c.TransactionalIDPrefix + "-" + strconv.Itoa(int(shard))
	m["transaction.timeout.ms"] = int(c.TransactionTimeout.Milliseconds())
	return m
}

// consumer is the configuration of a reader of tails; committed: it is not shown what was aborted, nor what is open.
func (c Config) consumer(committed bool) ck.ConfigMap {
	m := c.base()
	isolation := "read_uncommitted"
	if committed {
		isolation = "read_committed"
	}
	maps.Copy(m, ck.ConfigMap{
		"group.id":                        c.ClientID + "-tail", // required by the client; partitions are assigned, the group stays empty
		"enable.auto.commit":              false,
		"enable.auto.offset.store":        false,
		"enable.partition.eof":            true,
		"auto.offset.reset":               "earliest",
		"isolation.level":                 isolation,
		"fetch.wait.max.ms":               50,
		"fetch.queue.backoff.ms":          10,
		"fetch.error.backoff.ms":          100,
		"go.application.rebalance.enable": false,
	})
	return m
}
