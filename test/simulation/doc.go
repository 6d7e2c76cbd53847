// Package simulation drives the relay, the writer and the resolver's verdict through many thousand interleavings, each named
// by a seed: one goroutine, one pseudo-random generator that picks the next event, a clock that moves when it is told to.
//
// Real are: everything in package relay but Run's own select (lease, read, order, deliver, checkpoint, takeover), the store's
// Writer from Submit to Done (queue, batches, encoding, look-ups), the log's encoding, and the resolver's rules. In memory are
// the store behind them (Store), Kafka (Broker), and the source databases (Database).
//
// README.md says what is checked, how to repeat a failure, and what is not simulated.
package simulation
