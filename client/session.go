package client

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"sync"
	"time"

	"github.com/cenkalti/backoff/v5"
	"google.golang.org/grpc/codes"
)

// Link says whether the platform can be reached on a session.
type Link int32

// The states of the link.
const (
	// LinkConnecting: not tried yet, or a session has just ended and the next one is being opened. Calls wait for it.
	LinkConnecting Link = iota
	// LinkUp: a session is open, or calls go out as unary calls.
	LinkUp
	// LinkDown: the last attempt failed. Attempts go on.
	LinkDown
)

// String returns "connecting", "up" or "down".
func (l Link) String() string { return [...]string{"connecting", "up", "down"}[l] }

const (
	// firstReconnectDelay is the back-off after the first failed attempt to open a session.
	firstReconnectDelay = 50 * time.Millisecond
	// steadyAfter is how long a session must live for the next attempt to come at once and with fresh back-off.
	steadyAfter = time.Second
	// unaryFor is how long unary calls are made before a session is tried again, when sessions are not served.
	unaryFor = time.Minute
	// maxMessageBytes and maxMessageCalls bound the calls that are put into one message. A larger call travels alone.
	maxMessageBytes = 512 << 10
	maxMessageCalls = 1024
)

// errNoSessions sends a call to the unary path.
var errNoSessions = &Error{Code: codes.Unimplemented, Message: "the platform does not serve sessions", local: true}

// session is a stream to the platform that outlives its streams: it queues calls, gives them to the current stream, and
// takes them back when that one ends without having answered.
type session struct {
	c *Client

	mu      sync.Mutex
	queue   queue   // calls that no stream has taken
	current *stream // takes calls; nil while none is open
	link    Link
	unary   bool   // sessions are not served
	closed  bool   // no more calls
	lastErr *Error // why the last attempt failed
	nextID  uint64
	ride    ride
}

// roundTrip sends one call and waits for its answer, the end of ctx, or the timeout. failFast: do not wait for a session
// while the link is down.
func (s *session) roundTrip(ctx context.Context, k kind, body encoded, timeout time.Duration, failFast bool) ([]byte, *Error) {
	cl := newCall(k, body)
	if err := s.enqueue(cl, failFast); err != nil {
		return nil, err
	}
	cl.timer.Reset(timeout)
	var why *Error
	select {
	case a := <-cl.answer:
		cl.recycle()
		return a.token, a.err
	case <-ctx.Done():
		why = contextError(ctx, k.String())
	case <-cl.timer.C:
		why = timeoutError(k, timeout)
	}
	cl.timer.Stop()
	if !s.giveUp(cl, why) {
		a := <-cl.answer // it was answered in this very moment
		return a.token, a.err
	}
	return nil, why
}

func timeoutError(k kind, timeout time.Duration) *Error {
	return &Error{
		Code: codes.DeadlineExceeded, Message: fmt.Sprintf("%s: no answer within %v", k, timeout.Round(time.Millisecond)),
		cause: context.DeadlineExceeded, local: true,
	}
}

// enqueue puts a call into the queue, or says why not.
func (s *session) enqueue(cl *call, failFast bool) *Error {
	s.mu.Lock()
	defer s.mu.Unlock()
	switch {
	case s.closed:
		return errClosed
	case s.unary:
		return errNoSessions
	case s.link == LinkDown && cl.later == nil && (failFast || s.lastErr.refused()):
		return s.downError(cl.kind)
	}
	s.nextID++
	cl.id = s.nextID
	cl.head.set(cl.kind, cl.id, len(cl.body))
	s.queue.push(cl)
	if cl.later == nil {
		s.ride.called(time.Now())
		s.current.poke()
	} else if !s.ride.waits(s.decisionsWaited) {
		s.current.poke()
	}
	return nil
}

// decisionsWaited sends decisions that no call has taken along.
func (s *session) decisionsWaited() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.ride.armed = false
	s.current.poke()
}

// downError is the failure of a call that was never sent. The caller holds mu.
func (s *session) downError(k kind) *Error {
	last := s.lastErr
	e := &Error{Code: codes.Unavailable, Message: fmt.Sprintf("%s: no session with the platform", k), local: true}
	if last == nil {
		return e
	}
	e.Message += ": " + last.Error()
	e.cause, e.fatal = last, last.refused()
	if e.fatal {
		e.Code, e.Reason, e.Metadata = last.Code, last.Reason, last.Metadata
	}
	return e
}

// giveUp takes a call back that its caller no longer waits for and completes the reason. False: it is being answered.
func (s *session) giveUp(cl *call, why *Error) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	switch {
	case cl.queued:
		s.queue.remove(cl)
		if cl.sends == 0 && why.Code == codes.DeadlineExceeded && s.link != LinkUp {
			cause := why.cause
			*why = *s.downError(cl.kind) // it certainly had no effect
			why.cause = cause
		}
		return true
	case cl.stream != nil:
		st := cl.stream
		st.open[cl.id] = nil // its answer is still due and still counts
		if st.silentSince(cl.sentAt) {
			st.end(errStalled)
		}
		return true
	default:
		return false
	}
}

var errStalled = errors.New("the platform does not answer")

// run keeps a stream open until ctx ends.
func (s *session) run(ctx context.Context) {
	delays := s.delays()
	for ctx.Err() == nil {
		st, err := s.connect(ctx)
		if ctx.Err() != nil {
			return
		}
		if err != nil {
			sleep(ctx, s.failed(err, delays))
			continue
		}
		opened := time.Now()
		s.opened(st)
		s.watch(ctx, st)
		if time.Since(opened) >= steadyAfter {
			delays.Reset()
			continue
		}
		sleep(ctx, delays.NextBackOff())
	}
}

// watch returns when the stream ended or another one should take its place.
func (s *session) watch(ctx context.Context, st *stream) {
	tick := time.NewTicker(s.c.cfg.CallTimeout)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-st.done:
			return
		case <-st.replace:
			return
		case <-tick.C:
			// An answer that never came: the caller of a synchronous call has given up long ago, a Commit has nobody else.
			s.mu.Lock()
			if st.overdue(time.Now().Add(-3 * s.c.cfg.CallTimeout)) {
				st.end(errStalled)
			}
			s.mu.Unlock()
		}
	}
}

func (s *session) delays() *backoff.ExponentialBackOff {
	b := backoff.NewExponentialBackOff()
	b.InitialInterval = min(firstReconnectDelay, s.c.cfg.MaxReconnectDelay)
	b.MaxInterval = s.c.cfg.MaxReconnectDelay
	b.Multiplier = 2
	b.RandomizationFactor = 0.5
	b.Reset()
	return b
}

// failed notes that no stream could be opened, and returns how long to wait.
func (s *session) failed(err *Error, delays *backoff.ExponentialBackOff) time.Duration {
	s.mu.Lock()
	first := s.link != LinkDown && !s.unary
	s.lastErr = err
	var orphans []*call
	switch {
	case err.sessionsNotServed():
		s.unary = true
		orphans = s.takeQueue(func(*call) bool { return true })
	default:
		s.unary = false
		s.link = LinkDown
		if err.refused() {
			orphans = s.takeQueue(func(cl *call) bool { return cl.later == nil })
		}
	}
	unary := s.unary
	s.mu.Unlock()

	for _, cl := range orphans {
		if unary {
			cl.deliver(answer{err: errNoSessions})
			continue
		}
		s.mu.Lock()
		e := s.downError(cl.kind)
		s.mu.Unlock()
		cl.deliver(answer{err: e})
	}
	s.c.linkChanged()
	if unary {
		if first {
			s.c.cfg.Logger.Info("the platform does not serve sessions; making unary calls", "source", s.c.cfg.Source, "error", err)
		}
		return unaryFor/2 + rand.N(unaryFor)
	}
	s.c.stats.connectFailures.Add(1)
	if first {
		s.c.cfg.Logger.Warn("no session with the platform; trying again", "source", s.c.cfg.Source, "error", err)
	}
	return max(delays.NextBackOff(), min(err.RetryAfter, s.c.cfg.MaxReconnectDelay))
}

// takeQueue removes calls from the queue. The caller holds mu.
func (s *session) takeQueue(which func(*call) bool) []*call {
	var out []*call
	for cl := s.queue.head; cl != nil; {
		next := cl.next
		if which(cl) {
			s.queue.remove(cl)
			out = append(out, cl)
		}
		cl = next
	}
	return out
}

// opened makes st the current stream.
func (s *session) opened(st *stream) {
	s.mu.Lock()
	old := s.current
	s.current = st
	s.link, s.unary, s.lastErr = LinkUp, false, nil
	if old != nil {
		old.leave(0)
	}
	st.poke()
	s.mu.Unlock()
	if s.c.databasesChanged(st.databases) {
		st.askReplace() // registered between Hello and now
	}
	s.c.linkChanged()
	s.c.cfg.Logger.Info("session open", "source", s.c.cfg.Source, "server", st.server)
}

// ended takes back what the stream did not answer.
func (s *session) ended(st *stream, err error) {
	s.mu.Lock()
	open := make([]*call, 0, len(st.open))
	for _, cl := range st.open {
		if cl != nil {
			open = append(open, cl)
		}
	}
	st.open = nil
	if st.grace != nil {
		st.grace.Stop()
	}
	slices.SortFunc(open, func(a, b *call) int { return int(b.id - a.id) }) // newest first: each goes before the one before
	for _, cl := range open {
		cl.stream = nil
		if s.closed {
			continue
		}
		s.queue.insert(cl)
		s.c.stats.resent.Add(1)
	}
	if s.current == st {
		s.current = nil
		if s.link == LinkUp {
			s.link = LinkConnecting
		}
	}
	s.current.poke()
	closed := s.closed
	s.mu.Unlock()
	if closed {
		for _, cl := range open {
			cl.deliver(answer{err: errClosed})
		}
		return
	}
	s.c.linkChanged()
	s.c.cfg.Logger.Info("session ended", "source", s.c.cfg.Source, "server", st.server, "unanswered", len(open), "error", err)
}

// renew opens a new stream, for example because Hello would now say something else. The old one finishes.
func (s *session) renew() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.current != nil {
		s.current.askReplace()
	}
}

// close fails what is queued and everything that comes later.
func (s *session) close() {
	s.mu.Lock()
	s.closed = true
	orphans := s.takeQueue(func(*call) bool { return true })
	s.mu.Unlock()
	for _, cl := range orphans {
		cl.deliver(answer{err: errClosed})
	}
}

// state returns the link, and whether sessions are not served.
func (s *session) state() (Link, bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.link, s.unary
}

// sleep waits, or returns early when ctx ends.
func sleep(ctx context.Context, d time.Duration) {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-ctx.Done():
	case <-t.C:
	}
}
