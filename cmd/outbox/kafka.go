package main

import (
	"log/slog"
	"maps"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/outbox-platform/outbox/relay/kafka"
)

// kafkaSettings say how to reach the Kafka cluster.
type kafkaSettings struct {
	Brokers         []string      `name:"brokers" placeholder:"HOST:PORT" help:"Brokers to start from."`
	ClientID        string        `name:"client-id" default:"outbox-relay" help:"Name by which brokers know the relay in logs and quotas."`
	Security        string        `name:"security" default:"plaintext" enum:"plaintext,ssl,sasl_plaintext,sasl_ssl" help:"plaintext, ssl, sasl_plaintext or sasl_ssl."`
	SASLMechanism   string        `name:"sasl-mechanism" help:"PLAIN, SCRAM-SHA-256, SCRAM-SHA-512, OAUTHBEARER or GSSAPI."`
	SASLUsername    string        `name:"sasl-username" help:"User for SASL."`
	SASLPassword    secret        `name:"sasl-password" help:"Password for SASL."`
	SASLPasswordAt  string        `name:"sasl-password-file" type:"path" placeholder:"FILE" help:"File that holds it."`
	CA              string        `name:"ca" type:"path" placeholder:"FILE" help:"CAs (PEM) that the brokers' certificates must come from. Default: the system's."`
	Cert            string        `name:"cert" type:"path" placeholder:"FILE" help:"Client certificate (PEM)."`
	Key             string        `name:"key" type:"path" placeholder:"FILE" help:"Its key (PEM)."`
	Compression     string        `name:"compression" default:"lz4" enum:"none,lz4,zstd,snappy,gzip" help:"none, lz4, zstd, snappy or gzip."`
	Linger          time.Duration `name:"linger" default:"0s" help:"How long a record may wait for company. Batches form by themselves under load."`
	MaxQueued       int           `name:"max-queued" default:"10000" help:"Records handed to the producer and not acknowledged yet."`
	MaxQueuedBytes  int64         `name:"max-queued-bytes" default:"134217728" help:"Bytes of them."`
	MaxMessageBytes int           `name:"max-message-bytes" default:"10485760" help:"Largest record handed to a broker; at least what the topics allow, so that the topic's own limit decides."`

	Transactional         bool          `name:"transactional" help:"Write in transactions: consumers with isolation.level=read_committed never see what a former holder of a shard writes. Costs latency; see docs/guarantees.md. All relays of a store alike."`
	TransactionalIDPrefix string        `name:"transactional-id-prefix" default:"outbox" help:"Prefix of the transactional ids, one per shard. The same for all relays of a store, another for each store on the same Kafka cluster."`
	TransactionTimeout    time.Duration `name:"transaction-timeout" default:"10s" help:"After this time the cluster aborts the transactions of a relay that died, if no other took over: so long read_committed consumers may wait."`

	Properties map[string]secret `name:"properties" placeholder:"NAME=VALUE" help:"More settings of librdkafka. Those that carry the platform's promises are refused."`
}

// config is what kafka.New wants.
func (k kafkaSettings) config(log *slog.Logger, registerer prometheus.Registerer) (kafka.Config, error) {
	if len(k.Brokers) == 0 {
		return kafka.Config{}, usagef("the Kafka cluster's address is missing: give --kafka-brokers or OUTBOX_KAFKA_BROKERS")
	}
	password, err := k.SASLPassword.fromFile("kafka-sasl-password", k.SASLPasswordAt)
	if err != nil {
		return kafka.Config{}, err
	}
	if (k.Cert == "") != (k.Key == "") {
		return kafka.Config{}, usagef("kafka-cert and kafka-key go together: %q, %q", k.Cert, k.Key)
	}
	properties := map[string]string{}
	for name, value := range map[string]string{
		"sasl.mechanism": k.SASLMechanism, "sasl.username": k.SASLUsername, "sasl.password": password,
		"ssl.ca.location": k.CA, "ssl.certificate.location": k.Cert, "ssl.key.location": k.Key,
	} {
		if value != "" {
			properties[name] = value
		}
	}
	if k.Security != "plaintext" {
		properties["security.protocol"] = k.Security
	}
	for name, value := range k.Properties {
		properties[name] = string(value)
	}
	config := kafka.Config{
		Brokers: k.Brokers, ClientID: k.ClientID, Compression: k.Compression, Linger: k.Linger, MaxQueued: k.MaxQueued,
		MaxQueuedBytes: k.MaxQueuedBytes, MaxMessageBytes: k.MaxMessageBytes, Properties: maps.Clone(properties),
		Transactional: k.Transactional, TransactionalIDPrefix: k.TransactionalIDPrefix, TransactionTimeout: k.TransactionTimeout,
		Logger: log, Registerer: registerer,
	}
	if err := config.Validate(); err != nil {
		return kafka.Config{}, usagef("%w", err)
	}
	return config, nil
}
