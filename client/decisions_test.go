package client_test

import (
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"google.golang.org/grpc/codes"

	"github.com/outbox-platform/outbox/client"
	"github.com/outbox-platform/outbox/client/internal/fakeplatform"
)

// A decision waits for the first session, and there are none to be had: it goes out as a unary call.
func TestADecisionThatWaitedForASession(t *testing.T) {
	p := fakeplatform.Start(t)
	waits := make(chan struct{})
	p.SetFault(func(call fakeplatform.Call) fakeplatform.Fault {
		if call.Name != "session" {
			return fakeplatform.Fault{}
		}
		<-waits
		return fakeplatform.Fault{Err: fakeplatform.Error(codes.Unimplemented, "", 0, nil)}
	})
	c := newClient(t, p, nil)
	done := make(chan error, 1)
	c.AbortLater(client.NewID(), nil, func(err error) { done <- err })
	close(waits)
	if err := <-done; !client.IsUnknownTransaction(err) {
		t.Errorf("answered %v", err)
	}
	if calls := p.Calls("abort"); len(calls) != 1 || !calls[0].Unary {
		t.Errorf("calls %+v", calls)
	}
}

// A client that is closed gives up the unary decisions under way and those that wait for their turn, and says so to each.
func TestClosingGivesUpUnaryDecisions(t *testing.T) {
	p := fakeplatform.Start(t)
	c := newClient(t, p, func(cfg *client.Config) {
		cfg.Transport, cfg.CloseTimeout, cfg.CallTimeout = client.TransportUnary, time.Millisecond, time.Hour
	})
	p.SetFault(func(fakeplatform.Call) fakeplatform.Fault { return fakeplatform.Fault{Silent: true} })
	const n = 200
	told := make(chan error, n)
	for range n {
		c.CommitLater(client.NewID(), nil, func(err error) { told <- err })
	}
	p.Wait(t, "calls to be under way", func() bool { return len(p.Calls("commit")) >= 16 })
	if err := c.Close(); err != nil {
		t.Fatal(err)
	}
	for range n {
		if err := <-told; err == nil {
			t.Fatal("a commit was acknowledged by nobody")
		}
	}
	if s := c.Stats(); s.Acknowledged != 0 {
		t.Errorf("stats %+v", s)
	}
}

// More questions than can be worked on: those too many are not answered, and everything else goes on.
func TestTooManyQuestions(t *testing.T) {
	p := fakeplatform.Start(t)
	registered := make(chan struct{})
	p.SetFault(func(call fakeplatform.Call) fakeplatform.Fault {
		if call.Name == "session" {
			<-registered // so that there is one session, and stays
		}
		return fakeplatform.Fault{}
	})
	c := newClient(t, p, nil)
	var asked atomic.Int32
	blocked := make(chan struct{})
	release := sync.OnceFunc(func() { close(blocked) })
	t.Cleanup(release)
	db := &database{check: func(txs []client.CheckTransaction) []client.Verdict {
		asked.Add(1)
		<-blocked
		return []client.Verdict{{ID: txs[0].ID, Outcome: client.OutcomeUnknown}}
	}}
	if err := c.RegisterDatabase("", db); err != nil {
		t.Fatal(err)
	}
	close(registered)
	id, _ := prepare(t, c, "1", "a")
	q := p.Transaction(id).Question()
	for range client.MaxChecks {
		p.AskWithoutWaiting(t, "default", q)
	}
	p.Wait(t, "all places to be taken", func() bool { return asked.Load() == client.MaxChecks })
	p.AskWithoutWaiting(t, "default", q)
	prepare(t, c, "1", "comes behind it on the stream")
	if n := asked.Load(); n != client.MaxChecks {
		t.Errorf("%d questions are worked on", n)
	}
	release()
	p.Wait(t, "the answers", func() bool { return c.Stats().Checked == client.MaxChecks })
}
