package bench

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"text/tabwriter"
)

// ErrWrong is returned when the platform and the source database disagree about what happened.
var ErrWrong = errors.New("the platform contradicts the source database")

// KillResult is one line of output of the workload kill: services that died at one step, and one way of finding out.
type KillResult struct {
	Step     string `json:"step"`
	Resolver string `json:"resolver"`
	// N is the number of deaths; Wrong those whose decision, or whose event in Kafka, contradicts the source database.
	N     int `json:"n"`
	Wrong int `json:"wrong"`
	// Undecided were still in doubt when the bench lost its patience.
	Undecided int `json:"undecided"`
	// NotStored are unknown to the platform: nothing was prepared, and nothing is to be decided.
	NotStored int `json:"not_stored"`
	// ByClient were decided by the victim's own Commit, which arrived.
	ByClient int `json:"by_client"`
	// From death to decision, of those that were decided; null when none was.
	P50 *float64 `json:"p50_ms"`
	P99 *float64 `json:"p99_ms"`
	Max *float64 `json:"max_ms"`
}

// killPrinter writes results as they come.
type killPrinter struct {
	w    io.Writer
	json bool
	head bool
}

func (p *killPrinter) print(r KillResult) error {
	if p.json {
		if err := json.NewEncoder(p.w).Encode(r); err != nil {
			return fmt.Errorf("writing result: %w", err)
		}
		return nil
	}
	t := tabwriter.NewWriter(p.w, 11, 0, 1, ' ', tabwriter.AlignRight)
	if !p.head {
		p.head = true
		fmt.Fprintln(t, "killed\tresolver\tn\twrong\tundecided\tnot stored\tby client\tp50 ms\tp99 ms\tmax ms\t")
	}
	fmt.Fprintf(t, "%14s\t%s\t%d\t%d\t%d\t%d\t%d\t%s\t%s\t%s\t\n", r.Step, r.Resolver, r.N, r.Wrong, r.Undecided, r.NotStored, r.ByClient,
		millis(r.P50), millis(r.P99), millis(r.Max))
	if err := t.Flush(); err != nil {
		return fmt.Errorf("writing result: %w", err)
	}
	return nil
}

func millis(v *float64) string {
	if v == nil {
		return "–"
	}
	return fmt.Sprintf("%.1f", *v)
}
