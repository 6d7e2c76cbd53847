package server

import (
	"fmt"
	"time"

	grpcprometheus "github.com/grpc-ecosystem/go-grpc-prometheus"
	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"

	outboxv1 "github.com/outbox-platform/outbox/gen/go/outbox/v1"
	"github.com/outbox-platform/outbox/store"
)

// kinds is the number of store.Kind values.
const kinds = int(store.KindAbort) + 1

// codeCount is the number of gRPC codes.
const codeCount = int(codes.Unauthenticated) + 1

// metrics are what operators see of this server. Every combination of labels exists from the start, so that a rate over
// the first failure is right.
type metrics struct {
	calls          [kinds][codeCount]prometheus.Counter
	seconds        [kinds]prometheus.Observer
	decisions      [kinds]prometheus.Counter // Commit, Abort, and Publish which is its own
	byOperators    [kinds]prometheus.Counter // Commit and Abort
	prepares       prometheus.Counter
	events         prometheus.Counter
	eventBytes     prometheus.Counter
	openCalls      prometheus.Gauge
	sessions       prometheus.Gauge
	orphaned       prometheus.Counter
	strayAnswers   prometheus.Counter
	contradictions *prometheus.CounterVec
	refused        map[outboxv1.ErrorReason]prometheus.Counter
	undecodable    prometheus.Counter
	panics         prometheus.Counter
	storeUp        prometheus.Gauge
	ringFull       prometheus.Gauge
	logBytes       prometheus.Gauge
	unreleased     prometheus.Gauge
	rotations      prometheus.Counter
	truncations    prometheus.Counter
	purged         prometheus.Counter
}

func newMetrics(reg prometheus.Registerer) (*metrics, error) {
	r := registrar{reg: reg}
	m := &metrics{
		prepares:     r.counter("outbox_prepares_total", "Transactions stored durably and invisibly, repetitions included."),
		events:       r.counter("outbox_events_total", "Events accepted by Prepare and Publish, repetitions included."),
		eventBytes:   r.counter("outbox_event_bytes_total", "Bytes of these events: payloads, keys, headers and names."),
		openCalls:    r.gauge("outbox_open_calls", "Calls that wait for the store: the queue and the batches in flight."),
		sessions:     r.gauge("outbox_sessions", "Open sessions."),
		orphaned:     r.counter("outbox_orphaned_transactions_total", "Transactions whose session ended before their decision arrived; each is asked for at once."),
		strayAnswers: r.counter("outbox_stray_check_answers_total", "Check-back answers that nobody asked for or that came too late."),
		undecodable:  r.counter("outbox_undecodable_messages_total", "Messages that are not valid protobuf, or hold absurdly many elements; they are refused before any interceptor sees them."),
		panics:       r.counter("outbox_panics_total", "Calls that ended in a panic: bugs."),
		storeUp:      r.gauge("outbox_store_up", "1 while the store answers and is writable."),
		ringFull:     r.gauge("outbox_log_ring_full", "1 while the log cannot rotate because a shard is behind: the log grows. Alert on it."),
		logBytes:     r.gauge("outbox_log_bytes", "Bytes of the log, all generations."),
		unreleased:   r.gauge("outbox_log_generations", "Generations of the log that are not empty."),
		rotations:    r.counter("outbox_log_rotations_total", "Generations that this server closed."),
		truncations:  r.counter("outbox_log_truncations_total", "Generations that this server emptied."),
		purged:       r.counter("outbox_purged_transactions_total", "Transactions past retention that this server deleted."),
		refused:      make(map[outboxv1.ErrorReason]prometheus.Counter),
	}
	m.contradictions = r.counterVec("outbox_contradictions_total",
		"Calls that contradict the decision on record: the source and the platform disagree about history. Alert on it.", "call")
	calls := r.counterVec("outbox_calls_total", "Data calls that the store answered, unary and on sessions.", "call", "code")
	seconds := r.histogramVec("outbox_call_seconds", "Time from decoding a data call to its answer.", latencyBuckets, "call")
	decisions := r.counterVec("outbox_decisions_total", "Decisions taken from callers, repetitions included.", "state", "method")
	refused := r.counterVec("outbox_refused_calls_total", "Data calls refused before they got to the store, by reason.", "reason")
	if r.err != nil {
		return nil, r.err
	}
	for k := range kinds {
		name := kindName(store.Kind(k)) //nolint:gosec // small
		m.seconds[k] = seconds.WithLabelValues(name)
		m.contradictions.WithLabelValues(name)
		for c := range codeCount {
			m.calls[k][c] = calls.WithLabelValues(name, codes.Code(c).String()) //nolint:gosec // small
		}
	}
	m.decisions[store.KindCommit] = decisions.WithLabelValues("committed", "client")
	m.decisions[store.KindAbort] = decisions.WithLabelValues("aborted", "client")
	m.byOperators[store.KindCommit] = decisions.WithLabelValues("committed", "operator")
	m.byOperators[store.KindAbort] = decisions.WithLabelValues("aborted", "operator")
	m.decisions[store.KindPublish] = decisions.WithLabelValues("committed", "publish")
	for v, name := range outboxv1.ErrorReason_name {
		m.refused[outboxv1.ErrorReason(v)] = refused.WithLabelValues(name[len("ERROR_REASON_"):])
	}
	return m, nil
}

// latencyBuckets reach from a memory answer to the end of anybody's patience.
var latencyBuckets = []float64{.0005, .001, .002, .003, .005, .0075, .01, .015, .02, .03, .05, .1, .2, .5, 1, 2, 5, 10}

// observe counts an answer of the store.
func (m *metrics) observe(k store.Kind, code codes.Code, took time.Duration) {
	m.calls[k][code].Inc()
	m.seconds[k].Observe(took.Seconds())
	if code != codes.OK {
		return
	}
	if k == store.KindPrepare {
		m.prepares.Inc()
	} else {
		m.decisions[k].Inc()
	}
}

// refuse counts a call that did not get to the store.
func (m *metrics) refuse(e *apiError) { m.refused[e.reason].Inc() }

// WriterHooks registers the batch metrics and returns the function for store.WriterConfig.OnBatch.
func WriterHooks(reg prometheus.Registerer) (onBatch func(requests int, wait, statement time.Duration), err error) {
	r := registrar{reg: reg}
	size := r.histogram("outbox_batch_requests", "Requests in one batch of the writer.", []float64{1, 2, 4, 8, 16, 32, 64, 128, 256, 512})
	waits := r.histogram("outbox_batch_wait_seconds", "How long the oldest request of a batch waited in the queue.", latencyBuckets)
	statements := r.histogram("outbox_batch_statement_seconds", "How long the statement of a batch took, its commit included.", latencyBuckets)
	if r.err != nil {
		return nil, r.err
	}
	return func(requests int, wait, statement time.Duration) {
		size.Observe(float64(requests))
		waits.Observe(wait.Seconds())
		statements.Observe(statement.Seconds())
	}, nil
}

// rpcMetrics are the metrics that every gRPC server has, behind one constructor: go-grpc-prometheus is archived, and its
// successor has the same names.
type rpcMetrics struct {
	unary  grpc.UnaryServerInterceptor
	stream grpc.StreamServerInterceptor
	// initialize makes all combinations of labels exist.
	initialize func(*grpc.Server)
}

func newRPCMetrics(reg prometheus.Registerer) (*rpcMetrics, error) {
	m := grpcprometheus.NewServerMetrics()
	m.EnableHandlingTimeHistogram(grpcprometheus.WithHistogramBuckets(latencyBuckets))
	if err := reg.Register(m); err != nil {
		return nil, fmt.Errorf("registering the metrics of gRPC: %w", err)
	}
	return &rpcMetrics{unary: m.UnaryServerInterceptor(), stream: m.StreamServerInterceptor(), initialize: m.InitializeMetrics}, nil
}

// registrar registers metrics and keeps the first error.
type registrar struct {
	reg prometheus.Registerer
	err error
}

func (r *registrar) register(c prometheus.Collector) {
	if err := r.reg.Register(c); err != nil && r.err == nil {
		r.err = fmt.Errorf("registering metrics: %w", err)
	}
}

func (r *registrar) counter(name, help string) prometheus.Counter {
	c := prometheus.NewCounter(prometheus.CounterOpts{Name: name, Help: help})
	r.register(c)
	return c
}

func (r *registrar) counterVec(name, help string, labels ...string) *prometheus.CounterVec {
	c := prometheus.NewCounterVec(prometheus.CounterOpts{Name: name, Help: help}, labels)
	r.register(c)
	return c
}

func (r *registrar) gauge(name, help string) prometheus.Gauge {
	g := prometheus.NewGauge(prometheus.GaugeOpts{Name: name, Help: help})
	r.register(g)
	return g
}

func (r *registrar) histogram(name, help string, buckets []float64) prometheus.Histogram {
	h := prometheus.NewHistogram(prometheus.HistogramOpts{Name: name, Help: help, Buckets: buckets})
	r.register(h)
	return h
}

func (r *registrar) histogramVec(name, help string, buckets []float64, labels ...string) *prometheus.HistogramVec {
	h := prometheus.NewHistogramVec(prometheus.HistogramOpts{Name: name, Help: help, Buckets: buckets}, labels)
	r.register(h)
	return h
}
