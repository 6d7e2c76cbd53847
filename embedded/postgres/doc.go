// Package postgres runs a real PostgreSQL as child processes of this process, for `outbox dev`, for the bench and for
// tests. It needs nothing installed: a version that is not on the machine is fetched once and kept in a cache directory.
//
// It works for an ordinary user and for root. PostgreSQL refuses to run as root, so root's servers run as the user
// postgres, or nobody where there is no such user.
//
// A server dies with its parent: after SIGKILL of this process no PostgreSQL is left behind.
package postgres
