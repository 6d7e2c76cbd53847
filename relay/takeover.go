package relay

import (
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"
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
	s.knownTo, s.knownUntil = s.cursor, now.Add(knownFor)
	if len(published) > 0 {
		s.published = published
	}
}

// delivered reports whether the last holder delivered this event. Only the header that the event's own profile adds counts:
// another header with the same value is some caller's, for example the id of a cause. An event to which its caller gave a
// header of that name cannot be recognised, and is delivered again.
func (c *core) delivered(s *shard, e *event) bool {
	if s.published == nil {
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

// startTail ends the takeover of a shard that has read what the last holder had read: where the sink can, former holders are
// cut off first.
func (r *Relay) startTail(s *shard) {
	if r.fencer != nil {
		r.startFence(s)
		return
	}
	r.startTailRead(s)
}

// startTailRead looks in Kafka for what former holders delivered and no checkpoint tells of: in the partitions that what is
// outstanding goes to, from the offsets acknowledged by the last checkpoint; where none was, from the time of what is
// outstanding. Then the shard starts.
func (r *Relay) startTailRead(s *shard) {
	look, rows := lookOf(s), thawingRows(s)
	if s.epoch == firstEpoch || len(look.keys) == 0 && len(rows) == 0 {
		r.core.start(s, nil, r.now())
		return
	}
	if s.phase == phaseCatchUp {
		s.phase = phaseTail
	}
	began, offsets := r.now(), maps.Clone(s.offsets)
	r.accessWith(r.takeovers, func(ctx context.Context) func() {
		ctx, cancel := context.WithTimeout(ctx, r.cfg.TakeoverTailTimeout)
		defer cancel()
		t := tail{shard: strconv.Itoa(int(s.number)) + ":", left: r.cfg.TakeoverTailLimit, enough: cancel}
		err := errors.Join(r.lookForRows(ctx, rows, look), r.readTail(ctx, look, offsets, &t))
		return func() {
			if s.phase != phaseTail && !s.barredAtWork() {
				return
			}
			if err != nil {
				r.log.Warn("what the last holder delivered could not be read to the end: some of it may be delivered twice",
					"shard", s.number, "epoch", s.epoch, "records", len(t.published), "error", err)
			}
			r.log.Info("topic tails read", "shard", s.number, "epoch", s.epoch, "partitions", len(t.from),
				"from", places(t.from), "records", len(t.published), "took", r.now().Sub(began))
			r.core.start(s, t.published, r.now())
		}
	})
}

// readTail reads until it succeeds or ctx ends, when the cluster is away: nothing can be delivered then anyway.
func (r *Relay) readTail(ctx context.Context, look *lookIn, offsets map[TopicPartition]int64, t *tail) error {
	for {
		// A relay that has just started knows no topic yet. To leave out what it does not know would deliver it twice.
		counts, err := r.sink.Partitions(ctx, look.topics(offsets))
		if err == nil {
			err = r.readTailFrom(ctx, look, offsets, counts, t)
		}
		if err == nil || t.left == 0 || asSinkError(err).Class != ClassCluster {
			return err
		}
		select {
		case <-r.after(r.cfg.RetryMin):
		case <-ctx.Done():
			return err
		}
	}
}

func (r *Relay) readTailFrom(ctx context.Context, look *lookIn, offsets map[TopicPartition]int64, counts map[string]int32, t *tail) error {
	from, since := look.from(offsets, counts)
	if len(since) > 0 {
		found, err := r.sink.OffsetsForTimes(ctx, since)
		if err != nil {
			return err
		}
		maps.Copy(from, found)
	}
	t.from = from
	return r.sink.Tail(ctx, from, t.take)
}

// maxThawing bounds the aggregates whose rows are looked at to learn where they go.
const maxThawing = 1000

// thawingRows asks for the rows of aggregates that are about to go on: former holders may have delivered the first of them.
func thawingRows(s *shard) []store.ParkedAfter {
	rows := make([]store.ParkedAfter, 0, min(s.thaw.n, maxThawing))
	for i := range cap(rows) {
		a := s.thaw.at(i)
		rows = append(rows, store.ParkedAfter{Shard: s.number, Aggregate: a.id, After: a.popped})
	}
	return rows
}

// lookForRows reads rows of parked and adds where they go.
func (r *Relay) lookForRows(ctx context.Context, of []store.ParkedAfter, look *lookIn) error {
	for some := range slices.Chunk(of, r.core.loadAggregates) {
		found, err := r.st.LoadParkedOf(ctx, some, r.core.loadRows)
		if err != nil {
			return fmt.Errorf("load parked events: %w", err)
		}
		for _, rows := range found {
			for i := range rows {
				if rows[i].State != store.Committed {
					continue
				}
				rec, err := store.DecodeEvent(rows[i].Body)
				if err != nil {
					return fmt.Errorf("decode parked event %s: %w", rows[i].Position, err)
				}
				look.add(rec)
			}
		}
	}
	return nil
}

// firstEpoch is the epoch of a shard's first holder: nobody delivered anything before it.
const firstEpoch = 1

// clockSlack is by how much a broker's clock may be behind a server's, where brokers give records their timestamps.
const clockSlack = 5 * time.Second

// lookIn says where former holders may have delivered something of a shard.
type lookIn struct {
	// anywhere: rows are outstanding of which only some, or none, are in keys. They may be in any partition that the shard is
	// known to have written.
	anywhere bool
	keys     map[string][]lookFor // by topic
}

// lookFor is a key of a record that may be there, and since when it may be, by the record's own timestamp or the broker's.
type lookFor struct {
	key   []byte
	since time.Time
}

// lookOf returns where to look for what is outstanding.
func lookOf(s *shard) *lookIn {
	look := &lookIn{anywhere: s.thaw.n > 0, keys: map[string][]lookFor{}}
	for e := s.hot.first; e != nil; e = e.after {
		if e.state == store.Committed {
			look.add(&e.rec)
		}
	}
	return look
}

// add adds where an event goes.
func (l *lookIn) add(rec *store.Record) {
	key := []byte(rec.Event.AggregateID)
	if rec.Event.HasKey {
		key = slices.Clone(rec.Event.Key)
	}
	at := rec.PreparedAt - int64(clockSlack)
	if rec.Event.OccurredAt != 0 {
		at = min(at, rec.Event.OccurredAt)
	}
	topic := rec.Event.Topic
	if l.keys[topic] == nil {
		topic = cloneString(topic) // it points into a segment
	}
	l.keys[topic] = append(l.keys[topic], lookFor{key, time.Unix(0, at)})
}

func (l *lookIn) topics(offsets map[TopicPartition]int64) []string {
	names := slices.Collect(maps.Keys(l.keys))
	if l.anywhere {
		for tp := range offsets {
			names = append(names, tp.Topic)
		}
	}
	slices.Sort(names)
	return slices.Compact(names)
}

// from returns the partitions to look in, and from where; or since when, where nothing is known to be acknowledged.
func (l *lookIn) from(offsets map[TopicPartition]int64, counts map[string]int32) (from map[TopicPartition]int64, since map[TopicPartition]time.Time) {
	from, since = map[TopicPartition]int64{}, map[TopicPartition]time.Time{}
	for tp, offset := range offsets {
		if l.anywhere && tp.Partition < counts[tp.Topic] {
			from[tp] = offset
		}
	}
	for topic, keys := range l.keys {
		count := counts[topic]
		if count == 0 {
			continue
		}
		for _, k := range keys {
			tp := TopicPartition{topic, Partition(k.key, count)}
			if offset, ok := offsets[tp]; ok {
				from[tp] = offset
			} else if known, ok := since[tp]; !ok || k.since.Before(known) {
				since[tp] = k.since
			}
		}
	}
	return from, since
}

// tail collects the ids of the events of one shard.
type tail struct {
	shard     string                   // as EpochHeader begins
	from      map[TopicPartition]int64 // looked in
	left      int
	enough    func()
	published map[publishedEvent]struct{}
}

// places names partitions and offsets for the log, of many only some.
func places(from map[TopicPartition]int64) string {
	const most = 10
	var all []string
	for tp, offset := range from {
		all = append(all, fmt.Sprintf("%s/%d@%d", tp.Topic, tp.Partition, offset))
	}
	slices.Sort(all)
	if n := len(all) - most; n > 0 {
		all = append(all[:most], fmt.Sprintf("and %d more", n))
	}
	return strings.Join(all, " ")
}

// take takes a record.
func (t *tail) take(tp TopicPartition, _ int64, headers []store.Header) {
	if t.left == 0 {
		t.enough()
		return
	}
	t.left--
	ours := false
	for i := range headers {
		if h := &headers[i]; h.Name == EpochHeader {
			ours = ours || strings.HasPrefix(string(h.Value), t.shard)
		}
	}
	if !ours {
		return
	}
	if t.published == nil {
		t.published = map[publishedEvent]struct{}{}
	}
	for i := range headers {
		switch h := &headers[i]; h.Name {
		case "ce_id", "event_id", "id":
			if id, ok := parseUUID(h.Value); ok {
				t.published[publishedEvent{id, h.Name, tp.Topic}] = struct{}{}
			}
		}
	}
}

// parseUUID reads the canonical text of a UUID.
func parseUUID(text []byte) (id [16]byte, ok bool) {
	if len(text) != 36 || text[8] != '-' || text[13] != '-' || text[18] != '-' || text[23] != '-' {
		return id, false
	}
	var digits [32]byte
	n := copy(digits[:], text[:8])
	n += copy(digits[n:], text[9:13])
	n += copy(digits[n:], text[14:18])
	n += copy(digits[n:], text[19:23])
	copy(digits[n:], text[24:])
	_, err := hex.Decode(id[:], digits[:])
	return id, err == nil
}
