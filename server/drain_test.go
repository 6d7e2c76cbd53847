package server

import (
	"errors"
	"io"
	"testing"
	"time"

	"google.golang.org/grpc/codes"

	outboxv1 "github.com/outbox-platform/outbox/gen/go/outbox/v1"
	"github.com/outbox-platform/outbox/store"
)

// A client that moves when told loses nothing: its calls under way are answered, new sessions are refused.
func TestDrainPolite(t *testing.T) {
	held := make(chan *store.Request, 1)
	w := newMemoryWriter(t)
	w.answer = func(r *store.Request) { held <- r }
	r := startWithout(t, w)
	s := openSession(t, t.Context(), r.client, hello("orders"))
	sendCalls(t, s, callPrepareOf(1, newPrepare("orders")))
	req := <-held
	r.stop()
	resp, err := s.Recv()
	if err != nil || resp.GetDrainNotice().GetGraceMs() == 0 {
		t.Fatalf("%v, %v; want a notice with its grace", resp, err)
	}
	if r.readiness.ready.Load() {
		t.Error("ready although draining")
	}
	req.Done(req, store.Answer{Shards: 1})
	if got := receiveResults(t, s, 1); got[1].GetStatus() != nil {
		t.Fatalf("the call under way: %v", got[1])
	}
	if err := s.CloseSend(); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Recv(); !errors.Is(err, io.EOF) {
		t.Fatalf("%v, want the end", err)
	}
	if err := <-r.done; err != nil {
		t.Fatal(err)
	}
	r.done <- nil
}

// A client that does not move is cut in time, and told why.
func TestDrainBound(t *testing.T) {
	r := startWithout(t, newMemoryWriter(t), func(c *Config) { c.DrainTimeout = 500 * time.Millisecond })
	s := openSession(t, t.Context(), r.client, hello("orders"))
	began := time.Now()
	r.stop()
	var err error
	for err == nil {
		_, err = s.Recv()
	}
	wantError(t, err, codes.Unavailable, outboxv1.ErrorReason_ERROR_REASON_STORE_UNAVAILABLE)
	if err := <-r.done; err != nil {
		t.Fatal(err)
	}
	if took := time.Since(began); took > 5*time.Second {
		t.Errorf("draining took %s", took)
	}
	r.done <- nil
}

// A unary call that never ends is cut too.
func TestDrainCutsHangingCalls(t *testing.T) {
	held := make(chan *store.Request, 1)
	w := newMemoryWriter(t)
	w.answer = func(r *store.Request) { held <- r }
	r := startWithout(t, w, func(c *Config) { c.DrainTimeout = 300 * time.Millisecond })
	failed := make(chan error, 1)
	go func() {
		_, err := r.client.Prepare(t.Context(), newPrepare("orders"))
		failed <- err
	}()
	req := <-held
	r.stop()
	if err := <-failed; err == nil {
		t.Fatal("the call succeeded although nothing answered it")
	}
	if err := <-r.done; err != nil {
		t.Fatal(err)
	}
	req.Done(req, store.Answer{})
	r.done <- nil
}

func TestNoNewSessionsWhileDraining(t *testing.T) {
	r := startWithout(t, newMemoryWriter(t))
	r.sessions.drain(time.Second)
	s, err := r.client.Session(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Send(&outboxv1.SessionRequest{Request: &outboxv1.SessionRequest_Hello_{Hello: hello("orders")}}); err != nil {
		t.Fatal(err)
	}
	for err == nil {
		_, err = s.Recv()
	}
	wantError(t, err, codes.Unavailable, outboxv1.ErrorReason_ERROR_REASON_STORE_UNAVAILABLE)
}
