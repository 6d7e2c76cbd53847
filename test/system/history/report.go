package history

import (
	"fmt"
	"strings"
	"time"
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
	// Zombie records were written by a holder that had lost its shard, beyond the one per aggregate that may have been
	// under way when it lost it.
	Zombie Findings
	// Late records were written with an older epoch than a record before them on the same partition and shard. They break
	// nothing when they are repeats, and count as reordered or zombie too when they do.
	Late Findings
	// Repeats are records of an event that had a record already. Promised is only when they may occur: around takeovers.
	Repeats []Repeat
}

// Repeat is a duplicate.
type Repeat struct {
	Shard int
	// FirstEpoch is that of the first record of the event, Epoch that of this one. They differ when another holder repeated
	// what its predecessor had done. They are the same when a holder delivered again what it had given up, not knowing that
	// Kafka had it.
	FirstEpoch, Epoch int64
	// AppendedAt is when it was written, by the broker's clock, if the topic keeps that.
	AppendedAt time.Time
	// First is the event's first record, Again this one.
	First, Again *Record
	// What says which record it is.
	What string
}

// Findings counts the findings of one kind and keeps the first few.
type Findings struct {
	Count int
	First []string
	// About is the aggregate of each of First; empty when there is none.
	About []string
}

func (f *Findings) addf(about, format string, args ...any) {
	f.Count++
	if len(f.First) < shown {
		f.First = append(f.First, fmt.Sprintf(format, args...))
		f.About = append(f.About, about)
	}
}

// Broken reports whether a promise was broken. Whether the repeats came when they may is for the caller to judge, who knows
// what happened when.
func (r *Report) Broken() bool {
	return r.Lost.Count+r.Phantom.Count+r.Reordered.Count+r.Altered.Count+r.Misplaced.Count+r.Zombie.Count > 0
}

// String is the report for a person: one line of numbers, then the first findings of each kind.
func (r *Report) String() string {
	var b strings.Builder
	sameHolder := 0
	for _, repeat := range r.Repeats {
		if repeat.Epoch == repeat.FirstEpoch {
			sameHolder++
		}
	}
	fmt.Fprintf(&b, "committed %d, records %d: lost %d, phantom %d, reordered %d, altered %d, misplaced %d, zombie %d, late %d, repeats %d (%d of them by the same holder)",
		r.Committed, r.Records, r.Lost.Count, r.Phantom.Count, r.Reordered.Count, r.Altered.Count, r.Misplaced.Count,
		r.Zombie.Count, r.Late.Count, len(r.Repeats), sameHolder)
	for _, kind := range []struct {
		name     string
		findings Findings
	}{
		{"lost", r.Lost}, {"phantom", r.Phantom}, {"reordered", r.Reordered}, {"altered", r.Altered},
		{"misplaced", r.Misplaced}, {"zombie", r.Zombie}, {"late", r.Late},
	} {
		for _, line := range kind.findings.First {
			fmt.Fprintf(&b, "\n  %s: %s", kind.name, line)
		}
	}
	for i, repeat := range r.Repeats {
		if i < 2*shown {
			fmt.Fprintf(&b, "\n  repeat: %s", repeat.What)
		}
	}
	return b.String()
}
