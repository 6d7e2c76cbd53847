package main

import (
	"context"
	"fmt"

	"github.com/alecthomas/kong"

	outboxv1 "github.com/outbox-platform/outbox/gen/go/outbox/v1"
)

type deadletterCmd struct {
	List    deadletterListCmd `cmd:"" help:"List dead letters, oldest first."`
	Redrive operateCmd        `cmd:"" help:"Put an aggregate's dead letters back, in order, ahead of newer events; or try the head of a blocked one again."`
	Skip    operateCmd        `cmd:"" help:"Set the head of a blocked aggregate aside as a dead letter and go on. Order is broken knowingly."`
	Discard operateCmd        `cmd:"" help:"Drop an aggregate's dead letters, or the head of a blocked one, for good."`
}

type deadletterListCmd struct {
	Source string `help:"Only of this source."`
	outputSettings
	API apiSettings `embed:"" group:"api"`
}

// Run lists the dead letters.
func (c *deadletterListCmd) Run(ctx context.Context, s streams) error {
	server, err := c.API.dial()
	if err != nil {
		return err
	}
	defer server.close()
	all := &outboxv1.ListDeadLettersResponse{}
	err = pages(func(token string) (string, error) {
		ctx, cancel := server.call(ctx)
		defer cancel()
		r, err := server.admin.ListDeadLetters(ctx, &outboxv1.ListDeadLettersRequest{Source: c.Source, PageToken: token})
		all.DeadLetters = append(all.DeadLetters, r.GetDeadLetters()...)
		return r.GetNextPageToken(), err
	})
	if err != nil {
		return err
	}
	if c.json() {
		return writeMessage(s.out, all)
	}
	rows := make([][]string, 0, len(all.GetDeadLetters()))
	for _, d := range all.GetDeadLetters() {
		rows = append(rows, []string{
			d.GetSource(), d.GetAggregateType(), d.GetAggregateId(), idText(d.GetEventId()), d.GetEventType(), d.GetTopic(),
			timeText(d.GetSince()), fmt.Sprint(d.GetAttempts()), fmt.Sprint(d.GetPayloadBytes()), d.GetError(),
		})
	}
	return table(s.out, "SOURCE | TYPE | ID | EVENT | EVENT TYPE | TOPIC | SINCE | ATTEMPTS | BYTES | ERROR", rows)
}

// operateCmd asks the holder of an aggregate's shard to do something with it. Which action it is, is the command's name.
type operateCmd struct {
	Source string `arg:"" help:"The source."`
	Type   string `arg:"" help:"The aggregate's type."`
	ID     string `arg:"" help:"The aggregate's id."`
	Reason string `required:"" help:"Why; for the audit."`
	outputSettings
	API apiSettings `embed:"" group:"api"`
}

// Help implements kong.HelpProvider.
func (*operateCmd) Help() string {
	return `The relay that holds the aggregate's shard does it. If it does not get to it before --timeout, the request stays and
will be done; the answer says so.

Example:
  outbox deadletter redrive orders order 4711 --reason 'topic limit raised, OPS-31'

` + exitCodesHelp
}

// Run asks for the action and reports what the holder did.
func (c *operateCmd) Run(ctx context.Context, s streams, k *kong.Context) error {
	action := map[string]outboxv1.AggregateAction{
		"redrive": outboxv1.AggregateAction_AGGREGATE_ACTION_REDRIVE,
		"skip":    outboxv1.AggregateAction_AGGREGATE_ACTION_SKIP,
		"discard": outboxv1.AggregateAction_AGGREGATE_ACTION_DISCARD,
	}[k.Selected().Name]
	server, err := c.API.dial()
	if err != nil {
		return err
	}
	defer server.close()
	ctx, cancel := server.call(ctx)
	defer cancel()
	r, err := server.admin.OperateAggregate(ctx, &outboxv1.OperateAggregateRequest{
		Source: c.Source, AggregateType: c.Type, AggregateId: c.ID, Action: action, Reason: c.Reason,
	})
	if err != nil {
		return err
	}
	switch {
	case c.json():
		return writeMessage(s.out, r)
	case !r.GetDone():
		_, err = fmt.Fprintf(s.out, "operation %d is recorded, not done yet: the holder of the shard will do it ('outbox shard list' shows who holds it)\n", r.GetOperationId())
	default:
		_, err = fmt.Fprintf(s.out, "operation %d done: %s (%d events)\n", r.GetOperationId(), r.GetOutcome(), r.GetEvents())
	}
	return err
}
