// Package relay moves committed events from the store to Kafka, in order per aggregate.
package relay
