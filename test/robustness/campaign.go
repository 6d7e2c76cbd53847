package main

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/outbox-platform/outbox/test/robustness/check"
	"github.com/outbox-platform/outbox/test/robustness/nemesis"
)

type campaignCmd struct {
	runCmd `embed:""`
	Seeds  int           `default:"20" help:"How many seeds at least, from --seed on."`
	Total  int           `default:"1000000" help:"How many transactions in total."`
	Limit  time.Duration `default:"12h" help:"End after the seed during which this is over."`
	Mix    bool          `help:"Every second pair of seeds on Apache Kafka with three nodes, every fifth seed with Kafka transactions, every third with a Python service; the clocks of databases jump."`
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
	// Slowest is the longest that a run took to come to rest, in seconds.
	Slowest float64 `json:"slowest_settled_seconds"`
	// Pace has the samples of all runs and the worst run's numbers, Recovery all strikes of each fault.
	Pace     map[string]check.Spread `json:"pace"`
	Recovery map[string]check.Spread `json:"recovery"`
	Faults   map[string]int          `json:"faults"`
	Points   map[string]int          `json:"points"`
	Links    map[string]int          `json:"links"`
	Never    []string                `json:"never"`
	// Brokers and Transactional count seeds, Revisions too. Python counts transactions of Python services.
	Brokers       map[string]int `json:"brokers"`
	Transactional int            `json:"transactional"`
	Python        int            `json:"python"`
	Revisions     map[string]int `json:"revisions"`
	Seconds       float64        `json:"seconds"`

	recovery map[string][]float64
}

func newTotals() *totals {
	return &totals{
		Verdict: "valid", Verdicts: map[string]int{}, Faults: map[string]int{}, Points: map[string]int{}, Links: map[string]int{},
		Brokers: map[string]int{}, Revisions: map[string]int{}, Pace: map[string]check.Spread{}, Recovery: map[string]check.Spread{}, recovery: map[string][]float64{},
	}
}

// Run does one seed after the other, each in a deployment of its own, until there are enough seeds and transactions.
func (c *campaignCmd) Run(ctx context.Context) error {
	begun := time.Now()
	// Before the first seed: none of them may do without it.
	c.Python = c.Python || c.Mix
	if err := c.findPython(ctx); err != nil {
		return err
	}
	t := newTotals()
	for seed := c.Seed; (t.Seeds < c.Seeds || t.Transactions < c.Total) && time.Since(begun) < c.Limit && ctx.Err() == nil; seed++ {
		one := c.runCmd
		one.Seed, one.quiet = seed, true
		if c.Mix {
			one.mix()
		}
		v, err := one.once(ctx)
		if err != nil {
			v.Verdict, v.Why = "unknown", err.Error()
			if _, err := one.save(&v); err != nil {
				return err
			}
		}
		t.add(v)
		say("seed %d: %s, %s, %d transactions, %d repeats, %d takeovers, decided after %.1f s, at rest after %.1f s, %.0f s in all %s", seed, v.Verdict, v.Broker, v.Transactions,
			v.Summary.Repeats, v.Summary.Takeovers, v.Decided, v.Settled, v.Seconds, strings.SplitN(v.Why, "\n", 2)[0])
	}
	return t.print()
}

// mix gives a seed its brokers. An even seed's store has a disk that can be full, whatever its brokers.
func (c *runCmd) mix() {
	if c.Apache = 0; c.Seed/2%2 == 1 {
		c.Apache = 3
	}
	c.Transactional = c.Seed%5 == 0
	c.Python = c.Seed%3 == 0
	c.Clocks = true
}

func (t *totals) print() error {
	t.Never = t.never()
	t.recovered()
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
	t.Slowest = max(t.Slowest, v.Settled)
	t.Seconds += v.Seconds
	t.Brokers[v.Broker]++
	t.Revisions[v.Revision]++
	if v.Transactional {
		t.Transactional++
	}
	t.Python += v.Summary.Sources[v.Python]
	if v.Verdict != "valid" {
		t.Verdict = v.Verdict
		what := v.Why
		for _, violation := range v.Violations {
			what += " " + violation.Invariant + ": " + violation.What[0]
		}
		t.NotValid = append(t.NotValid, fmt.Sprintf("seed %d: %s:%s", v.Seed, v.Verdict, what))
	}
	t.pace(&v)
	for name, n := range v.Faults {
		if point, ok := strings.CutPrefix(name, "point:"); ok {
			t.Points[point] += n
		} else if link, ok := strings.CutPrefix(name, "link:"); ok {
			t.Links[link] += n
		} else {
			t.Faults[name] += n
		}
	}
}

// never names the faults and points that hit nothing.
func (t *totals) never() []string {
	all := []string{}
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

type totalsCmd struct {
	Results []string `arg:"" type:"existingdir" help:"Directories in which runs have left their results."`
	Table   bool     `help:"As tables for a person."`
}

// Run sums what runs have left. Each results.json counts, so that a run that was not valid is not forgotten.
func (c *totalsCmd) Run() error {
	t := newTotals()
	for _, dir := range c.Results {
		files, err := filepath.Glob(filepath.Join(dir, "*", "results.json"))
		if err != nil {
			return err
		}
		for _, file := range files {
			content, err := os.ReadFile(file)
			if err != nil {
				return err
			}
			var v verdict
			if err := json.Unmarshal(content, &v); err != nil {
				return fmt.Errorf("read %s: %w", file, err)
			}
			t.add(v)
		}
	}
	t.recovered()
	if c.Table {
		t.table()
	}
	return t.print()
}

// table prints counts as Markdown, several to a line.
func (t *totals) table() {
	for _, part := range []struct {
		what   string
		names  []string
		counts map[string]int
	}{{"fault", nemesis.Names(), t.Faults}, {"kill point", nemesis.Points(), t.Points}} {
		names := slices.Sorted(slices.Values(part.names))
		const across = 3
		rows := (len(names) + across - 1) / across
		fmt.Printf("|%s\n|%s\n", strings.Repeat(" "+part.what+" | hits |", across), strings.Repeat("---|---:|", across))
		for row := range rows {
			fmt.Print("|")
			for column := range across {
				if i := column*rows + row; i < len(names) {
					fmt.Printf(" %s | %d |", names[i], part.counts[names[i]])
				} else {
					fmt.Print(" | |")
				}
			}
			fmt.Println()
		}
		fmt.Println()
	}
	t.paceTable()
}
