package kafka

import (
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	dto "github.com/prometheus/client_model/go"

	broker "github.com/outbox-platform/outbox/embedded/kafka"
)

// soloCount is the value of the counter.
func (m *metrics) soloCount() float64 {
	var v dto.Metric
	_ = m.solo.Write(&v) // a counter always can
	return v.GetCounter().GetValue()
}

// gathered returns the value of every series with at most one label, as name or name/value.
func gathered(tb testing.TB, r *prometheus.Registry) map[string]float64 {
	tb.Helper()
	families, err := r.Gather()
	if err != nil {
		tb.Fatal(err)
	}
	values := map[string]float64{}
	for _, f := range families {
		for _, m := range f.GetMetric() {
			name := f.GetName()
			for _, l := range m.GetLabel() {
				name += "/" + l.GetValue()
			}
			values[name] = m.GetCounter().GetValue() + m.GetGauge().GetValue() + float64(m.GetHistogram().GetSampleCount())
		}
	}
	return values
}

func TestMetrics(t *testing.T) {
	f := fake(t, broker.FakeConfig{Topics: map[string]int{"t": 1}})
	r := prometheus.NewRegistry()
	s := newSink(t, f.Bootstrap(), func(cfg *Config) { cfg.Registerer = r; cfg.StatsInterval = 50 * time.Millisecond })
	deliver(t, s, delivery("t", "k", 1, "v"))
	allOK(t, reports(t, s, 1))
	if err := s.Deliver(delivery("not/legal", "k", 2, "v")); err == nil {
		t.Error("no error")
	}
	address := f.Cluster().ListenAddrs()[0]
	eventually(t, "statistics of the broker", func() bool { return gathered(t, r)["outbox_kafka_broker_up/"+address+"/batch"] == 1 })
	got := gathered(t, r)
	for name, want := range map[string]float64{
		"outbox_kafka_up":                              1,
		"outbox_kafka_queued_records":                  0,
		"outbox_kafka_queued_bytes":                    0,
		"outbox_kafka_unread_reports":                  0,
		"outbox_kafka_deliveries_total/ok":             1,
		"outbox_kafka_deliveries_total/topic":          0,
		"outbox_kafka_refusals_total/topic":            1,
		"outbox_kafka_refusals_total/record":           0,
		"outbox_kafka_delivery_seconds":                1,
		"outbox_kafka_solo_retries_total":              0,
		"outbox_kafka_producer_rebuilds_total":         0,
		"outbox_kafka_producer_ready/batch":            1,
		"outbox_kafka_broker_up/" + address + "/batch": 1,
	} {
		if v, ok := got[name]; !ok || v != want {
			t.Errorf("%s = %v (there: %v), want %v", name, v, ok, want)
		}
	}
	if _, err := New(t.Context(), Config{Brokers: []string{f.Bootstrap()}, Registerer: r}); err == nil {
		t.Error("metrics registered twice")
	}
}

// rebuildCount is the value of the counter.
func (m *metrics) rebuildCount() float64 {
	var v dto.Metric
	_ = m.rebuilds.Write(&v) // a counter always can
	return v.GetCounter().GetValue()
}
