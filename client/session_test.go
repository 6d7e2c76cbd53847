package client_test

import (
	"context"
	"fmt"
	"net"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/uuid"
	"google.golang.org/grpc/codes"

	"github.com/outbox-platform/outbox/client"
	"github.com/outbox-platform/outbox/client/internal/fakeplatform"
	outboxv1 "github.com/outbox-platform/outbox/gen/go/outbox/v1"
)

func linked(c *client.Client, want client.Link) func() bool {
	return func() bool {
		link, _ := c.Link()
		return link == want
	}
}

func TestWaitingCallsShareMessages(t *testing.T) {
	p := fakeplatform.Start(t)
	c := newClient(t, p, nil)
	gate := make(chan struct{})
	p.SetFault(func(call fakeplatform.Call) fakeplatform.Fault {
		if call.Name == "session" {
			<-gate
		}
		return fakeplatform.Fault{}
	})
	var wg sync.WaitGroup
	for i := range 100 {
		wg.Go(func() {
			if err := c.Publish(t.Context(), client.NewID(), event(fmt.Sprint(i), "a")); err != nil {
				t.Error(err)
			}
		})
	}
	p.Wait(t, "100 calls in flight", func() bool { return c.InFlight() == 100 })
	close(gate)
	wg.Wait()
	if s := c.Stats(); s.Calls != 100 || s.Messages > 50 {
		t.Errorf("%d calls in %d messages", s.Calls, s.Messages)
	}
}

// While calls come often, decisions go with them; the last ones, after which no call comes, go by themselves.
func TestDecisionsShareMessages(t *testing.T) {
	p := fakeplatform.Start(t)
	p.Instant()
	c := newClient(t, p, nil)
	connected(t, c)
	const n = 2000
	acknowledged := make(chan error, n)
	for i := range n {
		id, token := prepare(t, c, fmt.Sprint(i), "a")
		c.CommitLater(id, token, func(err error) { acknowledged <- err })
	}
	for range n {
		if err := <-acknowledged; err != nil {
			t.Fatal(err)
		}
	}
	if s := c.Stats(); s.Calls != 2*n || s.Messages >= 2*n {
		t.Errorf("%d calls in %d messages", s.Calls, s.Messages)
	}
}

func TestOpenCallsStayBelowTheLimit(t *testing.T) {
	p := fakeplatform.Start(t)
	p.SetLimits(&outboxv1.Limits{MaxOpenCalls: 3})
	var open, most atomic.Int32
	c := newClient(t, p, nil)
	p.SetFault(func(call fakeplatform.Call) fakeplatform.Fault {
		if call.Name != "session" {
			most.Store(max(most.Load(), open.Add(1)))
			return fakeplatform.Fault{After: time.Millisecond}
		}
		return fakeplatform.Fault{}
	})
	var wg sync.WaitGroup
	for i := range 30 {
		wg.Go(func() {
			if err := c.Publish(t.Context(), client.NewID(), event(fmt.Sprint(i), "a")); err != nil {
				t.Error(err)
			}
			open.Add(-1)
		})
	}
	wg.Wait()
	// A place is free for the client when the answer is there, and for this test a little later: allow one answer's worth.
	if most.Load() > 6 {
		t.Errorf("%d calls were open", most.Load())
	}
}

func TestCallsSurviveABrokenSession(t *testing.T) {
	p := fakeplatform.Start(t)
	c := newClient(t, p, nil)
	connected(t, c)
	var lost atomic.Bool
	lost.Store(true)
	p.SetFault(func(call fakeplatform.Call) fakeplatform.Fault {
		return fakeplatform.Fault{LoseAnswer: lost.Load() && call.Name != "session"}
	})
	const n = 20
	var wg sync.WaitGroup
	for i := range n {
		wg.Go(func() {
			if err := c.Publish(t.Context(), client.NewID(), event(fmt.Sprint(i), "a")); err != nil {
				t.Error(err)
			}
		})
	}
	acked := make(chan error, 1)
	p.Wait(t, "all calls at the platform", func() bool { return len(p.Calls("publish")) >= n })
	c.CommitLater(p.Transactions()[0].ID, nil, func(err error) { acked <- err })
	p.Wait(t, "the commit too", func() bool { return len(p.Calls("commit")) == 1 })
	lost.Store(false)
	p.Break()
	wg.Wait()
	if err := <-acked; err != nil {
		t.Error(err)
	}
	if got := len(p.Transactions()); got != n {
		t.Errorf("%d transactions", got)
	}
	if s := c.Stats(); s.Resent < n || s.Sessions < 2 {
		t.Errorf("stats %+v", s)
	}
}

// TestResentCallsKeepTheirOrder: what was sent first is sent again first.
func TestResentCallsKeepTheirOrder(t *testing.T) {
	p := fakeplatform.Start(t)
	c := newClient(t, p, nil)
	connected(t, c)
	p.SetFault(func(call fakeplatform.Call) fakeplatform.Fault {
		return fakeplatform.Fault{Silent: call.Name != "session"}
	})
	var ids []uuid.UUID
	var wg sync.WaitGroup
	for range 200 {
		id := client.NewID()
		ids = append(ids, id)
		wg.Add(1)
		c.CommitLater(id, nil, func(error) { wg.Done() })
	}
	p.Wait(t, "all at the platform", func() bool { return len(p.Calls("commit")) == 200 })
	p.SetFault(nil)
	p.Break()
	wg.Wait()
	var again []uuid.UUID
	for _, call := range p.Calls("commit")[200:] {
		again = append(again, call.ID)
	}
	if !slices.Equal(ids, again) {
		t.Error("the order changed")
	}
}

func TestServerRestart(t *testing.T) {
	p := fakeplatform.Start(t)
	c := newClient(t, p, func(cfg *client.Config) { cfg.MaxReconnectDelay, cfg.PrepareTimeout = 50*time.Millisecond, time.Hour })
	id, token := prepare(t, c, "1", "a")
	p.Stop()
	p.Wait(t, "the link to be down", linked(c, client.LinkDown))

	start := time.Now()
	r, err := c.Encode(t.Context(), client.NewID(), client.DatabaseTransaction{}, event("1", "b"))
	if err != nil {
		t.Fatal(err)
	}
	_, err = c.PrepareRequest(t.Context(), r, true)
	if !client.IsUnavailable(err) || time.Since(start) > time.Minute { // else it would have waited
		t.Errorf("a call that can spill: %v after %v", err, time.Since(start))
	}
	done := make(chan error, 1)
	c.CommitLater(id, token, func(err error) { done <- err })
	waiting := make(chan error, 1)
	go func() { waiting <- c.Publish(t.Context(), client.NewID(), event("1", "c")) }()
	p.Wait(t, "the call to wait", func() bool { return c.InFlight() == 1 })
	p.Restart()
	if err := <-waiting; err != nil {
		t.Errorf("a call that waits for the session: %v", err)
	}
	if err := <-done; err != nil {
		t.Errorf("the commit: %v", err)
	}
	if got := p.Published("1"); fmt.Sprint(got) != "[a c]" {
		t.Errorf("published %v", got)
	}
}

func TestUnreachableFromTheStart(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close() // accepts and says nothing
	c, err := client.New(client.Config{
		Target: l.Addr().String(), Source: "orders", Plaintext: true, ConnectTimeout: 50 * time.Millisecond,
		PrepareTimeout: 200 * time.Millisecond,
	})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
	defer cancel()
	if err := c.Connect(ctx); err == nil || !strings.Contains(err.Error(), "no session within 50ms") {
		t.Errorf("Connect: %v", err)
	}
	_, err = c.Prepare(t.Context(), client.NewID(), client.DatabaseTransaction{}, event("1", "a"))
	if !client.IsUnavailable(err) || !strings.Contains(err.Error(), "no session") {
		t.Errorf("Prepare: %v", err)
	}
}

// TestSilentServer: a server that accepts calls and never answers is noticed by the first call's deadline.
func TestSilentServer(t *testing.T) {
	p := fakeplatform.Start(t)
	c := newClient(t, p, func(cfg *client.Config) {
		cfg.PrepareTimeout = 100 * time.Millisecond
		cfg.ConnectTimeout = 100 * time.Millisecond
	})
	prepare(t, c, "1", "a")
	p.SetFault(func(fakeplatform.Call) fakeplatform.Fault { return fakeplatform.Fault{Silent: true} })
	p.Wait(t, "the link to be down", func() bool {
		_, err := c.Prepare(t.Context(), client.NewID(), client.DatabaseTransaction{}, event("1", "b"))
		return client.IsUnavailable(err) && linked(c, client.LinkDown)()
	})
	p.SetFault(nil)
	p.Wait(t, "the link to be up", linked(c, client.LinkUp))
	prepare(t, c, "1", "c")
}

func TestDrainMovesTheSession(t *testing.T) {
	p := fakeplatform.Start(t)
	c := newClient(t, p, nil)
	connected(t, c)
	p.SetFault(func(call fakeplatform.Call) fakeplatform.Fault {
		if string(call.Events0()) == "slow" {
			return fakeplatform.Fault{After: 100 * time.Millisecond}
		}
		return fakeplatform.Fault{}
	})
	slow := make(chan error, 1)
	go func() { slow <- c.Publish(t.Context(), client.NewID(), event("1", "slow")) }()
	p.Wait(t, "the slow call", func() bool { return len(p.Calls("publish")) == 1 })
	p.Drain(10 * time.Second)
	p.Wait(t, "a second session", func() bool { return len(p.Calls("session")) == 2 })
	if err := c.Publish(t.Context(), client.NewID(), event("2", "new")); err != nil {
		t.Error(err)
	}
	if err := <-slow; err != nil {
		t.Errorf("the call under way: %v", err)
	}
	p.Wait(t, "the old session to end", func() bool { return p.Sessions() == 1 })
	if s := c.Stats(); s.Resent != 0 || s.Drains != 1 {
		t.Errorf("stats %+v", s)
	}
	if n := len(p.Calls("publish")); n != 2 {
		t.Errorf("%d calls", n)
	}
}

// TestDrainGraceEnds: what a draining server does not answer in time is sent to the next one.
func TestDrainGraceEnds(t *testing.T) {
	p := fakeplatform.Start(t)
	c := newClient(t, p, nil)
	connected(t, c)
	var silent atomic.Bool
	silent.Store(true)
	p.SetFault(func(call fakeplatform.Call) fakeplatform.Fault {
		return fakeplatform.Fault{Silent: silent.Load() && call.Name == "publish"}
	})
	done := make(chan error, 1)
	go func() { done <- c.Publish(t.Context(), client.NewID(), event("1", "a")) }()
	p.Wait(t, "the call", func() bool { return len(p.Calls("publish")) == 1 })
	silent.Store(false)
	p.Drain(20 * time.Millisecond)
	if err := <-done; err != nil {
		t.Error(err)
	}
}

func TestFallsBackToUnaryCalls(t *testing.T) {
	for name, refusal := range map[string]error{
		"unimplemented": fakeplatform.Error(codes.Unimplemented, "", 0, nil),
		"forbidden":     fakeplatform.Error(codes.PermissionDenied, "METHOD_DENIED", 0, nil),
	} {
		t.Run(name, func(t *testing.T) {
			p := fakeplatform.Start(t)
			p.SetFault(func(call fakeplatform.Call) fakeplatform.Fault {
				if call.Name == "session" {
					return fakeplatform.Fault{Err: refusal}
				}
				return fakeplatform.Fault{}
			})
			c := newClient(t, p, nil)
			done := make(chan error, 2)
			id, token := prepare(t, c, "1", "a")
			c.CommitLater(id, token, func(err error) { done <- err })
			c.AbortLater(client.NewID(), token, func(err error) { done <- err })
			var failures int
			for range 2 {
				if err := <-done; err != nil {
					failures++
				}
			}
			if failures != 1 {
				t.Errorf("%d failures", failures)
			}
			if got := p.Published("1"); fmt.Sprint(got) != "[a]" {
				t.Errorf("published %v", got)
			}
			if !linked(c, client.LinkUp)() {
				t.Error("the link is not up")
			}
			for _, call := range p.Calls("prepare") {
				if !call.Unary {
					t.Errorf("%+v", call)
				}
			}
		})
	}
}

// TestUnaryCommitsAreRepeated: without sessions, too, a decision goes out until it is acknowledged.
func TestUnaryCommitsAreRepeated(t *testing.T) {
	p := fakeplatform.Start(t)
	c := newClient(t, p, func(cfg *client.Config) { cfg.Transport = client.TransportUnary })
	id, token := prepare(t, c, "1", "a")
	var n atomic.Int32
	p.SetFault(func(call fakeplatform.Call) fakeplatform.Fault {
		if n.Add(1) < 3 {
			return fakeplatform.Fault{Err: fakeplatform.Error(codes.Unavailable, "STORE_UNAVAILABLE", 0, nil)}
		}
		return fakeplatform.Fault{}
	})
	done := make(chan error, 1)
	c.CommitLater(id, token, func(err error) { done <- err })
	if err := <-done; err != nil {
		t.Error(err)
	}
}

// TestRefusedSession: a caller that the platform does not know learns it at once, not at its deadline.
func TestRefusedSession(t *testing.T) {
	p := fakeplatform.Start(t)
	var refuse atomic.Bool
	refuse.Store(true)
	p.SetFault(func(call fakeplatform.Call) fakeplatform.Fault {
		if call.Name == "session" && refuse.Load() {
			return fakeplatform.Fault{Err: fakeplatform.Error(codes.PermissionDenied, "SOURCE_DENIED", 0, map[string]string{"source": "orders"})}
		}
		return fakeplatform.Fault{}
	})
	c := newClient(t, p, func(cfg *client.Config) { cfg.MaxReconnectDelay = 20 * time.Millisecond })
	for range 2 { // queued before the refusal, and after it
		start := time.Now()
		err := c.Publish(t.Context(), client.NewID(), event("1", "a"))
		if !client.IsDenied(err) || !client.HasReason(err, client.ReasonSourceDenied) || time.Since(start) > 3*time.Second {
			t.Errorf("error: %v after %v", err, time.Since(start))
		}
	}
	refuse.Store(false)
	p.Wait(t, "the link to be up", linked(c, client.LinkUp))
	if err := c.Publish(t.Context(), client.NewID(), event("1", "a")); err != nil {
		t.Error(err)
	}
}

func TestSeveralSessions(t *testing.T) {
	p := fakeplatform.Start(t)
	c := newClient(t, p, func(cfg *client.Config) { cfg.Sessions = 3 })
	p.Wait(t, "three sessions", func() bool {
		if err := c.Publish(t.Context(), client.NewID(), event("1", "a")); err != nil {
			t.Error(err)
		}
		return p.Sessions() == 3
	})
	p.Break()
	if err := c.Publish(t.Context(), client.NewID(), event("1", "b")); err != nil {
		t.Error(err)
	}
}

func TestPendingCommitsAreBounded(t *testing.T) {
	p := fakeplatform.Start(t)
	c := newClient(t, p, func(cfg *client.Config) { cfg.MaxPendingCommits = 2; cfg.CloseTimeout = 10 * time.Millisecond })
	p.SetFault(func(call fakeplatform.Call) fakeplatform.Fault {
		return fakeplatform.Fault{Silent: call.Name == "commit"}
	})
	for range 2 {
		c.CommitLater(client.NewID(), nil, nil)
	}
	var err error
	c.CommitLater(client.NewID(), nil, func(e error) { err = e })
	if !client.IsExhausted(err) {
		t.Errorf("the third: %v", err)
	}
	if s := c.Stats(); s.DroppedCommits != 1 || s.PendingCommits != 2 {
		t.Errorf("stats %+v", s)
	}
}

// TestCloseWaitsForCommits: what was told to the client before Close reaches the platform.
func TestCloseWaitsForCommits(t *testing.T) {
	p := fakeplatform.Start(t)
	c := newClient(t, p, nil)
	id, token := prepare(t, c, "1", "a")
	p.SetFault(func(fakeplatform.Call) fakeplatform.Fault { return fakeplatform.Fault{After: 20 * time.Millisecond} })
	c.CommitLater(id, token, nil)
	c.Close()
	if s := p.Transaction(id).State; s != fakeplatform.Committed {
		t.Errorf("state %v", s)
	}
}

func TestContradictionRaisesTheAlarm(t *testing.T) {
	p := fakeplatform.Start(t)
	var a alarms
	c := newClient(t, p, func(cfg *client.Config) {
		cfg.OnAlarm = func(x client.Alarm) { a.add(x); panic("an alarm that fails must not hurt") } //nolint:forbidigo // on purpose
	})
	id, token := prepare(t, c, "1", "a")
	if err := p.Decide(id, fakeplatform.Aborted); err != nil {
		t.Fatal(err)
	}
	done := make(chan error, 1)
	c.CommitLater(id, token, func(err error) { done <- err; panic("so must this") }) //nolint:forbidigo // on purpose
	if err := <-done; !client.IsAlreadyDecided(err) {
		t.Error(err)
	}
	p.Wait(t, "the alarm", func() bool { return slices.Contains(a.kinds(), client.AlarmContradiction) })
	prepare(t, c, "1", "the session lives")
}

// TestAnswerThatNeverComes: a live session whose server has forgotten a call is broken off, and the call sent again.
func TestAnswerThatNeverComes(t *testing.T) {
	p := fakeplatform.Start(t)
	c := newClient(t, p, func(cfg *client.Config) { cfg.CallTimeout = 50 * time.Millisecond })
	id, token := prepare(t, c, "1", "a")
	var n atomic.Int32
	p.SetFault(func(call fakeplatform.Call) fakeplatform.Fault {
		return fakeplatform.Fault{LoseAnswer: call.Name == "commit" && n.Add(1) == 1}
	})
	done := make(chan error, 1)
	c.CommitLater(id, token, func(err error) { done <- err })
	if err := <-done; err != nil {
		t.Error(err)
	}
	if n.Load() != 2 {
		t.Errorf("%d commits", n.Load())
	}
}

func TestLinkNames(t *testing.T) {
	if s := fmt.Sprint(client.LinkConnecting, client.LinkUp, client.LinkDown); s != "connecting up down" {
		t.Error(s)
	}
}
