// Package system holds the tests of the whole system as it is deployed: real PostgreSQL, a real Kafka broker or the fake one
// in a process of its own, several `outbox server` and `outbox relay` processes, and a service that uses the Go SDK. Faults
// are real as well: kill -9, SIGSTOP, immediate shutdown.
//
// What happened is judged by test/system/history, from the service's own database and a foreign consumer alone.
package system
