// Package bench measures the platform beside the design it replaces, in one run on one machine, and checks at the same
// time that no event was lost, made up, re-ordered or repeated.
//
// Two workloads (events: only the outbox itself; orders: a business transaction with one event), two targets (outbox: this
// platform; naive: an outbox table in the service's own database with a polling relay). Whatever is not given by address is
// started as real processes: PostgreSQL for the source, PostgreSQL for the store, Kafka, the platform.
package bench
