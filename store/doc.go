// Package store keeps everything the platform must not forget, in PostgreSQL, and holds every SQL statement of it.
//
// It knows nothing of gRPC, Kafka or logging. Its parts, one file each:
//
//   - Writer: the group-commit batcher. Prepares, publishes, commits and aborts of all callers go through one queue into
//     one statement per batch.
//   - Reader: what relays read: segments of the log below the xid horizon.
//   - lease and Step: shards are leased by the database's clock; every write of a holder carries its epoch (the fencing
//     token), and a write with an old epoch fails with ErrFenced.
//   - source, topic, transaction, blocked, dead_letters, operation: what servers and operators read and change.
//   - maintenance: ring rotates and truncates the log, purge keeps tx small.
//   - Verify: checks every invariant of the stored state.
package store
