package client

import (
	"sync"
	"time"

	"github.com/cenkalti/backoff/v5"
	"github.com/google/uuid"
	"google.golang.org/grpc/codes"
)

// decision is a Commit or an Abort that is sent until the platform has acknowledged it.
type decision struct {
	c      *Client
	kind   kind
	id     uuid.UUID
	body   encoded
	done   func(error)
	delays *backoff.ExponentialBackOff // nil until the first failure
}

// decisions counts the decisions that are not yet acknowledged and does the unary ones.
type decisions struct {
	mu      sync.Mutex
	pending int
	idle    chan struct{}  // closed when pending becomes 0; nil while nobody waits
	unary   chan *decision // room for all that may be pending
	started bool           // the unary workers
}

// unaryDeciders is the number of decisions that are sent at a time as unary calls.
const unaryDeciders = 16

// CommitLater tells the platform that the local transaction has committed and returns at once. It is sent again until it is
// acknowledged; done, when not nil, is then called once with nil or with the platform's refusal, from a goroutine that must
// not be held up. Beyond Config.MaxPendingCommits, and after Close, nothing is sent, and done gets the reason: the platform finds
// the decision out by asking.
//
// token is what Prepare returned; it may be nil.
func (c *Client) CommitLater(id uuid.UUID, token []byte, done func(error)) {
	c.decideLater(kindCommit, id, token, done)
}

// AbortLater tells the platform that the local transaction did not commit and returns at once, like CommitLater. Never call
// it when the outcome is unknown.
func (c *Client) AbortLater(id uuid.UUID, token []byte, done func(error)) {
	c.decideLater(kindAbort, id, token, done)
}

var errTooManyPending = &Error{
	Code: codes.ResourceExhausted, Message: "too many decisions are not acknowledged; not sent", local: true,
}

func (c *Client) decideLater(k kind, id uuid.UUID, token []byte, done func(error)) {
	if done == nil {
		done = func(error) {}
	}
	q := &c.decisions
	q.mu.Lock()
	if q.pending >= c.cfg.MaxPendingCommits {
		q.mu.Unlock()
		c.stats.droppedCommits.Add(1)
		done(errTooManyPending)
		return
	}
	q.pending++
	q.mu.Unlock()
	d := &decision{c: c, kind: k, id: id, done: done, body: c.encodeDecision(k, id, token)}
	if err := c.start(); err != nil {
		d.finish(err)
		return
	}
	d.send()
}

func (d *decision) send() {
	s := d.c.pick()
	if s == nil {
		d.sendUnary()
		return
	}
	if err := s.enqueue(&call{kind: d.kind, body: d.body, later: d.answered}, false); err != nil {
		d.answered(answer{err: err})
	}
}

// answered decides what becomes of the decision. It is called by the stream's receiver.
func (d *decision) answered(a answer) {
	e := a.err
	switch {
	case e == nil:
		d.finish(nil)
	case e == errNoSessions: //nolint:errorlint // a value of our own that is never wrapped
		d.sendUnary()
	case e.local || d.final(e):
		d.finish(e)
	default:
		if d.delays == nil {
			d.delays = d.c.retryDelays()
			d.delays.MaxInterval = d.c.cfg.CallTimeout
		}
		time.AfterFunc(max(d.delays.NextBackOff(), e.RetryAfter), d.send)
	}
}

// final tells whether the platform's answer will stay the same.
func (d *decision) final(e *Error) bool {
	switch e.Code {
	case codes.NotFound, codes.FailedPrecondition, codes.InvalidArgument, codes.PermissionDenied, codes.Unauthenticated,
		codes.AlreadyExists, codes.Unimplemented:
		return true
	default:
		return false
	}
}

func (d *decision) finish(e *Error) {
	c := d.c
	var err error
	if e != nil {
		err = e
	}
	switch {
	case e == nil:
		c.stats.acknowledged.Add(1)
	case d.kind == kindCommit && IsAlreadyDecided(err):
		c.Report(Alarm{Kind: AlarmContradiction, TransactionID: d.id.String(), Err: err})
	case d.kind == kindAbort && IsUnknownTransaction(err):
		// It never arrived: nothing to abort.
	case !e.local:
		c.cfg.Logger.Warn("the platform refused a decision", "decision", d.kind.String(), "transaction_id", d.id.String(), "error", err)
	}
	if p := guard(func() error { d.done(err); return nil }); p != nil {
		c.cfg.Logger.Error("after a decision was acknowledged", "transaction_id", d.id.String(), "error", p)
	}
	q := &c.decisions
	q.mu.Lock()
	defer q.mu.Unlock()
	q.pending--
	if q.pending == 0 && q.idle != nil {
		close(q.idle)
		q.idle = nil
	}
}

// sendUnary hands the decision to the workers, which start with the first one.
func (d *decision) sendUnary() {
	c := d.c
	c.mu.Lock()
	if c.closed {
		c.mu.Unlock()
		d.finish(errClosed)
		return
	}
	if !c.decisions.started {
		c.decisions.started = true
		for range unaryDeciders {
			c.wg.Go(func() { c.decisions.work(c) })
		}
	}
	c.decisions.unary <- d
	c.mu.Unlock()
}

func (q *decisions) work(c *Client) {
	for {
		select {
		case <-c.life.Done():
			for {
				select {
				case d := <-q.unary:
					d.finish(errClosed)
				default:
					return
				}
			}
		case d := <-q.unary:
			_, err := c.unaryRoundTrip(c.life, d.kind, d.body, c.cfg.CallTimeout, true)
			if c.life.Err() != nil && err != nil {
				err = errClosed
			} else if err != nil {
				err.local = false // it was sent: a failure on the way is worth another try
			}
			d.answered(answer{err: err})
		}
	}
}

// drained returns a channel that is closed when no decision is pending.
func (q *decisions) drained() <-chan struct{} {
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.pending == 0 {
		done := make(chan struct{})
		close(done)
		return done
	}
	if q.idle == nil {
		q.idle = make(chan struct{})
	}
	return q.idle
}
