// Package pgxoutbox runs PostgreSQL transactions of pgx whose events the outbox platform publishes if and only if the
// transaction commits.
//
// # The simple way
//
// [InTx] begins a transaction, runs a function in it, prepares the events that the function collected, and commits:
//
//	err := pgxoutbox.InTx(ctx, pool, c, pgxoutbox.Options{}, func(tx *pgxoutbox.Tx) error {
//		if _, err := tx.Exec(ctx, "UPDATE orders SET state = 'paid' WHERE id = $1", id); err != nil {
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
// The transactions need the table of [client.MarkerDDL]. [Register] names the database's pool to the client, which then answers the
// platform's questions about transactions whose outcome it was not told, publishes requests that were spilled into the database
// while the platform was away, and deletes old markers.
package pgxoutbox
