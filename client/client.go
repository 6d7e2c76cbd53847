package client

import (
	"context"
	"fmt"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"

	"github.com/google/uuid"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/proto"

	outboxv1 "github.com/outbox-platform/outbox/gen/go/outbox/v1"
)

// Client talks to the platform for one source. Make it with [New], use it from many goroutines, and [Client.Close] it.
type Client struct {
	cfg       Config
	codec     codec
	limits    atomic.Pointer[Limits]
	inFlight  chan struct{} // a place per synchronous call
	checking  chan struct{} // a place per check-back question
	sessions  []*session    // empty: TransportUnary
	turn      atomic.Uint32
	unary     unaryConn
	stats     counters
	decisions decisions

	// life ends with Close, after upkeep has.
	life, upkeep context.Context
	die, retire  context.CancelFunc
	wg           sync.WaitGroup

	mu        sync.Mutex
	started   bool
	closed    bool
	databases map[string]Database
	link      Link
	changed   chan struct{} // closed and replaced when link changes
}

var errClosed = &Error{Code: codes.Canceled, Message: "the client is closed", local: true}

// New returns a client. It connects with the first call or the first registered database, so it does not fail because the
// platform is away.
func New(cfg Config) (*Client, error) {
	cfg, err := cfg.withDefaults()
	if err != nil {
		return nil, err
	}
	c := &Client{
		cfg: cfg, codec: newCodec(),
		inFlight: make(chan struct{}, cfg.MaxInFlight), checking: make(chan struct{}, maxChecks),
		databases: make(map[string]Database), changed: make(chan struct{}),
	}
	c.decisions.unary = make(chan *decision, cfg.MaxPendingCommits)
	limits := defaultLimits
	c.limits.Store(&limits)
	c.life, c.die = context.WithCancel(context.Background()) //nolint:forbidigo // the client's own life: Close ends it
	c.upkeep, c.retire = context.WithCancel(c.life)
	if cfg.Transport == TransportSession {
		for range cfg.Sessions {
			c.sessions = append(c.sessions, &session{c: c})
		}
	} else {
		c.link = LinkUp
	}
	// A configuration that gRPC does not accept shows here, not with the first call.
	if err := c.unary.open(c); err != nil {
		c.die()
		return nil, err
	}
	return c, nil
}

// start opens the sessions, once.
func (c *Client) start() *Error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.closed {
		return errClosed
	}
	c.startLocked()
	return nil
}

// startLocked is start for who holds the lock and knows that the client is not closed.
func (c *Client) startLocked() {
	if c.started {
		return
	}
	c.started = true
	for _, s := range c.sessions {
		c.wg.Go(func() { s.run(c.life) })
	}
}

// Close ends upkeep, waits up to Config.CloseTimeout for decisions that are not acknowledged, and closes all connections.
// Calls under way fail.
func (c *Client) Close() error {
	c.mu.Lock()
	if c.closed {
		c.mu.Unlock()
		return nil
	}
	c.closed = true
	c.mu.Unlock()
	c.retire()
	if link, _ := c.Link(); link == LinkUp {
		t := time.NewTimer(c.cfg.CloseTimeout)
		select {
		case <-c.decisions.drained():
		case <-t.C:
		}
		t.Stop()
	}
	for _, s := range c.sessions {
		s.close()
	}
	c.die()
	c.wg.Wait()
	return c.unary.close()
}

// Connect opens the session and waits until it is up. It is optional: calls do it by themselves. The error says why the last
// attempt failed.
func (c *Client) Connect(ctx context.Context) error {
	if err := c.start(); err != nil {
		return err
	}
	for {
		link, changed := c.Link()
		if link == LinkUp {
			return nil
		}
		select {
		case <-changed:
		case <-c.life.Done():
			return errClosed
		case <-ctx.Done():
			for _, s := range c.sessions {
				s.mu.Lock()
				last := s.lastErr
				s.mu.Unlock()
				if last != nil {
					return fmt.Errorf("connecting to %s: %w (%w)", c.cfg.Target, ctx.Err(), last)
				}
			}
			return fmt.Errorf("connecting to %s: %w", c.cfg.Target, ctx.Err())
		}
	}
}

// Link returns whether the platform can be reached, and a channel that is closed when that changes.
func (c *Client) Link() (Link, <-chan struct{}) {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.link, c.changed
}

// linkChanged recomputes the link: up when any session is, down when all are.
func (c *Client) linkChanged() {
	c.mu.Lock() // also while asking: of two changes at a time, the later must win
	defer c.mu.Unlock()
	best := LinkDown
	for _, s := range c.sessions {
		switch link, unary := s.state(); {
		case unary, link == LinkUp:
			best = LinkUp
		case link == LinkConnecting && best == LinkDown:
			best = LinkConnecting
		}
	}
	if c.link == best {
		return
	}
	c.link = best
	close(c.changed)
	c.changed = make(chan struct{})
}

// pick returns the session for the next call: one that is up if there is any. Nil: make a unary call.
func (c *Client) pick() *session {
	n := uint32(len(c.sessions))
	if n == 0 {
		return nil
	}
	first := c.turn.Add(1)
	var second *session
	for i := range n {
		s := c.sessions[(first+i)%n]
		switch link, unary := s.state(); {
		case unary:
		case n == 1 || link == LinkUp:
			return s
		case second == nil || link == LinkConnecting:
			second = s
		}
	}
	return second
}

// Source returns the source's name.
func (c *Client) Source() string { return c.cfg.Source }

// Logger returns Config.Logger, which is never nil here.
func (c *Client) Logger() *slog.Logger { return c.cfg.Logger }

// PrepareTimeout returns Config.PrepareTimeout as it is in force.
func (c *Client) PrepareTimeout() time.Duration { return c.cfg.PrepareTimeout }

// Prepare stores events durably but invisibly. Call it in an open database transaction, after the marker row was written and
// before COMMIT. The token goes to Commit or Abort.
//
// It fails with IsInvalid, IsDenied or ReasonIDReused when repeating it is no use, and with IsUnavailable when it may or may
// not have been stored; then COMMIT only if the request was spilled.
func (c *Client) Prepare(ctx context.Context, id uuid.UUID, db DatabaseTransaction, events ...Event) (token []byte, err error) {
	r, err := c.Encode(ctx, id, db, events...)
	if err != nil {
		return nil, err
	}
	return c.PrepareRequest(ctx, r, false)
}

// Commit tells that the local transaction committed and waits for the acknowledgement. Most callers want CommitLater.
// token is what Prepare returned; it may be nil.
func (c *Client) Commit(ctx context.Context, id uuid.UUID, token []byte) error {
	_, err := c.do(ctx, kindCommit, c.encodeDecision(kindCommit, id, token), c.cfg.CallTimeout, false)
	return err
}

// Abort tells that the local transaction did not commit and waits for the acknowledgement. Never call it when the outcome is
// unknown. token is what Prepare returned; it may be nil.
func (c *Client) Abort(ctx context.Context, id uuid.UUID, token []byte) error {
	_, err := c.do(ctx, kindAbort, c.encodeDecision(kindAbort, id, token), c.cfg.CallTimeout, false)
	return err
}

// Publish publishes events that belong to no database transaction. id is the idempotency key: repeating a call with the
// same id and the same events is safe. For that, events that are published again need their ID and OccurredAt set.
func (c *Client) Publish(ctx context.Context, id uuid.UUID, events ...Event) error {
	pe, err := c.protoEvents(events, c.traceOf(ctx))
	if err != nil {
		return err
	}
	return c.publish(ctx, &outboxv1.PublishRequest{Source: c.cfg.Source, TransactionId: id[:], Events: pe})
}

func (c *Client) publish(ctx context.Context, p *outboxv1.PublishRequest) error {
	body, err := proto.Marshal(p)
	if err != nil {
		return fmt.Errorf("encoding the request: %w", err)
	}
	_, err = c.do(ctx, kindPublish, body, c.cfg.CallTimeout, false)
	return err
}

// GetTransaction tells what the platform knows about a transaction. It fails with IsUnknownTransaction when it does not know
// it, or no longer; the error's metadata "retention_horizon" says from which time on it would.
func (c *Client) GetTransaction(ctx context.Context, id uuid.UUID) (*Transaction, error) {
	resp := new(outboxv1.GetTransactionResponse)
	err := c.retry(ctx, c.cfg.CallTimeout, func(timeout time.Duration) *Error {
		ctx, cancel := context.WithTimeout(ctx, timeout)
		defer cancel()
		return c.unary.invoke(ctx, outboxv1.OutboxService_GetTransaction_FullMethodName,
			&outboxv1.GetTransactionRequest{Source: c.cfg.Source, TransactionId: id[:]}, resp, false)
	})
	if err != nil {
		return nil, err
	}
	return transactionOf(resp.GetTransaction()), nil
}

// encodeDecision encodes a CommitRequest or an AbortRequest.
func (c *Client) encodeDecision(k kind, id uuid.UUID, token []byte) encoded {
	var m proto.Message
	if k == kindCommit {
		m = &outboxv1.CommitRequest{Source: c.cfg.Source, TransactionId: id[:], Token: token}
	} else {
		m = &outboxv1.AbortRequest{Source: c.cfg.Source, TransactionId: id[:], Token: token}
	}
	b, err := proto.Marshal(m)
	if err != nil {
		return nil // cannot happen: the source's name is the only string; the platform would refuse the empty message
	}
	return b
}

// do makes one call within its deadline and repeats it while that may help.
func (c *Client) do(ctx context.Context, k kind, body encoded, timeout time.Duration, failFast bool) ([]byte, error) {
	if err := c.start(); err != nil {
		return nil, err
	}
	deadline := time.Now().Add(timeout)
	if err := c.enter(ctx, k, timeout); err != nil {
		return nil, err
	}
	defer func() { <-c.inFlight }()
	var token []byte
	err := c.retry(ctx, time.Until(deadline), func(left time.Duration) *Error {
		var err *Error
		token, err = c.once(ctx, k, body, left, failFast)
		return err
	})
	return token, err
}

// once makes one attempt.
func (c *Client) once(ctx context.Context, k kind, body encoded, timeout time.Duration, failFast bool) ([]byte, *Error) {
	if s := c.pick(); s != nil {
		token, err := s.roundTrip(ctx, k, body, timeout, failFast)
		if err != errNoSessions { //nolint:errorlint // a value of our own that is never wrapped
			return token, err
		}
	}
	return c.unaryRoundTrip(ctx, k, body, timeout, failFast)
}

// enter waits for a place among the calls in flight.
func (c *Client) enter(ctx context.Context, k kind, timeout time.Duration) error {
	select {
	case c.inFlight <- struct{}{}:
		return nil
	default:
	}
	full := &Error{
		Code: codes.ResourceExhausted, Message: fmt.Sprintf("%s: %d calls are in flight", k, c.cfg.MaxInFlight), local: true,
	}
	if c.cfg.FailWhenFull {
		return full
	}
	t := time.NewTimer(timeout)
	defer t.Stop()
	select {
	case c.inFlight <- struct{}{}:
		return nil
	case <-t.C:
		return full
	case <-ctx.Done():
		return contextError(ctx, k.String())
	}
}

// Report logs an alarm, counts it, and passes it to Config.OnAlarm.
func (c *Client) Report(a Alarm) {
	c.stats.alarms.Add(1)
	c.cfg.Logger.Error("outbox alarm", "alarm", string(a.Kind), "transaction_id", a.TransactionID, "database", a.Database, "error", a.Err)
	if c.cfg.OnAlarm == nil {
		return
	}
	if err := guard(func() error { c.cfg.OnAlarm(a); return nil }); err != nil {
		c.cfg.Logger.Error("OnAlarm", "error", err)
	}
}

// clip cuts s to at most n bytes, at a rune's start.
func clip(s string, n int) string {
	if len(s) <= n {
		return s
	}
	for n > 0 && s[n]&0xC0 == 0x80 {
		n--
	}
	return s[:n]
}

// callOptions of the unary calls.
func (c *Client) callOptions() []grpc.CallOption {
	return []grpc.CallOption{grpc.ForceCodecV2(c.codec), grpc.StaticMethod()}
}
