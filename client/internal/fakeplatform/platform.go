package fakeplatform

import (
	"context"
	"errors"
	"net"
	"sync"
	"testing"
	"time"

	"github.com/google/uuid"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/protobuf/types/known/timestamppb"

	outboxv1 "github.com/outbox-platform/outbox/gen/go/outbox/v1"
)

// Call is one call that arrived.
type Call struct {
	// Name is prepare, commit, abort, publish, get or session.
	Name string
	// ID is the transaction's id, not for sessions.
	ID uuid.UUID
	// Unary says that it did not come on a session.
	Unary bool
	// Events of a Prepare or a Publish.
	Events []*outboxv1.Event
	// Kept is a Publish's kept_by_caller.
	Kept bool
}

// Fault is what happens to a call. The zero value: nothing special.
type Fault struct {
	// Err is answered and nothing done.
	Err error
	// Silent: nothing is done or answered.
	Silent bool
	// LoseAnswer: it is done and not answered.
	LoseAnswer bool
	// After delays doing and answering.
	After time.Duration
}

// TB is what the platform needs of a test; examples bring their own.
type TB interface {
	Helper()
	Errorf(format string, args ...any)
	Fatalf(format string, args ...any)
	Cleanup(func())
}

// Platform is the fake. All its methods may be called at any time.
type Platform struct {
	outboxv1.UnimplementedOutboxServiceServer
	tb     TB
	addr   string
	ledger ledger

	mu       sync.Mutex
	server   *grpc.Server
	served   chan struct{}
	fault    func(Call) Fault
	limits   *outboxv1.Limits
	horizon  time.Time
	sessions map[*fakeSession]struct{}
	calls    []Call
	record   bool
	instant  bool
	tokens   []string
	changed  chan struct{}
}

// Start starts a platform on a free port. It stops with the test.
func Start(tb TB) *Platform {
	tb.Helper()
	p := &Platform{
		tb: tb, ledger: ledger{byID: make(map[uuid.UUID]*Transaction)}, sessions: make(map[*fakeSession]struct{}),
		changed: make(chan struct{}), record: true,
	}
	p.addr = p.listen("127.0.0.1:0")
	tb.Cleanup(p.Stop)
	return p
}

// Addr returns the address, which stays the same.
func (p *Platform) Addr() string { return p.addr }

func (p *Platform) listen(addr string) string {
	p.tb.Helper()
	l, err := net.Listen("tcp", addr)
	if err != nil {
		p.tb.Fatalf("fakeplatform: listening on %s: %v", addr, err)
	}
	s := grpc.NewServer(grpc.MaxRecvMsgSize(16 << 20))
	outboxv1.RegisterOutboxServiceServer(s, p)
	served := make(chan struct{})
	p.mu.Lock()
	p.server, p.served = s, served
	p.mu.Unlock()
	go func() {
		defer close(served)
		if err := s.Serve(l); err != nil && !errors.Is(err, grpc.ErrServerStopped) {
			p.tb.Errorf("fakeplatform: %v", err)
		}
	}()
	return l.Addr().String()
}

// Stop breaks all connections off and refuses new ones. What is stored stays.
func (p *Platform) Stop() {
	p.mu.Lock()
	s, served := p.server, p.served
	p.server = nil
	p.mu.Unlock()
	if s == nil {
		return
	}
	s.Stop()
	<-served
}

// Restart serves again on the same address.
func (p *Platform) Restart() { p.listen(p.addr) }

// SetFault chooses what happens to calls. f is called for each; nil: nothing special.
func (p *Platform) SetFault(f func(Call) Fault) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.fault = f
}

// SetLimits chooses the limits that the next sessions are told.
func (p *Platform) SetLimits(l *outboxv1.Limits) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.limits = l
}

// SetHorizon chooses the retention horizon that GetTransaction tells for unknown transactions.
func (p *Platform) SetHorizon(t time.Time) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.horizon = t
}

// Instant answers OK to everything and stores nothing, for benchmarks.
func (p *Platform) Instant() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.record, p.instant = false, true
}

// Calls returns the calls that arrived with that name; all when it is empty.
func (p *Platform) Calls(name string) []Call {
	p.mu.Lock()
	defer p.mu.Unlock()
	var out []Call
	for _, c := range p.calls {
		if name == "" || c.Name == name {
			out = append(out, c)
		}
	}
	return out
}

// Authorizations returns the authorization headers that arrived.
func (p *Platform) Authorizations() []string {
	p.mu.Lock()
	defer p.mu.Unlock()
	return append([]string(nil), p.tokens...)
}

// Wait waits until cond holds; it is asked again whenever something has happened.
func (p *Platform) Wait(tb testing.TB, what string, cond func() bool) {
	tb.Helper()
	deadline := time.NewTimer(20 * time.Second)
	defer deadline.Stop()
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for {
		p.mu.Lock()
		changed := p.changed
		p.mu.Unlock()
		if cond() {
			return
		}
		select {
		case <-changed:
		case <-tick.C: // the condition may be about the client
		case <-deadline.C:
			tb.Fatalf("waited too long for: %s", what)
		}
	}
}

func (p *Platform) notify() {
	close(p.changed)
	p.changed = make(chan struct{})
}

// arrived records a call and returns its fault.
func (p *Platform) arrived(c Call) Fault {
	p.mu.Lock()
	fault := p.fault
	if p.record {
		p.calls = append(p.calls, c)
		p.notify()
	}
	p.mu.Unlock()
	if fault == nil {
		return Fault{}
	}
	return fault(c)
}

// do does a call's work under its fault. answered false: the caller must not answer.
func (p *Platform) do(ctx context.Context, f Fault, work func() error) (err error, answered bool) {
	if f.After > 0 {
		t := time.NewTimer(f.After)
		defer t.Stop()
		select {
		case <-t.C:
		case <-ctx.Done():
			return ctx.Err(), false
		}
	}
	switch {
	case f.Silent:
		return nil, false
	case f.Err != nil:
		return f.Err, true
	}
	p.mu.Lock()
	instant := p.instant
	p.mu.Unlock()
	if instant {
		return nil, true
	}
	err = work()
	p.mu.Lock()
	p.notify()
	p.mu.Unlock()
	return err, !f.LoseAnswer
}

func (p *Platform) unary(ctx context.Context, c Call, work func() error) error {
	c.Unary = true
	p.authorize(ctx)
	err, answered := p.do(ctx, p.arrived(c), work)
	if !answered {
		<-ctx.Done()
		return ctx.Err()
	}
	return err
}

func (p *Platform) authorize(ctx context.Context) {
	md, _ := metadata.FromIncomingContext(ctx)
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.record {
		p.tokens = append(p.tokens, md.Get("authorization")...)
	}
}

func call(name string, id []byte, events []*outboxv1.Event) Call {
	u, _ := uuid.FromBytes(id)
	return Call{Name: name, ID: u, Events: events}
}

func publishCall(r *outboxv1.PublishRequest) Call {
	c := call("publish", r.GetTransactionId(), r.GetEvents())
	c.Kept = r.GetKeptByCaller()
	return c
}

// Prepare implements the API.
func (p *Platform) Prepare(ctx context.Context, r *outboxv1.PrepareRequest) (*outboxv1.PrepareResponse, error) {
	err := p.unary(ctx, call("prepare", r.GetTransactionId(), r.GetEvents()), func() error { return p.prepare(r) })
	return &outboxv1.PrepareResponse{Token: []byte("token")}, err
}

func (p *Platform) prepare(r *outboxv1.PrepareRequest) error {
	return p.ledger.prepare(r.GetTransactionId(), r.GetDatabaseTransaction(), r.GetEvents(), Prepared)
}

// Commit implements the API.
func (p *Platform) Commit(ctx context.Context, r *outboxv1.CommitRequest) (*outboxv1.CommitResponse, error) {
	err := p.unary(ctx, call("commit", r.GetTransactionId(), nil), func() error { return p.ledger.decide(r.GetTransactionId(), Committed) })
	return &outboxv1.CommitResponse{}, err
}

// Abort implements the API.
func (p *Platform) Abort(ctx context.Context, r *outboxv1.AbortRequest) (*outboxv1.AbortResponse, error) {
	err := p.unary(ctx, call("abort", r.GetTransactionId(), nil), func() error { return p.ledger.decide(r.GetTransactionId(), Aborted) })
	return &outboxv1.AbortResponse{}, err
}

// Publish implements the API.
func (p *Platform) Publish(ctx context.Context, r *outboxv1.PublishRequest) (*outboxv1.PublishResponse, error) {
	err := p.unary(ctx, publishCall(r), func() error { return p.publish(r) })
	return &outboxv1.PublishResponse{}, err
}

func (p *Platform) publish(r *outboxv1.PublishRequest) error {
	return p.ledger.prepare(r.GetTransactionId(), nil, r.GetEvents(), Committed)
}

// GetTransaction implements the API.
func (p *Platform) GetTransaction(ctx context.Context, r *outboxv1.GetTransactionRequest) (*outboxv1.GetTransactionResponse, error) {
	resp := &outboxv1.GetTransactionResponse{}
	err := p.unary(ctx, call("get", r.GetTransactionId(), nil), func() error {
		u, _ := uuid.FromBytes(r.GetTransactionId())
		tx := p.Transaction(u)
		if tx == nil {
			p.mu.Lock()
			horizon := p.horizon
			p.mu.Unlock()
			return Error(codes.NotFound, "TRANSACTION_UNKNOWN", 0, map[string]string{
				"transaction_id": u.String(), "retention_horizon": horizon.UTC().Format(time.RFC3339Nano),
			})
		}
		resp.Transaction = &outboxv1.Transaction{
			Source: r.GetSource(), TransactionId: r.GetTransactionId(), State: tx.State, DatabaseTransaction: tx.Database,
			PrepareTime: timestamppb.Now(),
		}
		if tx.State != Prepared {
			resp.Transaction.DecideTime, resp.Transaction.DecidedBy = timestamppb.Now(), "client"
		}
		for _, e := range tx.Events {
			resp.Transaction.Events = append(resp.Transaction.Events, &outboxv1.EventStatus{
				EventId: e.GetEventId(), Topic: e.GetTopic(), AggregateType: e.GetAggregateType(), AggregateId: e.GetAggregateId(),
				Place: outboxv1.EventStatus_PLACE_IN_DOUBT, Explanation: "undecided",
			})
		}
		return nil
	})
	return resp, err
}

// Events0 returns the payload of the call's first event; nil: it has none.
func (c Call) Events0() []byte {
	if len(c.Events) == 0 {
		return nil
	}
	return c.Events[0].GetPayload()
}
