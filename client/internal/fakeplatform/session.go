package fakeplatform

import (
	"context"
	"slices"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	outboxv1 "github.com/outbox-platform/outbox/gen/go/outbox/v1"
)

type stream = outboxv1.OutboxService_SessionServer

// fakeSession is one open session.
type fakeSession struct {
	p      *Platform
	stream stream
	hello  *outboxv1.SessionRequest_Hello
	ctx    context.Context
	cancel context.CancelFunc
	wg     sync.WaitGroup

	sending sync.Mutex
	mu      sync.Mutex
	asked   uint64
	waiting map[uint64]chan *outboxv1.SessionRequest_CheckAnswers
}

// Session implements the API.
func (p *Platform) Session(st stream) error {
	f := p.arrived(Call{Name: "session"})
	p.authorize(st.Context())
	if f.Silent {
		<-st.Context().Done()
		return st.Context().Err()
	}
	if f.Err != nil {
		return f.Err
	}
	first, err := st.Recv()
	if err != nil {
		return err
	}
	hello := first.GetHello()
	if hello.GetSource() == "" {
		return status.Error(codes.InvalidArgument, "the session must begin with Hello")
	}
	ctx, cancel := context.WithCancel(st.Context())
	s := &fakeSession{p: p, stream: st, hello: hello, ctx: ctx, cancel: cancel, waiting: make(map[uint64]chan *outboxv1.SessionRequest_CheckAnswers)}
	defer s.wg.Wait()
	defer cancel()
	p.mu.Lock()
	limits := p.limits
	p.mu.Unlock()
	err = s.send(&outboxv1.SessionResponse{Response: &outboxv1.SessionResponse_Welcome_{
		Welcome: &outboxv1.SessionResponse_Welcome{Server: "fake", Limits: limits},
	}})
	if err != nil {
		return err
	}
	p.mu.Lock()
	p.sessions[s] = struct{}{}
	p.notify()
	p.mu.Unlock()
	defer func() {
		p.mu.Lock()
		defer p.mu.Unlock()
		delete(p.sessions, s)
		p.notify()
	}()
	return s.serve()
}

// serve works until the client goes or the session is broken off.
func (s *fakeSession) serve() error {
	received := make(chan error, 1)
	go func() { received <- s.receive() }() // ends when this method has returned
	select {
	case err := <-received:
		return err
	case <-s.ctx.Done():
		return status.Error(codes.Unavailable, "broken off")
	}
}

func (s *fakeSession) receive() error {
	for {
		m, err := s.stream.Recv()
		if err != nil {
			return err
		}
		switch r := m.GetRequest().(type) {
		case *outboxv1.SessionRequest_Calls_:
			s.calls(r.Calls.GetCalls())
		case *outboxv1.SessionRequest_CheckAnswers_:
			s.mu.Lock()
			ch := s.waiting[r.CheckAnswers.GetQuestionId()]
			delete(s.waiting, r.CheckAnswers.GetQuestionId())
			s.mu.Unlock()
			if ch != nil {
				ch <- r.CheckAnswers
			}
		}
	}
}

// calls answers calls: those without a fault at once and in one message.
func (s *fakeSession) calls(calls []*outboxv1.SessionRequest_Call) {
	var now []*outboxv1.SessionResponse_Result
	for _, c := range calls {
		what, work := s.p.workOf(c)
		f := s.p.arrived(what)
		run := func() *outboxv1.SessionResponse_Result {
			err, answered := s.p.do(s.ctx, f, work)
			if !answered {
				return nil
			}
			r := &outboxv1.SessionResponse_Result{CallId: c.GetCallId()}
			if err != nil {
				r.Status = status.Convert(err).Proto()
			} else if what.Name == "prepare" {
				r.Token = []byte("token")
			}
			return r
		}
		if f.After == 0 {
			if r := run(); r != nil {
				now = append(now, r)
			}
			continue
		}
		s.wg.Go(func() {
			if r := run(); r != nil {
				s.results(r)
			}
		})
	}
	if len(now) > 0 {
		s.results(now...)
	}
}

func (p *Platform) workOf(c *outboxv1.SessionRequest_Call) (Call, func() error) {
	switch r := c.GetCall().(type) {
	case *outboxv1.SessionRequest_Call_Prepare:
		return call("prepare", r.Prepare.GetTransactionId(), r.Prepare.GetEvents()), func() error { return p.prepare(r.Prepare) }
	case *outboxv1.SessionRequest_Call_Commit:
		return call("commit", r.Commit.GetTransactionId(), nil), func() error { return p.ledger.decide(r.Commit.GetTransactionId(), Committed) }
	case *outboxv1.SessionRequest_Call_Abort:
		return call("abort", r.Abort.GetTransactionId(), nil), func() error { return p.ledger.decide(r.Abort.GetTransactionId(), Aborted) }
	case *outboxv1.SessionRequest_Call_Publish:
		return publishCall(r.Publish), func() error { return p.publish(r.Publish) }
	}
	return Call{Name: "nothing"}, func() error { return Invalid("call", "is empty") }
}

func (s *fakeSession) results(r ...*outboxv1.SessionResponse_Result) {
	// A failure shows in receive.
	_ = s.send(&outboxv1.SessionResponse{Response: &outboxv1.SessionResponse_Results_{
		Results: &outboxv1.SessionResponse_Results{Results: r},
	}})
}

func (s *fakeSession) send(m *outboxv1.SessionResponse) error {
	s.sending.Lock()
	defer s.sending.Unlock()
	return s.stream.Send(m)
}

// Sessions returns the number of open sessions.
func (p *Platform) Sessions() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return len(p.sessions)
}

// Databases returns the databases that open sessions say they can answer for.
func (p *Platform) Databases() []string {
	p.mu.Lock()
	defer p.mu.Unlock()
	var out []string
	for s := range p.sessions {
		out = append(out, s.hello.GetDatabases()...)
	}
	return out
}

// Break breaks all sessions off.
func (p *Platform) Break() {
	p.mu.Lock()
	defer p.mu.Unlock()
	for s := range p.sessions {
		s.cancel()
	}
}

// Drain sends a drain notice to every open session.
func (p *Platform) Drain(grace time.Duration) {
	p.mu.Lock()
	open := make([]*fakeSession, 0, len(p.sessions))
	for s := range p.sessions {
		open = append(open, s)
	}
	p.mu.Unlock()
	for _, s := range open {
		_ = s.send(&outboxv1.SessionResponse{Response: &outboxv1.SessionResponse_DrainNotice_{
			DrainNotice: &outboxv1.SessionResponse_DrainNotice{GraceMs: uint32(grace.Milliseconds())},
		}})
	}
}

// Ask asks a session that can answer for the database what became of stored transactions, and waits for the answers.
func (p *Platform) Ask(tb testing.TB, database string, txs ...*outboxv1.SessionResponse_CheckTransaction) []*outboxv1.SessionRequest_CheckAnswer {
	tb.Helper()
	var s *fakeSession
	p.Wait(tb, "a session that answers for "+database, func() bool {
		s = p.session(database)
		return s != nil
	})
	answer := s.ask(tb, database, txs)
	t := time.NewTimer(20 * time.Second)
	defer t.Stop()
	select {
	case a := <-answer:
		return a.GetAnswers()
	case <-s.ctx.Done():
		tb.Fatal("the session ended before it answered")
	case <-t.C:
		tb.Fatal("no answer to a check-back question")
	}
	return nil
}

// AskWithoutWaiting asks any session, also about a database that it does not answer for.
func (p *Platform) AskWithoutWaiting(tb testing.TB, database string, txs ...*outboxv1.SessionResponse_CheckTransaction) {
	tb.Helper()
	s := p.session("")
	if s == nil {
		tb.Fatal("no session is open")
	}
	s.ask(tb, database, txs)
}

// session returns a session that answers for a database; empty: any.
func (p *Platform) session(database string) *fakeSession {
	p.mu.Lock()
	defer p.mu.Unlock()
	for s := range p.sessions {
		if database == "" || slices.Contains(s.hello.GetDatabases(), database) {
			return s
		}
	}
	return nil
}

func (s *fakeSession) ask(tb testing.TB, database string, txs []*outboxv1.SessionResponse_CheckTransaction) <-chan *outboxv1.SessionRequest_CheckAnswers {
	tb.Helper()
	answer := make(chan *outboxv1.SessionRequest_CheckAnswers, 1)
	s.mu.Lock()
	s.asked++
	id := s.asked
	s.waiting[id] = answer
	s.mu.Unlock()
	err := s.send(&outboxv1.SessionResponse{Response: &outboxv1.SessionResponse_CheckQuestion_{
		CheckQuestion: &outboxv1.SessionResponse_CheckQuestion{QuestionId: id, Database: database, Transactions: txs},
	}})
	if err != nil {
		tb.Fatalf("asking: %v", err)
	}
	return answer
}

// Question makes the question about a stored transaction.
func (t *Transaction) Question() *outboxv1.SessionResponse_CheckTransaction {
	return &outboxv1.SessionResponse_CheckTransaction{TransactionId: t.ID[:], DatabaseTransaction: t.Database}
}
