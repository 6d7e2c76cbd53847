package kafka

import (
	"fmt"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/outbox-platform/outbox/relay"
)

// classNames are the values of the label class.
var classNames = [...]string{
	relay.ClassRecord: "record", relay.ClassTopic: "topic", relay.ClassCluster: "cluster", relay.ClassFatal: "fatal", relay.ClassPurged: "purged",
}

// perClass is one counter per class, looked up once.
type perClass [len(classNames)]prometheus.Counter

// metrics of a sink.
type metrics struct {
	acked    prometheus.Counter
	failures perClass
	refusals perClass
	errors   perClass
	seconds  prometheus.Histogram
	solo     prometheus.Counter
	rebuilds prometheus.Counter
	// of the transactional mode:
	committed, aborted prometheus.Counter
	brokers            brokerMetrics
	all                []prometheus.Collector
}

func newMetrics(s *Sink) *metrics {
	m := &metrics{}
	gauge := func(name, help string, value func() float64) {
		m.all = append(m.all, prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: name, Help: help}, value))
	}
	gauge("outbox_kafka_up", "1 while the Kafka cluster answers and acknowledges. Alert when 0 for a minute: nothing is published meanwhile.", func() float64 {
		if ok, _ := s.Healthy(); ok {
			return 1
		}
		return 0
	})
	gauge("outbox_kafka_queued_records", "Records handed to the Kafka producer and not yet reported.", func() float64 { return float64(s.Queued()) })
	gauge("outbox_kafka_queued_bytes", "Bytes of those records.", func() float64 { return float64(s.queuedBytes()) })
	gauge("outbox_kafka_unread_reports", "Delivery reports that the relay has not read yet. Near the queue's limit: the relay is the bottleneck.", func() float64 { return float64(len(s.reports)) })

	deliveries := prometheus.NewCounterVec(prometheus.CounterOpts{
		Name: "outbox_kafka_deliveries_total", Help: "Deliveries reported, by outcome: ok, or the class of the failure.",
	}, []string{"outcome"})
	refusals := prometheus.NewCounterVec(prometheus.CounterOpts{
		Name: "outbox_kafka_refusals_total", Help: "Deliveries refused on the spot, by class.",
	}, []string{"class"})
	errors := prometheus.NewCounterVec(prometheus.CounterOpts{
		Name: "outbox_kafka_client_errors_total", Help: "Errors of the Kafka client that concern no single record, by class.",
	}, []string{"class"})
	m.acked = deliveries.WithLabelValues("ok")
	for class := relay.ClassRecord; int(class) < len(classNames); class++ {
		m.failures[class] = deliveries.WithLabelValues(classNames[class])
		m.refusals[class] = refusals.WithLabelValues(classNames[class])
		m.errors[class] = errors.WithLabelValues(classNames[class])
	}
	m.seconds = prometheus.NewHistogram(prometheus.HistogramOpts{
		Name: "outbox_kafka_delivery_seconds", Help: "Time from handing a record to the producer to its acknowledgement.",
		Buckets: []float64{.0005, .001, .002, .003, .005, .01, .025, .05, .1, .25, .5, 1, 2.5, 5, 10, 30, 60},
	})
	m.solo = prometheus.NewCounter(prometheus.CounterOpts{
		Name: "outbox_kafka_solo_retries_total", Help: "Records of refused batches that were tried again alone. Steady growth: a topic's max.message.bytes is smaller than batches; raise it.",
	})
	m.rebuilds = prometheus.NewCounter(prometheus.CounterOpts{
		Name: "outbox_kafka_producer_rebuilds_total", Help: "Kafka producers replaced after a fatal error.",
	})
	transactions := prometheus.NewCounterVec(prometheus.CounterOpts{
		Name: "outbox_kafka_transactions_total", Help: "Kafka transactions of the transactional mode, by outcome: committed or aborted. Many aborted ones: a topic refuses records, or the cluster is in trouble.",
	}, []string{"outcome"})
	m.committed, m.aborted = transactions.WithLabelValues("committed"), transactions.WithLabelValues("aborted")
	m.all = append(m.all, transactions)
	m.brokers = newBrokerMetrics()
	m.all = append(m.all, deliveries, refusals, errors, m.seconds, m.solo, m.rebuilds)
	m.all = append(m.all, m.brokers.collectors()...)
	return m
}

func (m *metrics) acknowledged(after time.Duration) {
	m.acked.Inc()
	m.seconds.Observe(after.Seconds())
}

func (m *metrics) failed(err *relay.SinkError)  { m.failures[err.Class].Inc() }
func (m *metrics) refused(err *relay.SinkError) { m.refusals[err.Class].Inc() }

// register registers everything or nothing. r may be nil.
func (m *metrics) register(r prometheus.Registerer) error {
	if r == nil {
		return nil
	}
	for i, c := range m.all {
		if err := r.Register(c); err != nil {
			for _, done := range m.all[:i] {
				r.Unregister(done)
			}
			return fmt.Errorf("registering kafka metrics: %w", err)
		}
	}
	return nil
}

func (m *metrics) unregister(r prometheus.Registerer) {
	if r == nil {
		return
	}
	for _, c := range m.all {
		r.Unregister(c)
	}
}
