package main

import (
	"context"
	"fmt"
	"strings"

	"github.com/google/uuid"

	outboxv1 "github.com/outbox-platform/outbox/gen/go/outbox/v1"
)

type transactionListCmd struct {
	InDoubt bool   `required:"" help:"The undecided ones whose events wait for that. The only list there is."`
	Source  string `help:"Only of this source."`
	outputSettings
	API apiSettings `embed:"" group:"api"`
}

// Help implements kong.HelpProvider.
func (*transactionListCmd) Help() string {
	return `Oldest first. CHECKS is how often the source and its database were asked, LAST ANSWER what they said.

Example:
  outbox transaction list --in-doubt --source orders`
}

// Run lists the transactions in doubt.
func (c *transactionListCmd) Run(ctx context.Context, s streams) error {
	server, err := c.API.dial()
	if err != nil {
		return err
	}
	defer server.close()
	all := &outboxv1.ListInDoubtTransactionsResponse{}
	err = pages(func(token string) (string, error) {
		ctx, cancel := server.call(ctx)
		defer cancel()
		r, err := server.admin.ListInDoubtTransactions(ctx, &outboxv1.ListInDoubtTransactionsRequest{Source: c.Source, PageToken: token})
		all.Transactions = append(all.Transactions, r.GetTransactions()...)
		return r.GetNextPageToken(), err
	})
	if err != nil {
		return err
	}
	if c.json() {
		return writeMessage(s.out, all)
	}
	rows := make([][]string, 0, len(all.GetTransactions()))
	for _, t := range all.GetTransactions() {
		rows = append(rows, []string{
			t.GetSource(), idText(t.GetTransactionId()), timeText(t.GetSince()), t.GetAggregateType() + "/" + t.GetAggregateId(),
			fmt.Sprint(t.GetEvents()), fmt.Sprint(t.GetWaiting()), fmt.Sprint(t.GetChecks()), timeText(t.GetNextCheckTime()), dash(t.GetLastAnswer()),
		})
	}
	return table(s.out, "SOURCE | TRANSACTION | SINCE | AGGREGATE | EVENTS | BEHIND IT | CHECKS | NEXT CHECK | LAST ANSWER", rows)
}

type transactionCheckCmd struct {
	Source string `arg:"" help:"The source."`
	ID     string `arg:"" help:"The transaction id (UUID)."`
	outputSettings
	API apiSettings `embed:"" group:"api"`
}

// Help implements kong.HelpProvider.
func (*transactionCheckCmd) Help() string {
	return `Asks the source's sessions and its database now, and decides the transaction if the answer is conclusive.

Example:
  outbox transaction check orders 019ab5c0-7c11-7e0a-9d2f-3b1f6f0c8a11

` + exitCodesHelp
}

// Run asks.
func (c *transactionCheckCmd) Run(ctx context.Context, s streams) error {
	id, err := transactionID(c.ID)
	if err != nil {
		return err
	}
	server, err := c.API.dial()
	if err != nil {
		return err
	}
	defer server.close()
	ctx, cancel := server.call(ctx)
	defer cancel()
	r, err := server.admin.CheckTransaction(ctx, &outboxv1.CheckTransactionRequest{Source: c.Source, TransactionId: id})
	if err != nil {
		return err
	}
	if c.json() {
		return writeMessage(s.out, r)
	}
	fmt.Fprintf(s.out, "answer    %s\n", enumName(r.GetOutcome(), "OUTCOME_"))
	for _, line := range []struct{ name, text string }{
		{"from", r.GetMethod()}, {"reason", r.GetReason()}, {"evidence", r.GetEvidence()},
	} {
		if line.text != "" {
			fmt.Fprintf(s.out, "%-9s %s\n", line.name, line.text)
		}
	}
	_, err = fmt.Fprintf(s.out, "state     %s\n", enumName(r.GetState(), "STATE_"))
	return err
}

type transactionDecideCmd struct {
	Source   string `arg:"" help:"The source."`
	ID       string `arg:"" help:"The transaction id (UUID)."`
	Decision string `arg:"" enum:"commit,abort" help:"commit or abort."`
	Reason   string `required:"" help:"On what proof; recorded for ever."`
	outputSettings
	API apiSettings `embed:"" group:"api"`
}

// Help implements kong.HelpProvider.
func (*transactionDecideCmd) Help() string {
	return `Decides a transaction in place of its source. There is no way back: commit publishes events of a transaction that may not have
happened, abort drops events of one that may have. Use it only with proof of what the source's own transaction did.

Example:
  outbox transaction decide orders 019ab5c0-7c11-7e0a-9d2f-3b1f6f0c8a11 abort --reason 'order 4711 is not in the database, OPS-40'

` + exitCodesHelp
}

// Run decides.
func (c *transactionDecideCmd) Run(ctx context.Context, s streams) error {
	id, err := transactionID(c.ID)
	if err != nil {
		return err
	}
	decision := outboxv1.Transaction_STATE_COMMITTED
	if c.Decision == "abort" {
		decision = outboxv1.Transaction_STATE_ABORTED
	}
	server, err := c.API.dial()
	if err != nil {
		return err
	}
	defer server.close()
	ctx, cancel := server.call(ctx)
	defer cancel()
	r, err := server.admin.DecideTransaction(ctx, &outboxv1.DecideTransactionRequest{
		Source: c.Source, TransactionId: id, Decision: decision, Reason: c.Reason,
	})
	if err != nil {
		return err
	}
	if c.json() {
		return writeMessage(s.out, r)
	}
	_, err = fmt.Fprintf(s.out, "%s is %s\n", strings.ToLower(c.ID), enumName(r.GetState(), "STATE_"))
	return err
}

func transactionID(text string) ([]byte, error) {
	id, err := uuid.Parse(text)
	if err != nil {
		return nil, usagef("the transaction id %q is not a UUID: %w", text, err)
	}
	return id[:], nil
}

type sourceFailoverCmd struct {
	Source   string `arg:"" help:"The source."`
	Timeline uint32 `required:"" help:"The timeline that the old primary wrote, for example 1."`
	Database string `default:"default" help:"The source's database."`
	Reason   string `required:"" help:"How it is known that the old primary is fenced; for the audit."`
	DryRun   bool   `help:"Tell what would be decided, but decide nothing."`
	outputSettings
	API apiSettings `embed:"" group:"api"`
}

// Help implements kong.HelpProvider.
func (*sourceFailoverCmd) Help() string {
	return `After a failover of a source's database, transactions that the old primary ran and that left no marker on the new one stay in
doubt: the old primary might still be alive and commit them. Once it is fenced for good, this decides all of them at once: committed
where the marker is there, aborted where it is not.

Example:
  outbox source failover orders --timeline 1 --reason 'db-1 is powered off, OPS-51' --dry-run

` + exitCodesHelp
}

// Run confirms the failover.
func (c *sourceFailoverCmd) Run(ctx context.Context, s streams) error {
	server, err := c.API.dial()
	if err != nil {
		return err
	}
	defer server.close()
	ctx, cancel := server.call(ctx)
	defer cancel()
	r, err := server.admin.ConfirmFailover(ctx, &outboxv1.ConfirmFailoverRequest{
		Source: c.Source, Database: c.Database, Timeline: c.Timeline, Reason: c.Reason, ValidateOnly: c.DryRun,
	})
	if err != nil {
		return err
	}
	if c.json() {
		return writeMessage(s.out, r)
	}
	verb := "decided"
	if c.DryRun {
		verb = "would be decided"
	}
	_, err = fmt.Fprintf(s.out, "%s: %d committed, %d aborted; %d stay in doubt\n", verb, r.GetCommitted(), r.GetAborted(), r.GetUndecided())
	return err
}
