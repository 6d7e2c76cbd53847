package main

import (
	"fmt"
	"maps"
	"slices"

	"github.com/outbox-platform/outbox/test/robustness/check"
)

// named is a distribution with what it is of, for a program and for a person.
type named struct {
	Name, What string
	check.Spread
}

// paces are the distributions of a run; none when nobody watched.
func paces(v *verdict) []named {
	p := v.Summary.Pace
	if p == nil {
		return nil
	}
	return []named{
		{"prepare", "Prepare", p.Prepare},
		{"prepare_calm", "Prepare, without a fault", p.PrepareCalm},
		{"publish", "COMMIT to Kafka", p.Publish},
		{"publish_calm", "COMMIT to Kafka, without a fault", p.PublishCalm},
		{"found_out", "COMMIT to Kafka, found out", p.FoundOut},
		{"found_out_calm", "COMMIT to Kafka, found out, without a fault", p.FoundOutCalm},
		{"torn", "a transaction is visible in parts", p.Torn},
		{"torn_unexplained", "… and nothing holds the rest up", p.Unexplained},
	}
}

// recoveries are how long it took after the end of each kind of fault.
func recoveries(v *verdict) []named {
	if v.Summary.Pace == nil {
		return nil
	}
	var all []named
	for _, fault := range slices.Sorted(maps.Keys(v.Summary.Pace.Recovery)) {
		all = append(all, named{fault, fault, check.SpreadOf(v.Summary.Pace.Recovery[fault])})
	}
	return all
}

// pace adds how long things took in a run.
func (t *totals) pace(v *verdict) {
	for _, p := range paces(v) {
		sum := t.Pace[p.Name]
		t.Pace[p.Name] = check.Spread{N: sum.N + p.N, P50: max(sum.P50, p.P50), P99: max(sum.P99, p.P99), Max: max(sum.Max, p.Max)}
	}
	if v.Summary.Pace == nil {
		return
	}
	for fault, times := range v.Summary.Pace.Recovery {
		t.recovery[fault] = append(t.recovery[fault], times...)
	}
}

// recovered sums the recoveries.
func (t *totals) recovered() {
	for fault, times := range t.recovery {
		t.Recovery[fault] = check.SpreadOf(times)
	}
}

// paceTable prints both as Markdown.
func (t *totals) paceTable() {
	for _, part := range []struct {
		what    string
		spreads map[string]check.Spread
	}{{"seconds, in the worst run", t.Pace}, {"recovery in seconds after", t.Recovery}} {
		fmt.Printf("| %s | n | p50 | p99 | max |\n|---|---:|---:|---:|---:|\n", part.what)
		for _, name := range slices.Sorted(maps.Keys(part.spreads)) {
			s := part.spreads[name]
			fmt.Printf("| %s | %d | %.3f | %.3f | %.3f |\n", name, s.N, s.P50, s.P99, s.Max)
		}
		fmt.Println()
	}
}
