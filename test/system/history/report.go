package history

import (
	"fmt"
	"strings"
)

// shown is how many findings of one kind a report spells out.
const shown = 5

// Report says what is wrong with a run. Every finding is one line for a person.
type Report struct {
	// Committed is the number of events in the source's database, Records that on Kafka.
	Committed, Records int
	// Lost events are committed and not on Kafka.
	Lost Findings
	// Phantom records belong to no committed event.
	Phantom Findings
	// Reordered records come after a later event of their aggregate, or before an earlier one was seen for the first time.
	Reordered Findings
	// Altered records differ from the event, or from the first record of the same event, in anything but the epoch.
	Altered Findings
	// Misplaced records are not on the partition that Java's partitioner chooses for their key.
	Misplaced Findings
	// Late records were written with an older epoch than a record before them on the same partition and shard: a holder
	// that had lost its shard still got one out. They are repeats or they count as reordered too.
	Late Findings
	// Takeover duplicates are repeats of an event by another holder of its shard: its epoch differs.
	Takeover Findings
	// Unexplained duplicates are repeats by the same holder.
	Unexplained Findings
}

// Findings counts the findings of one kind and keeps the first few.
type Findings struct {
	Count int
	First []string
}

func (f *Findings) addf(format string, args ...any) {
	f.Count++
	if len(f.First) < shown {
		f.First = append(f.First, fmt.Sprintf(format, args...))
	}
}

// Duplicates is the number of records that repeat an event.
func (r *Report) Duplicates() int { return r.Takeover.Count + r.Unexplained.Count }

// Broken reports whether a promise was broken. Duplicates that a takeover explains, and late records that are mere
// repeats, break none.
func (r *Report) Broken() bool {
	return r.Lost.Count+r.Phantom.Count+r.Reordered.Count+r.Altered.Count+r.Misplaced.Count+r.Unexplained.Count > 0
}

// String is the report for a person: one line of numbers, then the first findings of each kind.
func (r *Report) String() string {
	var b strings.Builder
	fmt.Fprintf(&b, "committed %d, records %d: lost %d, phantom %d, reordered %d, altered %d, misplaced %d, late %d, duplicates %d (%d by takeover)",
		r.Committed, r.Records, r.Lost.Count, r.Phantom.Count, r.Reordered.Count, r.Altered.Count, r.Misplaced.Count,
		r.Late.Count, r.Duplicates(), r.Takeover.Count)
	for _, kind := range []struct {
		name     string
		findings Findings
	}{
		{"lost", r.Lost}, {"phantom", r.Phantom}, {"reordered", r.Reordered}, {"altered", r.Altered},
		{"misplaced", r.Misplaced}, {"late", r.Late}, {"takeover duplicate", r.Takeover}, {"unexplained duplicate", r.Unexplained},
	} {
		for _, line := range kind.findings.First {
			fmt.Fprintf(&b, "\n  %s: %s", kind.name, line)
		}
	}
	return b.String()
}
