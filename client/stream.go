package client

import (
	"context"
	"errors"
	"fmt"
	"io"
	"runtime"
	"sync/atomic"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/mem"

	outboxv1 "github.com/outbox-platform/outbox/gen/go/outbox/v1"
)

// stream is one gRPC stream of a session, from Welcome to its end, on a connection of its own: a new stream may so be
// balanced to another server than the old one.
type stream struct {
	s      *session
	conn   *grpc.ClientConn
	grpc   grpc.ClientStream
	ctx    context.Context
	cancel context.CancelCauseFunc
	server string
	limit  int // calls that may be open

	batchBytes int // of calls in one message

	databases int // that Hello named

	wake    chan struct{} // something to send, or less open
	replace chan struct{} // another stream should take this one's place
	done    chan struct{} // ended; its calls are back in the queue

	lastRecv atomic.Int64 // when the server last sent anything, in nanoseconds since opened
	opened   time.Time

	// guarded by session.mu
	open    map[uint64]*call           // sent, not answered; nil: nobody waits for it any more
	answers []*outboxv1.SessionRequest // check answers to send, before calls
	leaving bool                       // takes no more calls, ends when none is open
	grace   *time.Timer                // ends a leaving stream
	batch   []*call                    // scratch of the sender
}

// connect opens a stream: connection, Hello, Welcome.
func (s *session) connect(ctx context.Context) (*stream, *Error) {
	cfg := &s.c.cfg
	ctx, cancel := context.WithCancelCause(ctx)
	late := fmt.Errorf("no session within %v", cfg.ConnectTimeout)
	limit := time.AfterFunc(cfg.ConnectTimeout, func() { cancel(late) })
	defer limit.Stop()
	fail := func(conn *grpc.ClientConn, err error) (*stream, *Error) {
		e := errorOf(err)
		if cause := context.Cause(ctx); cause != nil {
			e = &Error{Code: codes.Unavailable, Message: cause.Error(), cause: err}
		}
		cancel(err)
		if conn != nil {
			_ = conn.Close() // it never carried anything
		}
		return nil, e
	}
	conn, err := s.c.dial(loadBalancingStream)
	if err != nil {
		return fail(nil, err)
	}
	gs, err := conn.NewStream(ctx, &outboxv1.OutboxService_ServiceDesc.Streams[0], outboxv1.OutboxService_Session_FullMethodName,
		grpc.ForceCodecV2(s.c.codec))
	if err != nil {
		return fail(conn, err)
	}
	names := s.c.databaseNames()
	hello := &outboxv1.SessionRequest_Hello{Source: cfg.Source, Instance: cfg.Instance, Sdk: Version, Databases: names}
	err = gs.SendMsg(&outboxv1.SessionRequest{Request: &outboxv1.SessionRequest_Hello_{Hello: hello}})
	if err != nil && !errors.Is(err, io.EOF) { // EOF: RecvMsg says why
		return fail(conn, err)
	}
	var resp response
	if err := gs.RecvMsg(&resp); err != nil {
		return fail(conn, err)
	}
	welcome := resp.other.GetWelcome()
	if welcome == nil {
		return fail(conn, errors.New("the session did not begin with Welcome"))
	}
	if !limit.Stop() {
		return fail(conn, late)
	}
	limits := limitsOf(welcome.GetLimits())
	s.c.limits.Store(&limits)
	st := &stream{
		s: s, conn: conn, grpc: gs, ctx: ctx, cancel: cancel, server: welcome.GetServer(), limit: limits.OpenCalls,
		wake: make(chan struct{}, 1), replace: make(chan struct{}, 1), done: make(chan struct{}),
		batchBytes: min(maxMessageBytes, limits.TransactionBytes), opened: time.Now(), open: make(map[uint64]*call), databases: len(names),
	}
	s.c.stats.sessions.Add(1)
	s.c.wg.Go(st.sendLoop)
	s.c.wg.Go(st.receiveLoop)
	return st, nil
}

// poke wakes the sender. It may be called on nil.
func (st *stream) poke() {
	if st == nil {
		return
	}
	select {
	case st.wake <- struct{}{}:
	default:
	}
}

// askReplace makes the session open another stream.
func (st *stream) askReplace() {
	select {
	case st.replace <- struct{}{}:
	default:
	}
}

// end breaks the stream off.
func (st *stream) end(why error) { st.cancel(why) }

// leave lets the stream finish: it takes no more calls and ends when its last one is answered, or when grace is over (zero:
// the time of a call). The caller holds session.mu.
func (st *stream) leave(grace time.Duration) {
	if st.leaving {
		return
	}
	st.leaving = true
	if grace <= 0 {
		grace = st.s.c.cfg.CallTimeout
	}
	st.grace = time.AfterFunc(grace, func() { st.end(errLeft) })
	st.endIfIdle()
}

var errLeft = errors.New("moved to another session")

// endIfIdle ends a leaving stream whose calls are all answered. The caller holds session.mu.
func (st *stream) endIfIdle() {
	if st.leaving && len(st.open) == 0 && len(st.answers) == 0 {
		st.end(errLeft)
	}
}

// silentSince tells whether the server has sent nothing since then, for long enough to believe that it is gone.
func (st *stream) silentSince(t time.Time) bool {
	last := st.opened.Add(time.Duration(st.lastRecv.Load()))
	return last.Before(t) && time.Since(last) >= st.s.c.cfg.PrepareTimeout
}

// overdue tells whether a call was sent before then and not answered. The caller holds session.mu.
func (st *stream) overdue(t time.Time) bool {
	for _, cl := range st.open {
		if cl != nil && cl.sentAt.Before(t) {
			return true
		}
	}
	return false
}

// sendLoop sends what waits, all of it in one message: the more there is to do, the larger the messages. It never waits for
// more.
func (st *stream) sendLoop() {
	for {
		msg := st.next()
		if msg == nil {
			select {
			case <-st.wake:
				// Let callers that are ready to run queue their calls first: no waiting, only a better order of work.
				runtime.Gosched()
				continue
			case <-st.ctx.Done():
				return
			}
		}
		if err := st.grpc.SendMsg(msg); err != nil {
			return // receiveLoop learns why
		}
	}
}

// next returns the next message to send; nil: there is none.
func (st *stream) next() any {
	s := st.s
	s.mu.Lock()
	defer s.mu.Unlock()
	if n := len(st.answers); n > 0 {
		msg := st.answers[0]
		st.answers = st.answers[1:]
		st.endIfIdle()
		return msg
	}
	if s.current != st || st.leaving || st.open == nil || s.queue.head == nil {
		return nil
	}
	size := 0
	st.batch = st.batch[:0]
	for cl := s.queue.head; cl != nil && len(st.open)+len(st.batch) < st.limit && len(st.batch) < maxMessageCalls; cl = s.queue.head {
		if size > 0 && size+cl.size() > st.batchBytes {
			break
		}
		size += cl.size()
		s.queue.remove(cl)
		st.batch = append(st.batch, cl)
	}
	if len(st.batch) == 0 {
		return nil
	}
	now := time.Now()
	msg := make(frame, 0, 1+2*len(st.batch))
	msg = append(msg, mem.SliceBuffer(callsPrefix(size)))
	for _, cl := range st.batch {
		cl.stream, cl.sentAt = st, now
		cl.sends++
		st.open[cl.id] = cl
		msg = append(msg, mem.SliceBuffer(cl.head.bytes[:cl.head.n]), mem.SliceBuffer(cl.body))
	}
	s.c.stats.messages.Add(1)
	s.c.stats.calls.Add(uint64(len(st.batch)))
	return msg
}

// receiveLoop takes what the server sends, until the stream ends.
func (st *stream) receiveLoop() {
	err := st.receive()
	if cause := context.Cause(st.ctx); cause != nil {
		err = cause
	}
	st.cancel(err)
	_ = st.conn.Close() // err says why the stream has ended
	st.s.ended(st, err)
	close(st.done)
}

func (st *stream) receive() error {
	var (
		resp    response
		settled []settlement
	)
	for {
		if err := st.grpc.RecvMsg(&resp); err != nil {
			return err
		}
		st.lastRecv.Store(int64(time.Since(st.opened)))
		if resp.other == nil {
			settled = st.settle(resp.results, settled[:0])
			continue
		}
		switch r := resp.other.GetResponse().(type) {
		case *outboxv1.SessionResponse_CheckQuestion_:
			st.s.c.answerCheck(st, r.CheckQuestion)
		case *outboxv1.SessionResponse_DrainNotice_:
			st.drain(time.Duration(r.DrainNotice.GetGraceMs()) * time.Millisecond)
		}
	}
}

// drain moves the session away from a server that is about to stop.
func (st *stream) drain(grace time.Duration) {
	s := st.s
	s.mu.Lock()
	if s.current == st {
		s.current = nil
		s.link = LinkConnecting
	}
	st.leave(grace)
	st.askReplace()
	s.mu.Unlock()
	s.c.stats.drains.Add(1)
	s.c.linkChanged()
}

type settlement struct {
	call *call
	res  answer
}

// settle ends the calls that were answered.
func (st *stream) settle(results []result, settled []settlement) []settlement {
	s := st.s
	s.mu.Lock()
	for _, r := range results {
		cl := st.open[r.id]
		delete(st.open, r.id)
		if cl == nil {
			continue // its caller has gone
		}
		cl.stream = nil
		a := answer{token: r.token}
		if r.status != nil && r.status.Code != 0 {
			a = answer{err: errorOfStatus(r.status)}
		}
		settled = append(settled, settlement{cl, a})
	}
	if s.queue.len > 0 && s.current == st {
		st.poke() // the limit of open calls may have held it back
	}
	st.endIfIdle()
	s.mu.Unlock()
	for i := range settled {
		settled[i].call.deliver(settled[i].res)
		settled[i].call = nil
	}
	return settled
}

// answer queues check answers.
func (st *stream) answer(msg *outboxv1.SessionRequest) {
	st.s.mu.Lock()
	defer st.s.mu.Unlock()
	if st.open == nil {
		return // the stream is gone; the server asks another one
	}
	st.answers = append(st.answers, msg)
	st.poke()
}
