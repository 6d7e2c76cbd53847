package check

import (
	"fmt"
	"strconv"
	"strings"

	"github.com/google/uuid"

	"github.com/outbox-platform/outbox/test/robustness/driver"
	"github.com/outbox-platform/outbox/test/robustness/journal"
)

// Counters are what servers and relays say of themselves.
type Counters struct {
	// Servers and Relays are the sums over all processes when all was at rest, by name and labels; nil: one did not answer.
	Servers, Relays map[string]float64
	// Restarted: one of them was started again, and had forgotten what it had counted.
	ServersRestarted, RelaysRestarted bool
	// Takeovers is what the relays had counted before the first transaction.
	Takeovers float64
	// Published is what every relay that ever ran had counted when it was last asked.
	Published float64
}

// sum adds what begins with a name and has all the labels.
func sum(counters map[string]float64, name string, labels ...string) float64 {
	total := 0.0
next:
	for key, value := range counters {
		if rest, ok := strings.CutPrefix(key, name); !ok || rest != "" && rest[0] != '{' {
			continue
		}
		for _, l := range labels {
			if !strings.Contains(key, l) {
				continue next
			}
		}
		total += value
	}
	return total
}

// between says a range; most -1: it has no end.
func between(least, most int) string {
	if most < 0 {
		return fmt.Sprintf("%d or more", least)
	}
	if least == most {
		return strconv.Itoa(least)
	}
	return fmt.Sprintf("%d to %d", least, most)
}

// slack is how much more than what was asked for may be counted in a run without a fault: a call may be repeated on a new
// connection.
func slack(n int) float64 { return 16 + float64(n)/100 }

// patient is how long the slowest Prepare may have taken when nobody gave a call up, in ns.
const patient = 1e9

// counters: I14.
func (c *checker) counters() {
	c.relayCounters()
	c.serverCounters()
}

func (c *checker) relayCounters() {
	count := func(name string) float64 { return sum(c.Counters.Relays, "outbox_"+name) }
	// What Kafka acknowledged is there; with Kafka transactions it may have been taken back.
	if records := float64(len(c.Records)); !c.Transactional && c.Counters.Published > records {
		c.violate("I14", "", uuid.Nil, "the relays count %.0f published events, Kafka has %.0f", c.Counters.Published, records)
	}
	if c.Counters.Relays == nil {
		return
	}
	for _, name := range []string{"blocked_aggregates", "unacked_records", "shard_backlog_events"} {
		if n := count(name); n != 0 && c.Settled.Missing+c.Settled.Blocked+c.Settled.Undecided == 0 {
			c.violate("I14", "", uuid.Nil, "outbox_%s is %.0f when everything is published", name, n)
		}
	}
	if n := count("corrupt_total"); n != 0 {
		c.violate("I14", "", uuid.Nil, "outbox_corrupt_total is %.0f", n)
	}
	if c.Counters.RelaysRestarted || c.Disturbances > 0 { // what was written without an acknowledgement is not counted
		return
	}
	c.summary.Counted = append(c.summary.Counted, "relays")
	if n := count("published_total"); n != float64(len(c.Records)) {
		c.violate("I14", "", uuid.Nil, "the relays count %.0f published events, Kafka has %d", n, len(c.Records))
	}
	for _, name := range []string{`kafka_errors_total{class="record"}`, "dead_letters_total"} {
		if n := count(name); n != 0 {
			c.violate("I14", "", uuid.Nil, "outbox_%s is %.0f without a fault", name, n)
		}
	}
	if count("takeovers_total") > c.Counters.Takeovers { // the next holder drops again what its predecessor had dropped, and suppresses
		return
	}
	c.summary.Counted = append(c.summary.Counted, "dropped and suppressed")
	if n := count("duplicates_suppressed_total"); n != 0 {
		c.violate("I14", "", uuid.Nil, "the relays count %.0f suppressed duplicates, and no shard changed hands", n)
	}
	aborted := 0
	for _, t := range c.order {
		if c.States[t.id] == Aborted {
			aborted += len(t.events)
		}
	}
	if n := count("dropped_total"); n != float64(aborted) {
		c.violate("I14", "", uuid.Nil, "the relays count %.0f events of aborted transactions, there are %d", n, aborted)
	}
}

// calls are what the journals tell of the calls that servers count.
type calls struct {
	stored     int // Prepare or Publish answered OK by a server
	prepares   int // asked for, those that are repeated included, and those that the SDK refuses
	prepared   int // of them those answered OK, by a server or the SDK, which may have spilled
	publishes  int
	published  int
	commits    int
	aborts     int
	unanswered int
}

func (c *checker) calls() calls {
	var n calls
	for i := range c.Entries {
		e := &c.Entries[i]
		t := c.txs[e.Tx]
		if e.Type == journal.Info {
			n.unanswered++
		}
		if t == nil {
			continue
		}
		direct := t.profile == driver.Direct
		switch {
		case e.F == journal.Rollback && e.Type == journal.OK, e.F == journal.Abort && e.Type == journal.Invoke:
			n.aborts++
		case e.F == journal.Commit && e.Type == journal.Invoke:
			n.commits++
		case e.F != journal.Prepare && e.F != journal.Publish && e.F != journal.Again:
		case e.Type == journal.Invoke && direct:
			n.publishes++
		case e.Type == journal.Invoke:
			n.prepares++
		case e.Type == journal.OK:
			if direct {
				n.published++
			} else {
				n.prepared++
			}
			if t.committed || byHand[t.profile] { // else it may have been spilled, and rolled back
				n.stored++
			}
		}
	}
	return n
}

// byHand are the profiles that do not spill.
var byHand = map[string]bool{driver.TwoPhase: true, driver.Duplicate: true, driver.Sync: true, driver.Race: true, driver.Direct: true}

func (c *checker) serverCounters() {
	if c.Counters.Servers == nil || c.Counters.ServersRestarted {
		return
	}
	count := func(name string, labels ...string) float64 { return sum(c.Counters.Servers, "outbox_"+name, labels...) }
	decisions := func(labels ...string) float64 { return count("decisions_total", labels...) }
	const committed, aborted = `state="committed"`, `state="aborted"`
	n := c.calls()
	prepares, publishes := count("prepares_total"), decisions(`method="publish"`)
	if prepares+publishes < float64(n.stored) {
		c.violate("I14", "", uuid.Nil, "the servers count %.0f prepared and %.0f published transactions, %d were acknowledged", prepares, publishes, n.stored)
	}
	// What follows needs that nobody gave a call up or made it again.
	if n.unanswered > 0 || c.slowest > patient || len(strikes(c.Entries)) > 0 {
		return
	}
	c.summary.Counted = append(c.summary.Counted, "servers")
	states := map[State]int{}
	for _, t := range c.order {
		states[c.States[t.id]]++
	}
	found := map[State]int{}
	for _, r := range c.Resolutions {
		found[r.State]++
	}
	for _, x := range []struct {
		what            string
		counted         float64
		atLeast, atMost int
	}{
		{"prepared transactions", prepares, n.prepared, n.prepares},
		{"published transactions", publishes, n.published, n.publishes},
		{"COMMITTED from callers", decisions(committed, `method="client"`), 0, n.commits},
		{"ABORTED from callers", decisions(aborted, `method="client"`), 0, n.aborts},
		{"COMMITTED from anybody", decisions(committed) + count("resolved_transactions_total", committed), states[Committed], -1},
		{"ABORTED from anybody", decisions(aborted) + count("resolved_transactions_total", aborted), states[Aborted], -1},
		{"COMMITTED found out", count("resolved_transactions_total", committed), found[Committed], -1},
		{"ABORTED found out", count("resolved_transactions_total", aborted), found[Aborted], -1},
	} {
		if x.counted < float64(x.atLeast) || x.atMost >= 0 && x.counted > float64(x.atMost)+slack(x.atMost) {
			c.violate("I14", "", uuid.Nil, "the servers count %.0f %s; by the history there are %s", x.counted, x.what, between(x.atLeast, x.atMost))
		}
	}
}
