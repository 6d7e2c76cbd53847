package kafka

import (
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/twmb/franz-go/pkg/kmsg"

	broker "github.com/outbox-platform/outbox/embedded/kafka"
	"github.com/outbox-platform/outbox/relay"
)

func TestWaveSizeFollowsTheTimeOfWaves(t *testing.T) {
	z := &waveSize{bound: maxWaveBytes}
	const timeout = 8 * time.Second
	for _, s := range []struct {
		what      string
		bytes     int64
		took      time.Duration
		committed bool
		want      int64
	}{
		{"neither slow nor quick", 16 << 20, 3 * time.Second, true, 16 << 20},
		{"slow, and committed", 12 << 20, 5 * time.Second, true, 6 << 20},
		{"aborted as it took too long", 4 << 20, 8 * time.Second, false, 2 << 20},
		{"one record that is larger", 10 << 20, 8 * time.Second, false, 2 << 20},
		{"slow, but hardly for what it carried", 1 << 10, 8 * time.Second, false, 2 << 20},
		{"slow and little", 300 << 10, 8 * time.Second, true, 256 << 10},
		{"aborted at once for another reason", 256 << 10, time.Millisecond, false, 256 << 10},
		{"quick, with little", 128 << 10, time.Millisecond, true, 256 << 10},
		{"quick", 250 << 10, time.Millisecond, true, 512 << 10},
	} {
		if z.took(&wave{bytes: s.bytes, committed: s.committed}, s.took, timeout); z.bound != s.want {
			t.Fatalf("%s: %d bytes, want %d", s.what, z.bound, s.want)
		}
	}
	for range 10 {
		z.took(&wave{bytes: z.bound, committed: true}, time.Millisecond, timeout)
	}
	if z.bound != maxWaveBytes {
		t.Errorf("%d bytes at the most", z.bound)
	}
}

// TestSlowClusterGetsSmallerTransactions: a backlog that does not get through in the time of one transaction gets through in
// several, at the price of a few producers.
func TestSlowClusterGetsSmallerTransactions(t *testing.T) {
	f := fake(t, broker.FakeConfig{Topics: map[string]int{"t": 1}})
	const perSecond = 2 << 20
	f.Cluster().ControlKey(int16(kmsg.Produce), func(r kmsg.Request) (kmsg.Response, error, bool) {
		f.Cluster().KeepControl()
		size := 0
		for _, topic := range r.(*kmsg.ProduceRequest).Topics {
			for _, p := range topic.Partitions {
				size += len(p.Records)
			}
		}
		f.Cluster().SleepControl(func() { <-time.After(time.Duration(size) * time.Second / perSecond) })
		return nil, nil, false
	})
	mode := transactional(t, func(c *Config) { c.TransactionTimeout, c.Compression = 2*time.Second, "none" })
	s := newSink(t, f.Bootstrap(), mode)
	const n = 600
	var ds []*relay.Delivery
	for i := range n {
		ds = append(ds, delivery("t", "k", i, strings.Repeat("v", 10_000))) // one key: no order to keep here
	}
	for epoch := int64(1); len(ds) > 0; epoch++ {
		fence(t, s, 0, epoch)
		all := make(chan struct{}) // are delivered: what comes after the first wave is one
		hold := func() { <-all }
		s.transactions.all()[0].beforeCommit.Store(&hold)
		var again []*relay.Delivery
		accepted := 0
		for _, d := range ds {
			if s.Deliver(of(0, epoch, d)) != nil {
				again = append(again, d)
			} else {
				accepted++
			}
		}
		close(all)
		for _, d := range reports(t, s, accepted) {
			if d.Err != nil {
				if e := new(relay.SinkError); errors.As(d.Err, &e) && e.Class == relay.ClassTopic {
					t.Errorf("its topic's fault: %v", e)
				}
				again = append(again, d)
			}
		}
		if ds = again; len(ds) > 0 && epoch == 8 {
			t.Fatalf("%d records left after %d producers", len(ds), epoch)
		}
	}
	if got := len(committed(t, f.Bootstrap(), "t")); got != n {
		t.Errorf("%d records", got)
	}
}
