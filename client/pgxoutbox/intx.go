package pgxoutbox

import (
	"context"
	"fmt"

	"github.com/jackc/pgx/v5"

	"github.com/outbox-platform/outbox/client"
	"github.com/outbox-platform/outbox/client/internal/sourcedb"
)

// Spill says what happens when the platform cannot be reached in time.
type Spill = client.Spill

// The policies.
const (
	// SpillDefault stores the request in the marker, in the same transaction, to be published later and in order. Without a
	// registered database, whose client would publish it, the transaction fails instead.
	SpillDefault = client.SpillDefault
	// SpillNever fails the transaction.
	SpillNever = client.SpillNever
)

// Options are the options of one transaction. The zero value is usable.
type Options struct {
	// Database is the name under which the database is registered. Empty: "default".
	Database string
	// TxOptions go into BEGIN. REPEATABLE READ and SERIALIZABLE need a registered database, for a second connection.
	TxOptions pgx.TxOptions
	// Spill is the policy for times when the platform is away.
	Spill Spill
	// Mode says how the decision is found out: client.ModeMarker, or client.ModeXIDFenced, which needs PostgreSQL 17, no table, and
	// never spills. Zero: as the database is registered, else ModeMarker.
	Mode client.Mode
}

func (o Options) shared() sourcedb.Options {
	return sourcedb.Options{Database: o.Database, Spill: o.Spill, Mode: o.Mode}
}

// Beginner begins transactions: a *pgxpool.Pool, *pgxpool.Conn or *pgx.Conn.
type Beginner interface {
	BeginTx(ctx context.Context, txOptions pgx.TxOptions) (pgx.Tx, error)
}

// Tx is the transaction of [InTx]. It is a pgx.Tx, except that InTx ends it.
type Tx struct {
	pgx.Tx
	c          *client.Client
	events     []client.Event
	savepoints int // begun so far
}

// Publish adds events to the transaction. They are checked now, and prepared just before COMMIT, all at once, in this order. The
// events must not be changed any more.
func (tx *Tx) Publish(events ...client.Event) error {
	if len(events) == 0 {
		return nil
	}
	if err := tx.c.CheckEvents(events...); err != nil {
		return err
	}
	tx.events = append(tx.events, events...)
	return nil
}

// Commit returns [client.ErrManaged].
func (tx *Tx) Commit(context.Context) error { return client.ErrManaged }

// Rollback returns [client.ErrManaged].
func (tx *Tx) Rollback(context.Context) error { return client.ErrManaged }

// InTx runs fn in a transaction and publishes the events that fn collected if and only if the transaction commits.
//
// An error or a panic of fn rolls back, and is passed on. Without events it is an ordinary transaction. With events, InTx writes
// the marker, prepares, and commits. It returns nil when, and only when, the database has confirmed the commit; nothing that
// happens to the platform afterwards is an error. Otherwise:
//
//   - client.IsInvalid, client.IsDenied: the platform refuses the events; rolled back.
//   - client.IsUnavailable: the platform is away and spilling is not allowed; rolled back.
//   - client.ErrMustSpill: it would overtake spilled requests, and spilling is not allowed; rolled back.
//   - client.ErrSavepoint, client.ErrAsyncCommit, client.ErrFence: not safe to prepare; rolled back.
//   - *client.OutcomeUnknownError: COMMIT was sent and not answered. The events are published if it took effect.
//   - Errors of the database, for example serialization failures, wrapped; rolled back. Retry loops around InTx are fine: every
//     attempt gets an id of its own.
func InTx(ctx context.Context, db Beginner, c *client.Client, o Options, fn func(tx *Tx) error) error {
	begun, err := db.BeginTx(ctx, o.TxOptions)
	if err != nil {
		return fmt.Errorf("outbox: BEGIN: %w", err)
	}
	t := newTransaction(begun)
	tx := &Tx{Tx: begun, c: c}
	returned := false
	defer func() {
		if !returned { // fn panics, or ends its goroutine
			sourcedb.Rollback(ctx, t, nil)
		}
	}()
	err = fn(tx)
	returned = true
	if err != nil {
		sourcedb.Rollback(ctx, t, nil)
		return err
	}
	return sourcedb.Finish(ctx, c, o.shared(), t, tx.events)
}
