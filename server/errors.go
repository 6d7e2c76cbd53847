package server

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"time"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	spb "google.golang.org/genproto/googleapis/rpc/status"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/protoadapt"
	"google.golang.org/protobuf/types/known/durationpb"

	outboxv1 "github.com/outbox-platform/outbox/gen/go/outbox/v1"
	"github.com/outbox-platform/outbox/store"
)

// errorDomain is ErrorInfo.domain of every error of this API.
const errorDomain = "outbox.v1"

// retryPushback is the trailer that gRPC clients obey when they retry by themselves.
const retryPushback = "grpc-retry-pushback-ms"

// apiError is an error as a caller sees it: a code, exactly one reason, and the details that fit.
type apiError struct {
	code     codes.Code
	reason   outboxv1.ErrorReason
	message  string
	metadata map[string]string
	details  []protoadapt.MessageV1
	retry    time.Duration // > 0: RetryInfo, and the push-back trailer of unary calls
	cause    error         // logged, never sent
}

func (e *apiError) Error() string {
	if e.cause != nil {
		return e.message + ": " + e.cause.Error()
	}
	return e.message
}

func (e *apiError) Unwrap() error { return e.cause }

// GRPCStatus makes grpc send e as it is meant.
func (e *apiError) GRPCStatus() *status.Status { return status.FromProto(e.proto()) }

// proto is the status as it travels, in a trailer or in a Result.
func (e *apiError) proto() *spb.Status {
	info := &errdetails.ErrorInfo{
		Reason:   strings.TrimPrefix(e.reason.String(), "ERROR_REASON_"),
		Domain:   errorDomain,
		Metadata: e.metadata,
	}
	details := make([]protoadapt.MessageV1, 0, 2+len(e.details))
	details = append(details, info)
	details = append(details, e.details...)
	if e.retry > 0 {
		details = append(details, &errdetails.RetryInfo{RetryDelay: durationpb.New(e.retry)})
	}
	st := status.New(e.code, e.message)
	if detailed, err := st.WithDetails(details...); err == nil { // fails for code OK only
		st = detailed
	}
	return st.Proto()
}

// fieldError is INVALID_ARGUMENT for one field.
func fieldError(field, format string, args ...any) *apiError {
	return violationsError([]*errdetails.BadRequest_FieldViolation{{Field: field, Description: fmt.Sprintf(format, args...)}})
}

// violationsError is INVALID_ARGUMENT for some fields; there must be at least one.
func violationsError(violations []*errdetails.BadRequest_FieldViolation) *apiError {
	first := violations[0]
	message := first.GetField() + ": " + first.GetDescription()
	if n := len(violations) - 1; n > 0 {
		message += fmt.Sprintf(" (and %d more)", n)
	}
	return &apiError{
		code:     codes.InvalidArgument,
		reason:   outboxv1.ErrorReason_ERROR_REASON_FIELD_INVALID,
		message:  message,
		metadata: map[string]string{"field": first.GetField()},
		details:  []protoadapt.MessageV1{&errdetails.BadRequest{FieldViolations: violations}},
	}
}

// tooLargeError is INVALID_ARGUMENT for an event or a transaction above a limit.
func tooLargeError(field string, size, limit int64) *apiError {
	e := fieldError(field, "%d bytes, allowed are %d", size, limit)
	e.reason = outboxv1.ErrorReason_ERROR_REASON_EVENT_TOO_LARGE
	e.metadata["size_bytes"] = strconv.FormatInt(size, 10)
	e.metadata["limit_bytes"] = strconv.FormatInt(limit, 10)
	return e
}

// sourceDenied is the same for a source that is not registered and for one that the caller may not act for: the answer
// must not tell which names exist.
func sourceDenied(source string) *apiError {
	return &apiError{
		code:     codes.PermissionDenied,
		reason:   outboxv1.ErrorReason_ERROR_REASON_SOURCE_DENIED,
		message:  fmt.Sprintf("source %q is not registered, or the caller may not act for it", source),
		metadata: map[string]string{"source": source},
	}
}

func topicDenied(source, topic string) *apiError {
	return &apiError{
		code:     codes.PermissionDenied,
		reason:   outboxv1.ErrorReason_ERROR_REASON_TOPIC_DENIED,
		message:  fmt.Sprintf("source %q may not use topic %q", source, topic),
		metadata: map[string]string{"source": source, "topic": topic},
	}
}

// quotaExceeded: the source has too many calls under way, in the session or in this server.
func quotaExceeded(source, quota string, limit int) *apiError {
	return &apiError{
		code:     codes.ResourceExhausted,
		reason:   outboxv1.ErrorReason_ERROR_REASON_QUOTA_EXCEEDED,
		message:  fmt.Sprintf("source %q has its %d %s under way", source, limit, quota),
		metadata: map[string]string{"source": source, "quota": quota},
		details: []protoadapt.MessageV1{&errdetails.QuotaFailure{Violations: []*errdetails.QuotaFailure_Violation{{
			Subject: "source:" + source, Description: fmt.Sprintf("at most %d %s", limit, quota),
		}}}},
		retry: 50 * time.Millisecond,
	}
}

func notFound(kind, name string) *apiError {
	return &apiError{
		code:     codes.NotFound,
		reason:   outboxv1.ErrorReason_ERROR_REASON_NOT_FOUND,
		message:  fmt.Sprintf("no such %s: %q", kind, name),
		metadata: map[string]string{kind: name},
	}
}

func methodDenied(method string) *apiError {
	return &apiError{
		code:     codes.PermissionDenied,
		reason:   outboxv1.ErrorReason_ERROR_REASON_METHOD_DENIED,
		message:  "the caller may not use " + method,
		metadata: map[string]string{"method": method},
	}
}

// The errors that do not depend on the call.
var (
	errBacklogFull = &apiError{
		code:    codes.ResourceExhausted,
		reason:  outboxv1.ErrorReason_ERROR_REASON_BACKLOG_FULL,
		message: "the server's queue is full; nothing was stored",
		retry:   100 * time.Millisecond,
	}
	errTooManyCalls = &apiError{
		code:    codes.ResourceExhausted,
		reason:  outboxv1.ErrorReason_ERROR_REASON_BACKLOG_FULL,
		message: "the server has as many unary calls under way as it may; nothing was stored",
		retry:   100 * time.Millisecond,
	}
	errStoreUnavailable = &apiError{
		code:    codes.Unavailable,
		reason:  outboxv1.ErrorReason_ERROR_REASON_STORE_UNAVAILABLE,
		message: "the store cannot be reached; whether the call took effect is unknown, repeating it is safe",
		retry:   500 * time.Millisecond,
	}
	errDraining = &apiError{
		code:    codes.Unavailable,
		reason:  outboxv1.ErrorReason_ERROR_REASON_STORE_UNAVAILABLE,
		message: "this server is about to stop; repeat the call, it will go elsewhere",
		retry:   100 * time.Millisecond,
	}
	errContention = &apiError{
		code:    codes.Aborted,
		reason:  outboxv1.ErrorReason_ERROR_REASON_CONTENTION,
		message: "contention that retries did not resolve; nothing was stored, repeat the call",
		retry:   20 * time.Millisecond,
	}
	errUnauthenticated = &apiError{
		code:    codes.Unauthenticated,
		reason:  outboxv1.ErrorReason_ERROR_REASON_IDENTITY_UNKNOWN,
		message: "the caller did not prove who it is",
	}
)

// transactionError is the one table from what the store says about a transaction to what its caller sees. nil stays nil.
func transactionError(err error, id store.TransactionID) *apiError {
	if err == nil {
		return nil // the common case allocates nothing
	}
	return refusal(err, id)
}

func refusal(err error, id store.TransactionID) *apiError {
	var decided *store.DecidedError
	switch {
	case errors.Is(err, store.ErrBacklogFull):
		return errBacklogFull
	case errors.Is(err, store.ErrUnavailable):
		return errStoreUnavailable
	case errors.Is(err, store.ErrContention):
		return errContention
	case errors.Is(err, store.ErrReused):
		return &apiError{
			code:     codes.AlreadyExists,
			reason:   outboxv1.ErrorReason_ERROR_REASON_TRANSACTION_ID_REUSED,
			message:  "the transaction_id was used before with other content: " + id.String(),
			metadata: map[string]string{"transaction_id": id.String()},
		}
	case errors.Is(err, store.ErrUnknown):
		return &apiError{
			code:     codes.NotFound,
			reason:   outboxv1.ErrorReason_ERROR_REASON_TRANSACTION_UNKNOWN,
			message:  "no such transaction, or it is past retention: " + id.String(),
			metadata: map[string]string{"transaction_id": id.String()},
		}
	case errors.As(err, &decided):
		return &apiError{
			code:     codes.FailedPrecondition,
			reason:   outboxv1.ErrorReason_ERROR_REASON_TRANSACTION_ALREADY_DECIDED,
			message:  fmt.Sprintf("transaction %s is already %s", id, decided.State),
			metadata: map[string]string{"transaction_id": id.String(), "state": decided.State.String()},
		}
	case errors.Is(err, store.ErrInvalid):
		e := fieldError("transaction", "the store refused the data")
		e.cause = err
		return e
	}
	return otherError(err)
}

// sourceError is the same table for calls about a source or another named thing.
func sourceError(err error, kind, name string) *apiError {
	switch {
	case err == nil:
		return nil
	case errors.Is(err, store.ErrUnknown):
		return notFound(kind, name)
	case errors.Is(err, store.ErrInUse), errors.Is(err, store.ErrRevision):
		return &apiError{
			code:     codes.FailedPrecondition,
			reason:   outboxv1.ErrorReason_ERROR_REASON_SOURCE_IN_USE,
			message:  fmt.Sprintf("%s %q: %v", kind, name, err),
			metadata: map[string]string{kind: name},
		}
	case errors.Is(err, store.ErrUnavailable):
		return errStoreUnavailable
	case errors.Is(err, store.ErrContention):
		return errContention
	}
	return otherError(err)
}

// otherError is for what no table knows: the end of the caller's patience, or a bug.
func otherError(err error) *apiError {
	var e *apiError
	switch {
	case errors.As(err, &e):
		return e
	case errors.Is(err, context.DeadlineExceeded):
		return &apiError{
			code: codes.DeadlineExceeded, reason: outboxv1.ErrorReason_ERROR_REASON_STORE_UNAVAILABLE,
			message: "the deadline passed before the store answered; whether the call took effect is unknown, repeating it is safe",
		}
	case errors.Is(err, context.Canceled):
		return &apiError{
			code: codes.Canceled, reason: outboxv1.ErrorReason_ERROR_REASON_STORE_UNAVAILABLE,
			message: "the caller went away; whether the call took effect is unknown, repeating it is safe",
		}
	}
	id := logID()
	return &apiError{
		code:     codes.Internal,
		reason:   outboxv1.ErrorReason_ERROR_REASON_INTERNAL,
		message:  "internal error; the server's log has its cause under log_id " + id,
		metadata: map[string]string{"log_id": id},
		cause:    err,
	}
}

// logID names one line of the log.
func logID() string {
	var b [8]byte
	_, _ = rand.Read(b[:]) // never fails
	return hex.EncodeToString(b[:])
}
