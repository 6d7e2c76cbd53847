// Package orders is a small order service that publishes an event in each of its transactions: an example of the Go SDK, and
// the demo source of `outbox dev`.
//
// Shop.Place is what a service has to write. Everything else is around it.
package orders
