package server

import (
	"context"
	"errors"
	"io"
	"math/rand/v2"
	"sync"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"

	outboxv1 "github.com/outbox-platform/outbox/gen/go/outbox/v1"
	"github.com/outbox-platform/outbox/store"
)

const (
	// maxResults is how many results travel in one message: far below what clients accept, even if all are errors.
	maxResults = 1024
	// maxUndecided is how many undecided transactions a session remembers for the time when it breaks. Those beyond it are
	// found later, in the store.
	maxUndecided = 16384
	// maxQuestions is how many questions may wait for answers on one session.
	maxQuestions = 64
)

// session is one open Session. Its handler's goroutine sends, a second one receives; the writer's goroutines only append
// to results.
type session struct {
	server    *Server
	id        uint64
	source    *source // as it was registered when the session began
	databases []string
	instance  string
	sdk       string
	known     *identities // those by which the caller was admitted
	stream    grpc.BidiStreamingServer[outboxv1.SessionRequest, outboxv1.SessionResponse]

	wake chan struct{} // something to send
	room chan struct{} // the sender took what was queued
	end  chan error    // the receiver has ended; nil: the client closed its side

	mu        sync.Mutex
	results   []result
	spare     []result // the sender's other buffer
	control   []*outboxv1.SessionResponse
	open      int  // calls with the writer
	closed    bool // the sender has gone
	undecided map[store.TransactionID]store.DatabaseTransaction
	questions map[uint64]*question
	out       results // the sender's
}

// result is an answer on its way out. call is nil when the call was refused before it got to the writer.
type result struct {
	call    *call
	id      uint64
	answer  store.Answer
	refused *apiError
}

// Session implements outbox.v1.OutboxService.
func (s outboxService) Session(stream grpc.BidiStreamingServer[outboxv1.SessionRequest, outboxv1.SessionResponse]) error {
	ses, err := s.openSession(stream)
	if err != nil {
		return err
	}
	if err := s.sessions.add(ses); err != nil {
		return err
	}
	defer ses.close()
	// It is registered first: whoever was welcomed can be asked.
	if err := stream.Send(s.welcome()); err != nil {
		return err
	}
	s.log.Info("session opened", "session", ses.id, "source", ses.source.Name, "instance", ses.instance, "sdk", ses.sdk)
	s.receivers.Add(1)
	go func() {
		defer s.receivers.Done()
		ses.end <- s.guarded(func() error { return ses.receive(stream.Context()) })
	}()
	err = ses.send(stream.Context())
	s.log.Info("session ended", "session", ses.id, "source", ses.source.Name, "instance", ses.instance, "error", err)
	return err
}

// openSession receives Hello.
func (s outboxService) openSession(stream grpc.BidiStreamingServer[outboxv1.SessionRequest, outboxv1.SessionResponse]) (*session, error) {
	ctx := stream.Context()
	req, err := stream.Recv()
	if err != nil {
		if errors.Is(err, io.EOF) {
			return nil, nilHello
		}
		return nil, err
	}
	helloArrived(ctx)
	if e := s.validator.message(req); e != nil {
		return nil, e
	}
	hello := req.GetHello()
	if hello == nil {
		return nil, nilHello
	}
	known := s.identities.get()
	if err := admitted(ctx, known, hello.GetSource()); err != nil {
		return nil, err
	}
	src, err := s.findSource(ctx, hello.GetSource())
	if err != nil {
		return nil, err
	}
	for _, name := range hello.GetDatabases() {
		if src.database(name) == nil {
			return nil, fieldError("hello.databases", "source %q has no database %q", src.Name, name)
		}
	}
	ses := &session{
		server:    s.Server,
		source:    src,
		databases: hello.GetDatabases(),
		instance:  hello.GetInstance(),
		sdk:       hello.GetSdk(),
		known:     known,
		stream:    stream,
		wake:      make(chan struct{}, 1),
		room:      make(chan struct{}, 1),
		end:       make(chan error, 1),
		undecided: make(map[store.TransactionID]store.DatabaseTransaction),
		questions: make(map[uint64]*question),
	}
	return ses, nil
}

// welcome is the first response of a session.
func (s *Server) welcome() *outboxv1.SessionResponse {
	return &outboxv1.SessionResponse{Response: &outboxv1.SessionResponse_Welcome_{Welcome: &outboxv1.SessionResponse_Welcome{
		Limits: s.cfg.limitsProto(), Server: s.name,
	}}}
}

// admitted reports whether the caller of a session may act for a source.
func admitted(ctx context.Context, known *identities, source string) error {
	p, err := known.identify(ctx)
	if err != nil {
		return err
	}
	if !p.actsFor(source) {
		return sourceDenied(source)
	}
	return nil
}

// nilHello: a session must begin with Hello.
var nilHello = fieldError("hello", "a session must begin with it")

// limitsProto are the limits as Welcome tells them.
func (c Config) limitsProto() *outboxv1.Limits {
	//nolint:gosec // positive, and bounded by Validate or by int
	return &outboxv1.Limits{
		MaxEventsPerTransaction: uint32(c.MaxEvents),
		MaxTransactionBytes:     uint64(c.MaxTransactionBytes),
		MaxEventBytes:           uint64(c.MaxEventBytes),
		MaxHeaders:              uint32(c.MaxHeaders),
		MaxHeaderBytes:          uint32(c.MaxHeaderBytes),
		MaxOpenCalls:            uint32(c.MaxOpenCalls),
	}
}

// receive takes requests until the client closes its side (nil) or the stream breaks. While the client does not read its
// results it stops taking more.
func (s *session) receive(ctx context.Context) error {
	var req outboxv1.SessionRequest
	for {
		if err := s.waitForRoom(ctx); err != nil {
			return err
		}
		if err := s.stream.RecvMsg(&req); err != nil {
			if errors.Is(err, io.EOF) {
				return nil
			}
			return err
		}
		if now := s.server.identities.get(); now != s.known {
			// The tokens file changed: a credential that was taken away must not live on in an open session.
			if err := admitted(ctx, now, s.source.Name); err != nil {
				return err
			}
			s.known = now
		}
		switch r := req.GetRequest().(type) {
		case *outboxv1.SessionRequest_Calls_:
			calls := r.Calls.GetCalls()
			if n := len(calls); n == 0 || n > maxCallsOfProto {
				return fieldError("calls.calls", "between 1 and %d calls, not %d", maxCallsOfProto, n)
			}
			for _, c := range calls {
				s.accept(c)
			}
		case *outboxv1.SessionRequest_CheckAnswers_:
			if e := s.server.validator.message(r.CheckAnswers); e != nil {
				return e
			}
			s.checkAnswers(r.CheckAnswers)
		default:
			return fieldError("request", "neither calls nor check_answers")
		}
	}
}

// waitForRoom waits while too many results are queued.
func (s *session) waitForRoom(ctx context.Context) error {
	for {
		s.mu.Lock()
		full := len(s.results) >= 2*s.server.cfg.MaxOpenCalls
		s.mu.Unlock()
		if !full {
			return nil
		}
		select {
		case <-s.room:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// accept validates one call and hands it to the writer. A call that is refused is answered at once, and alone.
func (s *session) accept(req *outboxv1.SessionRequest_Call) {
	c := &call{server: s.server, started: time.Now(), session: s, id: req.GetCallId()}
	if e := s.start(c, req); e != nil {
		s.server.metrics.refuse(e)
		s.push(result{id: c.id, refused: e})
	}
}

func (s *session) start(c *call, req *outboxv1.SessionRequest_Call) *apiError {
	v, topics := s.server.validator, s.server.sources.topics()
	name, kind := callSource(req)
	if kind == "" {
		return fieldError("call", "none of prepare, commit, abort, publish")
	}
	if name != s.source.Name {
		return sourceDenied(name)
	}
	if c.source = s.server.sources.known(name); c.source == nil {
		return sourceDenied(name) // deleted meanwhile
	}
	var e *apiError
	switch r := req.GetCall().(type) {
	case *outboxv1.SessionRequest_Call_Prepare:
		e = v.prepare(c, r.Prepare, c.source, topics)
	case *outboxv1.SessionRequest_Call_Publish:
		e = v.publish(c, r.Publish, c.source, topics)
	case *outboxv1.SessionRequest_Call_Commit:
		e = v.decision(c, store.KindCommit, r.Commit, c.source, s.server.shards)
	case *outboxv1.SessionRequest_Call_Abort:
		e = v.decision(c, store.KindAbort, r.Abort, c.source, s.server.shards)
	}
	if e != nil {
		return e
	}
	if !s.reserve() {
		return quotaExceeded(s.source.Name, "open_calls", s.server.cfg.MaxOpenCalls)
	}
	if e = c.submit(); e != nil {
		s.mu.Lock()
		s.open--
		s.mu.Unlock()
	}
	return e
}

// callSource returns the source that a call names, and which call it is.
func callSource(req *outboxv1.SessionRequest_Call) (source, kind string) {
	switch r := req.GetCall().(type) {
	case *outboxv1.SessionRequest_Call_Prepare:
		return r.Prepare.GetSource(), "prepare"
	case *outboxv1.SessionRequest_Call_Publish:
		return r.Publish.GetSource(), "publish"
	case *outboxv1.SessionRequest_Call_Commit:
		return r.Commit.GetSource(), "commit"
	case *outboxv1.SessionRequest_Call_Abort:
		return r.Abort.GetSource(), "abort"
	}
	return "", ""
}

// reserve counts one more call with the writer, if there may be one more.
func (s *session) reserve() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.open >= s.server.cfg.MaxOpenCalls {
		return false
	}
	s.open++
	return true
}

// answer queues the answer of a call. The writer calls it; it never waits for the client.
func (s *session) answer(c *call, a store.Answer) {
	if s.push(result{call: c, id: c.id, answer: a}) {
		return
	}
	// The session is gone: nobody will hear it, and its source may be gone too.
	if c.outcome(a.Err) == nil && askable(c) {
		s.server.sessions.broke(s, []store.Parked{{Key: c.request.Key, Database: &c.database}})
	}
}

// askable reports whether a prepared transaction is one whose decision can be asked for.
func askable(c *call) bool {
	return c.request.Kind == store.KindPrepare && c.database.Mode != store.ModeClientOnly
}

// push queues a result; false: the session is closed.
func (s *session) push(r result) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return false
	}
	s.results = append(s.results, r)
	if len(s.results) == 1 {
		s.signal()
	}
	return true
}

// tell queues a question or a notice; false: the session is closed.
func (s *session) tell(m *outboxv1.SessionResponse) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return false
	}
	s.control = append(s.control, m)
	s.signal()
	return true
}

func (s *session) signal() {
	select {
	case s.wake <- struct{}{}:
	default:
	}
}

// send sends what is queued until the stream breaks, the client has closed its side and everything is answered, or the
// server stops.
func (s *session) send(ctx context.Context) error {
	age := s.server.cfg.MaxConnectionAge
	//nolint:gosec // jitter
	move := time.NewTimer(age*2/5 + time.Duration(rand.Int64N(int64(age)/10+1)))
	defer move.Stop()
	ended := false
	for {
		taken, control, open := s.take()
		for _, m := range control {
			if err := s.stream.Send(m); err != nil {
				return err
			}
		}
		for len(taken) > 0 {
			n := min(len(taken), maxResults)
			if err := s.stream.SendMsg(s.out.message(s, taken[:n])); err != nil {
				return err
			}
			clear(taken[:n]) // the buffer is used again: let go of the calls
			taken = taken[n:]
		}
		if ended && open == 0 {
			return nil
		}
		select {
		case <-s.wake:
		case err := <-s.end:
			if err != nil {
				return err
			}
			ended = true
			s.signal()
		case <-move.C:
			s.tell(drainNotice(age / 2))
		case <-s.server.sessions.stop:
			return errDraining
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// take takes everything that is queued, and remembers which transactions are undecided now.
func (s *session) take() (taken []result, control []*outboxv1.SessionResponse, open int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	taken, s.results, s.spare = s.results, s.spare[:0], s.results
	control, s.control = s.control, nil
	for i := range taken {
		if c := taken[i].call; c != nil {
			s.open--
			s.remember(c, taken[i].answer.Err)
		}
	}
	select {
	case s.room <- struct{}{}:
	default:
	}
	return taken, control, s.open + len(s.results)
}

// remember keeps undecided in step with an answer. s.mu is held.
func (s *session) remember(c *call, err error) {
	id := c.request.Key.Transaction
	switch {
	case c.request.Kind == store.KindPrepare:
		if err == nil && askable(c) && len(s.undecided) < maxUndecided {
			s.undecided[id] = c.database
		}
	case err == nil || !errors.Is(err, store.ErrUnavailable) && !errors.Is(err, store.ErrContention):
		delete(s.undecided, id)
	}
}

// close takes the session out of the registry and reports what it leaves undecided.
func (s *session) close() {
	s.server.sessions.remove(s)
	s.mu.Lock()
	s.closed = true
	left := s.results
	s.results, s.spare = nil, nil
	for i := range left {
		if c := left[i].call; c != nil {
			s.remember(c, left[i].answer.Err)
		}
	}
	inDoubt := make([]store.Parked, 0, len(s.undecided))
	for id, d := range s.undecided {
		inDoubt = append(inDoubt, store.Parked{Key: store.Key{Source: s.source.ID, Transaction: id}, Database: &d})
	}
	questions := s.questions
	s.questions, s.undecided = nil, nil
	s.mu.Unlock()
	for i := range left {
		if c := left[i].call; c != nil {
			_ = c.outcome(left[i].answer.Err) // counted; nobody is there to be told
		}
	}
	for _, q := range questions {
		q.reply(s, nil, true)
	}
	if len(inDoubt) > 0 {
		s.server.sessions.broke(s, inDoubt)
	}
}

// results builds Results messages in buffers that are used again: grpc has encoded a message when SendMsg returns.
type results struct {
	response outboxv1.SessionResponse
	results  outboxv1.SessionResponse_Results_
	body     outboxv1.SessionResponse_Results
	entries  []outboxv1.SessionResponse_Result
	pointers []*outboxv1.SessionResponse_Result
	tokens   []byte
}

// message builds one message of at most maxResults results.
func (o *results) message(s *session, taken []result) *outboxv1.SessionResponse {
	if need := len(taken); need > len(o.entries) {
		o.entries = make([]outboxv1.SessionResponse_Result, need)
		o.pointers = make([]*outboxv1.SessionResponse_Result, need)
		for i := range o.entries {
			o.pointers[i] = &o.entries[i]
		}
	}
	o.tokens = o.tokens[:0]
	for i := range taken {
		r, entry := &taken[i], &o.entries[i]
		entry.CallId, entry.Status, entry.Token = r.id, nil, nil
		e := r.refused
		if r.call != nil {
			e = r.call.outcome(r.answer.Err)
		}
		switch {
		case e != nil:
			if e.code == codes.Internal {
				s.server.logInternal(e, "session call")
			}
			entry.Status = e.proto()
		case r.call.request.Kind == store.KindPrepare:
			from := len(o.tokens)
			o.tokens = appendToken(o.tokens, r.answer.Shards, r.call.request.Key)
			entry.Token = o.tokens[from:len(o.tokens):len(o.tokens)]
		}
	}
	o.body.Results = o.pointers[:len(taken)]
	o.results.Results = &o.body
	o.response.Response = &o.results
	return &o.response
}

func drainNotice(grace time.Duration) *outboxv1.SessionResponse {
	//nolint:gosec // a duration of the configuration
	return &outboxv1.SessionResponse{Response: &outboxv1.SessionResponse_DrainNotice_{
		DrainNotice: &outboxv1.SessionResponse_DrainNotice{GraceMs: uint32(min(grace.Milliseconds(), 1<<31))},
	}}
}
