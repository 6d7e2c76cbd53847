package main

import (
	"context"
	"fmt"
	"strings"
	"time"

	"github.com/outbox-platform/outbox/test/robustness/nemesis"
)

type campaignCmd struct {
	runCmd `embed:""`
	Seeds  int           `default:"20" help:"How many seeds at least, from --seed on."`
	Total  int           `default:"1000000" help:"How many transactions in total."`
	Limit  time.Duration `default:"12h" help:"End after the seed during which this is over."`
}

// totals are the last line.
type totals struct {
	Verdict      string         `json:"verdict"`
	Transactions int            `json:"transactions"`
	Seeds        int            `json:"seeds"`
	Verdicts     map[string]int `json:"verdicts"`
	NotValid     []string       `json:"not_valid,omitempty"`
	Events       int            `json:"events"`
	Records      int            `json:"records"`
	Repeats      int            `json:"repeats"`
	Takeovers    int            `json:"takeovers"`
	Resolved     int            `json:"resolved"`
	Faults       map[string]int `json:"faults"`
	Points       map[string]int `json:"points"`
	Never        []string       `json:"never"`
	Broker       string         `json:"broker"`
	Revision     string         `json:"revision"`
	Seconds      float64        `json:"seconds"`
}

// Run does one seed after the other, each in a deployment of its own, until there are enough seeds and transactions.
func (c *campaignCmd) Run(ctx context.Context) error {
	begun := time.Now()
	t := totals{Verdict: "valid", Verdicts: map[string]int{}, Faults: map[string]int{}, Points: map[string]int{}, Revision: revision}
	for seed := c.Seed; (t.Seeds < c.Seeds || t.Transactions < c.Total) && time.Since(begun) < c.Limit && ctx.Err() == nil; seed++ {
		one := c.runCmd
		one.Seed, one.quiet = seed, true
		v, err := one.once(ctx)
		if err != nil {
			v.Verdict, v.Why = "unknown", err.Error()
		}
		t.add(v)
		say("seed %d: %s, %d transactions, %d repeats, %d takeovers, at rest after %.1f s, %.0f s in all %s", seed, v.Verdict, v.Transactions,
			v.Summary.Repeats, v.Summary.Takeovers, v.Settled, v.Seconds, strings.SplitN(v.Why, "\n", 2)[0])
	}
	t.Seconds = time.Since(begun).Seconds()
	t.Never = t.never()
	if err := printLast(t); err != nil {
		return err
	}
	if t.Verdict != "valid" {
		return errNotValid
	}
	return nil
}

func (t *totals) add(v verdict) {
	t.Seeds++
	t.Transactions += v.Transactions
	t.Verdicts[v.Verdict]++
	t.Events += v.Summary.Events
	t.Records += v.Summary.Records
	t.Repeats += v.Summary.Repeats
	t.Takeovers += v.Summary.Takeovers
	t.Resolved += v.Summary.Resolved
	t.Broker = v.Broker
	if v.Verdict != "valid" {
		t.Verdict = v.Verdict
		what := v.Why
		for _, violation := range v.Violations {
			what += " " + violation.Invariant + ": " + violation.What[0]
		}
		t.NotValid = append(t.NotValid, fmt.Sprintf("seed %d: %s:%s", v.Seed, v.Verdict, what))
	}
	for name, n := range v.Faults {
		if point, ok := strings.CutPrefix(name, "point:"); ok {
			t.Points[point] += n
		} else {
			t.Faults[name] += n
		}
	}
}

// never names the faults and points that hit nothing.
func (t *totals) never() []string {
	var all []string
	for _, name := range nemesis.Names() {
		if t.Faults[name] == 0 {
			all = append(all, name)
		}
	}
	for _, name := range nemesis.Points() {
		if t.Points[name] == 0 {
			all = append(all, name)
		}
	}
	return all
}
