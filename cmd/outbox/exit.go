package main

import (
	"context"
	"errors"
	"fmt"
	"strings"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/outbox-platform/outbox/store"
)

// Exit codes. They are part of the interface: scripts rely on them.
const (
	exitOK          = 0
	exitFailure     = 1 // anything that has no code of its own
	exitUsage       = 2 // wrong usage or configuration; nothing was done
	exitNotFound    = 3 // there is no such thing
	exitRefused     = 4 // the server refused it: invalid, not allowed, or the state does not allow it
	exitUnavailable = 5 // server or store cannot be reached, or are overloaded: try again
	exitViolation   = 6 // verify found violations; doctor found mode marker unsafe; bench lost, made up or reordered events
)

const exitCodesHelp = `Exit codes: 0 done, 1 failed, 2 wrong usage or configuration, 3 not found, 4 refused, 5 unavailable (try again),
6 verification found violations.`

// codedError is an error with an exit code of its own.
type codedError struct {
	code int
	error
}

func (e codedError) Unwrap() error { return e.error }

func usagef(format string, args ...any) error {
	return codedError{exitUsage, fmt.Errorf(format, args...)}
}

func exitCode(err error) int {
	var coded codedError
	if errors.As(err, &coded) {
		return coded.code
	}
	if errors.Is(err, store.ErrUnavailable) {
		return exitUnavailable
	}
	switch status.Code(err) {
	case codes.NotFound:
		return exitNotFound
	case codes.InvalidArgument, codes.PermissionDenied, codes.Unauthenticated, codes.FailedPrecondition, codes.AlreadyExists,
		codes.Unimplemented, codes.OutOfRange:
		return exitRefused
	case codes.Unavailable, codes.ResourceExhausted, codes.DeadlineExceeded, codes.Aborted:
		return exitUnavailable
	}
	return exitFailure
}

// explain makes an error of the API readable and says what to do next.
func explain(err error) error {
	if errors.Is(err, context.Canceled) {
		return errors.New("interrupted")
	}
	var answer interface {
		error
		GRPCStatus() *status.Status
	}
	if !errors.As(err, &answer) {
		return err
	}
	s := answer.GRPCStatus()
	// What was being done stays in front; "rpc error: code = …" says nothing more.
	text := strings.TrimSuffix(err.Error(), answer.Error()) + s.Message()
	for _, detail := range s.Details() {
		switch d := detail.(type) {
		case *errdetails.BadRequest:
			for _, v := range d.GetFieldViolations() {
				if violation := v.GetField() + ": " + v.GetDescription(); !strings.Contains(text, violation) {
					text += "\n  " + violation
				}
			}
		case *errdetails.ErrorInfo:
			text += fmt.Sprintf(" [%s]", d.GetReason())
		}
	}
	switch s.Code() {
	case codes.Unavailable:
		text += "\nIs the server running, and is its address right (--address, OUTBOX_ADDRESS)? Its health: outbox-server-host:http-port/readyz"
	case codes.DeadlineExceeded:
		text += "\nThe server did not answer in time (--timeout)."
	case codes.PermissionDenied, codes.Unauthenticated:
		text += "\nThe server did not accept who you are for this call."
	}
	return fmt.Errorf("%s (%s)", text, s.Code())
}
