package orders

import (
	"bytes"
	"context"
	"fmt"
	"net"
	"os"
	"slices"
	"strings"
	"sync"
	"syscall"

	"github.com/google/uuid"
	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
	"google.golang.org/grpc"

	"github.com/outbox-platform/outbox/client/pgxoutbox"
)

// The steps of a transaction at which a service can die. The database decides: what dies before COMMIT reached it never
// happened, what dies later did, and its event arrives though nobody says so.
const (
	// DieBeforePrepare: the marker is written, and the platform has heard nothing.
	DieBeforePrepare = "before-prepare"
	// DiePrepareSent: Prepare is sent, and its answer not read.
	DiePrepareSent = "prepare-sent"
	// DiePrepared: Prepare is answered.
	DiePrepared = "prepared"
	// DieCommitSent: COMMIT is sent to the database, and its answer not read: the service could not know the outcome itself.
	DieCommitSent = "commit-sent"
	// DieCommitted: COMMIT is answered, and the platform not told.
	DieCommitted = "committed"
	// DieCommitTold: Commit is sent to the platform, and its answer not read.
	DieCommitTold = "commit-told"
)

// DieSteps are all of them, in the order in which they come.
var DieSteps = []string{DieBeforePrepare, DiePrepareSent, DiePrepared, DieCommitSent, DieCommitted, DieCommitTold}

// Death ends this process with SIGKILL at one step of an order: no deferred call runs, no connection is closed in order. It
// is for trying out what becomes of the order's event. It needs connections without TLS, into which it looks.
type Death struct {
	step string
	last func(text string)

	mu    sync.Mutex
	fatal []byte // whoever has sent this dies; nil: nobody
	text  string // the last words
}

// NewDeath returns a death at a step. last is called with the last words.
func NewDeath(step string, last func(text string)) (*Death, error) {
	if !slices.Contains(DieSteps, step) {
		return nil, fmt.Errorf("there is no step %q to die at: choose one of %s", step, strings.Join(DieSteps, ", "))
	}
	return &Death{step: step, last: last}, nil
}

// Watch makes the pool's connections ones that can be died on. It is called before the pool is made.
func (d *Death) Watch(config *pgxpool.Config) {
	dial := config.ConnConfig.DialFunc
	config.ConnConfig.DialFunc = func(ctx context.Context, network, address string) (net.Conn, error) {
		return d.wrap(dial(ctx, network, address))
	}
}

// DialOption does the same for the client's connection to the platform.
func (d *Death) DialOption() grpc.DialOption {
	return grpc.WithContextDialer(func(ctx context.Context, address string) (net.Conn, error) {
		return d.wrap((&net.Dialer{}).DialContext(ctx, "tcp", address))
	})
}

func (d *Death) wrap(conn net.Conn, err error) (net.Conn, error) {
	if err != nil {
		return nil, err
	}
	return fuse{conn, d}, nil
}

// fuse is a connection on which sending certain bytes is fatal.
type fuse struct {
	net.Conn
	death *Death
}

// Write sends, and dies if that was it.
func (f fuse) Write(b []byte) (int, error) {
	n, err := f.Conn.Write(b)
	f.death.mu.Lock()
	defer f.death.mu.Unlock()
	if fatal := f.death.fatal; err == nil && fatal != nil && bytes.Contains(b, fatal) {
		f.death.now()
	}
	return n, err
}

// at dies if this is the step.
func (d *Death) at(step string) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.step == step {
		d.now()
	}
}

// onSending makes it fatal to send these bytes if this is the step.
func (d *Death) onSending(step string, fatal []byte) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.step == step {
		d.fatal = fatal
	}
}

// now says the last words and dies.
func (d *Death) now() {
	d.last(d.text)
	_ = syscall.Kill(os.Getpid(), syscall.SIGKILL)
	select {} // until the signal arrives
}

// PlaceAndDie places an order with the single pieces of which InTx is made, and dies at the step. It returns only if
// something else went wrong before.
func (s *Shop) PlaceAndDie(ctx context.Context, order Order, d *Death) error {
	tx, err := s.pool.BeginTx(ctx, pgx.TxOptions{})
	if err != nil {
		return err
	}
	defer func() { _ = tx.Rollback(ctx) }()
	event, err := store(ctx, tx, &order)
	if err != nil {
		return err
	}
	attempt, err := pgxoutbox.Mark(ctx, tx, s.outbox, pgxoutbox.Options{Spill: pgxoutbox.SpillNever})
	if err != nil {
		return err
	}
	d.words(order, attempt.ID())
	d.at(DieBeforePrepare)
	id := attempt.ID()
	d.onSending(DiePrepareSent, id[:])
	if err := attempt.Prepare(ctx, event); err != nil {
		return err
	}
	d.at(DiePrepared)
	d.onSending(DieCommitSent, []byte("commit"))
	if err := tx.Commit(ctx); err != nil {
		return err
	}
	d.at(DieCommitted)
	d.onSending(DieCommitTold, id[:])
	attempt.AfterCommit()
	<-ctx.Done() // AfterCommit does not wait
	return ctx.Err()
}

// words sets the last words.
func (d *Death) words(order Order, transaction uuid.UUID) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.text = fmt.Sprintf("dying at %s: order %s of %s, transaction %s", d.step, order.ID, order.Customer, transaction)
}
