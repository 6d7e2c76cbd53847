// Package kafka runs Kafka brokers for `outbox dev`, for the bench and for tests: a fake one in this process that needs
// nothing installed, and a real Apache Kafka as child processes, from Maven Central, that needs Java and Maven.
//
// ReadAll and ReadUntil read topics with a client that shares no code with the one that publishes.
package kafka
