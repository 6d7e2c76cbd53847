// Package check judges a finished run by the invariants I1 to I15 of README.md. It knows nothing of the platform: it compares
// the services' journals, the truth in their own databases, what stands on Kafka, and the state that the store is left in.
// All checks are linear in the size of the run but the one for linearizability, which looks at one transaction at a time.
package check

import (
	"fmt"
	"time"

	"github.com/google/uuid"

	"github.com/outbox-platform/outbox/test/robustness/journal"
	"github.com/outbox-platform/outbox/test/system/history"
)

// Run is all that is known of a run.
type Run struct {
	// Entries of all journals, in order of time.
	Entries []journal.Entry
	// Truth are the transactions that the services' databases committed.
	Truth map[uuid.UUID]bool
	// Markers are those still in the services' databases.
	Markers map[uuid.UUID]bool
	// States and Resolutions are what the store holds in the end.
	States      map[uuid.UUID]State
	Resolutions map[uuid.UUID]Resolution
	// Records are all of Kafka, from offset 0.
	Records []history.Record
	// Partitions of each topic, every count that it had.
	Partitions map[string][]int
	// Stored is what `outbox verify` found, Crashes what processes logged when they broke.
	Stored, Crashes []string
	// Settled is how it came to rest.
	Settled Settled
	// Disturbances are faults after which an event may be delivered twice: a relay or broker that was killed, cut off or
	// slowed. Jumps are leases that were made to run out although their holders were well.
	Disturbances, Jumps int
	// Transactional: records were written in Kafka transactions, and Records are what a read_committed consumer sees.
	Transactional bool
	// Window is how many records may be under way at once.
	Window int
	// Counters are those of servers and relays.
	Counters Counters
	// Seen says when a consumer that was there from the beginning saw each event first, by the journals' clock.
	Seen map[uuid.UUID]int64
	// Decided says when the store decided what did not commit, by the journals' clock.
	Decided map[uuid.UUID]int64
	// Disturbing are the faults that may hold up what is committed, Blocked the aggregates that waited for an operator's help.
	Disturbing, Blocked map[string]bool
	// Saturated: the services worked as fast as it went, so that nobody can say how fast it should have been.
	Saturated bool
}

// State of a transaction in the store.
type State string

// The states.
const (
	Prepared  State = "PREPARED"
	Committed State = "COMMITTED"
	Aborted   State = "ABORTED"
)

// Resolution is a decision that was found out.
type Resolution struct {
	State  State
	Method string
}

// Settled says how the platform came to rest after the last fault was healed.
type Settled struct {
	// Undecided, Spilled, Missing and Blocked are what was left when the time was up: transactions, requests, events,
	// aggregates.
	Undecided, Spilled, Missing, Blocked int
	// Decided is how long it took until nothing was undecided or parked, Within until everything was on Kafka, Limit how long
	// it might.
	Decided, Within, Limit time.Duration
	// Sights are what was left from second to second.
	Sights []Sight
}

// Sight is what was left so many seconds after the last fault.
type Sight struct {
	At        float64 `json:"at"`
	Undecided int     `json:"undecided"`
	Spilled   int     `json:"spilled"`
	Parked    int     `json:"parked"`
}

// Violation is a broken promise.
type Violation struct {
	Invariant string `json:"invariant"`
	Count     int    `json:"count"`
	// What are the first few.
	What []string `json:"what"`
	// Aggregate whose timeline shows it; empty: none does.
	Aggregate string    `json:"aggregate,omitempty"`
	Tx        uuid.UUID `json:"tx,omitzero"`
}

// Summary counts what the run was made of.
type Summary struct {
	Transactions int `json:"transactions"`
	Committed    int `json:"committed"`
	Events       int `json:"events"`
	Records      int `json:"records"`
	Repeats      int `json:"repeats"`
	Late         int `json:"late"`
	Resolved     int `json:"resolved"`
	Linearized   int `json:"linearized"`
	Takeovers    int `json:"takeovers"`
	// Profiles and Sources count transactions.
	Profiles map[string]int `json:"profiles"`
	Sources  map[string]int `json:"sources"`
	// Counted names what was compared with the history in full.
	Counted []string `json:"counted,omitempty"`
	// Pace is how long things took; nil: nobody watched.
	Pace *Pace `json:"pace,omitempty"`
}

// shown is how many findings of one invariant are spelled out.
const shown = 5

// Invariants names them, with what each says.
var Invariants = map[string]string{
	"I1":  "no phantom: a record's transaction is committed in the source's database",
	"I2":  "no loss: every event of a committed transaction is on Kafka",
	"I3":  "no tear: of a transaction all events are on Kafka, or none; during the run no part for long without a reason",
	"I4":  "order: an aggregate's events come in the order of its versions, without a gap",
	"I5":  "one partition: where Java's partitioner puts the key",
	"I6":  "repeats: none without a disturbance, a bounded number with one",
	"I7":  "fencing: a holder that lost its shard delivers nothing more but what was under way",
	"I8":  "integrity: topic, key, payload and headers as prepared; no record that nobody prepared",
	"I9":  "idempotency: the same call again gives the same answer, another content is refused",
	"I10": "state machine: the answers about a transaction are linearizable",
	"I11": "truth: what the platform decided and answered is what the source's database says",
	"I12": "liveness: after the last fault everything is decided and published in time, and nothing is blocked",
	"I13": "nothing is forgotten: what was acknowledged is known, decided and consistent in the store",
	"I14": "observability: the counters agree with the history",
	"I15": "performance: without a fault no median is beyond what a user would call broken",
	"M":   "misuse is refused by the SDK",
	"C":   "no process panics or has a data race",
}

// checker collects.
type checker struct {
	*Run
	found   map[string]*Violation
	txs     map[uuid.UUID]*tx
	events  map[uuid.UUID]*known // by event id
	order   []*tx
	summary Summary
	slowest int64 // Prepare, in ns
}

// tx is a transaction as the journals tell it.
type tx struct {
	id              uuid.UUID
	source, profile string
	events          []*known
	acknowledged    bool // Prepare or Publish answered OK
	committed       bool // it must be published
	open            bool // nobody can say whether it must: what the store says counts
	operations      []operation
	// By the journals' clock, 0 when it is not known: Prepare or Publish was called, Prepare was answered, the local COMMIT or
	// Publish was.
	from, prepared, local int64
	// When its first and its last event were seen, and the longest that nothing held up one of them, with that event.
	first, last, held int64
	late              *known
}

// known is an event that somebody prepared.
type known struct {
	journal.Event
	tx      *tx
	records int
	first   *history.Record
}

func (c *checker) violate(invariant, aggregate string, id uuid.UUID, format string, args ...any) {
	v := c.found[invariant]
	if v == nil {
		v = &Violation{Invariant: invariant, Aggregate: aggregate, Tx: id}
		c.found[invariant] = v
	}
	v.Count++
	if len(v.What) < shown {
		v.What = append(v.What, fmt.Sprintf(format, args...))
	}
}
