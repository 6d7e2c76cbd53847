package kafka

import (
	"errors"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"time"

	ck "github.com/confluentinc/confluent-kafka-go/v2/kafka"

	"github.com/outbox-platform/outbox/relay"
)

// Pauses before a producer that died is rebuilt, and how long one must have lived for the next pause to be the first again.
const (
	rebuildFirst = 50 * time.Millisecond
	rebuildMost  = 15 * time.Second
	rebuildReset = 30 * time.Second
)

// retireWait is how long a producer that is being closed may take to give up what it has.
const retireWait = 2 * time.Second

// errQueueFull stands for relay.ErrSinkFull where a *relay.SinkError is wanted.
var errQueueFull = &relay.SinkError{Code: "_QUEUE_FULL"}

// errRebuilding refuses deliveries while a lane has no producer.
var errRebuilding = &relay.SinkError{Class: relay.ClassCluster, Code: "_STATE", Detail: "the producer is being rebuilt"}

// lane is one way to the cluster: a producer, replaced by a new one when it died.
type lane struct {
	sink *Sink
	name string
	solo bool

	fatal chan death // capacity 1

	mu      sync.RWMutex // held shared while the producer is used, so that none is closed under its users
	cur     *producer    // nil: not started, being rebuilt or closed
	started bool         // it had a producer, or is closed: supervise and close decide what follows
}

// death is a fatal error of a producer.
type death struct {
	of  *producer
	err error
}

func newLane(s *Sink, name string) *lane {
	return &lane{sink: s, name: name, solo: name == "solo", fatal: make(chan death, 1)}
}

// producer is the client of a lane.
type producer struct {
	*client
	lane        *lane
	born        time.Time
	outstanding atomic.Int64
	users       sync.WaitGroup // of calls that may take longer than the lane's lock should be held

	// dying is the class of everything that is not acknowledged any more; 0: it lives.
	dying   atomic.Int32
	drained chan struct{} // capacity 1: dying, and nothing is outstanding
}

// start gives the lane its first producer, unless it ever had one.
func (l *lane) start() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.started {
		return nil
	}
	p, err := l.build()
	if err != nil {
		return err
	}
	l.cur, l.started = p, true
	return nil
}

func (l *lane) build() (*producer, error) {
	p := &producer{lane: l, born: time.Now(), drained: make(chan struct{}, 1)}
	var err error
	if p.client, err = l.sink.connect(l.name, l.sink.cfg.producer(l.solo), nil); err != nil {
		return nil, err
	}
	go p.run(p)
	return p, nil
}

// produce hands an entry to librdkafka. nil: the producer owns it and will report it.
func (l *lane) produce(e *entry) *relay.SinkError {
	l.mu.RLock()
	defer l.mu.RUnlock()
	p := l.cur
	if p == nil {
		return errRebuilding
	}
	e.owner.Store(p)
	p.outstanding.Add(1)
	err := p.produce(e)
	if err == nil {
		return nil
	}
	p.outstanding.Add(-1)
	e.owner.Store(nil)
	return p.refusal(e.d.Record.Topic, err)
}

// refusal says what an error of Produce means. Nothing was queued.
func (p *producer) refusal(topic string, err error) *relay.SinkError {
	var e ck.Error
	if errors.As(err, &e) {
		switch e.Code() { //nolint:exhaustive // the others go by the table
		case ck.ErrQueueFull:
			return errQueueFull
		case ck.ErrFatal:
			p.died(e)
			return errRebuilding
		}
	}
	refusal := judge(err)
	if refusal.Class == relay.ClassTopic {
		p.lane.sink.topicFailed(topic, refusal)
	}
	return refusal
}

// delivered handles one delivery report.
func (p *producer) delivered(m *ck.Message) {
	s := p.lane.sink
	e := m.Opaque.(*entry) //nolint:forcetypeassert // produce sets nothing else
	err := m.TopicPartition.Error
	switch {
	case err == nil && m.TopicPartition.Offset < 0:
		s.unproven(e)
	case err == nil:
		if e.tooLarge {
			s.batchTooLarge(e.d.Record.Topic)
		}
		s.acknowledged(e, m.TopicPartition.Partition, int64(m.TopicPartition.Offset))
	case p.dying.Load() != 0:
		v := judge(err)
		s.failed(e, &relay.SinkError{Class: relay.Class(p.dying.Load()), Code: v.Code, Detail: v.Detail})
	default:
		p.refused(e, err)
	}
	if p.outstanding.Add(-1) == 0 && p.dying.Load() != 0 {
		p.signalDrained()
	}
}

// unproven reports a delivery that librdkafka calls acknowledged although no broker said where the record is. It concludes
// that from the acknowledgement of a later batch of the same partition, as brokers accept no gap. But they do from a
// producer that they do not know (yet): when the first batch of several under way is refused for the time being (leader not
// ready, too few replicas) and the second is accepted, the first is lost. Seen on Apache Kafka 4.4 with a new topic. Only
// delivering it again is safe; if it was written after all, that is a duplicate.
func (s *Sink) unproven(e *entry) {
	s.log.Warn("kafka acknowledged a record only by implication: it is delivered again", "topic", e.d.Record.Topic)
	s.implied.Add(1)
	s.failed(e, &relay.SinkError{Class: relay.ClassFatal, Code: "_NO_OFFSET", Detail: "acknowledged only by implication; it may not be stored"})
}

// refused handles a delivery that a living producer reports as failed.
func (p *producer) refused(e *entry, err error) {
	s := p.lane.sink
	v := judge(err)
	switch v.Class { //nolint:exhaustive // the others are only reported
	case relay.ClassRecord:
		if !p.lane.solo {
			// The whole batch was refused, and it may have been a neighbour's fault. Alone it gets a verdict of its own.
			p.retryAlone(e, v)
			return
		}
	case relay.ClassTopic:
		s.topicFailed(e.d.Record.Topic, v)
	case relay.ClassPurged:
		// librdkafka purges its queue by itself when it dies.
		if why := p.rd.GetFatalError(); why != nil {
			v.Class = relay.ClassFatal
			p.died(why)
		}
	case relay.ClassFatal:
		// Also when librdkafka would go on: its epoch wraps around after 32,767 refused or purged batches, and from then on
		// brokers refuse everything. Only a new producer id helps.
		p.died(err)
	}
	s.failed(e, v)
}

// retryAlone moves an entry to the solo lane.
func (p *producer) retryAlone(e *entry, refused *relay.SinkError) {
	s := p.lane.sink
	s.metrics.solo.Inc()
	e.owner.Store(nil)
	e.tooLarge = refused.Code == codeTooLarge
	if err := s.solo.start(); err != nil {
		s.failed(e, &relay.SinkError{Class: relay.ClassCluster, Code: "_STATE", Detail: err.Error()})
		return
	}
	switch v := s.solo.produce(e); v {
	case nil:
	case errQueueFull:
		s.failed(e, &relay.SinkError{Class: relay.ClassCluster, Code: v.Code, Detail: "the solo lane is full"})
	default:
		s.failed(e, v)
	}
}

// failed handles an error that concerns the producer and no record.
func (p *producer) failed(err ck.Error) {
	if err.IsFatal() {
		p.died(err)
		return
	}
	p.troubled(err)
}

// died tells the lane to replace this producer. More than one death of the same producer counts once.
func (p *producer) died(err error) {
	select {
	case p.lane.fatal <- death{p, err}:
	default:
	}
}

// supervise replaces producers that died, until the sink is closed.
func (l *lane) supervise() {
	var pause time.Duration
	for {
		select {
		case <-l.sink.life.Done():
			return
		case d := <-l.fatal:
			if time.Since(d.of.born) > rebuildReset {
				pause = 0
			}
			pause = min(max(2*pause, rebuildFirst), rebuildMost)
			l.replace(d, pause)
		}
	}
}

// replace takes the dead producer away, waits, and makes a new one.
func (l *lane) replace(d death, pause time.Duration) {
	s := l.sink
	l.mu.Lock()
	if l.cur != d.of {
		l.mu.Unlock()
		return
	}
	l.cur = nil
	l.mu.Unlock()

	if why := d.of.rd.GetFatalError(); why != nil {
		d.err = why // says more than the error of one call
	}
	v := judge(d.err)
	// A producer that may not do its work is a refusal by the cluster; delivering again at once would not help.
	class := relay.ClassFatal
	if v.Class == relay.ClassCluster {
		class = relay.ClassCluster
	}
	s.metrics.rebuilds.Inc()
	s.health.setProducer(l.name, "the producer died: "+v.Error())
	s.log.Error("the kafka producer died and is rebuilt", "lane", l.name, "code", v.Code, "error", v.Detail, "pause", pause)
	d.of.retire(class)

	for {
		if !s.sleep(pause + rand.N(pause/4+1)) {
			return
		}
		p, err := l.build()
		if err == nil {
			l.mu.Lock()
			l.cur = p
			l.mu.Unlock()
			s.health.setProducer(l.name, "")
			s.wakeWatch()
			return
		}
		s.log.Error("rebuilding the kafka producer", "lane", l.name, "error", err)
		pause = min(2*pause, rebuildMost)
	}
}

// retire closes a producer that nobody can get from its lane any more. Everything it has and that is not acknowledged
// meanwhile is reported with the class. When it returns, the producer sends nothing any more.
func (p *producer) retire(class relay.Class) {
	p.dying.Store(int32(class))
	p.purge()
	if p.outstanding.Load() > 0 {
		t := time.NewTimer(retireWait)
		select {
		case <-p.drained:
		case <-t.C:
		}
		t.Stop()
	}
	p.users.Wait()
	p.close()
	s := p.lane.sink
	for i := range s.entries {
		if e := &s.entries[i]; e.owner.Load() == p {
			s.failed(e, &relay.SinkError{Class: class, Code: "_DESTROY", Detail: "the producer was closed"})
		}
	}
}

// signalDrained wakes retire.
func (p *producer) signalDrained() {
	select {
	case p.drained <- struct{}{}:
	default:
	}
}

// purge drops what the lane's producer has.
func (l *lane) purge() {
	l.mu.RLock()
	defer l.mu.RUnlock()
	if l.cur != nil {
		l.cur.purge()
	}
}

// close ends the lane. supervise must have ended.
func (l *lane) close(class relay.Class) {
	l.mu.Lock()
	p := l.cur
	l.cur, l.started = nil, true
	l.mu.Unlock()
	if p != nil {
		p.retire(class)
	}
}

// use returns the lane's producer for a call that takes longer; it will not be closed before done is called. nil: there is
// none now.
func (l *lane) use() (p *producer, done func()) {
	l.mu.RLock()
	defer l.mu.RUnlock()
	if l.cur == nil {
		return nil, func() {}
	}
	p = l.cur
	p.users.Add(1)
	return p, p.users.Done
}
