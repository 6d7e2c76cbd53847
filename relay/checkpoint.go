package relay

import (
	"time"

	"github.com/outbox-platform/outbox/internal/fault"
	"github.com/outbox-platform/outbox/store"
)

const (
	// offsetsEvery is how often acknowledged offsets are written again: older ones only mean that a takeover reads more.
	offsetsEvery = time.Second
	// maxOffsets bounds them; in other partitions a takeover looks for duplicates by time.
	maxOffsets = 1000
	// offsetsKept is how long after a takeover acknowledged offsets are not written while what the last holder delivered may be
	// outstanding.
	offsetsKept = 10 * time.Second
	// knownFor is how long what the last holder delivered is kept for rows of parked.
	knownFor = time.Minute
)

// stepDue reports whether the shard has something to write.
func (s *shard) stepDue() bool {
	return s.busy == idle && s.phase != phaseLoading && s.dirty
}

// step builds the next step of a shard, which is busy until stepped. From here on the machine is as if it were written.
func (c *core) step(s *shard, now time.Time) store.Step {
	st := store.Step{Shard: s.number, Epoch: s.epoch}
	before := c.position(s)
	moreLetters := c.buryDue(s, &st, before)
	moreRows := c.park(s, &st)
	st.Unpark = append(st.Unpark, s.unpark...)
	s.unpark = s.unpark[:0]
	st.Decide, s.decides = s.decides, nil
	s.stepping.decides = st.Decide
	st.Checkpoint = c.checkpoint(s, now)
	c.moveDue(s, &st)
	// What was buried may have let the checkpoint pass what is to be buried.
	passed := len(s.burying) > 0 && st.Checkpoint.Position != before
	s.dirty = moreLetters || moreRows || passed
	s.stepping.checkpoint = st.Checkpoint
	s.busy = stepping
	s.forgetPublished(now)
	return st
}

// forgetPublished forgets what the last holder delivered when all that was outstanding at the takeover is done. What was
// parked meanwhile may come back much later, so it is given up after a time: then a duplicate is possible.
func (s *shard) forgetPublished(now time.Time) {
	if s.published == nil || s.hot.first != nil && s.hot.first.pos.Position.Compare(s.knownTo) <= 0 {
		return
	}
	if s.rows == 0 || now.After(s.knownUntil) {
		s.published = nil
	}
}

// recognising reports whether what the last holder delivered may be among what is outstanding. It was found from the offsets of
// the last checkpoint on; the next holder would not find it from newer ones. Not for long: it has to read from there.
func (s *shard) recognising(now time.Time) bool {
	return s.published != nil && now.Before(s.offsetsFrom)
}

// renewal is a step that changes nothing, for a shard that is being taken over.
func (s *shard) renewal() store.Step {
	s.busy = stepping
	s.stepping = stepContent{checkpoint: s.saved}
	return store.Step{Shard: s.number, Epoch: s.epoch, Checkpoint: s.saved}
}

// position chooses how far the shard is: at the cursor if no more than maxPend hot events are outstanding before it, else
// just before the segment of the first that is too many. The first segment counts as a whole, or the shard would get stuck
// before one that holds more.
func (c *core) position(s *shard) store.Position {
	n := 0
	for e := s.hot.first; e != nil && e.pos.Position.Compare(s.cursor) <= 0; e = e.after {
		if n >= c.maxPend && e.pos.Position.Compare(s.saved.Position) > 0 && e.pos.Position != s.hot.first.pos.Position {
			return store.Position{XID: e.pos.XID, Seq: e.pos.Seq - 1}
		}
		n++
	}
	return s.cursor
}

// checkpoint is how far the shard is, with what is outstanding up to there.
func (c *core) checkpoint(s *shard, now time.Time) store.Checkpoint {
	position := c.position(s)
	var pend []store.PendEntry
	for e := s.hot.first; e != nil && e.pos.Position.Compare(position) <= 0; e = e.after {
		if fault.Mutant("S2") && e.inflight { // handed over is done
			continue
		}
		pend = append(pend, store.PendEntry{EventPosition: e.pos, Key: e.rec.Key, State: e.state})
	}
	cp := store.Checkpoint{Position: position, Oldest: position.XID, Pend: store.EncodePend(pend), Offsets: s.saved.Offsets}
	if len(pend) > 0 && !fault.Mutant("S6") { // S6: what is pending is not read again
		cp.Oldest = min(cp.Oldest, pend[0].XID)
	}
	if s.offsetsChanged && !s.recognising(now) && (s.offsetsAdded || now.Sub(s.offsetsSince) >= offsetsEvery) {
		cp.Offsets = s.encodeOffsets()
		s.offsetsChanged, s.offsetsAdded = false, false
		s.offsetsSince = now
	}
	return cp
}

// encodeOffsets encodes the acknowledged offsets.
func (s *shard) encodeOffsets() []byte {
	all := make([]store.TopicOffset, 0, len(s.offsets))
	for tp, offset := range s.offsets {
		if len(all) == maxOffsets {
			break
		}
		all = append(all, store.TopicOffset{Topic: tp.Topic, Partition: tp.Partition, Offset: offset})
	}
	return store.EncodeOffsets(all)
}

// stepped takes note that the step on its way is written.
func (c *core) stepped(s *shard) {
	done := s.stepping
	s.stepping = stepContent{}
	s.busy = idle
	s.saved = done.checkpoint
	for _, d := range done.decides {
		delete(s.deciding, d.Key)
	}
	for _, a := range done.parked {
		c.rowsWritten(a)
	}
	for _, e := range done.buried {
		c.buriedWritten(e)
	}
	for i := range done.moves {
		c.moved(s, &done.moves[i])
	}
}
