package main

import (
	"context"
	"fmt"

	outboxv1 "github.com/outbox-platform/outbox/gen/go/outbox/v1"
)

type aggregateCmd struct {
	Blocked aggregateBlockedCmd `cmd:"" help:"List aggregates whose head cannot be published now, and why."`
}

type aggregateBlockedCmd struct {
	Source string `help:"Only of this source."`
	outputSettings
	API apiSettings `embed:"" group:"api"`
}

// Help implements kong.HelpProvider.
func (*aggregateBlockedCmd) Help() string {
	return `An aggregate whose cause is "in-doubt" or "topic" goes on by itself once the decision or the topic is there. One that
is blocked by a record waits for you: 'outbox deadletter redrive', 'skip' or 'discard'.`
}

// Run lists the blocked aggregates, longest first.
func (c *aggregateBlockedCmd) Run(ctx context.Context, s streams) error {
	server, err := c.API.dial()
	if err != nil {
		return err
	}
	defer server.close()
	all := &outboxv1.ListBlockedAggregatesResponse{}
	err = pages(func(token string) (string, error) {
		ctx, cancel := server.call(ctx)
		defer cancel()
		r, err := server.admin.ListBlockedAggregates(ctx, &outboxv1.ListBlockedAggregatesRequest{Source: c.Source, PageToken: token})
		all.Aggregates = append(all.Aggregates, r.GetAggregates()...)
		return r.GetNextPageToken(), err
	})
	if err != nil {
		return err
	}
	if c.json() {
		return writeMessage(s.out, all)
	}
	rows := make([][]string, 0, len(all.GetAggregates()))
	for _, a := range all.GetAggregates() {
		rows = append(rows, []string{
			a.GetSource(), a.GetAggregateType(), a.GetAggregateId(), a.GetCause(), timeText(a.GetSince()), fmt.Sprint(a.GetWaiting()),
			fmt.Sprint(a.GetAttempts()), a.GetTopic(), a.GetExplanation(),
		})
	}
	return table(s.out, "SOURCE | TYPE | ID | CAUSE | SINCE | WAITING | ATTEMPTS | TOPIC | WHY", rows)
}
