// Package kafka is the relay.Sink over librdkafka. It is the only package that knows confluent-kafka-go.
//
// What it promises beside the interface:
//
//   - Exactly one report follows each accepted Deliver, whatever happens: acknowledgement, refusal, Purge, a fatal error of
//     the producer, Close.
//   - Memory is bounded: deliveries that are queued plus reports that nobody has read yet are never more than
//     Config.MaxQueued, and the bytes queued never more than Config.MaxQueuedBytes (but one record always fits).
//   - What passes by itself (a broker restarts, leaders move, too few replicas in sync) stays inside and is retried without
//     end; Healthy tells meanwhile that the cluster is away.
//   - A batch is the broker's unit of refusal, not the record: when one is refused, each of its records is tried again in a
//     batch of its own (the solo lane), and only that verdict is reported. So a record that is too large takes nobody with
//     it, also on a topic whose limit is smaller than our batches.
//   - A producer that died is rebuilt, with a growing pause when it dies again. Nothing of the old one is sent after its
//     reports.
//   - Acknowledged means that a broker said at which offset the record is. What librdkafka only concludes from later
//     acknowledgements is reported as ClassFatal, to be delivered again: that conclusion can be wrong (see Sink.unproven).
//   - Retries make no duplicates while brokers keep what they know of our producer. A broker that was killed may not:
//     duplicates were seen after a kill when records carried timestamps years old, and none with current ones. (Why is
//     inferred, not isolated: producer state may expire by the timestamp of its last record.)
//   - A topic is looked up before its first record is handed to librdkafka, which would wait for it for many seconds.
//
// In transactional mode (Config.Transactional) the lanes carry nothing; each shard has a transactor instead, which exists from
// Fence until its producer is broken or cut off: see transactions. There "reported" means committed, and a record that fails
// aborts the transaction it was in, not the others' delivery.
//
// Its parts, one file each: config, sink (queue and reports), client (a librdkafka producer), lane (its
// rebuilding), transactions, transactor and wave (the transactional mode), topics (the cache),
// watch (refreshing the cache, the cluster's health), class (what errors mean), tail, stats, metrics, logs.
package kafka
