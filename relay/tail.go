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
		// The store has a time of its own: the tails do not wait for it.
		err := r.lookForRows(ctx, rows, look)
		ctx, cancel := context.WithTimeout(ctx, r.cfg.TakeoverTailTimeout)
		defer cancel()
		t := tail{shard: strconv.Itoa(int(s.number)) + ":", from: map[TopicPartition]int64{}, left: r.cfg.TakeoverTailLimit, enough: cancel}
		err = errors.Join(err, r.readTail(ctx, look, offsets, &t))
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

// firstEpoch is the epoch of a shard's first holder: nobody delivered anything before it.
const firstEpoch = 1

// readTail reads what is known by offset first, then what is looked for by time with what is left of the limit.
func (r *Relay) readTail(ctx context.Context, look *lookIn, offsets map[TopicPartition]int64, t *tail) error {
	var from map[TopicPartition]int64
	var since map[TopicPartition]time.Time
	err := errors.Join(
		r.whileAway(ctx, t, func() error {
			// A relay that has just started knows no topic yet. To leave out what it does not know would deliver it twice.
			counts, err := r.sink.Partitions(ctx, look.topics(offsets))
			from, since = look.from(offsets, counts)
			return err
		}),
		r.whileAway(ctx, t, func() error { return r.readFrom(ctx, from, t) }),
		r.whileAway(ctx, t, func() error {
			if len(since) == 0 {
				return nil
			}
			found, err := r.sink.OffsetsForTimes(ctx, since, max(int64(t.left/len(since)), 1))
			return errors.Join(err, r.readFrom(ctx, found, t))
		}),
	)
	if t.left == 0 {
		err = errors.Join(err, fmt.Errorf("the limit of %d records is reached", r.cfg.TakeoverTailLimit))
	}
	return err
}

// whileAway does something again until it succeeds or ctx ends, when the cluster is away: nothing can be delivered then anyway.
func (r *Relay) whileAway(ctx context.Context, t *tail, do func() error) error {
	for t.left > 0 {
		if err := ctx.Err(); err != nil {
			return err
		}
		err := do()
		if err == nil || t.left == 0 || asSinkError(err).Class != ClassCluster {
			return err
		}
		select {
		case <-r.after(r.cfg.RetryMin):
		case <-ctx.Done():
			return err
		}
	}
	return nil
}

func (r *Relay) readFrom(ctx context.Context, from map[TopicPartition]int64, t *tail) error {
	if len(from) == 0 {
		return nil
	}
	maps.Copy(t.from, from)
	return r.sink.Tail(ctx, from, t.take)
}

// Bounds of what is read of parked to learn where rows go.
const (
	maxThawing     = 1000 // aggregates
	rowsToLookFor  = 4    // of each
	rowsToLookTime = 2 * time.Second
)

// thawingRows asks for the rows of aggregates that are about to go on: former holders may have delivered the first of them.
func thawingRows(s *shard) []store.ParkedAfter {
	n := min(s.thaw.n, maxThawing)
	rows := make([]store.ParkedAfter, n)
	for i := range n {
		a := s.thaw.at(i)
		rows[i] = store.ParkedAfter{Shard: s.number, Aggregate: a.id, After: a.popped}
	}
	return rows
}

// lookForRows reads rows of parked and adds where they go.
func (r *Relay) lookForRows(ctx context.Context, of []store.ParkedAfter, look *lookIn) error {
	ctx, cancel := context.WithTimeout(ctx, rowsToLookTime)
	defer cancel()
	var errs []error
	for some := range slices.Chunk(of, r.core.loadAggregates) {
		found, err := r.st.LoadParkedOf(ctx, some, rowsToLookFor)
		if err != nil {
			errs = append(errs, fmt.Errorf("load parked events: %w", err))
			break
		}
		for _, rows := range found {
			for i := range rows {
				if rows[i].State != store.Committed {
					continue
				}
				rec, err := store.DecodeEvent(rows[i].Body)
				if err != nil { // its aggregate will be blocked
					errs = append(errs, fmt.Errorf("decode parked event %s/%d: %w", rows[i].Position, rows[i].Record, err))
					continue
				}
				look.add(rec)
			}
		}
	}
	return errors.Join(errs...)
}

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
	topic := cloneString(rec.Event.Topic) // it points into a segment; an assignment replaces the key, too
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
