package simulation

import (
	"context"
	"encoding/binary"
	"errors"
	"flag"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"pgregory.net/rapid"

	"github.com/outbox-platform/outbox/store"
	"github.com/outbox-platform/outbox/store/storetest"
)

// TestStoreConforms runs scripts of operations against the store of the simulator and against the real one on PostgreSQL, and
// compares every answer, and after each operation everything that is stored.
func TestStoreConforms(t *testing.T) {
	t.Parallel()
	const servers, maxBatch, shards = 2, 4, 4
	// Nothing survives the test, so nothing has to reach the disk; and nobody else is to hold the horizon.
	cluster := storetest.NewCluster(t, storetest.WithSettings(map[string]string{"fsync": "off", "autovacuum": "off"}))
	db := cluster.New(t, storetest.WithShards(shards), storetest.WithConfig(func(c *store.Config) { c.Unsafe = true }))
	for _, name := range []string{"first", "second"} {
		db.Source(t, name)
	}
	real := newOnPostgres(t, db, servers, maxBatch)
	sources, err := real.Sources(t.Context(), "", 10)
	if err != nil || len(sources) != 2 {
		t.Fatal(sources, err)
	}
	reached := map[string]int{}
	compareScripts(t, func(rt *rapid.T) {
		real.empty()
		now := time.Now().Truncate(time.Millisecond)
		c := &comparison{
			t: rt, servers: servers, shards: shards, sources: []int32{sources[0].ID, sources[1].ID}, start: now,
			memory: newSide(newInMemory(shards, servers, maxBatch, now, sources)), real: newSide(real), reached: reached,
			requestsInFlight: make([][]*asked, servers),
		}
		defer c.end()
		c.compare()
		rt.Repeat(c.actions())
	})
	t.Logf("reached: %v", reached)
	for _, what := range []string{
		"stored", "stale", "reused", "decided otherwise", "unknown", "held", "waited for another", "cut", "read", "held back", "connection broke",
		"acquired some", "stolen", "fenced", "backwards", "fenced beside written", "backwards beside written", "rows", "aggregate's rows", "several rows of an aggregate", "dead letters",
		"dead queue", "claimed", "operation", "no such aggregate", "rotated", "truncated", "ring full", "purged",
	} {
		if reached[what] == 0 && !t.Failed() {
			t.Errorf("no script reached %q: this proves nothing about it", what)
		}
	}
}

// compareScripts is rapid.Check with other numbers of scripts and of steps in each, unless flags say how many. It is for tests
// that run in parallel, after all that do not.
func compareScripts(t *testing.T, script func(*rapid.T)) {
	t.Helper()
	if err := fewLongScripts(); err != nil {
		t.Fatal(err)
	}
	rapid.Check(t, script)
}

var fewLongScripts = sync.OnceValue(func() error {
	for name, n := range map[string]string{"rapid.checks": "40", "rapid.steps": "60"} {
		f := flag.Lookup(name)
		if f.Value.String() != f.DefValue {
			continue
		}
		if err := f.Value.Set(n); err != nil {
			return err
		}
	}
	return nil
})

// comparison is one script. What an operation does is drawn first, then it is run on both sides.
type comparison struct {
	t                *rapid.T
	memory, real     *side
	servers, shards  int
	sources          []int32
	start            time.Time
	leases           []store.Lease // ever given out; without checkpoints
	operationsAsked  int64
	turns            int
	reached          map[string]int // how often a script came to something worth comparing
	requestsInFlight [][]*asked     // by server
}

// asked is one request on both sides.
type asked struct {
	text    string
	answers [2]string
}

// twice returns the request for each side.
func (a *asked) twice(r store.Request) (two [2]*store.Request) {
	for i := range two {
		own := r
		own.Done = func(_ *store.Request, given store.Answer) {
			a.answers[i] = fmt.Sprintf("%s, token %b", answer(given.Err), given.Shards)
		}
		two[i] = &own
	}
	return two
}

func (c *comparison) sides() []*side { return []*side{c.memory, c.real} }

// both runs an operation on both sides and compares what it returns.
func (c *comparison) both(what string, operation func(s *side) string) string {
	c.t.Helper()
	c.t.Logf("%s", what)
	if m, ok := c.memory.subject.(*inMemory); ok {
		m.clock = m.clock.Add(time.Millisecond) // no two operations are at the same time
	}
	memory, real := operation(c.memory), operation(c.real)
	if memory != real {
		c.t.Fatalf("%s:\nin memory:\n%s\nPostgreSQL:\n%s", what, memory, real)
	}
	return memory
}

// compare compares all that is stored. It runs after each operation.
func (c *comparison) compare() {
	c.t.Helper()
	for _, s := range c.sides() {
		s.look()
	}
	c.reach("stale", len(slices.DeleteFunc(slices.Clone(c.memory.now.log), func(g segment) bool { return len(g.Stale) == 0 })))
	memory, real := c.memory.text(), c.real.text()
	if slices.Equal(memory, real) {
		return
	}
	var differ []string
	for _, line := range memory {
		if !slices.Contains(real, line) {
			differ = append(differ, "in memory only: "+line)
		}
	}
	for _, line := range real {
		if !slices.Contains(memory, line) {
			differ = append(differ, "PostgreSQL only: "+line)
		}
	}
	c.t.Fatalf("after that the stores differ:\n%s", strings.Join(differ, "\n"))
}

// end lets everything come to its end that the script has left.
func (c *comparison) end() {
	real := c.real.subject.(*onPostgres) //nolint:forcetypeassert,errcheck // it is
	for server := range c.servers {
		real.hold(server, false)
	}
	real.settle()
	for server := range c.servers {
		c.advance(c.real, server) // nobody is held up any more: until there is nothing left
	}
	for _, b := range c.memory.subject.(*inMemory).under { //nolint:forcetypeassert,errcheck // it is
		if b != nil {
			b.stop()
		}
	}
}

// reach counts what a script has come to.
func (c *comparison) reach(what string, times int) {
	if times > 0 {
		c.reached[what]++
	}
}

func (c *comparison) actions() map[string]func(*rapid.T) {
	as := func(do func()) func(*rapid.T) {
		return func(t *rapid.T) {
			c.t = t
			do()
		}
	}
	all := map[string]func(*rapid.T){"": as(c.compare)}
	for name, a := range map[string]struct {
		weight int
		do     func()
	}{
		"requests": {6, c.requests}, "let go": {2, c.letGo}, "cut": {1, c.cut}, "race": {1, c.race}, "read": {4, c.read}, "read at": {1, c.readAt}, "disconnect": {1, c.disconnect},
		"acquire": {2, c.acquire}, "release": {1, c.release}, "heartbeat": {1, c.heartbeat}, "step": {6, c.step}, "catch up": {2, c.catchUp}, "load": {3, c.load}, "claim": {3, c.claim},
		"answer": {1, c.answer}, "operation": {2, c.operation}, "time": {3, c.time}, "upkeep": {3, c.upkeep}, "turn": {1, c.turn}, "states": {1, c.states},
	} {
		for i := range a.weight {
			all[fmt.Sprint(name, " ", i)] = as(a.do)
		}
	}
	return all
}

func (c *comparison) number(what string, limit int) int {
	return rapid.IntRange(0, limit-1).Draw(c.t, what)
}

func (c *comparison) chance(what string, oneIn int) bool { return c.number(what, oneIn) == oneIn-1 }

func one[T any](c *comparison, what string, of []T) T { return of[c.number(what, len(of))] }

// some draws a part of a list, in its order.
func some[T any](c *comparison, what string, of []T, most int) (part []T) {
	for i := range of {
		if len(part) < most && c.chance(what, 3) {
			part = append(part, of[i])
		}
	}
	return part
}

func (c *comparison) key() store.Key {
	k := store.Key{Source: one(c, "source", c.sources)}
	k.Transaction[15] = byte(1 + c.number("transaction", 5)) //nolint:gosec // few
	return k
}

func (c *comparison) keys() (all []store.Key) {
	for _, source := range c.sources {
		for n := range 5 {
			k := store.Key{Source: source}
			k.Transaction[15] = byte(1 + n) //nolint:gosec // few
			all = append(all, k)
		}
	}
	return all
}

func (c *comparison) aggregates() (all []store.Aggregate) {
	for _, source := range c.sources {
		for n := range 4 {
			all = append(all, store.Aggregate{Source: source, Type: "order", ID: fmt.Sprint("id-", n)})
		}
	}
	return all
}

// content is what a transaction publishes: another one with each variant.
func (c *comparison) content(k store.Key, variant int) (events []store.Event, shards store.ShardSet) {
	n := int(k.Transaction[15])
	for i := range 1 + (n+variant)%3 {
		e := store.Event{
			Topic: fmt.Sprint("topic-", n%2), AggregateType: "order", AggregateID: fmt.Sprint("id-", (n*2+i+variant)%4), Type: "order.changed",
			Payload: fmt.Appendf(nil, "%d.%d.%d", n, variant, i), Headers: []store.Header{{Name: "h", Value: []byte{byte(i)}}},
		}
		if n == 5 {
			e.Payload = append(e.Payload, make([]byte, 5000)...) // two of those do not fit into a segment
		}
		binary.BigEndian.PutUint16(e.ID[:], uint16(n<<8|variant<<4|i)) //nolint:gosec // few
		events = append(events, e)
		shards = shards.Add(store.ShardOf(store.Aggregate{Source: k.Source, Type: "order", ID: e.AggregateID}, c.shards))
	}
	return events, shards
}

// requests hands some requests to a server and lets it work, until all are answered or it is held up.
func (c *comparison) requests() {
	server := c.number("server", c.servers)
	if c.memory.busy(server) {
		c.t.Skip("it has something under way")
	}
	held := c.chance("held", 3)
	var all []*asked
	var pairs [][2]*store.Request
	for range 1 + c.number("requests", 5) {
		k := c.key()
		kind := store.Kind(c.number("kind", 4)) //nolint:gosec // few
		variant := 0
		if c.chance("other content", 5) {
			variant = 1
		}
		events, shards := c.content(k, variant)
		a := &asked{text: fmt.Sprintf("%s %s", [...]string{"prepare", "publish", "commit", "abort"}[kind], keyText(k))}
		r := store.Request{Kind: kind, Key: k}
		switch kind {
		case store.KindPrepare:
			r.Events, a.text = events, fmt.Sprint(a.text, " content ", variant)
			r.Database = &store.DatabaseTransaction{Database: "default", XID: 700 + uint64(k.Transaction[15]), SystemIdentifier: 7, Timeline: 1, Mode: store.ModeMarker}
		case store.KindPublish:
			r.Events, a.text = events, fmt.Sprint(a.text, " content ", variant)
			if k.Transaction[15]%3 == 0 {
				r.Resolution = store.KeptByCaller("its caller")
				a.text += " kept"
			}
		case store.KindCommit, store.KindAbort:
			r.Shards = []store.ShardSet{0, shards, shards, 1, 1 << 40}[c.number("token", 5)]
			a.text = fmt.Sprintf("%s token %b", a.text, r.Shards)
			if c.chance("resolved", 3) {
				r.Resolution = &store.Resolution{Method: one(c, "method", []string{"check-back", "direct", "operator"}), Evidence: []byte(`{}`), Actor: "somebody"}
				a.text += " by " + r.Resolution.Method
			}
		}
		var two [2]*store.Request
		for i := range two {
			own := r
			own.Done = func(_ *store.Request, given store.Answer) {
				a.answers[i] = fmt.Sprintf("%s, token %b", answer(given.Err), given.Shards)
			}
			two[i] = &own
		}
		all, pairs = append(all, a), append(pairs, two)
	}
	c.hand(server, held, all, pairs)
}

// hand hands requests to a server, and lets it work.
func (c *comparison) hand(server int, held bool, all []*asked, pairs [][2]*store.Request) {
	c.requestsInFlight[server] = all
	texts := listed(all, func(a **asked) string { return (*a).text })
	c.both(fmt.Sprintf("server %d (held %v):\n%s", server, held, texts), func(s *side) string {
		s.hold(server, held)
		for _, two := range pairs {
			r := two[0]
			if s == c.real {
				r = two[1]
			}
			if err := s.writer(server).Submit(r); err != nil {
				return err.Error()
			}
		}
		c.advance(s, server)
		return ""
	})
	c.answered()
	if m := c.memory.subject.(*inMemory); m.busy(server) { //nolint:forcetypeassert,errcheck // it is
		c.reach("held", 1)
		if m.waits(server) {
			c.reach("waited for another", 1)
		}
	}
}

// advance lets a server work until it has nothing to do or is held up.
func (c *comparison) advance(s *side, server int) {
	w := s.writer(server)
	for !s.busy(server) {
		if put, _ := w.Batch(); put != nil {
			s.run(server, put)
		} else if look := w.LookUp(); look != nil {
			look()
		} else {
			return
		}
	}
}

// answered compares the answers given so far.
func (c *comparison) answered() {
	c.t.Helper()
	for server, all := range c.requestsInFlight {
		if memory, real := c.memory.busy(server), c.real.busy(server); memory != real {
			c.t.Fatalf("server %d: a batch waits in memory %v, in PostgreSQL %v", server, memory, real)
		}
		for _, a := range all {
			if a.answers[0] != a.answers[1] {
				c.t.Fatalf("server %d: %s is answered in memory %q, by PostgreSQL %q", server, a.text, a.answers[0], a.answers[1])
			}
			for text, what := range map[string]string{
				"ok": "stored", "before with other": "reused", "already": "decided otherwise", "unknown": "unknown",
			} {
				if strings.Contains(a.answers[0], text) {
					c.reach(what, 1)
				}
			}
			if a.answers[0] == "" && !c.memory.busy(server) {
				c.t.Fatalf("server %d: %s is not answered", server, a.text)
			}
		}
		if !c.memory.busy(server) {
			c.requestsInFlight[server] = nil
		}
	}
}

// busyServer is one that is held up and could be let go; -1: none.
func (c *comparison) busyServer() int {
	m := c.memory.subject.(*inMemory) //nolint:forcetypeassert,errcheck // it is
	for server := range c.servers {
		if m.busy(server) && m.held[server] && !m.waits(server) {
			return server
		}
	}
	return -1
}

// waits reports whether a batch waits for another server's.
func (m *inMemory) waits(server int) bool { return m.under[server].blocked }

// race lets one server decide, while another has not committed the Prepare yet, and wait for that for another reason: then
// the decision has begun before there was anything to decide.
func (c *comparison) race() {
	c.quiet()
	var all [2][]*asked
	var pairs [2][][2]*store.Request
	for i := range 2 {
		k := c.fresh()
		events, shards := c.content(k, 0)
		r := store.Request{Kind: store.KindPrepare, Key: k, Events: events, Database: &store.DatabaseTransaction{Database: "default", XID: 7, Mode: store.ModeMarker}}
		late := r
		if i == 0 {
			late = store.Request{Kind: store.KindCommit, Key: k, Shards: shards}
		}
		for server, r := range []store.Request{r, late} {
			a := &asked{text: fmt.Sprintf("kind %d of %s", r.Kind, keyText(k))}
			all[server], pairs[server] = append(all[server], a), append(pairs[server], a.twice(r))
		}
	}
	c.hand(0, true, all[0], pairs[0])
	c.compare()
	c.hand(1, false, all[1], pairs[1])
	c.compare()
	c.letGo()
}

// fresh returns a key that was not used before.
func (c *comparison) fresh() store.Key {
	c.turns++
	k := store.Key{Source: c.sources[0]}
	k.Transaction[14], k.Transaction[15] = 1, byte(c.turns) //nolint:gosec // few
	return k
}

func (c *comparison) letGo() {
	server := c.busyServer()
	if server < 0 {
		c.t.Skip("nobody is held up")
	}
	c.both(fmt.Sprintf("server %d is let go", server), func(s *side) string {
		s.hold(server, false)
		s.settle()
		for other := range c.servers {
			c.advance(s, other)
		}
		return ""
	})
	c.answered()
}

func (c *comparison) cut() {
	server := c.busyServer()
	if server < 0 {
		c.t.Skip("nobody is held up")
	}
	m := c.memory.subject.(*inMemory) //nolint:forcetypeassert,errcheck // it is
	for other := range c.servers {
		if m.busy(other) && m.waits(other) {
			c.t.Skip("which of the two would go on first is not determined")
		}
	}
	c.both(fmt.Sprintf("the connection of server %d breaks before it has committed", server), func(s *side) string {
		s.cut(server)
		c.reach("cut", 1)
		for other := range c.servers {
			c.advance(s, other)
		}
		return ""
	})
	c.answered()
}

// quiet skips an operation that would wait for what is held up, or is not defined beside it.
func (c *comparison) quiet() {
	for server := range c.servers {
		if c.memory.busy(server) {
			c.t.Skip("something is under way")
		}
	}
}

func (c *comparison) allPlaces(shard int16) (all []place) {
	seen := map[place]bool{}
	add := func(p place) {
		if !seen[p] {
			seen[p] = true
			all = append(all, p)
		}
	}
	for _, p := range c.memory.order[shard] {
		add(p)
	}
	for i := range c.memory.now.parked {
		if p := &c.memory.now.parked[i]; p.shard == shard {
			add(c.memory.place(p.EventPosition))
		}
	}
	for i := range c.memory.now.dead {
		if d := &c.memory.now.dead[i]; d.Shard == shard {
			add(c.memory.place(d.EventPosition))
		}
	}
	return all
}

// position draws a position that a checkpoint or cursor may have: the end of a segment, or the beginning.
func (c *comparison) position(shard int16) place {
	return one(c, "position", append([]place{{seq: -1}}, c.memory.ends[shard]...))
}

func (c *comparison) read() {
	var shards []int16
	var from []place
	for shard := range int16(c.shards) { //nolint:gosec // few
		if c.chance("read", 4) {
			continue
		}
		shards, from = append(shards, shard), append(from, c.position(shard))
	}
	limit := 1 + c.number("limit", 4)
	var wanted map[int16][]string
	out := c.both(fmt.Sprintf("read shards %v after %v, %d at most", shards, from, limit), func(s *side) string {
		cursors := make([]store.Cursor, len(shards))
		for i, shard := range shards {
			cursors[i] = store.Cursor{Shard: shard, Position: s.at(from[i]).Position}
		}
		byShard := func(found []store.Segment) map[int16][]string {
			texts := map[int16][]string{}
			for i := range found {
				texts[found[i].Shard] = append(texts[found[i].Shard], s.segmentText(&found[i]))
			}
			return texts
		}
		found, err := s.read(cursors, limit, func(found []store.Segment) bool {
			more := false
			texts := byShard(found)
			for shard, want := range wanted {
				more = more || len(texts[shard]) < len(want) && slices.Equal(texts[shard], want[:len(texts[shard])])
			}
			return !more // all of it, or what it should not return: waiting makes neither better
		})
		if err != nil {
			return answer(err)
		}
		texts := byShard(found)
		if wanted == nil {
			wanted = texts
		}
		out := ""
		for _, shard := range slices.Sorted(maps.Keys(texts)) {
			out += strings.Join(texts[shard], "\n") + "\n"
		}
		return out
	})
	switch {
	case out == store.ErrUnavailable.Error():
		c.reach("connection broke", 1)
	case out != "":
		c.reach("read", 1)
	}
	m := c.memory.subject.(*inMemory) //nolint:forcetypeassert,errcheck // it is
	for _, g := range c.memory.now.log {
		if g.XID >= m.horizon() {
			c.reach("held back", 1)
		}
	}
}

func (c *comparison) readAt() {
	shard := int16(c.number("shard", c.shards)) //nolint:gosec // few
	from := some(c, "named", append([]place{{seq: -1}}, c.memory.ends[shard]...), 5)
	c.both(fmt.Sprintf("read %v of shard %d", from, shard), func(s *side) string {
		var at []store.Position
		for _, p := range from {
			at = append(at, s.at(p).Position)
		}
		found, err := s.readAt(shard, at)
		if err != nil {
			return answer(err)
		}
		return listed(found, s.segmentText)
	})
}

func (c *comparison) disconnect() {
	c.both("the reader's connection breaks", func(s *side) string {
		s.disconnect()
		return ""
	})
}

var instances = []string{"relay-a", "relay-b"}

// An hour and a minute never end when time passes in steps of ten minutes, but for how long the test itself takes.
const leaseTTL = 61 * time.Minute

func (c *comparison) acquire() {
	instance := one(c, "instance", instances)
	// Which shards one gets that wants fewer than are free is left to the store; the script must not depend on that.
	limit := c.shards
	if free := c.free(); free > 0 && c.chance("no more", 2) {
		limit = free
	}
	var real []store.Lease
	c.both(fmt.Sprintf("%s acquires up to %d shards", instance, limit), func(s *side) string {
		found, err := s.AcquireShards(context.Background(), instance, leaseTTL, limit)
		if err != nil {
			return answer(err)
		}
		real = found
		return sorted(found, func(l *store.Lease) string {
			return fmt.Sprintf("shard %d epoch %d %s", l.Shard, l.Epoch, s.checkpointText(&l.Checkpoint))
		})
	})
	slices.SortFunc(real, func(a, b store.Lease) int { return int(a.Shard - b.Shard) })
	for _, l := range real {
		c.reach("acquired some", c.shards-len(real))
		if c.memory.now.shards[l.Shard].holder != "" {
			c.reach("stolen", 1)
		}
		c.leases = append(c.leases, store.Lease{Shard: l.Shard, Epoch: l.Epoch})
	}
}

// free is how many shards nobody has leased.
func (c *comparison) free() (n int) {
	for i := range c.memory.now.shards {
		if !c.memory.now.shards[i].leased {
			n++
		}
	}
	return n
}

// lease draws a lease that was given out, a late one more often than an early one.
func (c *comparison) lease() store.Lease {
	if len(c.leases) == 0 {
		c.t.Skip("nobody has leased anything")
	}
	n := len(c.leases)
	if !c.chance("old lease", 4) && n > c.shards {
		return c.leases[n-1-c.number("lease", c.shards)]
	}
	return one(c, "lease", c.leases)
}

func (c *comparison) release() {
	l := c.lease()
	c.both(fmt.Sprintf("shard %d is released with epoch %d", l.Shard, l.Epoch), func(s *side) string {
		return answer(s.ReleaseShards(context.Background(), []int16{l.Shard}, []int64{l.Epoch}))
	})
}

func (c *comparison) heartbeat() {
	instance := one(c, "instance", instances)
	c.both(instance+" lives", func(s *side) string {
		n, err := s.Heartbeat(context.Background(), instance, leaseTTL)
		return fmt.Sprint(n, answer(err))
	})
}

// plan is a step without positions of either side.
type plan struct {
	lease    store.Lease
	position place
	oldest   int
	pend     []place
	pending  []store.State
	offsets  []byte
	park     []place
	parked   []store.Parked // cause, attempts, error and so on
	decide   []store.ParkedDecision
	unpark   []place
	bury     []place
	buried   []store.DeadLetter
	exhume   []place
	outcomes []store.OperationOutcome
	flush    bool
}

func (c *comparison) plan(l store.Lease) plan {
	p := plan{lease: l, position: c.position(l.Shard), flush: c.chance("flush", 3)}
	if current := c.memory.place(store.EventPosition{Position: c.memory.now.shards[l.Shard].Position}); !c.chance("any position", 4) && comparePlaces(p.position, current) < 0 {
		p.position = current
	}
	events := c.memory.order[l.Shard]
	if ends := c.memory.ends[l.Shard]; len(ends) > 0 && c.chance("all of it", 2) {
		p.position = ends[len(ends)-1]
	}
	p.oldest = p.position.batch
	if c.chance("pending", 2) {
		p.oldest = c.number("oldest", 1+p.position.batch)
		for _, at := range some(c, "pending", events, 3) {
			p.pend, p.pending = append(p.pend, at), append(p.pending, store.State(c.number("state", 3))) //nolint:gosec // few
		}
	}
	if c.chance("offsets", 3) {
		p.offsets = store.EncodeOffsets([]store.TopicOffset{{Topic: "topic-0", Offset: int64(c.number("offset", 9))}})
	}
	if c.chance("checkpoint only", 3) {
		return p
	}
	all := c.allPlaces(l.Shard)
	for _, at := range some(c, "parked", events, 6) {
		p.park = append(p.park, at)
		q := store.Parked{
			State: []store.State{store.Prepared, store.Prepared, store.Committed, store.Aborted}[c.number("state", 4)], Cause: store.Cause(1 + c.number("cause", 5)), Attempts: int32(c.number("attempts", 3)), //nolint:gosec // few
			Error: one(c, "error", []string{"", "MSG_SIZE_TOO_LARGE"}),
		}
		if c.chance("next try", 2) {
			q.NextTry = c.start.Add(time.Hour)
		}
		p.parked = append(p.parked, q)
	}
	for _, k := range some(c, "decided", c.keys(), 2) {
		p.decide = append(p.decide, store.ParkedDecision{Key: k, State: store.State(1 + c.number("decision", 2))}) //nolint:gosec // few
	}
	p.unpark = some(c, "unparked", all, 2)
	p.exhume = some(c, "exhumed", all, 2)
	for _, at := range some(c, "buried", events, 2) {
		p.bury = append(p.bury, at)
		p.buried = append(p.buried, store.DeadLetter{
			Error: one(c, "error", []string{"INVALID_RECORD", "MSG_SIZE_TOO_LARGE"}), Attempts: int32(c.number("attempts", 3)), Queue: c.chance("queue", 2), //nolint:gosec // few
		})
	}
	if c.operationsAsked > 0 && c.chance("operation done", 2) {
		p.outcomes = append(p.outcomes, store.OperationOutcome{ID: 1 + int64(c.number("operation", int(c.operationsAsked))), Outcome: "done", Events: 2})
	}
	return p
}

func (p *plan) text() string {
	text := fmt.Sprintf("shard %d epoch %d: checkpoint %v, oldest %d", p.lease.Shard, p.lease.Epoch, p.position, p.oldest)
	for i, at := range p.pend {
		text += fmt.Sprintf(", pending %v %s", at, p.pending[i])
	}
	for i, at := range p.park {
		text += fmt.Sprintf(", park %v %s", at, p.parked[i].State)
	}
	for _, d := range p.decide {
		text += fmt.Sprintf(", decide %s %s", keyText(d.Key), d.State)
	}
	return fmt.Sprintf("%s, unpark %v, bury %v, exhume %v, outcomes %v, flush %v", text, p.unpark, p.bury, p.exhume, p.outcomes, p.flush)
}

func comparePlaces(a, b place) int {
	return store.EventPosition{Position: store.Position{XID: uint64(a.batch), Seq: a.seq}, Record: a.record}. //nolint:gosec // not negative
															Compare(store.EventPosition{Position: store.Position{XID: uint64(b.batch), Seq: b.seq}, Record: b.record}) //nolint:gosec // not negative
}

// step turns a plan into the step of a side.
func (s *side) step(p *plan) store.Step {
	st := store.Step{Shard: p.lease.Shard, Epoch: p.lease.Epoch, Flush: p.flush}
	st.Checkpoint = store.Checkpoint{Position: s.at(p.position).Position, Oldest: s.xids[p.oldest], Offsets: p.offsets}
	var pend []store.PendEntry
	for i, at := range p.pend {
		pend = append(pend, store.PendEntry{EventPosition: s.at(at), Key: s.records[st.Shard][at].Key, State: p.pending[i]})
	}
	st.Checkpoint.Pend = store.EncodePend(pend)
	for i, at := range p.park {
		q := p.parked[i]
		r := s.records[st.Shard][at]
		q.EventPosition, q.Key, q.Aggregate, q.Database = s.at(at), r.Key, aggregateOf(&r), r.Database
		r.State = q.State
		q.Body = store.EncodeEvent(nil, &r)
		st.Park = append(st.Park, q)
	}
	st.Decide = p.decide
	for _, at := range p.unpark {
		st.Unpark = append(st.Unpark, s.at(at))
	}
	for i, at := range p.bury {
		d := p.buried[i]
		r := s.records[st.Shard][at]
		d.EventPosition, d.Shard, d.Key, d.Aggregate, d.Body = s.at(at), st.Shard, r.Key, aggregateOf(&r), store.EncodeEvent(nil, &r)
		st.Bury = append(st.Bury, d)
	}
	for _, at := range p.exhume {
		st.Exhume = append(st.Exhume, s.at(at))
	}
	st.Operations = p.outcomes
	return st
}

func aggregateOf(r *store.Record) store.Aggregate {
	return store.Aggregate{Source: r.Key.Source, Type: r.Event.AggregateType, ID: r.Event.AggregateID}
}

func (c *comparison) step() {
	var plans []plan
	for range 1 + c.number("more steps", 2) {
		if l := c.lease(); !slices.ContainsFunc(plans, func(p plan) bool { return p.lease.Shard == l.Shard }) {
			plans = append(plans, c.plan(l))
		}
	}
	out := c.both("steps\n"+listed(plans, (*plan).text), func(s *side) string {
		var steps []store.Step
		for i := range plans {
			steps = append(steps, s.step(&plans[i]))
		}
		fenced, err := s.Steps(context.Background(), leaseTTL, steps)
		slices.Sort(fenced)
		return fmt.Sprint(len(fenced), " fenced ", fenced, " ", answer(err))
	})
	beside := ""
	if len(plans) > 1 {
		beside = " beside written"
	}
	switch {
	case strings.Contains(out, "backwards"):
		c.reach("backwards"+beside, 1)
		c.reach("backwards", 1)
	case strings.HasPrefix(out, "1"):
		c.reach("fenced"+beside, 1)
		c.reach("fenced", 1)
	}
}

// catchUp lets the holders of all shards be done with everything.
func (c *comparison) catchUp() {
	latest := map[int16]store.Lease{}
	for _, l := range c.leases {
		latest[l.Shard] = l
	}
	if len(latest) == 0 {
		c.t.Skip("nobody has leased anything")
	}
	c.both("everybody catches up", func(s *side) string {
		var steps []store.Step
		for _, shard := range slices.Sorted(maps.Keys(latest)) {
			p := plan{lease: latest[shard], position: place{seq: -1}}
			if ends := s.ends[shard]; len(ends) > 0 {
				p.position = ends[len(ends)-1]
			}
			p.oldest = p.position.batch
			steps = append(steps, s.step(&p))
		}
		fenced, err := s.Steps(context.Background(), leaseTTL, steps)
		slices.Sort(fenced)
		return fmt.Sprint(fenced, answer(err))
	})
}

func (c *comparison) load() {
	shard := int16(c.number("shard", c.shards)) //nolint:gosec // few
	a := one(c, "aggregate", c.aggregates())
	other := c.aggregates()[0] // that may be of another shard
	own := store.ShardOf(a, c.shards)
	after := one(c, "after", append([]place{{seq: -1}}, c.allPlaces(own)...))
	limit := 1 + c.number("limit", 3)
	ctx := context.Background()
	c.both(fmt.Sprintf("load the rows of shard %d, and of %s and %s after %v, %d at most", shard, aggregateText(a), aggregateText(other), after, limit), func(s *side) string {
		parked, err := s.LoadParked(ctx, shard)
		of, errOf := s.LoadParkedOf(ctx, []store.ParkedAfter{{Shard: own, Aggregate: a, After: s.at(after)}, {Shard: store.ShardOf(other, c.shards), Aggregate: other, After: s.at(after)}}, limit)
		parkedOf := slices.Concat(of...)
		queues, errQueues := s.LoadDeadQueues(ctx, shard)
		dead, errDead := s.LoadDeadLettersOf(ctx, own, a, s.at(after), limit)
		texts := []string{answer(errors.Join(err, errOf))}
		for _, each := range c.aggregates() {
			found, err := s.LoadParkedOf(ctx, []store.ParkedAfter{{Shard: store.ShardOf(each, c.shards), Aggregate: each}}, 100)
			all := slices.Concat(found...)
			texts = append(texts, answer(err), listed(all, s.parkedText))
			c.reach("several rows of an aggregate", len(all)-1)
		}
		c.reach("rows", len(parked))
		c.reach("aggregate's rows", len(parkedOf))
		c.reach("dead letters", len(dead))
		c.reach("dead queue", len(queues))
		pending, errPending := s.PendingOperations(ctx, []int16{shard, own})
		return strings.Join(append(texts, answer(errors.Join(errQueues, errDead, errPending)), listed(parked, s.parkedText), listed(parkedOf, s.parkedText),
			sorted(queues, func(a *store.Aggregate) string { return aggregateText(*a) }), listed(dead, s.deadText), listed(pending, operationText)), "\n")
	})
}

func (c *comparison) states() {
	keys := some(c, "asked", c.keys(), 10)
	c.both(fmt.Sprintf("states of %d transactions", len(keys)), func(s *side) string {
		states, err := s.States(context.Background(), keys)
		out := answer(err)
		for _, k := range keys {
			if state, known := states[k]; known {
				out += " " + keyText(k) + " " + state.String()
			}
		}
		return out
	})
}

func (c *comparison) claim() {
	limit := 1 + c.number("limit", 4)
	// Of those that became due at the same time it is left to the store who comes first: take all of them.
	if due := c.memory.subject.(*inMemory).due(); len(due) > limit { //nolint:forcetypeassert,errcheck // it is
		for limit < len(due) && due[limit].checkAt.Equal(due[limit-1].checkAt) {
			limit++
		}
	}
	c.both(fmt.Sprintf("claim %d in doubt", limit), func(s *side) string {
		found, err := s.ClaimInDoubt(context.Background(), limit, leaseTTL)
		if err != nil {
			return answer(err)
		}
		for i := range found {
			c.reach("claimed", 1)
			c.reach("claimed again", int(found[i].Checks)-1)
		}
		return sorted(found, s.parkedText)
	})
}

func (c *comparison) answer() {
	keys := some(c, "answered", c.keys(), 10)
	next := []time.Duration{0, 31 * time.Minute}[c.number("next", 2)]
	c.both(fmt.Sprintf("%d transactions are answered, to be asked about in %s", len(keys), next), func(s *side) string {
		return answer(s.RecordAnswer(context.Background(), keys, "IN_PROGRESS", next))
	})
}

func (c *comparison) operation() {
	a := one(c, "aggregate", c.aggregates())
	action := store.Action(1 + c.number("action", 3)) //nolint:gosec // few
	c.both(fmt.Sprintf("an operator wants to %s %s", action, aggregateText(a)), func(s *side) string {
		o, err := s.RequestOperation(context.Background(), a, action, "operator", "because")
		if err != nil {
			c.reach("no such aggregate", 1)
			return answer(err)
		}
		c.reach("operation", 1)
		c.operationsAsked = o.ID
		return operationText(o)
	})
}

func (c *comparison) time() {
	c.quiet()
	d := []time.Duration{10 * time.Minute, 70 * time.Minute}[c.number("passes", 2)]
	c.both(fmt.Sprintf("%s pass", d), func(s *side) string {
		s.pass(d)
		return ""
	})
}

func (c *comparison) upkeep() {
	c.maintain(c.chance("full", 2), []time.Duration{time.Hour + time.Minute, 100 * time.Hour}[c.number("log retention", 2)],
		[]time.Duration{15 * time.Minute, 15 * time.Minute, 65 * time.Minute, 100 * time.Hour}[c.number("retention", 4)])
}

// turn lets the log go on by some generations.
func (c *comparison) turn() {
	c.quiet()
	for range 1 + c.number("generations", 8) {
		k := c.fresh()
		events, _ := c.content(k, 0)
		c.both(fmt.Sprintf("publish something for the %d. time", c.turns), func(s *side) string {
			out := "no answer"
			s.hold(0, false)
			r := &store.Request{Kind: store.KindPublish, Key: k, Events: events, Done: func(_ *store.Request, a store.Answer) { out = answer(a.Err) }}
			if err := s.writer(0).Submit(r); err != nil {
				return err.Error()
			}
			c.advance(s, 0)
			return out
		})
		c.compare()
		c.maintain(true, 100*time.Hour, 100*time.Hour)
		c.compare()
	}
}

func (c *comparison) maintain(full bool, retention, purge time.Duration) {
	pages := c.memory.subject.(*inMemory).pages //nolint:forcetypeassert,errcheck // it is
	wanted := full && pages[c.memory.subject.(*inMemory).generation]
	out := c.both(fmt.Sprintf("upkeep: full %v, log %s, transactions %s", full, retention, purge), func(s *side) string {
		return s.upkeep(full, retention, purge, 2*purge)
	})
	for what, text := range map[string]string{"rotated": "rotated true", "truncated": ", 1 trunc", "purged": " purged"} {
		if strings.Contains(out, text) && !strings.Contains(out, " 0"+text) {
			c.reach(what, 1)
		}
	}
	if wanted && strings.Contains(out, "rotated false") {
		c.reach("ring full", 1)
	}
}
