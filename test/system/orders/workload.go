package orders

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"sync"
	"sync/atomic"

	"github.com/jackc/pgx/v5"
	"golang.org/x/time/rate"

	"github.com/outbox-platform/outbox/client"
	"github.com/outbox-platform/outbox/test/system/history"
)

// Workload says what the service does.
type Workload struct {
	// Callers is how many transactions run at a time.
	Callers int
	// Transactions ends the run after so many. 0: when the context ends.
	Transactions int
	// PerSecond bounds the transactions of all callers together. 0: as fast as it goes.
	PerSecond float64
	// Aggregates must be those of CreateSchema.
	Aggregates int
	// Topics of the events. An aggregate's events go to all of them.
	Topics []string
	// Rollback is the share of transactions that are rolled back, half of them after they were prepared.
	Rollback float64
	// MaxEvents of a transaction, which has one or two aggregates. 0: one event.
	MaxEvents int
	// MaxPayload is the size of the largest payload.
	MaxPayload int
	// Seed makes the choices of a run repeatable, but not their timing.
	Seed uint64
}

// Tally counts what became of the transactions.
type Tally struct {
	Committed, RolledBack, Failed atomic.Int64

	mu     sync.Mutex
	errors []string // the first few
}

// Errors are the first few failures.
func (t *Tally) Errors() []string {
	t.mu.Lock()
	defer t.mu.Unlock()
	return slices.Clone(t.errors)
}

func (t *Tally) fail(err error) {
	t.Failed.Add(1)
	t.mu.Lock()
	defer t.mu.Unlock()
	if len(t.errors) < 5 {
		t.errors = append(t.errors, err.Error())
	}
}

// String is the tally for a person.
func (t *Tally) String() string {
	return fmt.Sprintf("%d committed, %d rolled back, %d failed", t.Committed.Load(), t.RolledBack.Load(), t.Failed.Load())
}

// errChangedMind rolls a transaction back.
var errChangedMind = errors.New("the service changed its mind")

// run works until the workload's end. A transaction that has begun is finished.
func (w Workload) run(ctx context.Context, in *Instance, tally *Tally) {
	limit := rate.Inf
	if w.PerSecond > 0 {
		limit = rate.Limit(w.PerSecond)
	}
	limiter := rate.NewLimiter(limit, 1+int(w.PerSecond/20))
	var begun atomic.Int64
	var all sync.WaitGroup
	for caller := range w.Callers {
		all.Go(func() {
			random := rand.New(rand.NewPCG(w.Seed, uint64(caller)))
			for limiter.Wait(ctx) == nil && (w.Transactions == 0 || begun.Add(1) <= int64(w.Transactions)) {
				// The service finishes what it began; only the loop ends with the context.
				err := in.transact(context.WithoutCancel(ctx), w.plan(random))
				switch {
				case err == nil:
					tally.Committed.Add(1)
				case errors.Is(err, errChangedMind):
					tally.RolledBack.Add(1)
				default:
					tally.fail(err)
				}
			}
		})
	}
	all.Wait()
}

// plan is what one transaction will do.
type plan struct {
	changes []change // by aggregate, so that no two transactions lock in opposite order
	end     end
}

// end is how a transaction ends.
type end int

const (
	commit   end = iota
	rollback     // before anything was prepared
	abort        // after everything was prepared
)

// change is what happens to one aggregate.
type change struct {
	aggregate string
	key       []byte
	events    []planned
}

type planned struct {
	topic   string
	payload []byte
}

func (w Workload) plan(random *rand.Rand) plan {
	var p plan
	if random.Float64() < w.Rollback {
		p.end = rollback + end(random.IntN(2))
	}
	numbers := []int{random.IntN(w.Aggregates)}
	if events := 1 + random.IntN(max(1, w.MaxEvents)); events > 1 {
		numbers = append(numbers, random.IntN(w.Aggregates))
		slices.Sort(numbers)
		numbers = slices.Compact(numbers)
	}
	for _, n := range numbers {
		c := change{aggregate: aggregateID(n)}
		if n%3 == 0 { // the others are keyed by their id
			c.key = fmt.Appendf(nil, "key of %d", n)
		}
		for range 1 + random.IntN(max(1, w.MaxEvents/len(numbers))) {
			payload := make([]byte, random.IntN(w.MaxPayload+1))
			for i := range payload {
				payload[i] = byte(random.Uint32())
			}
			c.events = append(c.events, planned{w.Topics[random.IntN(len(w.Topics))], payload})
		}
		p.changes = append(p.changes, c)
	}
	return p
}

// do locks and counts the aggregates, notes the events and returns them for the SDK.
func (p plan) do(ctx context.Context, tx pgx.Tx) ([]client.Event, error) {
	var events []client.Event
	for _, c := range p.changes {
		var version int64
		err := tx.QueryRow(ctx, "UPDATE aggregate SET version = version + $2 WHERE id = $1 RETURNING version - $2",
			c.aggregate, int64(len(c.events))).Scan(&version)
		if err != nil {
			return nil, fmt.Errorf("change aggregate %s: %w", c.aggregate, err)
		}
		for _, e := range c.events {
			version++
			event, err := note(ctx, tx, c, e, version)
			if err != nil {
				return nil, err
			}
			events = append(events, event)
		}
	}
	return events, nil
}

// note writes one event down.
func note(ctx context.Context, tx pgx.Tx, c change, e planned, version int64) (client.Event, error) {
	id := client.NewID()
	text := fmt.Sprintf("%s/%d", c.aggregate, version)
	key := c.key
	if key == nil {
		key = []byte(c.aggregate)
	}
	digest := history.DigestOf(e.payload)
	_, err := tx.Exec(ctx, "INSERT INTO noted (event_id, aggregate, version, topic, key, payload, header) VALUES ($1,$2,$3,$4,$5,$6,$7)",
		[16]byte(id), c.aggregate, version, e.topic, key, digest[:], text)
	if err != nil {
		return client.Event{}, fmt.Errorf("note event %s: %w", text, err)
	}
	return client.Event{
		ID: id, Topic: e.topic, AggregateType: "order", AggregateID: c.aggregate, Type: "order.changed.v1",
		Key: c.key, Payload: e.payload, ContentType: "application/octet-stream",
		Headers: []client.Header{{Name: headerName, Value: []byte(text)}},
	}, nil
}
