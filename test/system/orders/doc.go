// Package orders is a service as its developers would write it with the Go SDK: it changes its aggregates' rows and prepares
// events in the same PostgreSQL transaction. In the same transaction it also notes every event, so that its own database
// tells afterwards what was committed.
package orders
