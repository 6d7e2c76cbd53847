// Package fakeplatform is an outbox platform in memory, for the tests of the SDK: a real gRPC server with the real API and
// the real rules of states and idempotency, whose faults a test chooses.
package fakeplatform
