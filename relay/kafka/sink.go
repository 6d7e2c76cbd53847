package kafka

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"

	"github.com/outbox-platform/outbox/relay"
)

// Sink delivers records over librdkafka. Its methods are safe for concurrent use.
type Sink struct {
	cfg     Config
	log     *slog.Logger
	metrics *metrics

	// batch is the ordinary lane. solo sends every record in a batch of its own, for those refused in company; it is a
	// second connection to the cluster and started when first needed.
	batch *lane
	solo  *lane
	// transactions carry the records in transactional mode; nil: the lanes do. Then batch only asks for topics.
	transactions *transactions

	// reports never blocks its senders: deliveries are accepted only while all reports, those still to come and those not
	// read yet, have room in it.
	reports chan *relay.Delivery

	health health
	wake   chan struct{}   // capacity 1: watch has something to do
	life   context.Context // of the background work; ended by Close
	end    context.CancelFunc
	wg     sync.WaitGroup

	seeded  bool         // of watch: the cache has had all topics
	implied atomic.Int64 // acknowledgements by implication only
	lastAck atomic.Int64 // Unix nanoseconds of the last acknowledgement

	mu      sync.Mutex // guards all below
	closed  bool
	drained chan struct{} // closed when closed and nothing is in use
	entries []entry
	free    *entry
	inUse   int
	bytes   int64
	busy    time.Time // since when inUse > 0
	topics  map[string]*topic
	asking  map[string]struct{} // topics to be looked up
}

var _ relay.Fencer = (*Sink)(nil)

// entry is one accepted delivery until its report. Entries are reused; there are Config.MaxQueued of them.
type entry struct {
	d     *relay.Delivery
	bytes int64
	since time.Time
	next  *entry // in the free list
	// tooLarge: a batch with it was too large; that it is stored alone shows that it was not.
	tooLarge bool
	// Of a transactor: alone is in a batch of its own, apart in a transaction without other topics; the report of librdkafka,
	// which counts when the transaction ends, and what is reported whatever becomes of that.
	alone, apart bool
	partition    int32
	offset       int64
	err          error
	verdict      *relay.SinkError
	// owner has handed it to librdkafka and will report it; nil: it is held, moving between lanes, or free.
	owner atomic.Pointer[producer]
}

// New starts a Sink. It contacts the cluster in the background, so that it starts while the cluster is away. ctx only
// carries values: the Sink works until Close. An error means that the configuration is wrong.
func New(ctx context.Context, cfg Config) (*Sink, error) {
	if err := cfg.Validate(); err != nil {
		return nil, err
	}
	cfg = cfg.withDefaults()
	life, end := context.WithCancel(context.WithoutCancel(ctx))
	s := &Sink{
		cfg:     cfg,
		log:     cfg.Logger,
		reports: make(chan *relay.Delivery, cfg.MaxQueued),
		wake:    make(chan struct{}, 1),
		life:    life,
		end:     end,
		drained: make(chan struct{}),
		entries: make([]entry, cfg.MaxQueued),
		topics:  make(map[string]*topic),
		asking:  make(map[string]struct{}),
	}
	for i := range s.entries {
		s.entries[i].next = s.free
		s.free = &s.entries[i]
	}
	s.health.init(cfg.Logger)
	s.metrics = newMetrics(s)
	if cfg.Transactional {
		s.transactions = newTransactions(s)
		if err := s.transactions.check(); err != nil {
			end()
			return nil, err
		}
	}
	s.batch = newLane(s, "batch")
	s.solo = newLane(s, "solo")
	if err := s.batch.start(); err != nil {
		end()
		return nil, err
	}
	if err := s.metrics.register(cfg.Registerer); err != nil {
		end()
		s.batch.close(relay.ClassPurged)
		return nil, err
	}
	s.wg.Go(s.batch.supervise)
	s.wg.Go(s.solo.supervise)
	s.wg.Go(s.watch)
	s.wakeWatch()
	return s, nil
}

// Deliver implements relay.Sink. d and its record belong to the Sink until the report: a record that is refused in company
// is delivered once more, alone.
func (s *Sink) Deliver(d *relay.Delivery) error {
	d.Partition, d.Offset, d.Err = -1, -1, nil
	size := recordBytes(&d.Record)

	s.mu.Lock()
	if s.closed {
		s.mu.Unlock()
		return s.refuse(&relay.SinkError{Class: relay.ClassCluster, Code: "_DESTROY", Detail: "the sink is closed"})
	}
	t, refusal := s.topicFor(d.Record.Topic)
	if refusal != nil {
		s.mu.Unlock()
		return s.refuse(refusal)
	}
	if s.inUse+len(s.reports) >= s.cfg.MaxQueued || (s.inUse > 0 && s.bytes+size > s.cfg.MaxQueuedBytes) {
		s.mu.Unlock()
		return relay.ErrSinkFull
	}
	e := s.take(d, size)
	if s.transactions != nil {
		if t.version == 0 { // it is known to be there; whether we may write it is not
			s.doubt(d.Record.Topic, t)
		}
		e.apart = time.Now().Before(t.apartUntil)
	}
	if t.state == topicAsking {
		t.held = append(t.held, e)
		s.mu.Unlock()
		return nil
	}
	lane := s.laneOf(t)
	s.mu.Unlock()

	if err := s.hand(e, lane); err != nil {
		s.release(e)
		return s.refuse(err)
	}
	return nil
}

// hand gives an entry to what carries it: a lane, or its shard's transactor.
func (s *Sink) hand(e *entry, l *lane) *relay.SinkError {
	if s.transactions != nil {
		return s.transactions.hand(e)
	}
	return l.produce(e)
}

// refuse counts a delivery that is refused on the spot.
func (s *Sink) refuse(err *relay.SinkError) error {
	if err == errQueueFull {
		return relay.ErrSinkFull
	}
	s.metrics.refused(err)
	return err
}

// laneOf returns the lane for a topic. s.mu is held.
func (s *Sink) laneOf(t *topic) *lane {
	if t.alone(time.Now()) {
		return s.solo
	}
	return s.batch
}

// sleep waits; false: the sink is closing.
func (s *Sink) sleep(d time.Duration) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return true
	case <-s.life.Done():
		return false
	}
}

// take turns a delivery into an entry. s.mu is held, and there is room.
func (s *Sink) take(d *relay.Delivery, size int64) *entry {
	e := s.free
	s.free = e.next
	e.next, e.d, e.bytes, e.since, e.tooLarge = nil, d, size, time.Now(), false
	e.alone, e.apart, e.err, e.verdict = false, false, nil, nil
	if s.inUse == 0 {
		s.busy = e.since
	}
	s.inUse++
	s.bytes += size
	return e
}

// release takes an entry back.
func (s *Sink) release(e *entry) {
	e.owner.Store(nil)
	s.mu.Lock()
	defer s.mu.Unlock()
	s.inUse--
	s.bytes -= e.bytes
	e.d = nil
	e.next = s.free
	s.free = e
	if s.closed && s.inUse == 0 {
		close(s.drained)
	}
}

// acknowledged reports a delivery that is stored.
func (s *Sink) acknowledged(e *entry, partition int32, offset int64) {
	now := time.Now()
	s.lastAck.Store(now.UnixNano())
	s.health.contact()
	s.metrics.acknowledged(now.Sub(e.since))
	e.d.Partition, e.d.Offset = partition, offset
	s.report(e)
}

// failed reports a delivery that is not, or not for certain.
func (s *Sink) failed(e *entry, err *relay.SinkError) {
	s.metrics.failed(err)
	e.d.Err = err
	s.report(e)
}

// report hands a delivery back. First the report, then the entry: in between it counts twice, which keeps the channel from
// ever being full.
func (s *Sink) report(e *entry) {
	s.reports <- e.d
	s.release(e)
}

// Reports implements relay.Sink.
func (s *Sink) Reports() <-chan *relay.Delivery { return s.reports }

// Purge implements relay.Sink. What is on its way to a broker may still be written. Records delivered while Purge runs may
// be dropped as well.
func (s *Sink) Purge() {
	s.dropHeld(&relay.SinkError{Class: relay.ClassPurged, Code: "_PURGE_QUEUE", Detail: "purged while its topic was looked up"})
	if s.transactions != nil {
		s.transactions.purge()
	}
	s.batch.purge()
	s.solo.purge()
}

// Queued returns how many deliveries are accepted and not reported.
func (s *Sink) Queued() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.inUse
}

func (s *Sink) queuedBytes() int64 {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.bytes
}

// Close implements relay.Sink. Its error says how many deliveries were purged because ctx ended. Reports may be left
// unread.
func (s *Sink) Close(ctx context.Context) error {
	s.mu.Lock()
	if s.closed {
		s.mu.Unlock()
		return errors.New("closing the kafka sink: it was closed before")
	}
	s.closed = true
	if s.inUse == 0 {
		close(s.drained)
	}
	s.mu.Unlock()

	var err error
	select {
	case <-s.drained:
	case <-ctx.Done():
		err = fmt.Errorf("closing the kafka sink: %d records purged: %w", s.Queued(), ctx.Err())
	}
	s.end()
	s.wg.Wait() // first of all, so that no lane is rebuilt and no topic looked up below
	s.dropHeld(&relay.SinkError{Class: relay.ClassPurged, Code: "_PURGE_QUEUE", Detail: "closed while its topic was looked up"})
	if s.transactions != nil {
		s.transactions.close()
	}
	s.batch.close(relay.ClassPurged)
	s.solo.close(relay.ClassPurged)
	close(s.reports)
	s.metrics.unregister(s.cfg.Registerer)
	return err
}

// recordBytes is what a record takes of the queue's memory.
func recordBytes(r *relay.Record) int64 {
	n := len(r.Key) + len(r.Value)
	for i := range r.Headers {
		n += len(r.Headers[i].Name) + len(r.Headers[i].Value)
	}
	return int64(n)
}
