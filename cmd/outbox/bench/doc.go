// Package bench measures the platform beside the design it replaces, in one run on one machine, and checks at the same
// time that no event was lost, made up, re-ordered or repeated.
//
// Two workloads of load (events: only the outbox itself; orders: a business transaction with one event), two targets (outbox: this
// platform; naive: an outbox table in the service's own database with a polling relay). Whatever is not given by address is
// started as real processes: PostgreSQL for the source, PostgreSQL for the store, Kafka, the platform.
//
// A third workload, kill, measures no load: services, each a process of its own, die by SIGKILL at each step of the protocol,
// and what the platform decides about their transactions is compared with the source database.
package bench
