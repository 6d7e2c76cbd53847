// Package client is the Go SDK of the outbox platform: it prepares events while a database transaction is open, and the
// platform publishes them to Kafka if and only if that transaction commits.
//
// Most services use it through [github.com/outbox-platform/outbox/client/pgxoutbox] or
// [github.com/outbox-platform/outbox/client/sqloutbox], whose InTx does the whole protocol. This package holds what they
// share: the [Client] with its session, the [Event], and the typed [Error].
//
// # Calls
//
// Every call is idempotent by its transaction id, so every call may be repeated, and is: failures that a repetition can
// cure (UNAVAILABLE, contention, a full queue that says when to come back) are repeated with jittered back-off until the
// call's deadline. Every call has a deadline, whether its context brings one or not.
//
// Calls travel on a session, one bidirectional stream that carries many calls at a time. When the stream breaks, the
// client opens another one and sends again what was not answered. When the server says that it is about to stop, the
// client moves to another one and lets the old stream finish. When sessions are not served, calls go out one by one.
//
// # Commit
//
// [Client.CommitLater] tells the platform that a transaction committed and does not wait. It is only an accelerator: when
// it is lost, the platform asks the source's database. For that, the client answers check-back questions about the
// databases that are registered with [Client.RegisterDatabase].
//
// A Client is safe for concurrent use. Nothing in this module keeps global state.
package client
