package main

import (
	"encoding/json"
	"fmt"
	"html/template"
	"os"
	"path/filepath"
	"slices"

	"github.com/google/uuid"

	"github.com/outbox-platform/outbox/test/robustness/check"
	"github.com/outbox-platform/outbox/test/robustness/journal"
)

// save writes results.json and returns its directory.
func (c *runCmd) save(v *verdict) (string, error) {
	name := fmt.Sprintf("seed-%d", c.Seed)
	if c.mutant != "" {
		name = c.mutant
	}
	dir := filepath.Join(c.Out, name)
	if err := os.MkdirAll(dir, 0o755); err != nil { //nolint:gosec // results are for everybody
		return "", err
	}
	text, err := json.MarshalIndent(v, "", "  ")
	if err != nil {
		return "", err
	}
	return dir, os.WriteFile(filepath.Join(dir, "results.json"), append(text, '\n'), 0o644) //nolint:gosec // results are for everybody
}

// report writes results.json and report.html and returns their directory.
func (c *runCmd) report(v *verdict, run *check.Run) (string, error) {
	dir, err := c.save(v)
	if err != nil {
		return "", err
	}
	f, err := os.Create(filepath.Join(dir, "report.html"))
	if err != nil {
		return "", err
	}
	err = page.Execute(f, map[string]any{"V": v, "Invariants": check.Invariants, "Timelines": timelines(v, run), "Faults": faults(run), "Pace": paces(v), "Recoveries": recoveries(v)})
	if closed := f.Close(); err == nil {
		err = closed
	}
	return dir, err
}

// timeline is everything that is known of one aggregate or transaction.
type timeline struct {
	Title string
	Lines []line
}

type line struct {
	Seconds string
	Kind    string
	Text    string
}

// longest is how many lines of a timeline are shown.
const longest = 2000

// timelines are those of the violations.
func timelines(v *verdict, run *check.Run) []timeline {
	var all []timeline
	for _, violation := range v.Violations {
		if violation.Aggregate == "" && violation.Tx == uuid.Nil {
			continue
		}
		t := timeline{Title: fmt.Sprintf("%s: aggregate %s transaction %s", violation.Invariant, violation.Aggregate, violation.Tx)}
		t.fill(violation, run)
		all = append(all, t)
	}
	return all
}

func (t *timeline) fill(violation check.Violation, run *check.Run) {
	about := map[uuid.UUID]bool{}   // transactions
	events := map[uuid.UUID]int64{} // their events' versions
	if violation.Tx != uuid.Nil {
		about[violation.Tx] = true
	}
	for _, e := range run.Entries {
		for _, ev := range e.Events {
			if e.Source+":"+ev.Aggregate == violation.Aggregate {
				about[e.Tx] = true
				events[ev.ID] = ev.Version
			}
		}
	}
	start := int64(0)
	for _, e := range run.Entries {
		if start == 0 {
			start = e.At
		}
		seconds := fmt.Sprintf("%.6f", float64(e.At-start)/1e9)
		switch {
		case e.F == journal.Fault:
			t.add(seconds, "fault", fmt.Sprintf("%s %s %s", e.State, e.Type, e.Note))
		case about[e.Tx]:
			versions := ""
			for _, ev := range e.Events {
				if e.Source+":"+ev.Aggregate == violation.Aggregate {
					versions += fmt.Sprintf(" v%d on %s", ev.Version, ev.Topic)
				}
			}
			t.add(seconds, "call", fmt.Sprintf("%s/%d %s %s %s (%s)%s %s %s", e.Process, e.Worker, e.Tx, e.F, e.Type, e.Profile, versions, e.State, e.Note))
		}
	}
	for id := range about {
		t.add("end", "store", fmt.Sprintf("%s: truth %v, marker %v, store %q, resolution %+v", id, run.Truth[id], run.Markers[id], run.States[id], run.Resolutions[id]))
	}
	for _, r := range run.Records {
		if version, ours := events[r.ID]; ours {
			t.add("kafka", "record", fmt.Sprintf("%s/%d@%d v%d event %s by %d:%d", r.Topic, r.Partition, r.Offset, version, r.ID, r.Shard, r.Epoch))
		}
	}
}

func (t *timeline) add(seconds, kind, text string) {
	if len(t.Lines) < longest {
		t.Lines = append(t.Lines, line{seconds, kind, text})
	}
}

// faults are the nemesis' strikes.
func faults(run *check.Run) []line {
	var all []line
	start := int64(0)
	for _, e := range run.Entries {
		if start == 0 {
			start = e.At
		}
		if e.F == journal.Fault {
			all = append(all, line{fmt.Sprintf("%.3f", float64(e.At-start)/1e9), string(e.Type), e.State + " " + e.Note})
		}
	}
	return slices.Clip(all)
}

var page = template.Must(template.New("report").Parse(`<!doctype html>
<html lang="en"><meta charset="utf-8"><title>robustness: seed {{.V.Seed}}: {{.V.Verdict}}</title>
<style>body{font:14px system-ui,sans-serif;margin:2em;max-width:110em}table{border-collapse:collapse}td,th{padding:1px 8px;text-align:left;vertical-align:top}
pre,td.t{font-family:monospace;font-size:12px}.fault{color:#a40}.record{color:#06c}.store{color:#080}h1.invalid{color:#b00}h1.valid{color:#080}</style>
<h1 class="{{.V.Verdict}}">seed {{.V.Seed}}: {{.V.Verdict}}</h1>
<p>{{.V.Transactions}} transactions, {{.V.Summary.Committed}} committed, {{.V.Summary.Events}} events, {{.V.Summary.Records}} records, {{.V.Summary.Repeats}} repeats,
{{.V.Summary.Takeovers}} takeovers, {{.V.Summary.Resolved}} decisions found out; {{.V.Broker}}; {{with .V.Python}}{{index $.V.Summary.Sources .}} transactions of {{.}}, a Python service; {{end}}revision {{.V.Revision}}. At rest after {{printf "%.1f" .V.Settled}} s. {{.V.Why}}</p>
<p>The same again: <code>{{.V.Command}}</code></p>
<h2>Invariants</h2><table>{{$v := .V}}{{range $name, $what := .Invariants}}<tr><td>{{$name}}<td>{{$what}}<td>{{range $v.Violations}}{{if eq .Invariant $name}}<b>{{.Count}} violations</b>{{end}}{{end}}{{end}}</table>
{{range .V.Violations}}<h3>{{.Invariant}}: {{.Count}}</h3><ul>{{range .What}}<li><pre>{{.}}</pre>{{end}}</ul>{{end}}
<h2>Faults that hit</h2><table>{{range $name, $n := .V.Faults}}<tr><td>{{$name}}<td>{{$n}}{{end}}</table>
<h2>How long it took, in seconds</h2><table><tr><th><th>n<th>p50<th>p99<th>max{{range .Pace}}<tr><td>{{.What}}<td>{{.N}}<td>{{.P50}}<td>{{.P99}}<td>{{.Max}}{{end}}</table>
<h2>Recovery after a fault, in seconds</h2><table><tr><th><th>n<th>p50<th>p99<th>max{{range .Recoveries}}<tr><td>{{.What}}<td>{{.N}}<td>{{.P50}}<td>{{.P99}}<td>{{.Max}}{{end}}</table>
{{range .Timelines}}<h2>{{.Title}}</h2><table>{{range .Lines}}<tr class="{{.Kind}}"><td>{{.Seconds}}<td>{{.Kind}}<td class="t">{{.Text}}{{end}}</table>{{end}}
<h2>Schedule</h2><table>{{range .Faults}}<tr><td>{{.Seconds}}<td>{{.Kind}}<td>{{.Text}}{{end}}</table></html>
`))
