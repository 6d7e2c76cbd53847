package check

import (
	"cmp"
	"math"
	"slices"

	"github.com/outbox-platform/outbox/test/robustness/journal"
)

// window is a time during which a fault was in force, by the journals' clock.
type window struct {
	fault    string
	from, to int64
	// hit: it did what it should.
	hit bool
}

// strikes are the nemesis' faults, in the order in which they ended. One of a kind strikes at a time.
func strikes(entries []journal.Entry) []window {
	var all []window
	open := map[string]int64{}
	for i := range entries {
		e := &entries[i]
		if e.F != journal.Fault {
			continue
		}
		if e.Type == journal.Invoke {
			open[e.State] = e.At
			continue
		}
		if from, begun := open[e.State]; begun {
			all = append(all, window{e.State, from, e.At, e.Note == ""})
			delete(open, e.State)
		}
	}
	for fault, from := range open {
		all = append(all, window{fault, from, math.MaxInt64, false})
	}
	return all
}

// windows are times that do not touch, in order.
type windows []window

// merged joins faults that overlap once each is longer by the time that healing may take.
func merged(faults []window, healing int64) windows {
	faults = slices.Clone(faults)
	slices.SortFunc(faults, func(a, b window) int { return cmp.Compare(a.from, b.from) })
	var all windows
	for _, f := range faults {
		if f.to < math.MaxInt64-healing {
			f.to += healing
		}
		if last := len(all) - 1; last >= 0 && f.from <= all[last].to {
			all[last].to = max(all[last].to, f.to)
			continue
		}
		all = append(all, f)
	}
	return all
}

// outside is how much of a time lies in no window.
func (all windows) outside(from, to int64) int64 {
	left := max(to-from, 0)
	first, _ := slices.BinarySearchFunc(all, from, func(w window, at int64) int { return cmp.Compare(w.to, at) })
	for _, w := range all[first:] {
		if w.from >= to {
			break
		}
		left -= min(w.to, to) - max(w.from, from)
	}
	return max(left, 0)
}
