package server

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"runtime/debug"
	"strconv"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"
	"google.golang.org/grpc/tap"

	outboxv1 "github.com/outbox-platform/outbox/gen/go/outbox/v1"
)

type (
	tapKey   struct{}
	helloKey struct{}
)

// tap admits a call, or refuses it, before a byte of its body is read.
func (s *Server) tap(ctx context.Context, info *tap.Info) (context.Context, error) {
	if !limited(info.FullMethodName) {
		return s.tapDeadline(ctx, info), nil
	}
	if !s.enter() {
		return nil, errTooManyCalls
	}
	// The stream's own context ends with the call, however that ends.
	context.AfterFunc(ctx, s.leave)
	return s.tapDeadline(ctx, info), nil
}

// enter admits one more unary call, whose end leave has to be told; false: there are as many as there may be.
func (s *Server) enter() bool {
	if s.unaryCalls.Add(1) <= int64(s.cfg.MaxCalls) {
		return true
	}
	s.leave()
	s.metrics.refuse(errTooManyCalls)
	return false
}

func (s *Server) leave() { s.unaryCalls.Add(-1) }

// limited reports whether a method counts for Config.MaxCalls: everything that brings data, but sessions, which have a limit
// of their own.
func limited(method string) bool {
	access := rules[method]
	return access != accessPublic && access != accessKnown
}

// tapDeadline gives every call that brings no deadline one, before a byte of its body is read: interceptors run after
// decoding, too late for a caller that sends headers and then nothing. A session has no deadline but for its Hello.
//
// Streams of health and reflection have none either; MaxConcurrentStreams bounds them, and they hold nothing.
func (s *Server) tapDeadline(ctx context.Context, info *tap.Info) context.Context {
	switch rules[info.FullMethodName] {
	case accessPublic, accessKnown:
		if info.FullMethodName != outboxv1.OutboxService_Session_FullMethodName {
			return ctx
		}
		ctx, cancel := context.WithCancel(ctx) // its caller sees CANCELLED; it said nothing, so it need not hear why
		t := time.AfterFunc(s.cfg.DefaultDeadline, cancel)
		return context.WithValue(ctx, helloKey{}, t)
	}
	if _, has := ctx.Deadline(); has {
		return ctx
	}
	ctx, cancel := context.WithTimeout(ctx, s.cfg.DefaultDeadline)
	// Nobody calls cancel: the stream's own context, the parent, ends with the call and stops the timer.
	return context.WithValue(ctx, tapKey{}, cancel)
}

// helloArrived takes the deadline of Hello away.
func helloArrived(ctx context.Context) {
	if t, ok := ctx.Value(helloKey{}).(*time.Timer); ok {
		t.Stop()
	}
}

// named is a request about one source.
type named interface{ GetSource() string }

// unaryGuard is the innermost interceptor: identity, authorisation, deadline, and the errors as callers see them.
func (s *Server) unaryGuard(ctx context.Context, req any, info *grpc.UnaryServerInfo, handler grpc.UnaryHandler) (resp any, err error) {
	defer func() {
		if p := recover(); p != nil {
			resp, err = nil, s.panicked(p, info.FullMethod)
		}
		err = s.unaryError(ctx, err, info.FullMethod)
	}()
	if _, has := ctx.Deadline(); !has { // calls through the HTTP port do not pass tapDeadline
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, s.cfg.DefaultDeadline)
		defer cancel()
	}
	p, err := s.identify(ctx, info.FullMethod)
	if err != nil {
		return nil, err
	}
	var source string
	if n, ok := req.(named); ok {
		source = n.GetSource()
	}
	if err := authorize(info.FullMethod, p, source); err != nil {
		return nil, err
	}
	return handler(withPrincipal(ctx, p), req)
}

// streamGuard is the same for streams.
func (s *Server) streamGuard(srv any, stream grpc.ServerStream, info *grpc.StreamServerInfo, handler grpc.StreamHandler) (err error) {
	ctx := stream.Context()
	defer func() {
		if p := recover(); p != nil {
			err = s.panicked(p, info.FullMethod)
		}
		err = s.callError(err, info.FullMethod)
	}()
	p, err := s.identify(ctx, info.FullMethod)
	if err != nil {
		return err
	}
	if err := authorize(info.FullMethod, p, ""); err != nil {
		return err
	}
	return handler(srv, &identifiedStream{ServerStream: stream, ctx: withPrincipal(ctx, p)})
}

// identifiedStream is a stream whose context knows the principal.
type identifiedStream struct {
	grpc.ServerStream
	ctx context.Context //nolint:containedctx // that is what it is for
}

func (s *identifiedStream) Context() context.Context { return s.ctx }

// identify finds out who calls; nil for public methods when nobody can be told.
func (s *Server) identify(ctx context.Context, method string) (*principal, error) {
	p, err := s.identities.get().identify(ctx)
	if err != nil && rules[method] == accessPublic {
		return nil, nil
	}
	return p, err
}

// guarded turns a panic of a session's second goroutine, which no interceptor sees, into an error.
func (s *Server) guarded(fn func() error) (err error) {
	defer func() {
		if p := recover(); p != nil {
			err = s.panicked(p, outboxv1.OutboxService_Session_FullMethodName)
		}
	}()
	return fn()
}

func (s *Server) panicked(p any, method string) error {
	e := otherError(fmt.Errorf("panic: %v", p))
	s.metrics.panics.Inc()
	s.log.Error("panic in a call", "method", method, "log_id", e.metadata["log_id"], "panic", fmt.Sprint(p), "stack", string(debug.Stack()))
	e.cause = nil // it is logged
	return e
}

// unaryError makes an error what callers see, and tells clients that retry by themselves when to.
func (s *Server) unaryError(ctx context.Context, err error, method string) error {
	err = s.callError(err, method)
	var e *apiError
	if errors.As(err, &e) && e.retry > 0 {
		// It fails when the headers cannot be sent any more; then nobody waits for the trailer either.
		_ = grpc.SetTrailer(ctx, metadata.Pairs(retryPushback, strconv.FormatInt(e.retry.Milliseconds(), 10)))
	}
	return err
}

// callError makes an error what callers see: our own as they are, grpc's own as they are, everything else INTERNAL with
// its cause in the log only.
func (s *Server) callError(err error, method string) error {
	if err == nil {
		return nil
	}
	var e *apiError
	if !errors.As(err, &e) {
		if _, ok := status.FromError(err); ok {
			return err
		}
		e = otherError(err)
	}
	if e.code == codes.Internal && e.cause != nil {
		s.logInternal(e, method)
	}
	return e
}

func (s *Server) logInternal(e *apiError, method string) {
	s.log.Error("internal error", "method", method, "log_id", e.metadata["log_id"], "error", e.cause)
}

// unaryLog writes the access log: admin calls always, data calls at debug level.
func (s *Server) unaryLog(ctx context.Context, req any, info *grpc.UnaryServerInfo, handler grpc.UnaryHandler) (any, error) {
	level := slog.LevelDebug
	if rules[info.FullMethod] == accessAdmin {
		level = slog.LevelInfo
	}
	if !s.log.Enabled(ctx, level) {
		return handler(ctx, req)
	}
	began := time.Now()
	resp, err := handler(ctx, req)
	s.logCall(ctx, level, info.FullMethod, began, err)
	return resp, err
}

// streamLog is the same for streams.
func (s *Server) streamLog(srv any, stream grpc.ServerStream, info *grpc.StreamServerInfo, handler grpc.StreamHandler) error {
	began := time.Now()
	err := handler(srv, stream)
	s.logCall(stream.Context(), slog.LevelDebug, info.FullMethod, began, err)
	return err
}

func (s *Server) logCall(ctx context.Context, level slog.Level, method string, began time.Time, err error) {
	attrs := []slog.Attr{
		slog.String("method", method),
		slog.String("code", status.Code(err).String()),
		slog.Duration("duration", time.Since(began)),
	}
	if pr, ok := peer.FromContext(ctx); ok {
		attrs = append(attrs, slog.String("peer", pr.Addr.String()))
	}
	if p, e := s.identities.get().identify(ctx); e == nil {
		attrs = append(attrs, slog.String("principal", p.name))
	}
	s.log.LogAttrs(ctx, level, "call", attrs...)
}
