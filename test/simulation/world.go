package simulation

import (
	"encoding/binary"
	"fmt"
	"time"

	"github.com/outbox-platform/outbox/relay"
	"github.com/outbox-platform/outbox/store"
)

// shardCount is small, so that aggregates share shards.
const shardCount = 2

// The sources, and with them what becomes of records that Kafka refuses for good.
const (
	sourceBlock int32 = 1 + iota
	sourcePark
	sourceSkip
)

// topicNames: poison events go to any of them, a topic may be missing for a while.
var topicNames = []string{"x", "y"}

// swarm says what may happen in a schedule. Each schedule leaves some of it out, so that the rest happens more often.
type swarm struct {
	crashes bool // of relays and servers
	pauses  bool // of relays: SIGSTOP, longer than the lease
	stops   bool // of relays, as a deployment does
	network bool // accesses fail, executed or not; answers get lost; requests are sent twice
	kafka   bool // producers give up, the cluster goes away
	topics  bool // topics go missing, records are refused for good
	storeCrash,
	sourceCrash,
	failOver,
	resolver, // false: only what clients decide is decided, until the end
	retention, // the log is rotated and truncated, tx is purged
	operators bool
}

// world is one schedule.
type world struct {
	c     chance
	swarm swarm
	now   time.Time

	store     *Store
	broker    *Broker
	relays    []*relayProcess
	servers   []*serverProcess
	databases map[int32]*Database

	clients []*client // that are not done
	byKey   map[store.Key]*client
	events  []*event
	order   map[store.Aggregate]*history
	all     []store.Aggregate // keys of order, in the order in which they came
	locks   map[store.Aggregate]*client
	orphans []*appending // of servers that are gone

	config    relay.Config
	limits    [4]int
	current   *task
	healing   bool
	failure   string
	disturbed int // whatever may lead to a duplicate
	count     map[string]int
	trace     func(format string, args ...any) // nil: nobody reads it
}

// client is a service that publishes events in one transaction.
type client struct {
	key       store.Key
	publish   bool // it has no database
	db        *Database
	xact      *store.DatabaseTransaction
	content   []store.Event
	events    []*event
	locked    []store.Aggregate
	attempts  int // Prepares and Publishes sent
	underWay  int // … and not answered, as far as the client knows
	prepared  bool
	token     store.ShardSet
	committed bool // in its own database; the truth
	over      bool // its local transaction has ended
	dying     bool // its database has not noticed yet that it is gone
	decisions int  // Commits or Aborts sent
	acked     bool
	done      bool
}

// event is one event of a client.
type event struct {
	number  int
	agg     store.Aggregate
	rank    int // in the history of its aggregate
	client  *client
	poison  bool
	skipped bool // set aside for good: out of the order
	writes  int
}

func (e *event) String() string {
	return fmt.Sprintf("event %d of %s (transaction %x)", e.number, e.agg.ID, e.client.key.Transaction[:2])
}

// history is the events of one aggregate in the order in which their transactions held its lock.
type history struct {
	events []*event
	first  int // everything before is written, or will never be
}

func newWorld(c chance) *world {
	w := &world{
		c: c, now: time.Unix(1_700_000_000, 0), databases: map[int32]*Database{}, byKey: map[store.Key]*client{},
		order: map[store.Aggregate]*history{}, locks: map[store.Aggregate]*client{}, count: map[string]int{},
	}
	flag := func() bool { return c.n(2) == 1 }
	w.swarm = swarm{
		crashes: flag(), pauses: flag(), stops: flag(), network: flag(), kafka: flag(), topics: flag(), storeCrash: flag(),
		sourceCrash: flag(), failOver: c.n(4) == 1, resolver: c.n(4) > 0, retention: flag(), operators: flag(),
	}
	w.store = NewStore(shardCount, func() time.Time { return w.now })
	w.store.call = w.access
	w.store.decided = w.checkDecision
	w.store.stepped = w.checkStep
	w.store.acquired = func(shard int16, epoch int64) {
		w.note("store: shard %d is leased, epoch %d", shard, epoch)
		if epoch > 1 {
			w.disturbed++
			w.count["takeovers"]++
		}
	}
	w.store.sources = []store.Source{
		{ID: sourceBlock, Name: "block", FailurePolicy: 1, RecordProfile: 1},
		{ID: sourcePark, Name: "park", FailurePolicy: 2, RecordProfile: 1},
		{ID: sourceSkip, Name: "skip", FailurePolicy: 3, RecordProfile: 1},
	}
	for _, src := range w.store.sources {
		db := NewDatabase(src.Name)
		db.access = w.others
		w.databases[src.ID] = db
	}
	w.broker = NewBroker(1+c.n(2), topicNames...)
	w.broker.refuse = func(r *relay.Record) bool { return w.eventOf(r).poison }
	w.broker.wrote = w.checkWrite
	w.config = relay.Config{
		MemoryBytes: []int64{3000, 64 << 20}[c.n(2)], MaxUnacked: 1 + c.n(6), RetryMax: time.Second,
	}
	w.limits = [4]int{1 + c.n(4), 2 + c.n(4), 1 + c.n(3), 1 + c.n(4)}
	for range 1 + c.n(3) {
		w.relays = append(w.relays, &relayProcess{w: w, number: len(w.relays)})
	}
	for range 1 + c.n(2) {
		w.servers = append(w.servers, &serverProcess{w: w})
	}
	for _, r := range w.relays {
		r.start()
	}
	for _, s := range w.servers {
		s.start()
	}
	return w
}

// eventOf finds the event that a record carries.
func (w *world) eventOf(r *relay.Record) *event { return w.events[binary.BigEndian.Uint32(r.Value)] }

// fail ends the schedule.
func (w *world) fail(format string, args ...any) {
	if w.failure == "" {
		w.failure = fmt.Sprintf(format, args...)
		w.note("VIOLATION: %s", w.failure)
	}
}

func (w *world) note(format string, args ...any) {
	if w.trace != nil {
		w.trace("%9.3f "+format, append([]any{w.now.Sub(time.Unix(1_700_000_000, 0)).Seconds()}, args...)...)
	}
}

// happens says yes one time in so many, and never while everything heals.
func (w *world) happens(may bool, oneIn int) bool { return may && !w.healing && w.c.n(oneIn) == 0 }

var errLost = fmt.Errorf("connection lost: %w", store.ErrUnavailable)

// access makes an access to the store from a task: others may go first, it may fail, and it may be made and fail all the same.
func (w *world) access(do func() error) error {
	if w.current == nil || w.healing {
		return do()
	}
	w.others()
	if w.happens(w.swarm.network, 16) {
		if w.c.n(2) == 0 {
			return errLost
		}
		if err := do(); err != nil {
			return err
		}
		return errLost
	}
	err := do()
	if w.c.n(4) == 0 {
		w.others()
	}
	return err
}

// run lets so many events happen, then heals everything and waits until nothing is left to do.
func (w *world) run(events int) {
	for range events {
		w.happen()
		if w.failure != "" {
			return
		}
	}
	w.heal()
}

// close ends what is left of tasks.
func (w *world) close() {
	for _, r := range w.relays {
		w.kill(&r.process)
	}
	for _, s := range w.servers {
		w.kill(&s.process)
	}
}
