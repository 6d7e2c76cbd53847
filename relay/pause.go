package relay

import (
	"time"
)

// pause keeps all aggregates whose head goes to one topic, or comes from one source, while the topic cannot be written or
// the source is not known. No attempt is counted. From time to time one aggregate tries for all.
type pause struct {
	topic   string
	source  int32 // 0: it is a topic that is paused
	problem string
	backoff time.Duration
	next    time.Time
	probe   *aggregate // tries, or will as soon as its head is loaded
	waiting []*aggregate
}

// concerns reports whether an event waits for this pause.
func (p *pause) concerns(e *event) bool {
	if p.source != 0 {
		return e.rec.Key.Source == p.source
	}
	return e.rec.Event.Topic == p.topic
}

// stopWaiting takes an aggregate off the list.
func (p *pause) stopWaiting(a *aggregate) {
	last := p.waiting[len(p.waiting)-1]
	p.waiting[a.slot], last.slot = last, a.slot
	p.waiting[len(p.waiting)-1] = nil
	p.waiting = p.waiting[:len(p.waiting)-1]
}

// giveUpProbe lets another aggregate try.
func (p *pause) giveUpProbe() {
	p.probe.probing = nil
	p.probe = nil
}

// dropShard forgets the aggregates of a shard.
func (p *pause) dropShard(s *shard, now time.Time) {
	if p.probe != nil && p.probe.shard == s {
		p.giveUpProbe()
		p.next = now
	}
	kept := p.waiting[:0]
	for _, a := range p.waiting {
		if a.shard != s {
			a.slot = len(kept)
			kept = append(kept, a)
		}
	}
	clear(p.waiting[len(kept):])
	p.waiting = kept
}

// topicPause returns the pause of a topic, or nil. Few topics are paused at once.
func (c *core) topicPause(topic string) *pause {
	for _, p := range c.pauses {
		if p.source == 0 && p.topic == topic {
			return p
		}
	}
	return nil
}

// sourcePause returns the pause of the source of an event, which is not known; made if there is none.
func (c *core) sourcePause(e *event) *pause {
	source := e.rec.Key.Source
	for _, p := range c.pauses {
		if p.source == source {
			return p
		}
	}
	p := &pause{source: source, problem: "the source is not registered", backoff: c.retryMin, next: e.readAt}
	c.pauses = append(c.pauses, p)
	return p
}

// pauseTopic begins or prolongs the pause of a topic because a record of this aggregate failed.
func (c *core) pauseTopic(topic string, a *aggregate, failure *SinkError, now time.Time) *pause {
	p := c.topicPause(topic)
	switch {
	case p == nil:
		p = &pause{topic: cloneString(topic), backoff: c.retryMin, next: now.Add(c.retryMin)}
		c.pauses = append(c.pauses, p)
	case p.probe == a:
		p.giveUpProbe()
		p.backoff = min(2*p.backoff, c.retryMax)
		p.next = now.Add(p.backoff)
	}
	p.problem = failure.Error()
	return p
}

// pauseFor freezes an aggregate until a pause ends.
func (c *core) pauseFor(a *aggregate, p *pause) {
	c.endRetry(a, "blocked: "+p.problem, 0)
	a.bypass = false
	a.problem = p.problem
	c.freeze(a, statusTopic)
	a.pause = p
	a.slot = len(p.waiting)
	p.waiting = append(p.waiting, a)
}

// resume ends a pause.
func (c *core) resume(p *pause) {
	for i, other := range c.pauses {
		if other == p {
			c.pauses = append(c.pauses[:i], c.pauses[i+1:]...)
			break
		}
	}
	if p.probe != nil {
		p.giveUpProbe()
	}
	for len(p.waiting) > 0 {
		a := p.waiting[len(p.waiting)-1]
		c.thaw(a)
		c.advance(a)
	}
}

// tryPauses lets one aggregate try for each pause whose time has come.
func (c *core) tryPauses(now time.Time) {
	for i := 0; i < len(c.pauses); {
		p := c.pauses[i]
		if p.probe != nil && !p.probe.inflight && !p.probe.shard.usable(now) {
			p.giveUpProbe() // it cannot try; another shard can
		}
		switch {
		case p.probe != nil || now.Before(p.next):
		case len(p.waiting) == 0 || p.source != 0 && c.sources[p.source] != nil:
			c.resume(p)
			continue // the next one has its place
		case p.source != 0:
			c.wantSources = true
			p.backoff = min(2*p.backoff, c.retryMax)
			p.next = now.Add(p.backoff)
		default:
			c.probe(p, now)
		}
		i++
	}
}

// probe lets one aggregate try.
func (c *core) probe(p *pause, now time.Time) {
	for _, a := range p.waiting {
		if a.shard.usable(now) && a.held == nil {
			c.thaw(a)
			a.probing, p.probe = p, a
			c.advance(a)
			return
		}
	}
}
