package relay

import (
	"errors"
	"time"

	"github.com/outbox-platform/outbox/internal/fault"
	"github.com/outbox-platform/outbox/store"
)

// next returns an event to deliver now, or nil. The event counts as in flight until report or refused. Shards take turns.
func (c *core) next(now time.Time) *event {
	if c.unacked >= c.maxUnacked || !c.cluster.open(now) {
		return nil
	}
	for range c.shards {
		c.turn++
		if c.turn >= len(c.shards) {
			c.turn = 0
		}
		s := c.shards[c.turn]
		if !s.usable(now) {
			continue
		}
		if e := c.nextOf(s); e != nil {
			c.cluster.sent(now)
			return e
		}
	}
	return nil
}

// nextOf returns the next event of a shard. What was true when an aggregate was queued may have changed since.
func (c *core) nextOf(s *shard) *event {
	for s.ready.n > 0 {
		a := s.ready.pop()
		a.queued = false
		e := a.head()
		if e == nil || e.state != store.Committed || a.status != statusFlowing || a.held != nil || a.deadQueue {
			c.advance(a)
			continue
		}
		if c.delivered(s, e) {
			c.tally.suppressed++
			c.succeeded(e)
			c.advance(a)
			continue
		}
		if !c.admitted(a, e) {
			continue
		}
		a.inflight, e.inflight = true, true
		a.anew = s.published != nil
		s.inflight++
		c.unacked++
		if fault.Mutant("S1") { // no gate
			c.again(e)
		}
		return e
	}
	return nil
}

// landed ends the flight of an event. False: its shard is gone, and the event with it.
func (c *core) landed(e *event) bool {
	c.unacked--
	if e.shard.phase == phaseGone {
		c.release(e)
		return false
	}
	e.inflight, e.aggregate.inflight = false, false
	e.shard.inflight--
	return true
}

// again queues an event that is to be delivered once more, before all others of its shard.
func (c *core) again(e *event) {
	a := e.aggregate
	if a.held == nil && !a.queued {
		a.queued = true
		e.shard.ready.pushFirst(a)
	}
}

// refused takes an event back for which the sink had no room.
func (c *core) refused(e *event) {
	if c.landed(e) {
		c.again(e)
	}
}

// report takes what became of a delivery: err is nil when it was acknowledged.
func (c *core) report(e *event, partition int32, offset int64, err error, now time.Time) {
	if err != nil {
		c.failed(e, err, now)
		return
	}
	c.cluster.succeeded()
	if !c.landed(e) {
		return
	}
	s, a := e.shard, e.aggregate
	s.acknowledged(TopicPartition{e.rec.Event.Topic, partition}, offset)
	c.tally.published++
	if fault.Mutant("S4") && e.attempts == 0 { // once more, to be sure
		e.attempts++
		c.again(e)
		return
	}
	probed := a.probing
	c.succeeded(e)
	c.advance(a)
	if probed != nil {
		c.resume(probed)
	}
}

// succeeded ends the head of an aggregate: Kafka has it.
func (c *core) succeeded(e *event) {
	a := e.aggregate
	c.done(e)
	c.endRetry(a, "published", 1)
}

// failed takes a failed delivery.
func (c *core) failed(e *event, err error, now time.Time) {
	failure := asSinkError(err)
	c.tally.byClass[failure.Class]++
	if failure.Class == ClassCluster {
		c.cluster.failed(now, c.retryMin, c.retryMax)
	}
	if !c.landed(e) {
		return
	}
	a := e.aggregate
	switch failure.Class {
	case ClassRecord:
		probed := a.probing
		c.refusedForGood(e, failure)
		if probed != nil {
			c.resume(probed) // the topic took a look at the record: it is there
		}
	case ClassTopic:
		c.pauseFor(a, c.pauseTopic(e.rec.Event.Topic, a, failure, now))
	case ClassPurged:
		if fault.Mutant("S5") { // it will have been written
			c.succeeded(e)
			c.advance(a)
			return
		}
		c.again(e)
	default: // cluster, fatal, and purged too: it may or may not be written; order is kept by the gate
		c.again(e)
	}
}

// asSinkError returns the error of a sink. Any other error is a fault of the sink: it says nothing about the record.
func asSinkError(err error) *SinkError {
	var e *SinkError
	if errors.As(err, &e) && e.Class >= ClassRecord && e.Class <= ClassPurged {
		return e
	}
	return &SinkError{Class: ClassCluster, Code: "UNKNOWN", Detail: err.Error()}
}

// acknowledged remembers how far Kafka has acknowledged a partition.
func (s *shard) acknowledged(tp TopicPartition, offset int64) {
	next := offset + 1
	known, ok := s.offsets[tp]
	if ok && next <= known {
		return
	}
	if !ok {
		tp.Topic = cloneString(tp.Topic) // it may point into a segment
		s.offsetsAdded = true
	}
	s.offsets[tp] = next
	s.offsetsChanged = true
}

// clusterPause holds everything back while the cluster is away. From time to time one record tries for all, whatever
// is still in flight: some of that may be stuck for reasons of its own topic.
type clusterPause struct {
	backoff time.Duration // 0: the cluster is there
	until   time.Time
	probing bool // a record went out to try
}

func (p *clusterPause) open(now time.Time) bool { return p.backoff == 0 || !now.Before(p.until) }

// sent takes note that a record goes out.
func (p *clusterPause) sent(now time.Time) {
	if p.backoff > 0 {
		p.probing = true
		p.until = now.Add(p.backoff)
	}
}

func (p *clusterPause) failed(now time.Time, least, most time.Duration) {
	if p.backoff > 0 && !p.probing && now.Before(p.until) {
		return // one of those that were in flight when it began
	}
	p.probing = false
	p.backoff = min(max(2*p.backoff, least), most)
	p.until = now.Add(p.backoff)
}

func (p *clusterPause) succeeded() { *p = clusterPause{} }
