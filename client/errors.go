package client

import (
	"context"
	"errors"
	"fmt"
	"time"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	spb "google.golang.org/genproto/googleapis/rpc/status"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// Reason says in one word, which never changes, why a call failed. See outbox.v1.ErrorReason for each one's meaning.
type Reason string

// The reasons that calls of this package can meet. The platform may send others in the future.
const (
	ReasonFieldInvalid       Reason = "FIELD_INVALID"
	ReasonEventTooLarge      Reason = "EVENT_TOO_LARGE"
	ReasonSourceDenied       Reason = "SOURCE_DENIED"
	ReasonTopicDenied        Reason = "TOPIC_DENIED"
	ReasonIDReused           Reason = "TRANSACTION_ID_REUSED"
	ReasonTransactionUnknown Reason = "TRANSACTION_UNKNOWN"
	ReasonAlreadyDecided     Reason = "TRANSACTION_ALREADY_DECIDED"
	ReasonQuotaExceeded      Reason = "QUOTA_EXCEEDED"
	ReasonBacklogFull        Reason = "BACKLOG_FULL"
	ReasonStoreUnavailable   Reason = "STORE_UNAVAILABLE"
	ReasonContention         Reason = "CONTENTION"
	ReasonIdentityUnknown    Reason = "IDENTITY_UNKNOWN"
	ReasonMethodDenied       Reason = "METHOD_DENIED"
	ReasonInternal           Reason = "INTERNAL"
)

// errorDomain is the domain of every ErrorInfo of the platform.
const errorDomain = "outbox.v1"

// Error is what every call of the platform fails with. Get it with errors.As.
type Error struct {
	// Code is the gRPC code. It says what to do: see the Is functions.
	Code codes.Code
	// Reason says why. Empty when the error does not come from the platform but from the way to it.
	Reason Reason
	// Message is for people. Its text may change.
	Message string
	// Metadata are the reason's parameters, for example the topic.
	Metadata map[string]string
	// Fields are the fields that break a rule; only with INVALID_ARGUMENT.
	Fields []FieldViolation
	// RetryAfter is how long the platform asks to wait before the call is repeated. Zero: it does not say.
	RetryAfter time.Duration

	cause error
	local bool // made by this client; the platform was not asked
	fatal bool // the session was refused: no repetition within this call will help
}

// FieldViolation is one field that breaks a rule.
type FieldViolation struct {
	// Field is its path, for example "events[0].topic".
	Field string
	// Description says what is wrong with it.
	Description string
}

// Error returns code, reason and message.
func (e *Error) Error() string {
	if e.Reason == "" {
		return fmt.Sprintf("%s: %s", codeName(e.Code), e.Message)
	}
	return fmt.Sprintf("%s (%s): %s", codeName(e.Code), e.Reason, e.Message)
}

// Unwrap returns the cause: a gRPC status error, or the error of the call's context.
func (e *Error) Unwrap() error { return e.cause }

// Is makes errors.Is(err, context.DeadlineExceeded) and errors.Is(err, context.Canceled) true for the codes of these names.
func (e *Error) Is(target error) bool {
	return target == context.DeadlineExceeded && e.Code == codes.DeadlineExceeded || //nolint:errorlint // this is Is
		target == context.Canceled && e.Code == codes.Canceled //nolint:errorlint // this is Is
}

// GRPCStatus lets status.FromError and status.Code see the code.
func (e *Error) GRPCStatus() *status.Status { return status.New(e.Code, e.Message) }

// HasReason tells whether err is an [Error] with one of the reasons.
func HasReason(err error, reasons ...Reason) bool {
	var e *Error
	if !errors.As(err, &e) {
		return false
	}
	for _, r := range reasons {
		if e.Reason == r {
			return true
		}
	}
	return false
}

// IsUnavailable tells whether the platform could not be reached or did not answer in time. Whether the call took effect is
// unknown; repeating it is safe.
func IsUnavailable(err error) bool { return hasCode(err, codes.Unavailable, codes.DeadlineExceeded) }

// IsInvalid tells whether the request itself is wrong. Repeating it will fail again.
func IsInvalid(err error) bool { return hasCode(err, codes.InvalidArgument) }

// IsDenied tells whether the caller may not do this: unknown source or identity, topic or method not allowed.
func IsDenied(err error) bool { return hasCode(err, codes.PermissionDenied, codes.Unauthenticated) }

// IsUnknownTransaction tells whether the platform does not know the transaction, or no longer.
func IsUnknownTransaction(err error) bool { return HasReason(err, ReasonTransactionUnknown) }

// IsAlreadyDecided tells whether the platform holds the opposite decision: the source and it disagree about history.
func IsAlreadyDecided(err error) bool { return HasReason(err, ReasonAlreadyDecided) }

// IsExhausted tells whether a quota is used up, or a queue full. Nothing took effect; repeat it later.
func IsExhausted(err error) bool { return hasCode(err, codes.ResourceExhausted) }

func hasCode(err error, want ...codes.Code) bool {
	var e *Error
	if !errors.As(err, &e) {
		return false
	}
	for _, c := range want {
		if e.Code == c {
			return true
		}
	}
	return false
}

// retryable tells whether repeating the call may help.
func (e *Error) retryable() bool {
	switch e.Code {
	case codes.Unavailable:
		return !e.fatal
	case codes.Aborted:
		return e.Reason == ReasonContention
	case codes.ResourceExhausted:
		return !e.local && e.RetryAfter > 0
	default:
		return false
	}
}

// errorOf turns an error of gRPC into an *Error.
func errorOf(err error) *Error {
	var e *Error
	if errors.As(err, &e) {
		return e
	}
	s, ok := status.FromError(err)
	if !ok {
		s = status.FromContextError(err)
	}
	e = errorOfStatus(s.Proto())
	e.cause = err
	return e
}

// errorOfStatus reads the details of a status.
func errorOfStatus(p *spb.Status) *Error {
	e := &Error{Code: codes.Code(p.GetCode()), Message: p.GetMessage()}
	for _, d := range p.GetDetails() {
		m, err := d.UnmarshalNew()
		if err != nil {
			continue // a detail of a newer platform
		}
		switch m := m.(type) {
		case *errdetails.ErrorInfo:
			if m.GetDomain() == errorDomain {
				e.Reason, e.Metadata = Reason(m.GetReason()), m.GetMetadata()
			}
		case *errdetails.BadRequest:
			for _, f := range m.GetFieldViolations() {
				e.Fields = append(e.Fields, FieldViolation{Field: f.GetField(), Description: f.GetDescription()})
			}
		case *errdetails.RetryInfo:
			e.RetryAfter = max(0, m.GetRetryDelay().AsDuration())
		}
	}
	return e
}

// contextError is the failure of a call whose own context ended.
func contextError(ctx context.Context, doing string) *Error {
	err := context.Cause(ctx)
	code := codes.Canceled
	if errors.Is(ctx.Err(), context.DeadlineExceeded) {
		code, err = codes.DeadlineExceeded, ctx.Err()
	}
	return &Error{Code: code, Message: fmt.Sprintf("%s: %v", doing, err), cause: err, local: true}
}

// codeName spells a code as the API does, for example "UNAVAILABLE".
func codeName(c codes.Code) string {
	b := make([]byte, 0, 20)
	for i, r := range []byte(c.String()) {
		if 'A' <= r && r <= 'Z' && i > 0 {
			b = append(b, '_')
		}
		if 'a' <= r && r <= 'z' {
			r -= 'a' - 'A'
		}
		b = append(b, r)
	}
	return string(b)
}

// sessionsNotServed tells whether a status means that sessions (not this caller) are refused, so that unary calls may still work.
func (e *Error) sessionsNotServed() bool {
	return e.Code == codes.Unimplemented || (e.Code == codes.PermissionDenied && e.Reason == ReasonMethodDenied)
}

// refused tells whether the platform will not open a session for this caller until somebody changes something.
func (e *Error) refused() bool {
	switch e.Code {
	case codes.Unauthenticated, codes.PermissionDenied, codes.InvalidArgument, codes.FailedPrecondition:
		return true
	default:
		return false
	}
}
