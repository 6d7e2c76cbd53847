package fakeplatform

import (
	"time"

	"github.com/google/uuid"
	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/protoadapt"
	"google.golang.org/protobuf/types/known/durationpb"
)

// Error makes an error as the platform sends it. retryAfter 0: without RetryInfo.
func Error(code codes.Code, reason string, retryAfter time.Duration, metadata map[string]string) error {
	details := []protoadapt.MessageV1{&errdetails.ErrorInfo{Reason: reason, Domain: "outbox.v1", Metadata: metadata}}
	if retryAfter > 0 {
		details = append(details, &errdetails.RetryInfo{RetryDelay: durationpb.New(retryAfter)})
	}
	s, err := status.New(code, "fake: "+reason).WithDetails(details...)
	if err != nil {
		return internal(err)
	}
	return s.Err()
}

// Invalid is the error for fields that break a rule.
func Invalid(field, description string) error {
	s, err := status.New(codes.InvalidArgument, field+" "+description).WithDetails(
		&errdetails.ErrorInfo{Reason: "FIELD_INVALID", Domain: "outbox.v1", Metadata: map[string]string{"field": field}},
		&errdetails.BadRequest{FieldViolations: []*errdetails.BadRequest_FieldViolation{{Field: field, Description: description}}},
	)
	if err != nil {
		return internal(err)
	}
	return s.Err()
}

func text(id []byte) string {
	u, _ := uuid.FromBytes(id)
	return u.String()
}

func internal(err error) error { return status.Error(codes.Internal, err.Error()) }

func reused(id []byte) error {
	return Error(codes.AlreadyExists, "TRANSACTION_ID_REUSED", 0, map[string]string{"transaction_id": text(id)})
}

func unknown(id []byte) error {
	return Error(codes.NotFound, "TRANSACTION_UNKNOWN", 0, map[string]string{"transaction_id": text(id)})
}

func decided(id []byte, s State) error {
	return Error(codes.FailedPrecondition, "TRANSACTION_ALREADY_DECIDED", 0,
		map[string]string{"transaction_id": text(id), "state": s.String()[len("STATE_"):]})
}
