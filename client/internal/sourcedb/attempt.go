package sourcedb

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/google/uuid"

	"github.com/outbox-platform/outbox/client"
)

// Options are the options of one attempt.
type Options struct {
	// Database names the source database. Empty: "default".
	Database string
	// Spill is the policy for times when the platform is away.
	Spill client.Spill
	// Mode says how the decision is found out. Zero: as the database is registered, else ModeMarker.
	Mode client.Mode
}

// Attempt is one attempt of a database transaction that has events. It is used by one goroutine.
type Attempt struct {
	c       *client.Client
	db      *Database // nil: not registered
	id      uuid.UUID
	mode    client.Mode
	spill   bool // allowed
	mark    *mark
	token   []byte
	sent    bool // Prepare may have arrived
	ready   bool // prepared or spilled: COMMIT may follow
	spilled bool
	ended   bool
}

// NewAttempt returns an attempt with a new id.
func NewAttempt(c *client.Client, o Options) *Attempt {
	db, _ := c.Registered(o.Database).(*Database)
	a := &Attempt{c: c, db: db, id: client.NewID(), mode: o.Mode}
	if a.mode == 0 && db != nil {
		a.mode = db.upkeep.Mode
	}
	a.mode = cmp.Or(a.mode, client.ModeMarker)
	a.spill = o.Spill == client.SpillDefault && db != nil && a.mode == client.ModeMarker // else there is no table to spill to
	return a
}

// ID returns the transaction's id.
func (a *Attempt) ID() uuid.UUID { return a.id }

// Mark writes the marker, or in mode XID_FENCED makes the transaction's id durable.
func (a *Attempt) Mark(ctx context.Context, q Queryer, database string) error {
	var known *identities
	if a.db != nil {
		known = &a.db.identities
	}
	var err error
	switch a.mode {
	case client.ModeMarker:
		a.mark, err = writeMark(ctx, q, a.id, database, known)
	case client.ModeXIDFenced:
		a.mark, err = raiseFence(ctx, q, database, known)
	default:
		err = fmt.Errorf("outbox: mode %d is not for transactions of a database; use the client's Prepare", a.mode)
	}
	return err
}

var errTwice = errors.New("outbox: an attempt is prepared once, with all events of the transaction")

// Prepare prepares the events, or spills them. COMMIT must not follow an error.
func (a *Attempt) Prepare(ctx context.Context, q Queryer, events []client.Event) error {
	if a.mark == nil || a.ready || a.sent {
		return errTwice
	}
	r, err := a.c.Encode(ctx, a.id, a.mark.tx, events...)
	if err != nil {
		return err
	}
	must, err := a.mustSpill(ctx)
	switch {
	case err != nil:
		return err
	case must && !a.spill:
		return client.ErrMustSpill
	case must:
		return a.store(ctx, q, r, nil)
	}
	a.sent = true
	a.token, err = a.c.PrepareRequest(ctx, r, a.spill)
	switch {
	case err == nil:
		a.ready = true
		return nil
	case ctx.Err() != nil, !a.spill, !client.IsUnavailable(err):
		return fmt.Errorf("outbox: preparing events: %w", err)
	}
	return a.store(ctx, q, r, err)
}

// mustSpill tells whether spilled requests wait, which later ones must not overtake. Under REPEATABLE READ and SERIALIZABLE
// the marker's own statement has looked at an old snapshot, so a second connection is asked. When it does not answer,
// spilling is the safe answer.
func (a *Attempt) mustSpill(ctx context.Context) (bool, error) {
	if a.mode == client.ModeXIDFenced {
		return false, nil // nothing can be spilled
	}
	if a.mark.fresh() {
		return a.mark.mustSpill, nil
	}
	if a.db == nil {
		return false, fmt.Errorf("outbox: a transaction that is %s needs its database registered with the client", a.mark.isolation)
	}
	// The limit is also what frees us when all connections of the pool wait here for a second one.
	limited, cancel := context.WithTimeout(ctx, a.c.PrepareTimeout())
	defer cancel()
	must := false
	if err := a.db.pool.QueryRow(limited, mustSpillSQL).Scan(&must); err != nil {
		if ctx.Err() != nil {
			return false, fmt.Errorf("outbox: asking for spilled requests: %w", err)
		}
		return true, nil
	}
	return must, nil
}

// store spills the request.
func (a *Attempt) store(ctx context.Context, q Queryer, r *client.Request, why error) error {
	n, err := q.Exec(ctx, spillSQL, a.id, r.Bytes())
	if err != nil {
		return errors.Join(fmt.Errorf("outbox: spilling: %w", err), why)
	}
	if n != 1 {
		return fmt.Errorf("outbox: spilling: the marker is not there (%d rows)", n)
	}
	a.ready, a.spilled = true, true
	return nil
}

// Committed is told that COMMIT succeeded. It neither fails nor panics nor waits.
func (a *Attempt) Committed() {
	a.quietly(func() {
		if a.ended || !a.ready {
			return
		}
		a.ended = true
		if a.spilled {
			a.c.Count(client.UpkeepCounts{Spilled: 1})
			a.db.wakeUp()
			return
		}
		a.c.CommitLater(a.id, a.token, func(err error) {
			if err == nil && a.db != nil && a.mode == client.ModeMarker {
				a.db.acknowledged(a.id)
			}
		})
	})
}

// RolledBack is told that the transaction is rolled back for certain.
func (a *Attempt) RolledBack() {
	a.quietly(func() {
		if a.ended || !a.sent {
			return
		}
		a.ended = true
		a.c.AbortLater(a.id, a.token, nil)
	})
}

// quietly runs what is ours after the transaction has ended: no concern of the application any more.
func (a *Attempt) quietly(f func()) {
	defer func() {
		if p := recover(); p != nil {
			a.c.Report(client.Alarm{Kind: client.AlarmBug, TransactionID: a.id.String(), Err: fmt.Errorf("panic: %v", p)})
		}
	}()
	f()
}

// rollbackTimeout bounds a rollback, which must happen also when the caller's context has ended.
const rollbackTimeout = 5 * time.Second

// Rollback ends the transaction without effect. a may be nil.
func Rollback(ctx context.Context, tx Tx, a *Attempt) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), rollbackTimeout)
	defer cancel()
	if err := tx.Rollback(ctx); err == nil && a != nil {
		a.RolledBack()
	}
}

// Finish ends a transaction whose business part is done: it prepares the events, commits, and tells the platform. Without
// events it only commits.
func Finish(ctx context.Context, c *client.Client, o Options, tx Tx, events []client.Event) error {
	if len(events) == 0 {
		return commit(ctx, tx, nil)
	}
	a := NewAttempt(c, o)
	err := a.Mark(ctx, tx, o.Database)
	if err == nil {
		err = a.Prepare(ctx, tx, events)
	}
	if err == nil {
		err = ctx.Err() // the last moment at which the outcome is still ours
	}
	if err != nil {
		Rollback(ctx, tx, a)
		return err
	}
	return commit(ctx, tx, a)
}

// commit commits. a is nil when there are no events.
func commit(ctx context.Context, tx Tx, a *Attempt) error {
	err := tx.Commit(ctx)
	if err == nil {
		if a != nil {
			a.Committed()
		}
		return nil
	}
	if certainlyRolledBack(err) {
		if a != nil {
			a.RolledBack()
		}
		return fmt.Errorf("outbox: COMMIT: %w", err)
	}
	unknown := &client.OutcomeUnknownError{Err: err}
	if a != nil {
		unknown.TransactionID = a.id
	}
	return unknown
}
