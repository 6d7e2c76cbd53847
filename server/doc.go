// Package server is the platform's gRPC front.
//
// A call is decoded, attributed to a principal, authorised (deny by default), validated on one path for unary calls and
// sessions alike, and handed to store.Writer, which groups the calls of everybody into one statement per batch. The
// answer goes back on the goroutine of the unary call, or into the send queue of the session: a session costs two
// goroutines, never one per call, and a reader that does not read costs others nothing.
//
// One file, one concept:
//
//   - validate: rules of the proto, limits of the deployment, and the conversion to what the store keeps
//   - errors: the one table from an error to a code, a reason and details
//   - identity, authorize: who calls, and what they may call
//   - sources: what the hot path knows about sources and topics without asking the store
//   - call, service, session, sessions: the data calls, unary and streamed, and the sessions that can be asked
//   - admin, page: the platform team's calls
//   - http, health, metrics, maintenance, reload: the second port and the background loops
package server
