package driver

import (
	"context"
	"crypto/sha256"
	"fmt"
	"math"
	"math/rand/v2"
	"slices"
	"strings"

	"github.com/google/uuid"
	"github.com/jackc/pgx/v5"

	"github.com/outbox-platform/outbox/client"
	"github.com/outbox-platform/outbox/test/robustness/journal"
)

// aggregateType is that of all aggregates.
const aggregateType = "thing"

// change is what a transaction does to one aggregate.
type change struct {
	aggregate string // its id
	locked    bool   // by its row; else it is this session's own
	events    int
	version   int64 // of the last event
}

// plan draws what a transaction does. Transactions that stay undecided for long keep to aggregates of their own.
func (w *worker) plan(profile string) []change {
	switch profile {
	case Race, TwoPhase, Long, Probe:
		return []change{{aggregate: w.fresh(profile), events: 1 + w.random.IntN(3)}}
	}
	if profile == Direct { // a Publish must not overtake what is spilled, so that it has an aggregate of its own
		return []change{{aggregate: w.fresh(profile), events: w.count()}}
	}
	if w.random.IntN(7) == 0 {
		return []change{{aggregate: w.session(), events: w.count()}}
	}
	wanted := 1
	if n := w.random.IntN(20); n < 3 {
		wanted += 1 + n
	}
	var numbers []int
	for range wanted {
		numbers = append(numbers, w.draw())
	}
	slices.Sort(numbers) // no two transactions lock in opposite order
	var changes []change
	for _, n := range slices.Compact(numbers) {
		changes = append(changes, change{aggregate: fmt.Sprintf("a-%d", n), locked: true, events: w.count()})
	}
	slices.SortFunc(changes, func(a, b change) int { return strings.Compare(a.aggregate, b.aggregate) })
	return changes
}

// count is a number of events: mostly one, sometimes many.
func (w *worker) count() int { return min(50, int(1/math.Pow(1-w.random.Float64(), 0.55))) }

// draw draws an aggregate: a few are hot. One that is very hot is published no faster than Kafka acknowledges one record after
// the other, so that a load without a limit needs others too.
func (w *worker) draw() int {
	if w.random.IntN(100) >= w.Hot {
		return w.random.IntN(w.Aggregates)
	}
	return int(math.Pow(float64(w.Aggregates), w.random.Float64())) - 1
}

func lognormal(random *rand.Rand, sigma float64) float64 {
	return math.Exp(sigma * random.NormFloat64())
}

func (w *worker) fresh(kind string) string {
	return fmt.Sprintf("%s-%s-%d-%d", kind, w.Process, w.n, w.begun)
}

// session is the worker's own aggregate. It leaves it when it does not know the outcome of a transaction on it: then
// nothing but a lock would say in which order that one and the next happened.
func (w *worker) session() string {
	if w.own == "" {
		w.own, w.version = w.fresh("own"), 0
	}
	return w.own
}

func (w *worker) uncertain() { w.own = "" }

// lock takes the aggregate's row lock and its versions.
func (w *worker) lock(ctx context.Context, tx pgx.Tx, c *change) error {
	if !c.locked {
		c.version = w.versions(c)
		return nil
	}
	err := tx.QueryRow(ctx, `INSERT INTO aggregate (id, version) VALUES ($1, $2)
		ON CONFLICT (id) DO UPDATE SET version = aggregate.version + $2 RETURNING version`, c.aggregate, c.events).Scan(&c.version)
	if err != nil {
		return fmt.Errorf("lock aggregate %s: %w", c.aggregate, err)
	}
	return nil
}

// versions are those of an aggregate that nobody else writes to.
func (w *worker) versions(c *change) int64 {
	if c.aggregate != w.own {
		return int64(c.events)
	}
	w.version += int64(c.events)
	return w.version
}

// tell writes the truth.
func tell(ctx context.Context, tx pgx.Tx, id uuid.UUID, changes []change) error {
	batch := &pgx.Batch{}
	for _, c := range changes {
		batch.Queue(`INSERT INTO truth (tx, aggregate, version, events) VALUES ($1, $2, $3, $4)`, [16]byte(id), c.aggregate, c.version, c.events)
	}
	return tx.SendBatch(ctx, batch).Close()
}

// events makes the events of a transaction, for the SDK and for the journal.
func (w *worker) events(changes []change) ([]client.Event, []journal.Event) {
	var sent []client.Event
	var noted []journal.Event
	for _, c := range changes {
		key, shown := keyOf(c.aggregate)
		for i := range c.events {
			version := c.version - int64(c.events) + int64(i) + 1
			e := client.Event{
				ID: client.NewID(), Topic: w.Topics[w.random.IntN(len(w.Topics))], AggregateType: aggregateType, AggregateID: c.aggregate,
				Type: "thing.changed.v1", Key: key, Payload: w.payload(), ContentType: "application/octet-stream", Headers: w.headers(c.aggregate, version),
			}
			digest := sha256.Sum256(e.Payload)
			n := journal.Event{
				ID: e.ID, Topic: e.Topic, Aggregate: aggregateType + "/" + c.aggregate, Version: version, Locked: c.locked, Key: shown, Digest: digest[:],
			}
			for _, h := range e.Headers {
				n.Headers = append(n.Headers, journal.Header{Name: h.Name, Value: h.Value})
			}
			sent, noted = append(sent, e), append(noted, n)
		}
	}
	return sent, noted
}

// keyOf is the key of an aggregate's events: always the same, or they would be on several partitions. given is nil when the
// aggregate's id is the key.
func keyOf(aggregate string) (given, shown []byte) {
	switch sum := sha256.Sum256([]byte(aggregate)); sum[0] % 8 {
	case 0:
		given = []byte("key of " + aggregate)
	case 1:
		given = append([]byte{0, 0xff, 0x80}, sum[:8]...)
	case 2:
		given = []byte{} // an empty key is a key
	default:
		return nil, []byte(aggregate)
	}
	return given, given
}

// payload is any bytes; small ones are the rule.
func (w *worker) payload() []byte {
	var size int
	switch n := w.random.IntN(1000); {
	case n < 20:
		size = 0
	case n < 800:
		size = 20 + w.random.IntN(300)
	case n < 985:
		size = w.random.IntN(4000)
	case n < 999:
		size = w.random.IntN(60_000)
	default:
		size = 300_000 + w.random.IntN(300_000)
	}
	p := make([]byte, size)
	for i := range p {
		p[i] = byte(w.random.Uint32())
	}
	return p
}

// headers name the event, and are extreme now and then.
func (w *worker) headers(aggregate string, version int64) []client.Header {
	h := []client.Header{{Name: "note", Value: fmt.Appendf(nil, "%s/%d", aggregate, version)}}
	switch w.random.IntN(60) {
	case 0: // as many as there may be
		for range 63 {
			h = append(h, client.Header{Name: "many", Value: []byte{byte(w.random.Uint32())}})
		}
	case 1: // as large as there may be, nearly
		h = append(h, client.Header{Name: "large", Value: make([]byte, 15<<10)})
	case 2:
		h = append(h, client.Header{Name: "\u00fcn\u00efcode", Value: []byte{0, 0xff}}, client.Header{Name: "empty", Value: []byte{}})
	}
	return h
}
