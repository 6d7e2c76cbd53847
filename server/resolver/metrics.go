package resolver

import (
	"fmt"

	"github.com/prometheus/client_golang/prometheus"
)

// The ways in which a transaction is resolved, as stored and as labels.
const (
	methodCheckBack = "check-back"
	methodDirect    = "direct"
	methodOperator  = "operator"
)

// metrics are what operators see of the resolver.
type metrics struct {
	resolved       *prometheus.CounterVec   // method, state
	answers        *prometheus.CounterVec   // method, outcome
	seconds        *prometheus.HistogramVec // method
	failures       *prometheus.CounterVec   // method
	naiveWrong     prometheus.Counter
	contradictions prometheus.Counter
	queued         prometheus.Gauge
	inDoubt        *prometheus.GaugeVec
	oldest         *prometheus.GaugeVec
}

func newMetrics(reg prometheus.Registerer) (*metrics, error) {
	counter := func(name, help string, labels ...string) *prometheus.CounterVec {
		return prometheus.NewCounterVec(prometheus.CounterOpts{Name: name, Help: help}, labels)
	}
	m := &metrics{
		resolved: counter("outbox_resolved_transactions_total", "Transactions that this server decided from evidence.", "method", "state"),
		answers:  counter("outbox_check_answers_total", "Answers about in-doubt transactions.", "method", "outcome"),
		failures: counter("outbox_check_failures_total", "Rounds in which nobody could be asked, by method. A rate that stays means that a source or its database is away.", "method"),
		seconds: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name: "outbox_resolution_seconds", Help: "Time from hearing of an in-doubt transaction to its decision.",
			Buckets: []float64{.005, .01, .02, .05, .1, .2, .5, 1, 2, 5, 10, 30, 60, 300, 3600},
		}, []string{"method"}),
		naiveWrong: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "outbox_naive_check_wrong_total", Help: "Decisions where pg_xact_status alone would have said the opposite, and published what never happened or dropped what did.",
		}),
		contradictions: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "outbox_resolver_contradictions_total", Help: "Markers found for transactions that are on record as ABORTED: the source and the platform disagree about history. Alert on it.",
		}),
		queued: prometheus.NewGauge(prometheus.GaugeOpts{
			Name: "outbox_resolver_queued_transactions", Help: "In-doubt transactions that this server is asking about.",
		}),
		inDoubt: prometheus.NewGaugeVec(prometheus.GaugeOpts{
			Name: "outbox_in_doubt_transactions", Help: "Undecided transactions whose events are parked, by source, in the whole platform.",
		}, []string{"source"}),
		oldest: prometheus.NewGaugeVec(prometheus.GaugeOpts{
			Name: "outbox_in_doubt_oldest_age_seconds", Help: "How long the oldest of them is parked. Alert on it.",
		}, []string{"source"}),
	}
	for _, c := range []prometheus.Collector{m.resolved, m.answers, m.failures, m.seconds, m.naiveWrong, m.contradictions, m.queued, m.inDoubt, m.oldest} {
		if err := reg.Register(c); err != nil {
			return nil, fmt.Errorf("registering the resolver's metrics: %w", err)
		}
	}
	for _, method := range []string{methodCheckBack, methodDirect, methodOperator} {
		for _, state := range []string{"committed", "aborted"} {
			m.resolved.WithLabelValues(method, state)
		}
		for _, o := range []outcome{committed, aborted, inProgress, unknown} {
			m.answers.WithLabelValues(method, outcomeName(o))
		}
		m.failures.WithLabelValues(method)
		m.seconds.WithLabelValues(method)
	}
	return m, nil
}

// outcomeName is an outcome as a label and in words.
func outcomeName(o outcome) string {
	switch o {
	case committed:
		return "committed"
	case aborted:
		return "aborted"
	case inProgress:
		return "in_progress"
	}
	return "unknown"
}
