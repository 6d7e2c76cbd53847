package main

import (
	"context"
	"fmt"
	"io"

	outboxv1 "github.com/outbox-platform/outbox/gen/go/outbox/v1"
)

type transactionCmd struct {
	Get    transactionGetCmd    `cmd:"" help:"Show a transaction: its decision, who made it, where each event is now and why it is not out."`
	List   transactionListCmd   `cmd:"" help:"List transactions in doubt, and what was answered about them."`
	Check  transactionCheckCmd  `cmd:"" help:"Ask the source about a transaction in doubt now."`
	Decide transactionDecideCmd `cmd:"" help:"Decide a transaction in place of its source. There is no way back."`
}

type transactionGetCmd struct {
	Source string `arg:"" help:"The source."`
	ID     string `arg:"" help:"The transaction id (UUID)."`
	outputSettings
	API apiSettings `embed:"" group:"api"`
}

// Help implements kong.HelpProvider.
func (*transactionGetCmd) Help() string {
	return `Example:
  outbox transaction get orders 019ab5c0-7c11-7e0a-9d2f-3b1f6f0c8a11

` + exitCodesHelp
}

// Run shows the transaction.
func (c *transactionGetCmd) Run(ctx context.Context, s streams) error {
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
	r, err := server.data.GetTransaction(ctx, &outboxv1.GetTransactionRequest{Source: c.Source, TransactionId: id})
	if err != nil {
		return err
	}
	if c.json() {
		return writeMessage(s.out, r.GetTransaction())
	}
	return writeTransaction(s.out, r.GetTransaction())
}

func writeTransaction(w io.Writer, t *outboxv1.Transaction) error {
	fmt.Fprintf(w, "transaction  %s of %s\n", idText(t.GetTransactionId()), t.GetSource())
	fmt.Fprintf(w, "state        %s\n", enumName(t.GetState(), "STATE_"))
	fmt.Fprintf(w, "prepared     %s\n", timeText(t.GetPrepareTime()))
	if t.GetState() == outboxv1.Transaction_STATE_PREPARED {
		fmt.Fprintln(w, "decided      not yet: nobody has told the decision of the source's local transaction")
	} else {
		fmt.Fprintf(w, "decided      %s by %s\n", timeText(t.GetDecideTime()), dash(t.GetDecidedBy()))
	}
	if t.GetEvidence() != "" {
		fmt.Fprintf(w, "evidence     %s\n", t.GetEvidence())
	}
	if d := t.GetDatabaseTransaction(); d != nil {
		fmt.Fprintf(w, "database     %s: xid %d on system %d, timeline %d (mode %s)\n", d.GetDatabase(), d.GetXid(),
			d.GetSystemIdentifier(), d.GetTimeline(), enumName(d.GetMode(), "DATABASE_MODE_"))
	}
	if len(t.GetEvents()) == 0 {
		_, err := fmt.Fprintln(w, "events       no longer in the log, so they are out (or dropped, if it was aborted)")
		return err
	}
	fmt.Fprintln(w)
	rows := make([][]string, 0, len(t.GetEvents()))
	for _, e := range t.GetEvents() {
		rows = append(rows, []string{
			idText(e.GetEventId()), e.GetTopic(), e.GetAggregateType() + "/" + e.GetAggregateId(), fmt.Sprint(e.GetShard()),
			enumName(e.GetPlace(), "PLACE_"), dash(e.GetExplanation()),
		})
	}
	return table(w, "EVENT | TOPIC | AGGREGATE | SHARD | WHERE | WHY IT IS NOT OUT", rows)
}
