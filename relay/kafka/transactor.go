package kafka

import (
	"context"
	"errors"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	ck "github.com/confluentinc/confluent-kafka-go/v2/kafka"

	"github.com/outbox-platform/outbox/relay"
)

const (
	// apiSlice is how long one call of librdkafka's transactional API may block. It cannot be interrupted, but resumed.
	apiSlice = 500 * time.Millisecond
	// apiPause is the least time between two of them.
	apiPause = 50 * time.Millisecond
	// txnErrorFacility is the facility of librdkafka's log line that says that a transaction can only be aborted. There is no
	// event for it, and no record need be reported: those that are queued just stay.
	txnErrorFacility = "TXNERR"
)

// Pauses before what was in an aborted transaction is tried again, when the cluster was the reason.
const (
	retryFirst = 100 * time.Millisecond
	retryMost  = 2 * time.Second
)

// transactor carries the records of one shard during one epoch, wave by wave: what is delivered while a transaction is under
// way is the next one. It has one producer, and ends with it.
type transactor struct {
	*client
	shard int16
	epoch int64
	size  *waveSize      // of run
	known map[string]int // of run: topics that the producer has heard of, with topic.version
	until time.Time      // of run: when the wave under way has lasted so long that its producer is given up
	since time.Time      // of run: when the first of the waves began that the cluster was the reason to abort; zero: the last was not

	afterHandingOver atomic.Pointer[func(topic string)] // for tests: called when librdkafka has taken a record
	beforeCommit     atomic.Pointer[func()]             // for tests: called when all records are written

	wake  chan struct{} // capacity 1: something below changed
	quit  chan struct{} // closed by stop
	ended chan struct{} // closed when everything is reported and the producer is closed
	once  sync.Once     // of quit

	mu      sync.Mutex // guards all below
	queue   []*entry   // for the next waves
	landed  []*entry   // of the wave under way: reported by librdkafka and not looked at yet
	purging bool       // the wave under way is not wanted any more
	suspect bool       // the transaction under way is broken, librdkafka says
	fatal   error      // the producer is
	refusal *relay.SinkError
}

// errStopped ends a transactor that is not wanted any more, errPurged one whose transaction cannot be aborted any more, errStuck
// one whose transaction lasts longer than the cluster allows: nothing comes of it, and librdkafka does not always find out (it
// was seen to wait for ever for the coordinator's connection after a restart of the broker).
var (
	errStopped = errors.New("the transactional producer was closed")
	errPurged  = errors.New("purged while the end of a transaction was awaited")
	errStuck   = ck.NewError(ck.ErrTimedOut, "a transaction does not end", false)
)

// stuckMost bounds how much longer than the cluster allows a transaction may last before its producer is given up; it is as
// long again, if that is less. streakFactor is how many times as long transactions in a row may come to nothing.
const (
	stuckMost    = 30 * time.Second
	streakFactor = 5
)

// newTransactor makes a producer for the shard and ends what another with its transactional id left open.
func (s *Sink) newTransactor(ctx context.Context, shard int16, epoch int64, size *waveSize) (*transactor, error) {
	t := &transactor{
		shard: shard, epoch: epoch, size: size, known: make(map[string]int),
		wake: make(chan struct{}, 1), quit: make(chan struct{}), ended: make(chan struct{}),
	}
	var err error
	t.client, err = s.connect("shard-"+strconv.Itoa(int(shard)), s.cfg.transactor(shard), t.logged)
	if err != nil {
		return nil, err
	}
	go t.client.run(t)
	err = inSlices(t.rd.InitTransactions, func() bool { return ctx.Err() != nil || s.life.Err() != nil })
	if err != nil {
		t.client.close()
		return nil, judge(err)
	}
	return t, nil
}

// inSlices calls a function of the transactional API until it succeeds, fails for a reason that does not pass by itself, or
// stopped says so after a call that was not enough.
func inSlices(call func(context.Context) error, stopped func() bool) error {
	for {
		began := time.Now()
		ctx, cancel := context.WithTimeout(context.Background(), apiSlice) //nolint:forbidigo // of the call, whoever waits for it
		err := call(ctx)
		cancel()
		var e ck.Error
		if err == nil || !errors.As(err, &e) || !e.IsRetriable() || stopped() {
			return err
		}
		if rest := apiPause - time.Since(began); rest > 0 {
			<-time.After(rest)
		}
	}
}

func (t *transactor) signal() {
	select {
	case t.wake <- struct{}{}:
	default:
	}
}

// accept takes an entry. nil: it will be reported.
func (t *transactor) accept(e *entry) *relay.SinkError {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.refusal != nil {
		return t.refusal
	}
	t.queue = append(t.queue, e)
	t.signal()
	return nil
}

// works reports whether it has a producer that may be used.
func (t *transactor) works() bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.refusal == nil
}

// purge reports what is queued, and has what is under way aborted.
func (t *transactor) purge() {
	t.mu.Lock()
	queued := t.queue
	t.queue, t.purging = nil, true
	t.mu.Unlock()
	t.signal()
	for _, e := range queued {
		t.sink.failed(e, &relay.SinkError{Class: relay.ClassPurged, Code: "_PURGE_QUEUE", Detail: "purged before its transaction"})
	}
}

// stop ends it soon.
func (t *transactor) stop() { t.once.Do(func() { close(t.quit) }) }

func (t *transactor) stopped() bool {
	select {
	case <-t.quit:
		return true
	default:
		return false
	}
}

// delivered implements reactor.
func (t *transactor) delivered(m *ck.Message) {
	e := m.Opaque.(*entry) //nolint:forcetypeassert // produce sets nothing else
	e.partition, e.offset, e.err = m.TopicPartition.Partition, int64(m.TopicPartition.Offset), m.TopicPartition.Error
	t.mu.Lock()
	t.landed = append(t.landed, e)
	t.mu.Unlock()
	t.signal()
}

// failed implements reactor.
func (t *transactor) failed(err ck.Error) {
	if !err.IsFatal() {
		t.troubled(err)
		return
	}
	t.mu.Lock()
	t.fatal = err
	t.mu.Unlock()
	t.signal()
}

// logged is told what librdkafka logs.
func (t *transactor) logged(facility string) {
	if facility != txnErrorFacility {
		return
	}
	t.mu.Lock()
	t.suspect = true
	t.mu.Unlock()
	t.signal()
}

// run carries wave after wave until the producer is broken or not wanted any more.
func (t *transactor) run() {
	defer close(t.ended)
	pause := time.Duration(0)
	for {
		w, err := t.nextWave(pause)
		if err == nil {
			err = t.carry(w)
			t.learn(w)
		}
		if err == nil && w.trouble != nil && time.Since(t.since) > streakFactor*t.sink.cfg.TransactionTimeout {
			err = errStuck
		}
		if err != nil {
			t.end(w, err)
			return
		}
		pause = t.settle(w, pause)
	}
}

// learn adapts the size of waves to how long one took.
func (t *transactor) learn(w *wave) {
	if w.begun.IsZero() {
		return
	}
	took, before, timeout := time.Since(w.begun), t.size.bound, t.sink.cfg.TransactionTimeout
	if t.size.took(w, took, timeout); t.size.bound < before {
		t.sink.log.Warn("a kafka transaction took more than half of its time; the next ones of the shard are smaller",
			"lane", t.name, "took", took, "transaction_timeout", timeout, "bytes", w.bytes, "next_bytes", t.size.bound)
	}
}

// nextWave waits for something to carry, after a pause.
func (t *transactor) nextWave(pause time.Duration) (*wave, error) {
	if pause > 0 {
		timer := time.NewTimer(pause)
		defer timer.Stop()
		select {
		case <-timer.C:
		case <-t.quit:
		}
	}
	for {
		t.mu.Lock()
		fatal := t.fatal
		var w *wave
		if fatal == nil && len(t.queue) > 0 {
			w, t.queue = takeWave(t.queue, t.size.bound)
		}
		t.purging, t.suspect = false, false
		t.mu.Unlock()
		switch {
		case t.stopped():
			return w, errStopped
		case fatal != nil || w != nil:
			return w, fatal
		}
		select {
		case <-t.wake:
		case <-t.quit:
		}
	}
}

// settle reports what became of a wave whose transaction ended, and puts back what is to be tried again. It returns the pause
// before that.
func (t *transactor) settle(w *wave, pause time.Duration) time.Duration {
	s := t.sink
	var again []*entry
	for _, e := range w.entries {
		switch {
		case e.verdict != nil:
			s.failed(e, e.verdict)
		case w.committed && e.err == nil && e.offset >= 0:
			if e.tooLarge {
				s.batchTooLarge(e.d.Record.Topic)
			}
			s.acknowledged(e, e.partition, e.offset)
		default:
			again = append(again, e)
		}
	}
	t.mu.Lock()
	purging := t.purging
	if !purging {
		t.queue = append(again, t.queue...)
		again = nil
	}
	t.mu.Unlock()
	for _, e := range again {
		s.failed(e, &relay.SinkError{Class: relay.ClassPurged, Code: "_PURGE_INFLIGHT", Detail: "purged; its transaction was aborted"})
	}
	if w.trouble == nil || purging {
		t.since = time.Time{}
	}
	if w.trouble == nil {
		return 0
	}
	s.log.Warn("a kafka transaction was aborted and is tried again", "lane", t.name, "epoch", t.epoch, "code", w.trouble.Code, "error", w.trouble.Detail)
	return min(max(2*pause, retryFirst), retryMost)
}

// end closes the producer and reports everything. What happened to the last transaction, if it was to be committed, is not
// known: the next Fence waits until it is.
func (t *transactor) end(w *wave, why error) {
	s := t.sink
	if fatal := t.rd.GetFatalError(); fatal != nil {
		why = fatal // says more than the error of one call
	}
	class, code := relay.ClassFatal, "_DESTROY"
	detail := why.Error()
	switch {
	case errors.Is(why, errStopped) || errors.Is(why, errPurged):
		class = relay.ClassPurged
	default:
		v := judge(why)
		code, detail = v.Code, v.Detail
		s.metrics.rebuilds.Inc()
		s.log.Error("the transactional kafka producer of a shard died; the shard is to be fenced again", "lane", t.name, "epoch", t.epoch,
			"code", v.Code, "error", v.Detail)
	}
	t.mu.Lock()
	t.refusal = &relay.SinkError{Class: relay.ClassFatal, Code: code, Detail: detail}
	queued := t.queue
	t.queue = nil
	t.mu.Unlock()

	t.client.purge()
	t.client.close()
	if w != nil {
		queued = append(w.entries, queued...)
	}
	for _, e := range queued {
		v := e.verdict
		if v == nil {
			v = &relay.SinkError{Class: class, Code: code, Detail: detail}
		}
		s.failed(e, v)
	}
}
