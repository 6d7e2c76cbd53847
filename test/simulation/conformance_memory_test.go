package simulation

import (
	"context"
	"errors"
	"iter"
	"maps"
	"slices"
	"time"

	"github.com/outbox-platform/outbox/relay"
	"github.com/outbox-platform/outbox/store"
)

// inMemory is the store of the simulator as a subject.
type inMemory struct {
	*Store
	clock   time.Time
	writers []*store.SteppedWriter
	under   []*memoryBatch // what each server has begun, or nil
	held    []bool
	reader  relay.Reader
}

var _ subject = (*inMemory)(nil)

// memoryBatch is a batch on its way: it goes on when it is resumed, until it waits again.
type memoryBatch struct {
	resume  func() (struct{}, bool)
	stop    func()
	yield   func(struct{}) bool
	cut     bool
	blocked bool // it waits for another server's
}

// patient is the configuration of the writers on both sides: nothing is given up because a script takes long.
func patient(maxBatch int) store.WriterConfig {
	return store.WriterConfig{MaxWait: 10 * time.Minute, MaxBatch: maxBatch, SecondWriterAt: 1000}
}

func newInMemory(shards, servers, maxBatch int, now time.Time, sources []store.Source) *inMemory {
	m := &inMemory{clock: now, under: make([]*memoryBatch, servers), held: make([]bool, servers)}
	m.Store = NewStore(shards, func() time.Time { return m.clock })
	m.sources = sources
	for n := range servers {
		m.writers = append(m.writers, store.NewSteppedWriter(shards, patient(maxBatch), memoryBackend{m, n}))
	}
	m.reader, _ = m.OpenReader(context.Background())
	return m
}

func (m *inMemory) writer(server int) *store.SteppedWriter { return m.writers[server] }

func (m *inMemory) run(server int, put func()) {
	b := &memoryBatch{}
	b.resume, b.stop = iter.Pull(func(yield func(struct{}) bool) {
		b.yield = yield
		put()
	})
	m.under[server] = b
	m.settle()
}

func (m *inMemory) settle() {
	for range 2 * len(m.under) { // whoever ends lets others go on
		for server, b := range m.under {
			if b == nil {
				continue
			}
			if _, more := b.resume(); !more {
				m.under[server] = nil
			}
		}
	}
}

func (m *inMemory) busy(server int) bool       { return m.under[server] != nil }
func (m *inMemory) hold(server int, held bool) { m.held[server] = held }
func (m *inMemory) pass(d time.Duration)       { m.clock = m.clock.Add(d) }
func (m *inMemory) disconnect()                { m.crashes++ }
func (m *inMemory) cut(server int)             { m.under[server].cut = true; m.settle() }
func (m *inMemory) readAt(shard int16, at []store.Position) ([]store.Segment, error) {
	return m.reader.ReadAt(context.Background(), shard, at)
}

func (m *inMemory) read(cursors []store.Cursor, limit int, _ func([]store.Segment) bool) ([]store.Segment, error) {
	return m.reader.Read(context.Background(), cursors, limit)
}

func (m *inMemory) upkeep(full bool, logRetention, retention, resolutionRetention time.Duration) string {
	before := len(m.closed)
	_, rotated := m.maintain(full, logRetention)
	truncated := before - len(m.closed)
	if rotated {
		truncated++
	}
	return upkeepText(rotated, truncated, m.purge(retention, resolutionRetention))
}

// memoryBackend is the store as a server's writer reaches it.
type memoryBackend struct {
	m      *inMemory
	server int
}

func (b memoryBackend) Now() time.Time      { return b.m.clock }
func (b memoryBackend) Pause(time.Duration) {}

func (b memoryBackend) Append(a *store.Append) ([]int32, error) {
	under := b.m.under[b.server]
	t := b.m.begin(a)
	for under.blocked = t.blocked(); under.blocked; under.blocked = t.blocked() {
		if !under.yield(struct{}{}) {
			return nil, errScriptOver
		}
	}
	t.run()
	for t.won > 0 && b.m.held[b.server] {
		if !under.yield(struct{}{}) {
			return nil, errScriptOver
		}
		if under.cut {
			under.cut = false
			t.end()
			return nil, errLost
		}
	}
	return t.commit(), nil
}

var errScriptOver = errors.New("the script is over")

func (b memoryBackend) LookUp(keys []store.Key) (map[store.Key]store.Row, error) {
	return b.m.LookUp(keys), nil
}

func (m *inMemory) dump() *dump {
	d := &dump{open: m.generation % ringSize}
	for _, k := range slices.SortedFunc(maps.Keys(m.tx), compareKeys) {
		row := m.tx[k]
		t := dumpedTx{Row: row.Row, logXID: row.logXID, decided: !row.decidedAt.IsZero()}
		if r := m.resolutions[k]; r != nil {
			t.resolved = r.Method + " by " + r.Actor
		}
		d.tx = append(d.tx, t)
	}
	for shard := range m.shards {
		for _, g := range m.log[shard] {
			g.generation %= ringSize
			d.log = append(d.log, g)
		}
		for i := range m.parked[shard] {
			p := &m.parked[shard][i]
			d.parked = append(d.parked, dumpedParked{p.Parked, int16(shard), !p.checkAt.IsZero()}) //nolint:gosec // few
		}
		d.dead = append(d.dead, m.dead[shard]...)
		s := &m.shards[shard]
		d.shards = append(d.shards, dumpedShard{s.Checkpoint, s.epoch, s.holder, s.leaseUntil.After(m.clock)})
	}
	for _, o := range m.operations {
		if !o.Done {
			d.operations = append(d.operations, o)
		}
	}
	for generation := range m.closed {
		d.used = append(d.used, generation%ringSize)
	}
	d.used = append(d.used, d.open)
	slices.Sort(d.used)
	return d
}

func compareKeys(a, b store.Key) int {
	if a.Source != b.Source {
		return int(a.Source - b.Source)
	}
	return slices.Compare(a.Transaction[:], b.Transaction[:])
}
