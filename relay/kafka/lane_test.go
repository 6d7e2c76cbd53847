package kafka

import (
	"context"
	"errors"
	"fmt"
	"testing"
	"time"

	ck "github.com/confluentinc/confluent-kafka-go/v2/kafka"
	"github.com/twmb/franz-go/pkg/kerr"
	"github.com/twmb/franz-go/pkg/kfake"
	"github.com/twmb/franz-go/pkg/kmsg"

	broker "github.com/outbox-platform/outbox/embedded/kafka"
	"github.com/outbox-platform/outbox/relay"
)

// current returns the batch lane's producer.
func (s *Sink) current(tb testing.TB) *producer {
	tb.Helper()
	p, done := s.batch.use()
	done()
	return p
}

// TestFatalErrorFromTheBroker: the broker says that the sequence is broken. Everything outstanding is reported as fatal, the
// producer is replaced, and delivery goes on.
func TestFatalErrorFromTheBroker(t *testing.T) {
	f := fake(t, broker.FakeConfig{Topics: map[string]int{"t": 4}})
	s := newSink(t, f.Bootstrap(), nil)
	deliver(t, s, delivery("t", "warm", -1, "v"))
	allOK(t, reports(t, s, 1))
	first := s.current(t)

	f.Cluster().Fault(kfake.Fault{Keys: []kmsg.Key{kmsg.Produce}, Err: kerr.OutOfOrderSequenceNumber, Count: -1, When: ofFirstProducer()})
	const n = 100
	accepted := 0
	for i := range n {
		if err := s.Deliver(delivery("t", fmt.Sprint(i), i, "v")); err != nil {
			wantClass(t, err, relay.ClassCluster) // it is already being rebuilt
			break
		}
		accepted++
	}
	if accepted == 0 {
		t.Fatal("nothing was accepted")
	}
	fatal := 0
	for _, d := range reports(t, s, accepted) {
		var e *relay.SinkError
		switch {
		case errors.As(d.Err, &e) && e.Class == relay.ClassFatal:
			fatal++
		case e == nil || e.Class != relay.ClassCluster || e.Code != "_STATE": // taken in the moment of its death, and never handed over
			t.Errorf("report %#v", d.Err)
		}
	}
	if fatal == 0 {
		t.Fatal("nothing was reported as fatal")
	}
	eventually(t, "rebuilt", func() bool { p := s.current(t); return p != nil && p != first })
	for i := range n {
		deliver(t, s, delivery("t", fmt.Sprint(i), n+i, "v"))
	}
	allOK(t, reports(t, s, n))
	noReport(t, s)
	if v := s.metrics.rebuildCount(); v != 1 {
		t.Errorf("%v rebuilds", v)
	}
	healthy(t, s)
}

// TestImpliedAcknowledgement: a partition whose broker does not know our producer yet refuses the first batch for the time
// being and accepts the second, which is under way as well. librdkafka then calls the first acknowledged although it is
// lost. It must be told as not delivered.
func TestImpliedAcknowledgement(t *testing.T) {
	f := fake(t, broker.FakeConfig{Topics: map[string]int{"t": 1}})
	other := newSink(t, f.Bootstrap(), nil)
	deliver(t, other, delivery("t", "other", -1, "v")) // the partition is not new, only our producer is
	allOK(t, reports(t, other, 1))

	const keys = 40
	implied, total := int64(0), 0
	for try := 0; implied == 0; try++ {
		if try == 50 {
			t.Fatal("no acknowledgement was implied")
		}
		s := newSink(t, f.Bootstrap(), nil)
		f.Cluster().Fault(kfake.Fault{Keys: []kmsg.Key{kmsg.Produce}, Err: kerr.NotEnoughReplicas, Count: 1})
		waiting := map[int]*relay.Delivery{}
		for i := range keys {
			d := delivery("t", fmt.Sprint(i), total+i, "v")
			waiting[total+i] = d
			deliver(t, s, d)
		}
		for len(waiting) > 0 {
			for id, d := range reports(t, s, len(waiting)) {
				if d.Err == nil {
					delete(waiting, id)
					continue
				}
				wantClass(t, d.Err, relay.ClassFatal)
				deliver(t, s, d)
			}
		}
		total += keys
		implied = s.implied.Load()
	}
	seen := map[int]bool{}
	for _, r := range readAll(t, f.Bootstrap(), "t") {
		seen[index(t, r)] = true
	}
	for i := range total {
		if !seen[i] {
			t.Errorf("record %d was acknowledged and is lost", i)
		}
	}
	t.Logf("%d implied acknowledgements of %d records", implied, total)
}

// TestFencedProducerID: an epoch that the broker does not accept (any more) is no fatal error for librdkafka, but for us: only
// a new producer id helps.
func TestFencedProducerID(t *testing.T) {
	f := fake(t, broker.FakeConfig{Topics: map[string]int{"t": 1}})
	s := newSink(t, f.Bootstrap(), nil)
	f.Cluster().Fault(kfake.Fault{Keys: []kmsg.Key{kmsg.Produce}, Err: kerr.InvalidProducerEpoch, Count: -1, When: ofFirstProducer()})
	deliver(t, s, delivery("t", "k", 1, "v"))
	wantClass(t, reports(t, s, 1)[1].Err, relay.ClassFatal)
	eventually(t, "delivered by a new producer", func() bool {
		if err := s.Deliver(delivery("t", "k", 2, "v")); err != nil {
			wantClass(t, err, relay.ClassCluster)
			return false
		}
		return reports(t, s, 1)[2].Err == nil
	})
	if all := readAll(t, f.Bootstrap(), "t"); len(all) != 1 || index(t, all[0]) != 2 {
		t.Errorf("%d records, the first %v", len(all), all)
	}
}

// TestFatalErrorsUnderLoad kills the producer again and again while records flow: none is lost, none is reordered.
func TestFatalErrorsUnderLoad(t *testing.T) {
	onBoth(t, func(t *testing.T, c cluster) {
		topic := createTopic(t, c, 4, nil)
		s := newSink(t, c.Bootstrap(), nil)
		deaths := 0
		g := &gate{tb: t, s: s, topic: topic, each: 100, onDone: func(done int) {
			if done%1000 == 500 && deaths < 4 {
				if p := s.current(t); p != nil {
					deaths++
					p.rd.TestFatalError(ck.ErrOutOfOrderSequenceNumber, "injected")
				}
			}
		}}
		g.run(50)
		duplicates := g.check(readAll(t, c.Bootstrap(), topic), 50)
		t.Logf("%d deaths, %d rebuilds, delivered again %v, %d duplicates", deaths, int(s.metrics.rebuildCount()), g.again, duplicates)
		if deaths == 0 || int(s.metrics.rebuildCount()) != deaths {
			t.Errorf("%d deaths, %v rebuilds", deaths, s.metrics.rebuildCount())
		}
	})
}

// TestDeliverWhileRebuilding: without a producer, deliveries are refused as the cluster's fault, at once.
func TestDeliverWhileRebuilding(t *testing.T) {
	f := fake(t, broker.FakeConfig{Topics: map[string]int{"t": 1}})
	s := newSink(t, f.Bootstrap(), nil)
	deliver(t, s, delivery("t", "k", 0, "v"))
	allOK(t, reports(t, s, 1))
	s.current(t).rd.TestFatalError(ck.ErrFenced, "injected")
	refused := false
	eventually(t, "delivered by the new producer", func() bool {
		if err := s.Deliver(delivery("t", "k", 1, "v")); err != nil {
			wantClass(t, err, relay.ClassCluster)
			refused = true
			return false
		}
		return reports(t, s, 1)[1].Err == nil
	})
	if !refused {
		t.Error("no delivery was refused while the producer was rebuilt")
	}
}

// TestProducerIDRefused: a cluster that does not let us have a producer id refuses us altogether. No attempt is counted, the
// pauses grow, and it recovers when the right is granted.
func TestProducerIDRefused(t *testing.T) {
	f := fake(t, broker.FakeConfig{Topics: map[string]int{"t": 1}})
	h := f.Cluster().Fault(kfake.Fault{Keys: []kmsg.Key{kmsg.InitProducerID}, TopLevel: true, Err: kerr.ClusterAuthorizationFailed, Count: -1})
	s := newSink(t, f.Bootstrap(), nil)
	eventually(t, "two deaths", func() bool { return s.metrics.rebuildCount() >= 2 })
	if ok, why := s.Healthy(); ok {
		t.Error("healthy", why)
	}
	h.Remove()
	eventually(t, "delivered", func() bool {
		if err := s.Deliver(delivery("t", "k", 1, "v")); err != nil {
			wantClass(t, err, relay.ClassCluster)
			return false
		}
		d := reports(t, s, 1)[1]
		if d.Err != nil {
			wantClass(t, d.Err, relay.ClassCluster)
		}
		return d.Err == nil
	})
}

// TestCloseWhileDying: each delivery is reported once, also when the producer dies as the sink is closed.
func TestCloseWhileDying(t *testing.T) {
	f := fake(t, broker.FakeConfig{Topics: map[string]int{"t": 4}})
	s := newSink(t, f.Bootstrap(), nil)
	healthy(t, s)
	f.Cluster().Fault(kfake.Fault{Keys: []kmsg.Key{kmsg.Produce}, Err: kerr.NotEnoughReplicas, Count: -1})
	const n = 100
	for i := range n {
		deliver(t, s, delivery("t", fmt.Sprint(i), i, "v"))
	}
	s.current(t).rd.TestFatalError(ck.ErrOutOfOrderSequenceNumber, "injected")
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
	defer cancel()
	_ = s.Close(ctx) // in time or not: what counts is that all are reported
	for _, d := range reports(t, s, n) {
		if d.Err == nil {
			t.Error("acknowledged?")
		}
	}
	if _, open := <-s.Reports(); open {
		t.Error("reports still open")
	}
}

// TestBrokerKilled kills the only broker with SIGKILL under load and starts it again: no delivery fails, nothing is lost,
// nothing is duplicated, nothing is reordered.
func TestBrokerKilled(t *testing.T) {
	a, err := broker.StartApache(t.Context(), broker.ApacheConfig{Heap: "256m"})
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := a.Stop(context.Background()); err != nil {
			t.Error(err)
		}
	}()
	if err := a.CreateTopic(t.Context(), "t", 3, nil); err != nil {
		t.Fatal(err)
	}
	s := newSink(t, a.Bootstrap(), nil)
	restarted := make(chan error, 1)
	sick := make(chan string, 1)
	g := &gate{tb: t, s: s, topic: "t", each: 100}
	g.onDone = func(done int) {
		if done != 5_000 {
			return
		}
		a.Kill(0)
		go func() {
			eventually(t, "unhealthy", func() bool {
				ok, why := s.Healthy()
				if !ok {
					sick <- why
				}
				return !ok
			})
			restarted <- a.Restart(t.Context(), 0)
		}()
	}
	g.run(100)
	if err := <-restarted; err != nil {
		t.Fatal(err)
	}
	t.Logf("while it was away: %s; delivered again %v", <-sick, g.again)
	healthy(t, s)
	implied := int(s.implied.Load()) // a new topic may refuse first batches
	again := 0
	for _, n := range g.again {
		again += n
	}
	if d := g.check(readAll(t, a.Bootstrap(), "t"), 100); d > implied || again != implied {
		t.Errorf("%d duplicates, delivered again %v, implied %d", d, g.again, implied)
	}
}

// TestClusterAway: a sink starts while nobody answers, says so, holds what it is given, and delivers it when the cluster
// comes.
func TestClusterAway(t *testing.T) {
	f := fake(t, broker.FakeConfig{Dir: t.TempDir(), Topics: map[string]int{"t": 2}})
	address := f.Bootstrap()
	f.Close()
	s := newSink(t, address, nil)
	if ok, why := s.Healthy(); ok || why == "" {
		t.Errorf("healthy %v %q", ok, why)
	}
	deliver(t, s, delivery("t", "a", 1, "v"), delivery("t", "b", 2, "v"))
	if _, ok := goesTo(s, "t", []byte("a")); ok {
		t.Error("the partition is known although nobody answers")
	}
	ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	if _, err := s.Topics(ctx, nil); err == nil {
		t.Error("no error from Topics")
	}
	noReport(t, s)
	s.Purge()
	for _, d := range reports(t, s, 2) {
		wantClass(t, d.Err, relay.ClassPurged)
	}
	deliver(t, s, delivery("t", "a", 3, "v"))

	var port int
	if _, err := fmt.Sscanf(address, "127.0.0.1:%d", &port); err != nil {
		t.Fatal(err)
	}
	fake(t, broker.FakeConfig{Port: port, Topics: map[string]int{"t": 2}})
	allOK(t, reports(t, s, 1))
	healthy(t, s)
}

// TestStall: a cluster that answers but acknowledges nothing is not healthy, and is again as soon as it does.
func TestStall(t *testing.T) {
	f := fake(t, broker.FakeConfig{Topics: map[string]int{"t": 1}})
	s := newSink(t, f.Bootstrap(), func(cfg *Config) { cfg.StallAfter = 200 * time.Millisecond })
	healthy(t, s)
	h := f.Cluster().Fault(kfake.Fault{Keys: []kmsg.Key{kmsg.Produce}, Err: kerr.NotEnoughReplicas, Count: -1})
	deliver(t, s, delivery("t", "k", 1, "v"))
	eventually(t, "stalled", func() bool { ok, _ := s.Healthy(); return !ok })
	h.Remove()
	allOK(t, reports(t, s, 1))
	healthy(t, s)
}
