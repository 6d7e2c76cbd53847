package kafka

import (
	"encoding/json"
	"log/slog"
	"strings"

	"github.com/prometheus/client_golang/prometheus"
)

// statistics is the part of librdkafka's statistics (its STATISTICS.md) that is exported.
type statistics struct {
	Brokers map[string]struct {
		Name     string `json:"nodename"`
		State    string `json:"state"`
		NodeID   int    `json:"nodeid"`
		Queued   int    `json:"outbuf_cnt"`
		Waiting  int    `json:"waitresp_cnt"`
		RTT      window `json:"rtt"`          // microseconds
		Throttle window `json:"throttle"`     // milliseconds
		Requests int64  `json:"tx"`           // grows
		Timeouts int64  `json:"req_timeouts"` // grows
	} `json:"brokers"`
	Topics map[string]struct {
		BatchRecords window `json:"batchcnt"`
	} `json:"topics"`
	EOS struct {
		State string `json:"idemp_state"`
	} `json:"eos"`
}

// window is one of librdkafka's rolling windows.
type window struct {
	Avg   int64 `json:"avg"`
	P50   int64 `json:"p50"`
	P99   int64 `json:"p99"`
	Count int64 `json:"cnt"`
	Sum   int64 `json:"sum"`
}

// brokerMetrics are set from the statistics of each lane.
type brokerMetrics struct {
	up, rtt, throttle, waiting, batch, idempotent *prometheus.GaugeVec
}

func newBrokerMetrics() brokerMetrics {
	vec := func(name, help string, labels ...string) *prometheus.GaugeVec {
		return prometheus.NewGaugeVec(prometheus.GaugeOpts{Name: name, Help: help}, labels)
	}
	return brokerMetrics{
		up:         vec("outbox_kafka_broker_up", "1 while the producer is connected to the broker.", "lane", "broker"),
		rtt:        vec("outbox_kafka_broker_rtt_seconds", "Round trip of requests to the broker, 99th percentile of the last interval.", "lane", "broker"),
		throttle:   vec("outbox_kafka_broker_throttle_seconds", "How long the broker makes us wait (quota), 99th percentile of the last interval.", "lane", "broker"),
		waiting:    vec("outbox_kafka_broker_waiting_requests", "Requests queued for or not yet answered by the broker.", "lane", "broker"),
		batch:      vec("outbox_kafka_batch_records", "Records per batch, mean over all topics of the last interval.", "lane"),
		idempotent: vec("outbox_kafka_producer_ready", "1 while the producer has its producer id.", "lane"),
	}
}

func (m *brokerMetrics) collectors() []prometheus.Collector {
	return []prometheus.Collector{m.up, m.rtt, m.throttle, m.waiting, m.batch, m.idempotent}
}

// stats exports one statistics event of a lane.
func (m *metrics) stats(lane, text string, log *slog.Logger) {
	var st statistics
	if err := json.Unmarshal([]byte(text), &st); err != nil {
		log.Warn("reading librdkafka's statistics", "error", err)
		return
	}
	m.brokers.set(lane, &st)
}

func (m *brokerMetrics) set(lane string, st *statistics) {
	// Brokers come and go; those that are gone must not stay.
	for _, v := range []*prometheus.GaugeVec{m.up, m.rtt, m.throttle, m.waiting} {
		v.DeletePartialMatch(prometheus.Labels{"lane": lane})
	}
	for _, b := range st.Brokers {
		if b.NodeID < 0 || b.Name == "" || strings.HasPrefix(b.Name, ":") { // bootstrap and internal ones
			continue
		}
		m.up.WithLabelValues(lane, b.Name).Set(truth(b.State == "UP"))
		m.rtt.WithLabelValues(lane, b.Name).Set(float64(b.RTT.P99) / 1e6)
		m.throttle.WithLabelValues(lane, b.Name).Set(float64(b.Throttle.P99) / 1e3)
		m.waiting.WithLabelValues(lane, b.Name).Set(float64(b.Queued + b.Waiting))
	}
	var records, batches int64
	for _, t := range st.Topics {
		records += t.BatchRecords.Sum
		batches += t.BatchRecords.Count
	}
	if batches > 0 {
		m.batch.WithLabelValues(lane).Set(float64(records) / float64(batches))
	}
	m.idempotent.WithLabelValues(lane).Set(truth(st.EOS.State == "Assigned"))
}

func truth(b bool) float64 {
	if b {
		return 1
	}
	return 0
}
