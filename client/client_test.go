package client_test

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/outbox-platform/outbox/client"
	"github.com/outbox-platform/outbox/client/internal/fakeplatform"
	outboxv1 "github.com/outbox-platform/outbox/gen/go/outbox/v1"
)

// transports runs a test over both transports.
func transports(t *testing.T, f func(t *testing.T, tr client.Transport)) {
	t.Run("session", func(t *testing.T) { f(t, client.TransportSession) })
	t.Run("unary", func(t *testing.T) { f(t, client.TransportUnary) })
}

func TestCallsHaveTheirEffect(t *testing.T) {
	transports(t, func(t *testing.T, tr client.Transport) {
		p := fakeplatform.Start(t)
		c := newClient(t, p, func(cfg *client.Config) { cfg.Transport = tr; cfg.Token = client.StaticToken("secret") })
		ctx := t.Context()

		id, token := prepare(t, c, "1", "a")
		if string(token) != "token" {
			t.Errorf("token %q", token)
		}
		if s := p.Transaction(id).State; s != fakeplatform.Prepared {
			t.Errorf("after Prepare: %v", s)
		}
		if err := c.Commit(ctx, id, token); err != nil {
			t.Fatal(err)
		}
		tx, err := c.GetTransaction(ctx, id)
		if err != nil {
			t.Fatal(err)
		}
		if tx.State != client.StateCommitted || tx.ID != id || tx.DecidedBy != "client" || tx.DecidedAt.IsZero() ||
			len(tx.Events) != 1 || tx.Events[0].Place != "IN_DOUBT" || tx.State.String() != "COMMITTED" {
			t.Errorf("GetTransaction: %+v", tx)
		}
		err = c.Abort(ctx, id, nil)
		if !client.IsAlreadyDecided(err) || status.Code(err) != codes.FailedPrecondition {
			t.Errorf("Abort after COMMITTED: %v", err)
		}
		var e *client.Error
		if !errors.As(err, &e) || e.Metadata["state"] != "COMMITTED" ||
			!strings.HasPrefix(e.Error(), "FAILED_PRECONDITION (TRANSACTION_ALREADY_DECIDED): ") {
			t.Errorf("error: %v", err)
		}

		aborted, token := prepare(t, c, "1", "b")
		if err := c.Abort(ctx, aborted, token); err != nil {
			t.Fatal(err)
		}
		published := client.NewID()
		for range 2 { // repeating it is safe
			e := event("1", "c")
			e.ID, e.OccurredAt = published, time.Unix(1, 0)
			if err := c.Publish(ctx, published, e); err != nil {
				t.Fatal(err)
			}
		}
		if got := p.Published("1"); fmt.Sprint(got) != "[a c]" {
			t.Errorf("published %v", got)
		}
		if err := c.Publish(ctx, published, event("1", "other")); !client.HasReason(err, client.ReasonIDReused) {
			t.Errorf("other content under the same id: %v", err)
		}
		if _, err := c.GetTransaction(ctx, client.NewID()); !client.IsUnknownTransaction(err) {
			t.Errorf("unknown transaction: %v", err)
		}
		if err := c.Commit(ctx, client.NewID(), nil); !client.IsUnknownTransaction(err) {
			t.Errorf("unknown transaction: %v", err)
		}
		for _, a := range p.Authorizations() {
			if a != "Bearer secret" {
				t.Errorf("authorization %q", a)
			}
		}
		for _, call := range p.Calls("prepare") {
			if call.Unary != (tr == client.TransportUnary) {
				t.Errorf("%+v came the wrong way", call)
			}
		}
	})
}

func TestRetriesWhatARepetitionCanCure(t *testing.T) {
	transports(t, func(t *testing.T, tr client.Transport) {
		cases := []struct {
			name  string
			err   error
			tries int
		}{
			{"unavailable", fakeplatform.Error(codes.Unavailable, "STORE_UNAVAILABLE", time.Millisecond, nil), 3},
			{"contention", fakeplatform.Error(codes.Aborted, "CONTENTION", 0, nil), 3},
			{"backlog", fakeplatform.Error(codes.ResourceExhausted, "BACKLOG_FULL", time.Millisecond, nil), 3},
			{"quota without a time", fakeplatform.Error(codes.ResourceExhausted, "QUOTA_EXCEEDED", 0, nil), 1},
			{"denied", fakeplatform.Error(codes.PermissionDenied, "TOPIC_DENIED", 0, nil), 1},
			{"internal", fakeplatform.Error(codes.Internal, "INTERNAL", 0, nil), 1},
			{"invalid", fakeplatform.Invalid("events[0].topic", "is odd"), 1},
		}
		for _, tc := range cases {
			t.Run(tc.name, func(t *testing.T) {
				p := fakeplatform.Start(t)
				c := newClient(t, p, func(cfg *client.Config) { cfg.Transport = tr })
				var n atomic.Int32
				p.SetFault(func(call fakeplatform.Call) fakeplatform.Fault {
					if call.Name == "publish" && n.Add(1) < 3 {
						return fakeplatform.Fault{Err: tc.err}
					}
					return fakeplatform.Fault{}
				})
				err := c.Publish(t.Context(), client.NewID(), event("1", "a"))
				if got := len(p.Calls("publish")); got != tc.tries {
					t.Errorf("%d attempts, want %d (%v)", got, tc.tries, err)
				}
				if (err == nil) != (tc.tries == 3) {
					t.Errorf("error: %v", err)
				}
				if tc.tries == 3 && c.Stats().Retries != 2 {
					t.Errorf("stats: %+v", c.Stats())
				}
			})
		}
	})
}

func TestRetryKeepsToRetryInfoAndDeadline(t *testing.T) {
	p := fakeplatform.Start(t)
	c := newClient(t, p, func(cfg *client.Config) { cfg.CallTimeout = 10 * time.Minute })
	p.SetFault(func(call fakeplatform.Call) fakeplatform.Fault {
		if call.Name == "session" {
			return fakeplatform.Fault{}
		}
		return fakeplatform.Fault{Err: fakeplatform.Error(codes.Unavailable, "STORE_UNAVAILABLE", time.Hour, nil)}
	})
	start := time.Now()
	err := c.Publish(t.Context(), client.NewID(), event("1", "a"))
	if !client.IsUnavailable(err) || !client.HasReason(err, client.ReasonStoreUnavailable) {
		t.Errorf("error: %v", err)
	}
	if d := time.Since(start); d > time.Minute {
		t.Errorf("waited %v although the next attempt would have been too late", d)
	}
	if n := len(p.Calls("publish")); n != 1 {
		t.Errorf("%d attempts", n)
	}
}

func TestRetriesCanBeSwitchedOff(t *testing.T) {
	p := fakeplatform.Start(t)
	c := newClient(t, p, func(cfg *client.Config) { cfg.DisableRetries = true })
	p.SetFault(func(call fakeplatform.Call) fakeplatform.Fault {
		if call.Name == "session" {
			return fakeplatform.Fault{}
		}
		return fakeplatform.Fault{Err: fakeplatform.Error(codes.Unavailable, "STORE_UNAVAILABLE", 0, nil)}
	})
	if err := c.Publish(t.Context(), client.NewID(), event("1", "a")); !client.IsUnavailable(err) {
		t.Error(err)
	}
	if n := len(p.Calls("publish")); n != 1 {
		t.Errorf("%d attempts", n)
	}
}

func TestDeadlines(t *testing.T) {
	transports(t, func(t *testing.T, tr client.Transport) {
		p := fakeplatform.Start(t)
		c := newClient(t, p, func(cfg *client.Config) {
			cfg.Transport = tr
			cfg.PrepareTimeout, cfg.CallTimeout = 50*time.Millisecond, 60*time.Millisecond
		})
		if tr == client.TransportSession {
			connected(t, c)
		}
		p.SetFault(func(call fakeplatform.Call) fakeplatform.Fault {
			return fakeplatform.Fault{Silent: call.Name != "session"}
		})
		_, err := c.Prepare(t.Context(), client.NewID(), client.DatabaseTransaction{}, event("1", "a"))
		if !client.IsUnavailable(err) || !errors.Is(err, context.DeadlineExceeded) || !strings.Contains(err.Error(), "50ms") {
			t.Errorf("the call's own limit: %v", err)
		}
		ctx, cancel := context.WithTimeout(t.Context(), 10*time.Millisecond)
		defer cancel()
		if err := c.Publish(ctx, client.NewID(), event("1", "a")); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("the caller's deadline: %v", err)
		}
		ctx, cancel = context.WithCancel(t.Context())
		cancel()
		err = c.Publish(ctx, client.NewID(), event("1", "a"))
		if !errors.Is(err, context.Canceled) || status.Code(err) != codes.Canceled || client.IsUnavailable(err) {
			t.Errorf("the caller gave up: %v", err)
		}
		if err := c.Commit(t.Context(), client.NewID(), nil); !client.IsUnavailable(err) {
			t.Errorf("the default limit: %v", err)
		}
	})
}

func TestInFlightIsBounded(t *testing.T) {
	for _, fail := range []bool{true, false} {
		t.Run(fmt.Sprint("fail=", fail), func(t *testing.T) {
			p := fakeplatform.Start(t)
			c := newClient(t, p, func(cfg *client.Config) { cfg.MaxInFlight = 2; cfg.FailWhenFull = fail })
			release := make(chan struct{})
			var once sync.Once
			free := func() { once.Do(func() { close(release) }) }
			defer free()
			p.SetFault(func(call fakeplatform.Call) fakeplatform.Fault {
				if string(call.Events0()) == "slow" {
					<-release
				}
				return fakeplatform.Fault{}
			})
			var wg sync.WaitGroup
			for range 2 {
				wg.Go(func() {
					if err := c.Publish(t.Context(), client.NewID(), event("1", "slow")); err != nil {
						t.Error(err)
					}
				})
			}
			p.Wait(t, "a call that hangs", func() bool { return c.InFlight() == 2 && len(p.Calls("publish")) > 0 })
			ctx, cancel := context.WithTimeout(t.Context(), 30*time.Millisecond)
			defer cancel()
			err := c.Publish(ctx, client.NewID(), event("1", "one too many"))
			if fail && !client.IsExhausted(err) || !fail && !errors.Is(err, context.DeadlineExceeded) {
				t.Errorf("error: %v", err)
			}
			free()
			wg.Wait()
			if err := c.Publish(t.Context(), client.NewID(), event("1", "room again")); err != nil {
				t.Error(err)
			}
		})
	}
}

func TestConfigIsChecked(t *testing.T) {
	for name, cfg := range map[string]client.Config{
		"Target":         {Source: "s"},
		"Source":         {Target: "t"},
		"Plaintext":      {Target: "t", Source: "s", Plaintext: true, TLS: insecureTLS()},
		"Transport":      {Target: "t", Source: "s", Transport: 9},
		"Sessions":       {Target: "t", Source: "s", Sessions: 17},
		"MaxInFlight":    {Target: "t", Source: "s", MaxInFlight: -1},
		"PrepareTimeout": {Target: "t", Source: "s", PrepareTimeout: -1},
		"more than 255":  {Target: "t", Source: strings.Repeat("s", 256)},
		"target":         {Target: "nosuchscheme://%", Source: "s"},
	} {
		if c, err := client.New(cfg); err == nil || !strings.Contains(err.Error(), name) {
			t.Errorf("%s: %v", name, err)
			if c != nil {
				c.Close()
			}
		}
	}
}

func TestClosedClient(t *testing.T) {
	p := fakeplatform.Start(t)
	c := newClient(t, p, nil)
	connected(t, c)
	for range 2 {
		if err := c.Close(); err != nil {
			t.Error(err)
		}
	}
	if err := c.Publish(t.Context(), client.NewID(), event("1", "a")); status.Code(err) != codes.Canceled {
		t.Error(err)
	}
	if _, err := c.GetTransaction(t.Context(), client.NewID()); status.Code(err) != codes.Canceled {
		t.Error(err)
	}
	if err := c.Connect(t.Context()); err == nil {
		t.Error("Connect after Close")
	}
	done := make(chan error, 1)
	c.CommitLater(client.NewID(), nil, func(err error) { done <- err })
	if err := <-done; err == nil {
		t.Error("CommitLater after Close was acknowledged")
	}
	if err := c.RegisterDatabase("", nil); err == nil {
		t.Error("RegisterDatabase after Close")
	}
}

func TestTLSIsTheDefaultAndTokensNeedIt(t *testing.T) {
	p := fakeplatform.Start(t) // speaks plaintext
	c := newClient(t, p, func(cfg *client.Config) { cfg.Plaintext = false; cfg.CallTimeout = 300 * time.Millisecond })
	if err := c.Publish(t.Context(), client.NewID(), event("1", "a")); !client.IsUnavailable(err) {
		t.Errorf("TLS with a server that has none: %v", err)
	}
	if n := len(p.Calls("")); n != 0 {
		t.Errorf("%d calls arrived", n)
	}
}

func TestLimitsComeFromWelcome(t *testing.T) {
	p := fakeplatform.Start(t)
	p.SetLimits(&outboxv1.Limits{
		MaxEventsPerTransaction: 2, MaxEventBytes: 100, MaxTransactionBytes: 150, MaxHeaders: 1, MaxHeaderBytes: 10, MaxOpenCalls: 5,
	})
	c := newClient(t, p, nil)
	connected(t, c)
	want := client.Limits{EventsPerTransaction: 2, TransactionBytes: 150, EventBytes: 100, Headers: 1, HeaderBytes: 10, OpenCalls: 5}
	if got := c.Limits(); got != want {
		t.Errorf("limits %+v", got)
	}
	err := c.Publish(t.Context(), client.NewID(), event("1", strings.Repeat("x", 101)))
	if !client.HasReason(err, client.ReasonEventTooLarge) {
		t.Error(err)
	}
	if n := len(p.Calls("publish")); n != 0 {
		t.Errorf("%d requests were sent although they are too large", n)
	}
}
