package relay

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/outbox-platform/outbox/store"
)

// inheritance is what the last holder of a shard left, loaded from the store.
type inheritance struct {
	pend       []store.PendEntry
	sources    []segmentSource // segments that pend points into, in order
	states     map[store.Key]store.State
	parked     []store.Parked // all, without bodies
	deadQueues []store.Aggregate
	offsets    []store.TopicOffset
}

// segmentSource is a segment as restore needs it.
type segmentSource struct {
	pos     store.Position
	bytes   int
	records func(func(*store.Record) bool) error
}

// restore takes what the last holder left. Then the shard reads on from its checkpoint, and nothing is delivered before
// start. An error: the log does not have what the checkpoint says; the shard cannot be worked.
func (c *core) restore(s *shard, h *inheritance, now time.Time) error {
	for _, o := range h.offsets {
		s.offsets[TopicPartition{o.Topic, o.Partition}] = o.Offset
	}
	for _, id := range h.deadQueues {
		c.aggregate(s, id).deadQueue = true
	}
	for i := range h.parked {
		c.restoreRow(s, &h.parked[i])
	}
	if err := c.restorePend(s, h, now); err != nil {
		return err
	}
	for _, a := range s.restored {
		s.restoredTo = maxPosition(s.restoredTo, a.lastRow.Position)
	}
	s.phase, s.loaded = phaseCatchUp, true
	touched := append(c.touched[:0], s.restored...)
	for e := s.hot.first; e != nil; e = e.after {
		if a := e.aggregate; !a.restored && !a.touched {
			a.touched = true
			touched = append(touched, a)
		}
	}
	for _, a := range touched {
		a.touched = false
		c.advance(a)
	}
	c.touched = touched[:0]
	if s.restored != nil && s.cursor.Compare(s.restoredTo) >= 0 {
		c.endRestored(s)
	}
	return nil
}

// restoreRow takes one row of parked, in position order.
func (c *core) restoreRow(s *shard, row *store.Parked) {
	a := c.aggregate(s, row.Aggregate)
	isHead := a.unloaded == 0
	a.unloaded++
	s.rows++
	a.lastRow = row.EventPosition
	if !a.restored {
		a.restored = true
		s.restored = append(s.restored, a)
	}
	if row.State == store.Prepared {
		t := c.txn(s, row.Key)
		t.rows++
		if isHead {
			a.headTxn = t
			t.waiting = append(t.waiting, a)
			c.setStatus(a, statusInDoubt)
		}
		return
	}
	// A head that waits for its topic is simply tried again: its topic may be there by now.
	if isHead && row.Cause == store.CauseRecord && row.State == store.Committed {
		a.attempts, a.problem = row.Attempts, row.Error
		c.setStatus(a, statusRecord)
	}
}

// restorePend takes the events of pend from the segments they are in.
func (c *core) restorePend(s *shard, h *inheritance, now time.Time) error {
	pend := h.pend
	for _, segment := range h.sources {
		m := &memory{bytes: int64(segment.bytes)}
		err := segment.records(func(r *store.Record) bool {
			at := store.EventPosition{Position: segment.pos, Record: r.Number}
			if len(pend) == 0 || pend[0].EventPosition != at || r.IsDecision {
				return len(pend) > 0
			}
			state := pend[0].State
			if known, ok := h.states[r.Key]; ok && state == store.Prepared {
				state = known
			}
			a := c.aggregate(s, store.Aggregate{Source: r.Key.Source, Type: r.Event.AggregateType, ID: r.Event.AggregateID})
			c.append(a, at, m, r, state, now)
			if a.frozen() && !a.parking {
				a.parking = true
				s.toPark.push(a)
			}
			pend = pend[1:]
			return true
		})
		if err != nil {
			return fmt.Errorf("decode segment %s of shard %d: %w", segment.pos, s.number, err)
		}
	}
	if len(pend) > 0 {
		return fmt.Errorf("the log of shard %d does not have event %s/%d, which its checkpoint lists as outstanding (%d missing)",
			s.number, pend[0].Position, pend[0].Record, len(pend))
	}
	return nil
}

// publishedEvent names an event that a record in Kafka carries: its id, the header that says so, and the record's topic.
type publishedEvent struct {
	id     [16]byte
	header string
	topic  string
}

// start ends a takeover: what Kafka is known to have is not delivered again.
func (c *core) start(s *shard, published map[publishedEvent]struct{}, now time.Time) {
	s.phase, s.bar = phaseActive, barNone
	s.knownTo, s.knownUntil, s.offsetsFrom = s.cursor, now.Add(knownFor), now.Add(offsetsKept)
	if len(published) > 0 {
		s.published = published
	}
}

// delivered reports whether the last holder delivered this event. Only the header that the event's own profile adds counts:
// another header with the same value is some caller's, for example the id of a cause. An event to which its caller gave a
// header of that name cannot be recognised, and is delivered again.
func (c *core) delivered(s *shard, e *event) bool {
	if s.published == nil || e.aggregate.anew {
		return false
	}
	src := c.sources[e.rec.Key.Source]
	if src == nil {
		return false
	}
	header := EventIDHeader(src.RecordProfile)
	for i := range e.rec.Event.Headers {
		if e.rec.Event.Headers[i].Name == header {
			return false
		}
	}
	known := publishedEvent{e.rec.Event.ID, header, e.rec.Event.Topic}
	if _, ok := s.published[known]; !ok {
		return false
	}
	delete(s.published, known)
	return true
}

// drain stops the shard: nothing is read or delivered any more. It is over when nothing is in flight.
func (s *shard) drain() { s.phase = phaseDraining }

func maxPosition(a, b store.Position) store.Position {
	if a.Compare(b) >= 0 {
		return a
	}
	return b
}

// loadInheritance reads what the last holder of a shard left.
func loadInheritance(ctx context.Context, st Store, reader Reader, lease store.Lease) (*inheritance, error) {
	h := &inheritance{}
	var err error
	if h.pend, err = store.DecodePend(lease.Pend); err != nil {
		return nil, fmt.Errorf("decode the checkpoint: %w", err)
	}
	if h.offsets, err = store.DecodeOffsets(lease.Offsets); err != nil {
		return nil, fmt.Errorf("decode the checkpoint: %w", err)
	}
	var at []store.Position
	var undecided []store.Key
	for i := range h.pend {
		if p := h.pend[i].Position; len(at) == 0 || at[len(at)-1] != p {
			at = append(at, p)
		}
		if h.pend[i].State == store.Prepared {
			undecided = append(undecided, h.pend[i].Key)
		}
	}
	if len(at) > 0 {
		segments, err := readAt(ctx, reader, lease.Shard, at)
		if err != nil {
			return nil, fmt.Errorf("read outstanding events: %w", err)
		}
		for i := range segments {
			h.sources = append(h.sources, segmentSource{
				pos: segments[i].Position, bytes: len(segments[i].Body), records: segments[i].Records,
			})
		}
	}
	if h.parked, err = withTimeout(ctx, func(ctx context.Context) ([]store.Parked, error) {
		return st.LoadParked(ctx, lease.Shard)
	}); err != nil {
		return nil, fmt.Errorf("load parked events: %w", err)
	}
	if h.deadQueues, err = withTimeout(ctx, func(ctx context.Context) ([]store.Aggregate, error) {
		return st.LoadDeadQueues(ctx, lease.Shard)
	}); err != nil {
		return nil, fmt.Errorf("load dead queues: %w", err)
	}
	if len(undecided) > 0 {
		if h.states, err = withTimeout(ctx, func(ctx context.Context) (map[store.Key]store.State, error) {
			return st.States(ctx, undecided)
		}); err != nil {
			return nil, fmt.Errorf("read states: %w", err)
		}
	}
	return h, nil
}

// readAt reads segments. That the store is another one is told once; the lease is of the one that is there now.
func readAt(ctx context.Context, reader Reader, shard int16, at []store.Position) ([]store.Segment, error) {
	return withTimeout(ctx, func(ctx context.Context) ([]store.Segment, error) {
		segments, err := reader.ReadAt(ctx, shard, at)
		if errors.Is(err, store.ErrStoreChanged) {
			segments, err = reader.ReadAt(ctx, shard, at)
		}
		return segments, err
	})
}

func withTimeout[T any](ctx context.Context, f func(context.Context) (T, error)) (T, error) {
	ctx, cancel := context.WithTimeout(ctx, 4*ioTimeout) // a takeover may have much to load; the lease is renewed meanwhile
	defer cancel()
	return f(ctx)
}
