// Package sqloutbox runs PostgreSQL transactions of database/sql (with the pgx driver) whose events the outbox platform publishes if and only if the
// transaction commits.
//
// # The simple way
//
// [InTx] begins a transaction, runs a function in it, prepares the events that the function collected, and commits:
//
//	err := sqloutbox.InTx(ctx, db, c, sqloutbox.Options{}, func(tx *sqloutbox.Tx) error {
//		if _, err := tx.ExecContext(ctx, "UPDATE orders SET state = 'paid' WHERE id = $1", id); err != nil {
//			return err
//		}
//		return tx.Publish(client.Event{Topic: "orders", AggregateType: "order", AggregateID: id, Type: "order.paid.v1", Payload: body})
//	})
//
// Take the aggregate's row lock in the function, as the UPDATE does here: the order of these locks is the order in which the
// events of the aggregate are published.
//
// # For people who end their transactions themselves
//
// [Mark] and [Attempt.Prepare] before COMMIT, [Attempt.AfterCommit] or [Attempt.AfterRollback] behind it.
//
// # The database
//
// The transactions need the table of [client.MarkerDDL]. [Register] names the database to the client, which then answers the
// platform's questions about transactions whose outcome it was not told, publishes requests that were spilled into the database
// while the platform was away, and deletes old markers.
package sqloutbox
