package store

import (
	"context"
	"encoding/binary"
	"slices"
	"time"
)

// SteppedWriter is a Writer without loops, connections and a clock of its own: whoever steps it says when a batch is taken,
// and its Backend is the store. It is how a seed drives everything between Submit and Done; see test/simulation. Not safe
// for concurrent use.
type SteppedWriter struct {
	w       Writer
	backend Backend // nil: the store itself
	idle    []*appender
	lookup  *txLookup
}

// Backend is the store of a SteppedWriter.
type Backend interface {
	// Append executes the append statement: as PostgreSQL does, all of it or nothing. stale names those that lost, as in
	// Segment. ErrUnavailable: it may have been executed.
	Append(a *Append) (stale []int32, err error)
	// LookUp returns the rows of tx that there are.
	LookUp(keys []Key) (map[Key]Row, error)
	// Now is the time, Pause lets some of it pass.
	Now() time.Time
	Pause(d time.Duration)
}

// Append is a batch as the append statement gets it.
type Append struct {
	Prepares  []Row // Prepares and Publishes, sorted by key
	Decisions []Row // Digest is not used
	// Segments are without xid and generation, which the statement itself provides.
	Segments []Segment
	// Resolutions of decisions that are not the client's own, and of publishes that their callers keep.
	Resolutions map[Key]*Resolution
}

// Row is a row of tx, or what is to become of it.
type Row struct {
	Key    Key
	State  State
	Shards ShardSet
	Digest uint64
}

// NewSteppedWriter returns a writer of a store with so many shards.
func NewSteppedWriter(shards int, cfg WriterConfig, backend Backend) *SteppedWriter {
	return newSteppedWriter(&Store{shardCount: shards}, cfg, backend)
}

// NewSteppedWriterOf returns a writer of st, over connections of its own: what a writer in a simulation is compared with.
// What Batch and LookUp return then takes as long as the store takes, and may run in a goroutine of its own, as long as
// nothing else is done with the writer meanwhile.
func NewSteppedWriterOf(st *Store, cfg WriterConfig) *SteppedWriter {
	return newSteppedWriter(st, cfg, nil)
}

func newSteppedWriter(st *Store, cfg WriterConfig, backend Backend) *SteppedWriter {
	s := &SteppedWriter{backend: backend}
	cfg.DecisionWait = -1 // whoever steps it says when a batch is taken
	s.w.st, s.w.cfg, s.w.stepped = st, cfg.withDefaults(), s
	s.w.queue.init(s.w.cfg)
	s.w.queue.background.rests = false // as above
	for range writersPerProcess {
		s.idle = append(s.idle, newAppender(&s.w))
	}
	s.lookup = newTxLookup(&s.w)
	return s
}

// Submit is Writer.Submit.
func (s *SteppedWriter) Submit(r *Request) error { return s.w.Submit(r) }

// Outstanding is how many requests are submitted and not answered.
func (s *SteppedWriter) Outstanding() int { return int(s.w.queue.outstanding.Load()) }

// Batch takes the next batch, if there is one and the writer would take it now, and returns what stores and answers it.
func (s *SteppedWriter) Batch() (store func(), requests int) {
	q := &s.w.queue
	from := q.mayTake()
	if len(s.idle) == 0 || from == nothing {
		return nil, 0
	}
	a := s.idle[len(s.idle)-1]
	s.idle = s.idle[:len(s.idle)-1]
	a.taken = q.begin(a.taken[:0], from)
	return func() {
		a.store(context.Background(), a.taken) //nolint:forbidigo // a simulation has no caller whose patience could end
		a.batch.forget()
		clear(a.taken)
		q.batchDone(from)
		s.idle = append(s.idle, a)
	}, len(a.taken)
}

// LookUp takes what wants a look-up, if anything does and none is under way, and returns what makes it.
func (s *SteppedWriter) LookUp() func() {
	l := s.lookup
	if l == nil || len(s.w.queue.wanting) == 0 {
		return nil
	}
	s.lookup = nil
	l.taken, _ = s.w.queue.takeWanting(l.taken[:0])
	return func() {
		l.resolve(context.Background(), l.taken) //nolint:forbidigo // as above
		clear(l.taken)
		s.lookup = l
	}
}

// Close closes the connections of a writer that has nothing under way.
func (s *SteppedWriter) Close(ctx context.Context) {
	for _, a := range s.idle {
		a.disconnect(ctx)
	}
	if s.lookup != nil {
		closeConn(ctx, &s.lookup.conn)
	}
}

// backendOf is what a writer reaches instead of its store, or nil.
func (w *Writer) backendOf() *SteppedWriter {
	if w.stepped == nil || w.stepped.backend == nil {
		return nil
	}
	return w.stepped
}

// append hands a built batch to the backend.
func (s *SteppedWriter) append(b *batch) (stale []int32, err error) {
	a := Append{}
	row := func(r *Request) Row {
		return Row{Key: r.Key, State: stateOf(r.enc.as), Shards: r.enc.shards, Digest: r.enc.digest}
	}
	for _, r := range b.prepares {
		a.Prepares = append(a.Prepares, row(r))
	}
	for _, r := range b.decisions {
		a.Decisions = append(a.Decisions, row(r))
	}
	for _, r := range b.requests {
		if r.Resolution != nil {
			if a.Resolutions == nil {
				a.Resolutions = map[Key]*Resolution{}
			}
			a.Resolutions[r.Key] = r.Resolution
		}
	}
	shards, seqs := int2s(nil, b.params[9].value()), int4s(b.params[10].value())
	bodies := b.params[11].value()
	for i, at := 0, arrayHeader; i < len(shards); i++ {
		n := int(binary.BigEndian.Uint32(bodies[at:]))
		a.Segments = append(a.Segments, Segment{
			Shard: shards[i], Position: Position{Seq: seqs[i]}, Body: slices.Clone(bodies[at+4 : at+4+n]),
		})
		at += 4 + n
	}
	return s.backend.Append(&a)
}

// read is txLookup.read.
func (s *SteppedWriter) read(requests []*Request) (map[Key]txRow, error) {
	keys := make([]Key, len(requests))
	for i, r := range requests {
		keys[i] = r.Key
	}
	found, err := s.backend.LookUp(keys)
	if err != nil {
		return nil, err
	}
	rows := make(map[Key]txRow, len(found))
	for k, r := range found {
		rows[k] = txRow{state: r.State, shards: r.Shards, digest: r.Digest}
	}
	return rows, nil
}

// now is the time.
func (w *Writer) now() time.Time {
	if s := w.backendOf(); s != nil {
		return s.backend.Now()
	}
	return time.Now()
}

// pause waits for d or until ctx ends.
func (w *Writer) pause(ctx context.Context, d time.Duration) {
	if s := w.backendOf(); s != nil {
		s.backend.Pause(d)
		return
	}
	sleep(ctx, d)
}
