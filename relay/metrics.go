package relay

import (
	"strconv"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/outbox-platform/outbox/store"
)

// gaugesEvery is how often gauges are set.
const gaugesEvery = time.Second

// String returns the class as metrics and logs name it.
func (c Class) String() string {
	switch c {
	case ClassRecord:
		return "record"
	case ClassTopic:
		return "topic"
	case ClassCluster:
		return "cluster"
	case ClassFatal:
		return "fatal"
	case ClassPurged:
		return "purged"
	}
	return "none"
}

// metrics of one relay.
type metrics struct {
	published, dropped, suppressed, parked, deadLetters prometheus.Counter
	kafkaErrors                                         *prometheus.CounterVec
	takeovers, fenced, storeChanges, corrupt            prometheus.Counter
	storeErrors                                         *prometheus.CounterVec
	fromPrepare, fromDecision                           prometheus.Histogram

	backlog, oldest, epoch                       *prometheus.GaugeVec
	blocked                                      *prometheus.GaugeVec
	unacked, memory, shards, horizonHeld, paused prometheus.Gauge

	last  tally
	setAt time.Time
}

func newMetrics(reg prometheus.Registerer) (*metrics, error) {
	counter := func(name, help string) prometheus.Counter {
		return prometheus.NewCounter(prometheus.CounterOpts{Name: "outbox_" + name, Help: help})
	}
	gauge := func(name, help string) prometheus.Gauge {
		return prometheus.NewGauge(prometheus.GaugeOpts{Name: "outbox_" + name, Help: help})
	}
	perShard := func(name, help string) *prometheus.GaugeVec {
		return prometheus.NewGaugeVec(prometheus.GaugeOpts{Name: "outbox_" + name, Help: help}, []string{"shard"})
	}
	latency := func(name, help string) prometheus.Histogram {
		return prometheus.NewHistogram(prometheus.HistogramOpts{Name: "outbox_" + name, Help: help,
			Buckets: prometheus.ExponentialBuckets(0.0005, 2, 18)})
	}
	m := &metrics{
		published:   counter("published_total", "Events acknowledged by Kafka."),
		dropped:     counter("dropped_total", "Events not published because their transaction was aborted."),
		suppressed:  counter("duplicates_suppressed_total", "Events found in Kafka at a takeover and not delivered again."),
		parked:      counter("parked_total", "Events copied out of the log because they were undecided or blocked."),
		deadLetters: counter("dead_letters_total", "Events set aside as dead letters."),
		kafkaErrors: prometheus.NewCounterVec(prometheus.CounterOpts{Name: "outbox_kafka_errors_total",
			Help: "Failed deliveries by class: record needs an operator or a policy, the others are tried again."}, []string{"class"}),
		takeovers:    counter("takeovers_total", "Shards taken over."),
		fenced:       counter("fenced_total", "Writes refused because another relay had taken the shard."),
		storeChanges: counter("store_changes_total", "Times the store turned out to be another server or timeline."),
		corrupt:      counter("corrupt_total", "Segments and parked events that could not be decoded. Never normal."),
		storeErrors: prometheus.NewCounterVec(prometheus.CounterOpts{Name: "outbox_relay_store_errors_total",
			Help: "Failed accesses to the store by what was done; all are repeated."}, []string{"access"}),
		fromPrepare:  latency("prepare_to_publish_seconds", "From Prepare, by the server's clock, to Kafka's acknowledgement."),
		fromDecision: latency("commit_to_publish_seconds", "From the relay reading the commit to Kafka's acknowledgement."),
		backlog:      perShard("shard_backlog_events", "Events read and neither published nor dropped nor dead, parked ones included."),
		oldest:       perShard("shard_oldest_age_seconds", "Age of the oldest event in memory that is not out. Alert on it."),
		epoch:        perShard("shard_epoch", "Epoch under which this relay holds the shard; absent when it does not."),
		blocked: prometheus.NewGaugeVec(prometheus.GaugeOpts{Name: "outbox_blocked_aggregates",
			Help: "Aggregates whose head cannot be published now, by cause. record waits for an operator."}, []string{"cause"}),
		unacked:     gauge("unacked_records", "Records handed to Kafka and not yet acknowledged."),
		memory:      gauge("relay_memory_bytes", "Log kept in memory. At its bound nothing more is read."),
		shards:      gauge("held_shards", "Shards this relay holds."),
		horizonHeld: gauge("horizon_held_seconds", "How long a transaction that owns an xid has held back reading; 0: it moves."),
		paused:      gauge("paused_topics", "Topics, and sources not known, that are tried again from time to time."),
	}
	if reg == nil {
		return m, nil
	}
	for _, c := range []prometheus.Collector{
		m.published, m.dropped, m.suppressed, m.parked, m.deadLetters, m.kafkaErrors, m.takeovers, m.fenced, m.storeChanges,
		m.corrupt, m.storeErrors, m.fromPrepare, m.fromDecision, m.backlog, m.oldest, m.epoch, m.blocked, m.unacked, m.memory,
		m.shards, m.horizonHeld, m.paused,
	} {
		if err := reg.Register(c); err != nil {
			return nil, err
		}
	}
	return m, nil
}

// acknowledged observes the latencies of an event that Kafka has.
func (m *metrics) acknowledged(e *event, now time.Time) {
	if at := e.rec.PreparedAt; at > 0 {
		m.fromPrepare.Observe(float64(now.UnixNano()-at) / 1e9)
	}
	if !e.decidedAt.IsZero() {
		m.fromDecision.Observe(now.Sub(e.decidedAt).Seconds())
	}
}

// update sets everything that is counted elsewhere.
func (m *metrics) update(r *Relay, now time.Time) {
	if now.Sub(m.setAt) < gaugesEvery && !r.stopping {
		return
	}
	m.setAt = now
	c := r.core
	t := c.tally
	m.published.Add(float64(t.published - m.last.published))
	m.dropped.Add(float64(t.dropped - m.last.dropped))
	m.suppressed.Add(float64(t.suppressed - m.last.suppressed))
	m.parked.Add(float64(t.parked - m.last.parked))
	m.deadLetters.Add(float64(t.deadLetters - m.last.deadLetters))
	for class := ClassRecord; class <= ClassPurged; class++ {
		m.kafkaErrors.WithLabelValues(class.String()).Add(float64(t.byClass[class] - m.last.byClass[class]))
	}
	m.last = t
	m.blocked.WithLabelValues("in_doubt").Set(float64(t.byStatus[statusInDoubt]))
	m.blocked.WithLabelValues("topic").Set(float64(t.byStatus[statusTopic]))
	m.blocked.WithLabelValues("record").Set(float64(t.byStatus[statusRecord]))
	m.unacked.Set(float64(c.unacked))
	m.memory.Set(float64(c.bytes))
	m.shards.Set(float64(len(c.shards)))
	m.paused.Set(float64(len(c.pauses)))
	m.horizonHeld.Set(r.read.horizon.Held.Seconds())
	for _, s := range c.shards {
		label := strconv.Itoa(int(s.number))
		m.backlog.WithLabelValues(label).Set(float64(s.hotCount + s.rows))
		m.epoch.WithLabelValues(label).Set(float64(s.epoch))
		age := 0.0
		if e := s.oldest(); e != nil {
			age = max(float64(now.UnixNano()-e.rec.PreparedAt)/1e9, 0)
		}
		m.oldest.WithLabelValues(label).Set(age)
	}
}

// oldest returns the oldest hot event that is committed, or else the oldest, or nil.
func (s *shard) oldest() *event {
	for e := s.hot.first; e != nil; e = e.after {
		if e.state == store.Committed {
			return e
		}
	}
	return s.hot.first
}

// forget removes the gauges of a shard.
func (m *metrics) forget(shard int16) {
	label := strconv.Itoa(int(shard))
	m.backlog.DeleteLabelValues(label)
	m.oldest.DeleteLabelValues(label)
	m.epoch.DeleteLabelValues(label)
}
