package check

import (
	"cmp"
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/google/uuid"
	"github.com/twmb/franz-go/pkg/kgo"

	"github.com/outbox-platform/outbox/test/robustness/driver"
	"github.com/outbox-platform/outbox/test/robustness/journal"
	"github.com/outbox-platform/outbox/test/system/history"
)

// Check judges a run. An error means that it cannot be judged.
func Check(run *Run) ([]Violation, Summary, error) {
	c := &checker{Run: run, found: map[string]*Violation{}, txs: map[uuid.UUID]*tx{}, events: map[uuid.UUID]*known{}}
	c.summary.Profiles, c.summary.Sources = map[string]int{}, map[string]int{}
	c.index()
	c.decide()
	c.records()
	if err := c.placed(); err != nil {
		return nil, c.summary, err
	}
	c.whole()
	c.store()
	c.answers()
	c.linearize()
	c.rest()
	c.counters()
	c.pace()
	var all []Violation
	for _, name := range slices.SortedFunc(maps.Keys(c.found), func(a, b string) int { return cmp.Or(cmp.Compare(len(a), len(b)), strings.Compare(a, b)) }) {
		all = append(all, *c.found[name])
	}
	return all, c.summary, nil
}

// index reads the journals.
func (c *checker) index() {
	for i := range c.Entries {
		e := &c.Entries[i]
		if e.Tx == uuid.Nil {
			continue
		}
		t := c.txs[e.Tx]
		if t == nil {
			if e.F != journal.Prepare && e.F != journal.Publish {
				continue // an alarm about something else
			}
			t = &tx{id: e.Tx, source: e.Source, profile: e.Profile}
			c.txs[e.Tx] = t
			c.order = append(c.order, t)
			c.summary.Profiles[t.profile]++
			c.summary.Sources[t.source]++
		}
		if len(e.Events) > 0 {
			for _, ev := range e.Events {
				k := &known{Event: ev, tx: t}
				k.Aggregate = t.source + ":" + k.Aggregate
				t.events = append(t.events, k)
				c.events[ev.ID] = k
			}
		}
		if e.Type == journal.OK && (e.F == journal.Prepare || e.F == journal.Publish || e.F == journal.Again) {
			t.acknowledged = true
		}
		t.operate(e)
		c.clock(t, e)
	}
	c.summary.Transactions = len(c.order)
}

// clock notes when a transaction did what.
func (c *checker) clock(t *tx, e *journal.Entry) {
	switch {
	case t.from == 0:
		t.from = e.At
	case e.Type != journal.OK:
	case e.F == journal.Prepare:
		t.prepared = e.At
		c.slowest = max(c.slowest, t.prepared-t.from)
	case t.local == 0 && (e.F == journal.Local || t.profile == driver.Direct):
		t.local = e.At
	}
}

// decide says of each transaction whether it must be published.
func (c *checker) decide() {
	for _, t := range c.order {
		switch t.profile {
		case driver.Race: // whoever came first
			t.committed = c.States[t.id] == Committed
		case driver.Direct:
			t.committed = t.acknowledged || c.States[t.id] == Committed
			t.open = !t.acknowledged
		default:
			t.committed = c.Truth[t.id]
		}
		if t.committed {
			c.summary.Committed++
			c.summary.Events += len(t.events)
		}
	}
	c.summary.Resolved = len(c.Resolutions)
}

// records looks at each record by itself: I1, I8.
func (c *checker) records() {
	c.summary.Records = len(c.Records)
	for i := range c.Records {
		r := &c.Records[i]
		k := c.events[r.ID]
		switch {
		case k == nil:
			c.violate("I8", "", uuid.Nil, "%s/%d@%d: nobody prepared event %s", r.Topic, r.Partition, r.Offset, r.ID)
			continue
		case !k.tx.committed:
			c.violate("I1", k.Aggregate, k.tx.id, "%s/%d@%d: event %s of transaction %s (%s), which did not commit", r.Topic, r.Partition, r.Offset, r.ID, k.tx.id, k.tx.profile)
		case k.Topic != r.Topic:
			c.violate("I8", k.Aggregate, k.tx.id, "event %s is on topic %s, prepared for %s", r.ID, r.Topic, k.Topic)
		}
		k.records++
		if k.first == nil {
			k.first = r
		}
	}
}

// placed compares what is committed with the records in their order: I2, I4, I5, I6, I7, I8. It is done by package history.
//
// A topic that got more partitions is taken apart: each partition is a topic of its own there, because no order is promised
// across the change.
func (c *checker) placed() error {
	parts := map[string]int{}
	for topic, counts := range c.Partitions {
		parts[topic] = counts[len(counts)-1]
	}
	records := make([]history.Record, 0, len(c.Records))
	home := c.homes()
	for _, r := range c.Records {
		k := c.events[r.ID]
		if k == nil || !k.tx.committed || k.Topic != r.Topic {
			continue // judged already
		}
		if counts := c.Partitions[r.Topic]; len(counts) > 1 {
			if c.era(&r) < 0 {
				c.violate("I5", k.Aggregate, k.tx.id, "%s/%d@%d: key %q belongs there with none of %v partitions", r.Topic, r.Partition, r.Offset, r.Key, counts)
			}
			name := fmt.Sprintf("%s#%d", r.Topic, r.Partition)
			if home[r.ID] != name {
				c.summary.Repeats++ // on the other side of the change
				continue
			}
			last := counts[len(counts)-1]
			parts[name] = last
			r.Partition, r.Topic = partition(r.Topic, r.Key, last), name
		}
		records = append(records, r)
	}
	report, err := history.Check(c.committed(home), records, parts)
	if err != nil {
		return fmt.Errorf("the journals contradict themselves: %w", err)
	}
	for invariant, f := range map[string]history.Findings{
		"I2": report.Lost, "I4": report.Reordered, "I5": report.Misplaced, "I8": report.Altered,
	} {
		c.take(invariant, f)
	}
	c.repeats(report)
	return nil
}

// homes says of each event on a topic that grew on which partition it was written first: offsets of two partitions say
// nothing about that. A repeat by a later holder came later, and a key goes on where a greater count puts it.
func (c *checker) homes() map[uuid.UUID]string {
	first := map[uuid.UUID]*history.Record{}
	for i := range c.Records {
		r := &c.Records[i]
		if len(c.Partitions[r.Topic]) < 2 {
			continue
		}
		f := first[r.ID]
		if f == nil || cmp.Or(cmp.Compare(r.Epoch, f.Epoch), cmp.Compare(c.era(r), c.era(f))) < 0 {
			first[r.ID] = r
		}
	}
	home := make(map[uuid.UUID]string, len(first))
	for id, r := range first {
		home[id] = fmt.Sprintf("%s#%d", r.Topic, r.Partition)
	}
	return home
}

// era is the first of its topic's partition counts that puts a record where it is; -1: none does.
func (c *checker) era(r *history.Record) int {
	return slices.IndexFunc(c.Partitions[r.Topic], func(n int) bool { return partition(r.Topic, r.Key, n) == r.Partition })
}

// partition is where a key belongs.
func partition(topic string, key []byte, count int) int32 {
	return int32(kgo.StickyKeyPartitioner(nil).ForTopic(topic).Partition(&kgo.Record{Key: key}, count)) //nolint:gosec // few
}

// repeats judges I6 and I7.
func (c *checker) repeats(report *history.Report) {
	c.summary.Repeats += len(report.Repeats)
	c.summary.Late = report.Late.Count
	most := c.Window * c.Disturbances
	if c.summary.Repeats > most {
		what := fmt.Sprintf("%d repeats, at most %d are explained by %d disturbances", c.summary.Repeats, most, c.Disturbances)
		for i, r := range report.Repeats {
			if i < shown-1 {
				what += "; " + r.What
			}
		}
		c.violate("I6", "", uuid.Nil, "%s", what)
	}
	// A lease that ran out under a holder that was well lets it deliver until its next step finds it fenced.
	if report.Zombie.Count > c.Jumps*c.Window/4 {
		c.take("I7", report.Zombie)
	}
	if c.Transactional && report.Late.Count > 0 { // whoever was cut off writes nothing that counts
		c.take("I7", report.Late)
	}
	epochs := map[int]int64{}
	for _, r := range c.Records {
		if last, seen := epochs[r.Shard]; !seen || r.Epoch > last {
			if seen {
				c.summary.Takeovers++
			}
			epochs[r.Shard] = r.Epoch
		}
	}
}

// take takes findings of package history.
func (c *checker) take(invariant string, f history.Findings) {
	for i, what := range f.First {
		c.violate(invariant, f.About[i], uuid.Nil, "%s", what)
	}
	if v := c.found[invariant]; v != nil {
		v.Count += f.Count - len(f.First)
	}
}

// committed are the committed events as package history wants them. Versions of an aggregate without a lock become ranks:
// transactions that did not commit leave gaps there.
func (c *checker) committed(home map[uuid.UUID]string) []history.Event {
	var all []history.Event
	unlocked := map[string][]int{} // indexes of all, by aggregate
	for _, t := range c.order {
		if !t.committed {
			continue
		}
		for _, k := range t.events {
			e := history.Event{ID: k.ID, Aggregate: k.Aggregate, Version: k.Version, Topic: k.Topic, Key: k.Key}
			copy(e.Payload[:], k.Digest)
			for _, h := range k.Headers {
				e.Headers = append(e.Headers, history.Header{Name: h.Name, Value: string(h.Value)})
			}
			if name := home[k.ID]; name != "" {
				e.Topic = name
			}
			if !k.Locked {
				unlocked[k.Aggregate] = append(unlocked[k.Aggregate], len(all))
			}
			all = append(all, e)
		}
	}
	for _, at := range unlocked {
		slices.SortFunc(at, func(a, b int) int { return cmp.Compare(all[a].Version, all[b].Version) })
		for rank, i := range at {
			all[i].Version = int64(rank + 1)
		}
	}
	return all
}

// whole: I3.
func (c *checker) whole() {
	for _, t := range c.order {
		there := 0
		for _, k := range t.events {
			if k.records > 0 {
				there++
			}
		}
		if there > 0 && there < len(t.events) {
			c.violate("I3", t.events[0].Aggregate, t.id, "transaction %s (%s): %d of %d events are on Kafka", t.id, t.profile, there, len(t.events))
		}
	}
}

// store: what the platform holds in the end is the truth: I11, I12, I13.
func (c *checker) store() {
	for _, t := range c.order {
		state, there := c.States[t.id]
		about := ""
		if len(t.events) > 0 {
			about = t.events[0].Aggregate
		}
		switch {
		case there && state == Prepared:
			c.violate("I12", about, t.id, "transaction %s (%s) is undecided", t.id, t.profile)
		case t.committed && !there:
			c.violate("I13", about, t.id, "transaction %s (%s) is committed, and the store does not know it", t.id, t.profile)
		case t.committed && state != Committed:
			c.violate("I11", about, t.id, "transaction %s (%s) is committed, and the store holds it for %s (%v)", t.id, t.profile, state, c.Resolutions[t.id])
		case !t.committed && !t.open && state == Committed:
			c.violate("I11", about, t.id, "transaction %s (%s) did not commit, and the store holds it for committed (%v)", t.id, t.profile, c.Resolutions[t.id])
		}
		if r, resolved := c.Resolutions[t.id]; resolved && t.profile != driver.Race && (r.State == Committed) != t.committed {
			c.violate("I11", about, t.id, "transaction %s (%s): %s found out %s", t.id, t.profile, r.Method, r.State)
		}
		if c.Markers[t.id] && !c.Truth[t.id] && t.profile != driver.Misused {
			c.violate("I13", about, t.id, "transaction %s has a marker and no truth", t.id)
		}
	}
	for _, line := range c.Stored {
		c.violate("I13", "", uuid.Nil, "outbox verify: %s", line)
	}
}

// answers: I9, misuse, and the SDK's alarms.
func (c *checker) answers() {
	for i := range c.Entries {
		e := &c.Entries[i]
		switch {
		case e.F == journal.Again && e.Type == journal.Fail:
			c.violate("I9", "", e.Tx, "transaction %s, the same again: %s", e.Tx, e.Note)
		case e.F == journal.Other && e.Type == journal.OK:
			c.violate("I9", "", e.Tx, "transaction %s was accepted again with other content", e.Tx)
		case e.F == journal.Misuse && e.Type == journal.Fail:
			c.violate("M", "", uuid.Nil, "%s", e.Note)
		case (e.F == journal.Prepare || e.F == journal.Publish) && e.Type == journal.Fail:
			c.violate("I9", "", e.Tx, "transaction %s (%s) was refused: %s", e.Tx, e.Profile, e.Note)
		case e.F == "alarm" && (c.txs[e.Tx] == nil || c.txs[e.Tx].profile != driver.Race):
			c.violate("I11", "", e.Tx, "alarm %s of transaction %s: %s", e.State, e.Tx, e.Note)
		}
	}
}

// rest: liveness, crashes.
func (c *checker) rest() {
	s := c.Settled
	if s.Undecided+s.Spilled+s.Missing+s.Blocked > 0 {
		c.violate("I12", "", uuid.Nil, "%s after the last fault: %d transactions undecided, %d requests spilled, %d events missing, %d aggregates blocked",
			s.Limit, s.Undecided, s.Spilled, s.Missing, s.Blocked)
	}
	for _, crash := range c.Crashes {
		c.violate("C", "", uuid.Nil, "%s", crash)
	}
}
