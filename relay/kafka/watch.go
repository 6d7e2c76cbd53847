package kafka

import (
	"fmt"
	"log/slog"
	"maps"
	"slices"
	"sync"
	"sync/atomic"
	"time"
)

// watchTick is how often watch looks whether it has something to do that nobody woke it for.
const watchTick = 250 * time.Millisecond

// watch looks topics up, refreshes those in use, and finds out whether the cluster is there, until the sink is closed.
func (s *Sink) watch() {
	tick := time.NewTicker(watchTick)
	defer tick.Stop()
	refreshed := time.Now()
	failed := false
	for {
		woken := s.wake
		if failed { // at the pace of the tick
			woken = nil
		}
		select {
		case <-s.life.Done():
			return
		case <-woken:
		case <-tick.C:
		}
		refresh := time.Since(refreshed) >= s.cfg.MetadataRefresh
		if refresh {
			refreshed = time.Now()
		}
		failed = !s.watchOnce(refresh)
	}
}

// watchOnce does what is due. false: the cluster did not answer.
func (s *Sink) watchOnce(refresh bool) bool {
	names := s.takeAsked()
	if refresh {
		names = append(names, s.inUseTopics()...)
	}
	var err error
	switch {
	case len(names) > 0:
		slices.Sort(names)
		names = slices.Compact(names)
		err = s.lookUp(s.life, names)
	case !s.seeded:
		err = s.seed()
	case s.health.inQuestion():
		err = s.probe()
	default:
		s.checkStall()
		return true
	}
	if s.life.Err() != nil {
		return true
	}
	if err != nil {
		s.askAgain(names)
		s.health.lost(err.Error())
		s.checkStall()
		return false
	}
	s.health.contact()
	s.checkStall()
	return true
}

// takeAsked returns the topics to be looked up.
func (s *Sink) takeAsked() []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	names := slices.Collect(maps.Keys(s.asking))
	clear(s.asking)
	return names
}

// askAgain puts those back that are waited for; the others come again at the next refresh.
func (s *Sink) askAgain(names []string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, name := range names {
		if t := s.topics[name]; t != nil && t.state != topicKnown {
			s.asking[name] = struct{}{}
		}
	}
}

// inUseTopics returns the topics to refresh: those that had a record. It forgets refused ones that nobody wanted since the
// last time.
func (s *Sink) inUseTopics() []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	var names []string
	for name, t := range s.topics {
		switch {
		case t.state == topicKnown && t.used:
			names = append(names, name)
		case t.state == topicRefused && t.used:
			t.used = false
		case t.state == topicRefused:
			delete(s.topics, name)
		}
	}
	return names
}

// seed puts all topics into the cache, once, when the cluster is reached for the first time: so that a relay that has just
// started knows where its predecessor's records went.
func (s *Sink) seed() error {
	p, done := s.batch.use()
	if p == nil {
		return errRebuilding
	}
	defer done()
	topics, err := p.allTopics(s.life)
	if err != nil {
		return err
	}
	s.remember(topics)
	s.seeded = true
	return nil
}

// probe asks the cluster for anything at all.
func (s *Sink) probe() error {
	p, done := s.batch.use()
	if p == nil {
		return errRebuilding
	}
	defer done()
	if _, err := p.rd.GetMetadata(nil, false, int(lookUpTimeout.Milliseconds())); err != nil {
		return fmt.Errorf("asking for metadata: %w", err)
	}
	return nil
}

// checkStall finds out whether records wait although nothing else is wrong: a broker that hangs, too few replicas.
func (s *Sink) checkStall() {
	s.mu.Lock()
	queued, since := s.inUse, s.busy
	s.mu.Unlock()
	if last := time.Unix(0, s.lastAck.Load()); last.After(since) {
		since = last
	}
	stalled := ""
	if queued > 0 && time.Since(since) >= s.cfg.StallAfter {
		stalled = fmt.Sprintf("no acknowledgement for %s with %d records queued", time.Since(since).Round(time.Second), queued)
	}
	s.health.setStalled(stalled)
}

// Healthy reports whether the cluster answers, and if not why, for operators. While it does not, records stay queued and
// are retried; delivering more is allowed but only fills the queue. It becomes true again without deliveries.
func (s *Sink) Healthy() (bool, string) { return s.health.state() }

// health is what is known of the cluster.
type health struct {
	log  *slog.Logger
	fine atomic.Bool // nothing is wrong: contact has nothing to do

	mu       sync.Mutex
	away     bool              // it was logged that the cluster is away
	reason   string            // contact is lost; "": it is not
	doubt    string            // an event says so; a probe must find out
	stalled  string            // answers, but acknowledges nothing
	producer map[string]string // per lane: it has no producer
}

func (h *health) init(log *slog.Logger) {
	h.log = log
	h.reason = "not reached yet"
	h.producer = make(map[string]string)
}

// contact notes an answer of the cluster.
func (h *health) contact() {
	if h.fine.Load() {
		return
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	h.reason, h.doubt = "", ""
	h.settle()
}

// lost notes that the cluster did not answer.
func (h *health) lost(why string) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.doubt != "" {
		why = h.doubt // says more than a timeout
	}
	h.reason = why
	h.settle()
}

// suspect notes that librdkafka says that the cluster is away.
func (h *health) suspect(why string) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.doubt = why
	h.settle()
}

func (h *health) setStalled(why string) {
	if why == "" && h.fine.Load() {
		return
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	h.stalled = why
	h.settle()
}

// setProducer notes why a lane has no producer; "": it has one.
func (h *health) setProducer(lane, why string) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if why == "" {
		delete(h.producer, lane)
	} else {
		h.producer[lane] = why
	}
	h.settle()
}

// settle recomputes fine, and logs when the cluster goes away or comes back. h.mu is held.
func (h *health) settle() {
	h.fine.Store(h.reason == "" && h.doubt == "" && h.stalled == "" && len(h.producer) == 0)
	switch ok, why := h.locked(); {
	case !ok && !h.away:
		h.log.Warn("kafka is away; records stay queued", "error", why)
		h.away = true
	case ok && h.away:
		h.log.Info("kafka is back")
		h.away = false
	}
}

// inQuestion reports whether a probe is wanted.
func (h *health) inQuestion() bool {
	if h.fine.Load() {
		return false
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.reason != "" || h.doubt != ""
}

func (h *health) state() (bool, string) {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.locked()
}

func (h *health) locked() (bool, string) {
	for _, why := range h.producer {
		return false, why
	}
	if h.reason != "" {
		return false, h.reason
	}
	return h.stalled == "", h.stalled
}
