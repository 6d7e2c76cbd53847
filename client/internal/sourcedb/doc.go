// Package sourcedb is the part of the protocol that happens in the source's own database, whatever its driver: the marker
// statement, the spill, the verdict on a transaction's outcome, draining and clean-up. pgxoutbox and sqloutbox lend it their
// connections and give it their types.
//
// The rules it keeps, from the protocol:
//
//   - The marker is written before Prepare, and Prepare is answered before COMMIT, both at the top level of the transaction.
//   - Every attempt has a new id. A conflict on the marker kills the transaction.
//   - A COMMIT whose outcome is unknown is followed by neither Commit nor Abort.
//   - After COMMIT nothing of ours reaches the application, not even a panic.
//   - While spilled requests wait, later transactions spill too: order.
//   - A verdict is never guessed: what is not certain is UNKNOWN.
package sourcedb
