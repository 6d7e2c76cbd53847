// Package relaytest gives tests a Kafka in memory: a Cluster that keeps what was written, and Sinks that write to it, with
// faults on demand. It behaves as relay.Sink promises, and as librdkafka does behind relay/kafka: while the cluster is away
// records stay queued and nothing is reported; a purge reports everything queued; a fatal error reports everything not
// yet acknowledged although part of it was written.
package relaytest
