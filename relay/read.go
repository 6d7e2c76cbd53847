package relay

import (
	"context"
	"errors"
	"time"

	"github.com/outbox-platform/outbox/store"
)

const (
	// readBytes is about what one read of all shards is to bring.
	readBytes = 2 << 20
	// maxReadLimit bounds the segments per shard and read.
	maxReadLimit = 64
	// readRetry is the pause after a failed read.
	readRetry = 100 * time.Millisecond
)

// readLoop reads the log, one read at a time: of all shards from time to time, which is the truth, and between that of
// those of which a hint says that there is something, which is fast and cheap.
type readLoop struct {
	reader  Reader
	running bool
	at      time.Time // of the next read of all shards
	pause   time.Duration
	// began is when the last read began, and rest the end of the pause that every read is followed by, whatever asks for the
	// next one: the longer a read takes, the longer it pays to let more come together.
	began  time.Time
	rest   time.Time
	hinted store.ShardSet // to be read now
	// hintedAt is when a hint came last: where a server of this process tells of its events, all shards are read for those
	// of other servers only, and less often.
	hintedAt time.Time
	// late are shards of which a hint came and nothing was there: what it told of was read before, or an older batch on its
	// way hides it. They are read again, ever later, until all shards are.
	late      store.ShardSet
	lateAt    time.Time
	latePause time.Duration
	limit     int
	horizon   store.Horizon
	failing   bool
}

// restFactor is how many times as long as a read took the pause after it is, PollMax at most. Of an idle machine's reads
// nobody waits for more than a few hundred microseconds; where everything competes for the processors, reads become
// fewer and larger, and so do the requests to Kafka.
const restFactor = 2

// hintedPause is how many times as long the pause between reads of all shards is while hints come; hintsLast after the
// last one they are believed to have ended.
const (
	hintedPause = 5
	hintsLast   = 100 * time.Millisecond
)

// takeHints makes a read of the shards that are ours due, as soon as the last read's rest is over.
func (r *Relay) takeHints() {
	hints := store.ShardSet(r.hints.Swap(0))
	if hints == 0 {
		return
	}
	r.read.hintedAt = r.now()
	for _, s := range r.core.shards {
		if hints.Has(s.number) {
			r.read.hinted = r.read.hinted.Add(s.number)
		}
	}
}

// wake lowers next to when a read is due.
func (l *readLoop) wake(r *Relay, next *time.Time) {
	if l.running || r.core.full() {
		return
	}
	for _, s := range r.core.shards {
		if !s.reading() {
			continue
		}
		earlier(next, later(l.at, l.rest))
		if l.hinted.Has(s.number) {
			earlier(next, l.rest)
		}
		if l.late.Has(s.number) {
			earlier(next, later(l.lateAt, l.rest))
		}
	}
}

// due returns what to read now: all shards, some, or none.
func (l *readLoop) due(now time.Time) (of store.ShardSet, all bool) {
	if now.Before(l.rest) {
		return 0, false
	}
	if !now.Before(l.at) {
		l.hinted, l.late, l.latePause = 0, 0, 0
		return ^store.ShardSet(0), true
	}
	if of = l.hinted; of != 0 || l.late != 0 && !now.Before(l.lateAt) {
		of |= l.late
	}
	l.hinted, l.late = 0, l.late&^of
	return of, false
}

// startRead begins a read if one is due. While memory is full nothing is read.
func (r *Relay) startRead(now time.Time) {
	l := &r.read
	if r.core.full() {
		for _, s := range r.core.shards {
			if s.phase == phaseCatchUp {
				r.log.Warn("memory is full before a shard has read what its last holder had read: some of it may be delivered twice",
					"shard", s.number, "epoch", s.epoch)
				r.startTail(s)
			}
		}
		return
	}
	if l.running {
		return
	}
	of, all := l.due(now)
	var shards []*shard
	var cursors []store.Cursor
	for _, s := range r.core.shards {
		if of.Has(s.number) && s.reading() {
			shards = append(shards, s)
			cursors = append(cursors, store.Cursor{Shard: s.number, Position: s.cursor})
		}
	}
	if len(shards) == 0 {
		return
	}
	limit := max(l.limit, 1)
	l.running, l.began = true, now
	reader := l.reader
	r.access(func(ctx context.Context) func() {
		ctx, cancel := context.WithTimeout(ctx, ioTimeout)
		defer cancel()
		var err error
		if reader == nil {
			if reader, err = r.st.OpenReader(ctx); err != nil {
				return func() { r.notRead(err) }
			}
		}
		segments, err := reader.Read(ctx, cursors, limit)
		return func() {
			l.reader = reader
			if err != nil {
				r.notRead(err)
				return
			}
			r.takeSegments(shards, all, segments, limit)
		}
	})
}

// notRead takes a failed read.
func (r *Relay) notRead(err error) {
	l := &r.read
	l.running = false
	l.at = r.now().Add(readRetry)
	if errors.Is(err, store.ErrStoreChanged) {
		r.storeChanged(err)
		return
	}
	r.metrics.storeErrors.WithLabelValues("read").Inc()
	if !l.failing {
		l.failing = true
		r.log.Error("reading the log", "error", err)
	}
}

// takeSegments feeds what was read, and decides when to read next.
func (r *Relay) takeSegments(shards []*shard, all bool, segments []store.Segment, limit int) {
	l := &r.read
	now := r.now()
	l.running = false
	if l.failing {
		l.failing = false
		r.log.Info("reading the log again")
	}
	l.horizon = l.reader.Horizon()
	l.rest = now.Add(min(restFactor*now.Sub(l.began), r.cfg.PollMax))
	bytes, full, hidden := 0, false, false
	var empty store.ShardSet
	for _, s := range shards {
		n := 0
		for i := range segments {
			segment := &segments[i]
			if segment.Shard != s.number {
				continue
			}
			n++
			bytes += len(segment.Body)
			if !s.reading() {
				continue
			}
			if err := r.core.feed(s, segment.Position, len(segment.Body), segment.Records, now); err != nil {
				r.metrics.corrupt.Inc()
				r.log.Error("segment cannot be decoded: nothing more is read of its shard", "shard", s.number, "position",
					segment.Position.String(), "error", err)
			}
		}
		if n >= limit {
			full = true
			l.hinted = l.hinted.Add(s.number)
			continue
		}
		if n == 0 {
			empty = empty.Add(s.number)
		}
		caughtUp := r.core.caughtUp(s, l.horizon)
		if s.phase == phaseCatchUp && !caughtUp {
			hidden = true
			if s.catchUpBy.IsZero() {
				s.catchUpBy = now.Add(r.cfg.TakeoverTailTimeout)
			}
			if caughtUp = now.After(s.catchUpBy); caughtUp {
				r.log.Warn("a transaction in the store's cluster hides what the last holder may have read: some of it may be delivered twice",
					"shard", s.number, "epoch", s.epoch, "horizon", l.horizon.XID, "needed", s.readTo)
			}
		}
		if s.phase == phaseCatchUp && caughtUp {
			r.startTail(s)
		}
	}
	l.adapt(len(segments), bytes, len(shards))
	if full {
		l.rest = now
	}
	switch {
	case !all:
		l.late |= empty
		l.latePause = min(max(2*l.latePause, r.cfg.PollMin), r.cfg.PollMax)
		l.lateAt = now.Add(l.latePause)
		if empty == 0 {
			l.latePause = 0
		}
		return
	case full:
		l.pause = r.cfg.PollMin
		l.at = now
		return
	case len(segments) > 0, hidden:
		l.pause = r.cfg.PollMin
		if now.Sub(l.hintedAt) < hintsLast {
			l.pause = min(hintedPause*r.cfg.PollMin, r.cfg.PollMax)
		}
	default:
		l.pause = min(max(2*l.pause, r.cfg.PollMin), r.cfg.PollMax)
	}
	l.at = now.Add(l.pause)
}

// adapt chooses the limit of the next read by the size of what the last one brought.
func (l *readLoop) adapt(segments, bytes, shards int) {
	size := 8000
	if segments > 0 {
		size = max(bytes/segments, 1000)
	}
	l.limit = min(max(readBytes/(size*shards), 1), maxReadLimit)
}

// storeChanged drops all memory: the store is another server, or on another timeline. Nothing is written for the old
// tenures but the end of their leases, where the epoch still matches; then shards are acquired again, from their
// checkpoints.
func (r *Relay) storeChanged(cause error) {
	r.log.Error("the store changed: starting again from the checkpoints", "error", cause)
	r.metrics.storeChanges.Inc()
	now := r.now()
	var shards []int16
	var epochs []int64
	for len(r.core.shards) > 0 {
		s := r.core.shards[0]
		shards, epochs = append(shards, s.number), append(epochs, s.epoch)
		r.drop(s, now)
	}
	r.lease.beat.at = now.Add(r.cfg.RenewEvery)
	r.release(shards, epochs)
}
