package client_test

import (
	"context"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/outbox-platform/outbox/client"
	"github.com/outbox-platform/outbox/client/internal/fakeplatform"
	outboxv1 "github.com/outbox-platform/outbox/gen/go/outbox/v1"
)

// database answers check-back questions as a test wants.
type database struct {
	check func([]client.CheckTransaction) []client.Verdict
	runs  chan struct{}
}

func (d *database) Check(_ context.Context, txs []client.CheckTransaction) []client.Verdict {
	return d.check(txs)
}

func (d *database) Run(ctx context.Context) error {
	select {
	case d.runs <- struct{}{}:
		panic("upkeep that fails is started again") //nolint:forbidigo // on purpose
	default:
	}
	<-ctx.Done()
	return ctx.Err()
}

func TestCheckBack(t *testing.T) {
	p := fakeplatform.Start(t)
	c := newClient(t, p, func(cfg *client.Config) { cfg.MaxReconnectDelay = 20 * time.Millisecond })
	connected(t, c) // before the database is registered: the session has to be renewed
	id, _ := prepare(t, c, "1", "a")

	db := &database{runs: make(chan struct{}, 1)}
	db.check = func(txs []client.CheckTransaction) []client.Verdict {
		if len(txs) != 1 || txs[0].ID != id || txs[0].Database.XID != 7 || txs[0].Database.Mode != client.ModeMarker {
			t.Errorf("asked for %+v", txs)
		}
		return []client.Verdict{{
			ID: id, Outcome: client.OutcomeCommitted, Reason: strings.Repeat("é", 1000), Evidence: `{"a":1}`, NaiveWrong: true,
		}}
	}
	if err := c.RegisterDatabase("", db); err != nil {
		t.Fatal(err)
	}
	if err := c.RegisterDatabase("default", db); err == nil {
		t.Error("the name was given twice")
	}
	if c.Registered("") != db || c.Registered("other") != nil {
		t.Error("Registered")
	}
	answers := p.Ask(t, "default", p.Transaction(id).Question())
	if len(answers) != 1 || answers[0].GetOutcome() != outboxv1.SessionRequest_CheckAnswer_OUTCOME_COMMITTED ||
		!answers[0].GetNaiveWrong() || len(answers[0].GetReason()) > 1024 || answers[0].GetEvidence() != `{"a":1}` {
		t.Errorf("answers %v", answers)
	}
	if s := c.Stats(); s.Checked != 1 {
		t.Errorf("stats %+v", s)
	}
	p.Wait(t, "the old session to end", func() bool { return p.Sessions() == 1 })

	p.Wait(t, "the upkeep to start again", func() bool { return len(db.runs) == 1 })
}

// TestCheckBackWithoutAnAnswer: a database that panics, or that is not registered, answers nothing, and the session goes on.
func TestCheckBackWithoutAnAnswer(t *testing.T) {
	p := fakeplatform.Start(t)
	c := newClient(t, p, nil)
	var asked atomic.Int32
	db := &database{check: func(txs []client.CheckTransaction) []client.Verdict {
		if asked.Add(1) == 1 {
			panic("broken") //nolint:forbidigo // on purpose
		}
		return []client.Verdict{{ID: txs[0].ID, Outcome: client.OutcomeUnknown, Evidence: strings.Repeat("x", 5000)}}
	}}
	if err := c.RegisterDatabase("", db); err != nil {
		t.Fatal(err)
	}
	if err := c.RegisterDatabase("second", db); err != nil { // while the session is being opened
		t.Fatal(err)
	}
	id, _ := prepare(t, c, "1", "a")
	q := p.Transaction(id).Question()
	p.Wait(t, "both names", func() bool { return slices.Contains(p.Databases(), "second") && p.Sessions() == 1 })
	p.AskWithoutWaiting(t, "default", q)
	p.Wait(t, "the panic", func() bool { return asked.Load() == 1 })
	p.AskWithoutWaiting(t, "unheard of", q)
	answers := p.Ask(t, "default", q)
	if len(answers) != 1 || answers[0].GetEvidence() != "" {
		t.Errorf("%v", answers)
	}
}

func TestOutcomeNames(t *testing.T) {
	for o, want := range map[client.Outcome]string{
		client.OutcomeCommitted: "COMMITTED", client.OutcomeAborted: "ABORTED", client.OutcomeInProgress: "IN_PROGRESS",
		client.OutcomeUnknown: "UNKNOWN", 0: "UNKNOWN",
	} {
		if o.String() != want {
			t.Errorf("%d: %s", o, o)
		}
	}
	for s, want := range map[client.State]string{
		client.StatePrepared: "PREPARED", client.StateCommitted: "COMMITTED", client.StateAborted: "ABORTED", 9: "UNSPECIFIED",
	} {
		if s.String() != want {
			t.Errorf("%d: %s", s, s)
		}
	}
}
