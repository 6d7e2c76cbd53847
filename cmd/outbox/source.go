package main

import (
	"context"
	"fmt"
	"io"
	"os"
	"strings"

	outboxv1 "github.com/outbox-platform/outbox/gen/go/outbox/v1"
)

type sourceCmd struct {
	Apply    sourceApplyCmd    `cmd:"" help:"Register sources, or change them, from a file; shows the difference."`
	List     sourceListCmd     `cmd:"" help:"List the sources."`
	Get      sourceGetCmd      `cmd:"" help:"Show a source as YAML that 'source apply' takes."`
	Delete   sourceDeleteCmd   `cmd:"" help:"Take a registration away."`
	Failover sourceFailoverCmd `cmd:"" help:"Confirm that the old primary of a source's database is fenced: decides what it left in doubt."`
}

type sourceApplyCmd struct {
	File   string `arg:"" help:"YAML file; - is standard input."`
	DryRun bool   `help:"Check everything and show the difference, but change nothing."`
	Reason string `help:"Why; for the audit."`
	outputSettings
	API apiSettings `embed:"" group:"api"`
}

// Help implements kong.HelpProvider.
func (*sourceApplyCmd) Help() string {
	return sourceFileHelp + `

Examples:
  outbox source apply orders.yaml --dry-run
  outbox source get orders | sed 's/block/park/' | outbox source apply - --reason 'OPS-12'

` + exitCodesHelp
}

// Run checks all sources of the file before it changes the first.
func (c *sourceApplyCmd) Run(ctx context.Context, s streams) error {
	wanted, err := c.read(s.in)
	if err != nil {
		return usagef("%s: %w", c.File, err)
	}
	server, err := c.API.dial()
	if err != nil {
		return err
	}
	defer server.close()
	plans := make([]sourcePlan, len(wanted))
	for i, source := range wanted {
		if plans[i], err = planSource(ctx, server, source); err != nil {
			return fmt.Errorf("source %s: %w", source.GetName(), err)
		}
	}
	for i := range plans {
		if err := c.apply(ctx, server, &plans[i]); err != nil {
			return fmt.Errorf("source %s: %w", plans[i].wanted.GetName(), err)
		}
		if !c.json() {
			fmt.Fprint(s.out, plans[i].text())
		}
	}
	if !c.json() {
		return nil
	}
	all := make([]any, len(plans))
	for i, p := range plans {
		source, err := jsonOf(p.now)
		if err != nil {
			return err
		}
		all[i] = map[string]any{"outcome": p.outcome, "diff": p.diff, "source": source}
	}
	return writeJSON(s.out, all)
}

func (c *sourceApplyCmd) read(in io.Reader) ([]*outboxv1.Source, error) {
	if c.File == "-" {
		return readSources(in)
	}
	f, err := os.Open(c.File)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return readSources(f)
}

func (c *sourceApplyCmd) apply(ctx context.Context, server *api, p *sourcePlan) error {
	switch {
	case !p.changed:
		p.outcome = "unchanged"
		return nil
	case c.DryRun:
		p.outcome = "would be " + p.verb
		return nil
	}
	ctx, cancel := server.call(ctx)
	defer cancel()
	r, err := server.admin.ApplySource(ctx, &outboxv1.ApplySourceRequest{Source: p.wanted, Reason: c.Reason})
	if err != nil {
		return err
	}
	p.now, p.outcome = r.GetSource(), p.verb
	return nil
}

// sourcePlan is what applying a source would change.
type sourcePlan struct {
	wanted, now *outboxv1.Source
	verb        string // created or changed
	changed     bool
	diff        string
	outcome     string
}

func planSource(ctx context.Context, server *api, wanted *outboxv1.Source) (sourcePlan, error) {
	ctx, cancel := server.call(ctx)
	defer cancel()
	r, err := server.admin.ApplySource(ctx, &outboxv1.ApplySourceRequest{Source: wanted, ValidateOnly: true})
	if err != nil {
		return sourcePlan{}, err
	}
	now, err := sourceYAML(r.GetSource())
	if err != nil {
		return sourcePlan{}, err
	}
	p := sourcePlan{wanted: wanted, now: r.GetSource(), verb: "created", changed: true}
	before := ""
	if r.GetPrevious() != nil {
		if before, err = sourceYAML(r.GetPrevious()); err != nil {
			return sourcePlan{}, err
		}
		p.verb, p.changed = "changed", before != now
		if !p.changed {
			p.now = r.GetPrevious()
		}
	}
	p.diff = diff(before, now)
	return p, nil
}

func (p sourcePlan) text() string {
	switch p.outcome {
	case "unchanged":
		return fmt.Sprintf("%s unchanged (revision %d)\n", p.wanted.GetName(), p.now.GetRevision())
	case p.verb:
		return fmt.Sprintf("%s%s %s (revision %d)\n", p.diff, p.wanted.GetName(), p.outcome, p.now.GetRevision())
	default:
		return fmt.Sprintf("%s%s %s\n", p.diff, p.wanted.GetName(), p.outcome)
	}
}

type sourceListCmd struct {
	outputSettings
	API apiSettings `embed:"" group:"api"`
}

// Run lists all sources, page by page.
func (c *sourceListCmd) Run(ctx context.Context, s streams) error {
	server, err := c.API.dial()
	if err != nil {
		return err
	}
	defer server.close()
	all := &outboxv1.ListSourcesResponse{}
	err = pages(func(token string) (string, error) {
		ctx, cancel := server.call(ctx)
		defer cancel()
		r, err := server.admin.ListSources(ctx, &outboxv1.ListSourcesRequest{PageToken: token})
		all.Sources = append(all.Sources, r.GetSources()...)
		return r.GetNextPageToken(), err
	})
	if err != nil {
		return err
	}
	if c.json() {
		return writeMessage(s.out, all)
	}
	rows := make([][]string, 0, len(all.GetSources()))
	for _, source := range all.GetSources() {
		rows = append(rows, []string{
			source.GetName(), strings.Join(source.GetTopics(), ","), enumName(source.GetRecordProfile(), "RECORD_PROFILE_"),
			enumName(source.GetFailurePolicy(), "FAILURE_POLICY_"), fmt.Sprint(source.GetRevision()), timeText(source.GetUpdateTime()),
		})
	}
	return table(s.out, "NAME | TOPICS | PROFILE | ON FAILURE | REVISION | CHANGED", rows)
}

type sourceGetCmd struct {
	Name string `arg:"" help:"The source."`
	outputSettings
	API apiSettings `embed:"" group:"api"`
}

// Run shows one source.
func (c *sourceGetCmd) Run(ctx context.Context, s streams) error {
	server, err := c.API.dial()
	if err != nil {
		return err
	}
	defer server.close()
	ctx, cancel := server.call(ctx)
	defer cancel()
	r, err := server.admin.GetSource(ctx, &outboxv1.GetSourceRequest{Name: c.Name})
	if err != nil {
		return err
	}
	if c.json() {
		return writeMessage(s.out, r.GetSource())
	}
	text, err := sourceYAML(r.GetSource())
	if err != nil {
		return err
	}
	_, err = fmt.Fprintf(s.out, "# revision %d, registered %s, changed %s\n%s", r.GetSource().GetRevision(),
		timeText(r.GetSource().GetCreateTime()), timeText(r.GetSource().GetUpdateTime()), text)
	return err
}

type sourceDeleteCmd struct {
	Name   string      `arg:"" help:"The source."`
	Reason string      `required:"" help:"Why; for the audit."`
	API    apiSettings `embed:"" group:"api"`
}

// Help implements kong.HelpProvider.
func (*sourceDeleteCmd) Help() string {
	return `The source's history stays. It is refused while transactions of the source are undecided or events are not out.

Example:
  outbox source delete orders --reason 'moved to shop-orders'`
}

// Run deletes the registration.
func (c *sourceDeleteCmd) Run(ctx context.Context, s streams) error {
	server, err := c.API.dial()
	if err != nil {
		return err
	}
	defer server.close()
	ctx, cancel := server.call(ctx)
	defer cancel()
	if _, err := server.admin.DeleteSource(ctx, &outboxv1.DeleteSourceRequest{Name: c.Name, Reason: c.Reason}); err != nil {
		return err
	}
	_, err = fmt.Fprintf(s.out, "%s deleted\n", c.Name)
	return err
}
