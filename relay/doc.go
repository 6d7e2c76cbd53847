// Package relay moves committed events from the store to Kafka, in order per aggregate.
//
// # Holding
//
// The shards of a store are leased by the database's clock; each acquisition raises the shard's epoch, and every write
// carries it. A write with an old epoch is fenced: the relay drops the shard at once and writes nothing more for it. By its
// own monotonic clock a holder believes a renewal for 70 % of the lease only, counted from before the attempt, and looks
// before each delivery. When that time is over with records in flight, they are purged from the sink.
//
// # Order
//
// Each aggregate has one queue, in log order, and at most one record of it is unacknowledged. Its head is delivered if its
// transaction is committed, and dropped if that is aborted. Whatever else keeps a head keeps only its aggregate:
//
//   - undecided for ParkAfter, or ParkFollowerAfter when a later event waits or memory is full: all its events become rows
//     of parked, where the resolver finds them;
//   - its topic cannot be written, or its source is not known: the same; one aggregate tries from time to time for all;
//   - Kafka refuses its record for good: what the source's policy says. Block: the same, until an operator acts. Park: it and
//     all that follow become dead letters, in order, until a redrive. Skip: it alone becomes a dead letter.
//
// A failure of the cluster or the producer parks nothing and counts as nobody's attempt: reading stops when memory is full,
// and the records are delivered again in order.
//
// # What is written down
//
// A step is one transaction of checkpoint, parked, dead letters and operations. It says: everything up to its position is
// done, listed in pend, or a row. If its outcome is unknown it is repeated before anything else of the shard is written.
// Three rules make that enough for a new holder, which reads again from the position:
//
//   - rows of an aggregate are older than everything of it that is read again, so that what is read again up to its youngest
//     row is a row or done;
//   - a dead letter is written only when the position has reached it, so that it is never read again;
//   - the same for a head that an operator sets aside or drops.
//
// A new holder looks in Kafka, from the acknowledged offsets of the checkpoint, for events that the last one delivered, and
// does not deliver those again.
//
// # Structure
//
// The decisions are made by a state machine without goroutines, clocks or I/O (core), which a seeded test drives against a
// model. Run is a loop around it: one goroutine owns all state, and every access to the store is a goroutine of its own
// that hands its outcome back. Kafka is behind Sink.
package relay
