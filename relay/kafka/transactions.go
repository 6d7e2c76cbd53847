package kafka

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	ck "github.com/confluentinc/confluent-kafka-go/v2/kafka"

	"github.com/outbox-platform/outbox/relay"
)

// transactions are the ways to the cluster in transactional mode: one transactor per shard that was fenced.
//
// Who holds a shard is known to the store; who may write for it, to Kafka. Fence joins the two: it makes a producer with the
// shard's transactional id, and from then on Kafka refuses everything of the producer before it, which it cannot undo by
// itself: a transactor that was cut off is never made again within its epoch but by another Fence. The relay proves its lease
// after each Fence and before it delivers. So a producer that writes was made before a moment when its epoch was the newest,
// and the next holder's Fence, which comes later, ends it for good; a zombie that calls Fence too late interrupts the holder
// once, and writes nothing.
type transactions struct {
	sink *Sink

	mu     sync.Mutex
	closed bool
	shards map[int16]*transactorSlot
}

// transactorSlot is the place of one shard's transactor.
type transactorSlot struct {
	turn chan struct{} // capacity 1: holds a value while somebody fences
	size *waveSize     // of the transactor there is
	cur  *transactor   // guarded by transactions.mu; nil: never fenced
}

// errNotFenced refuses deliveries of an epoch that has no producer (any more). Its class lets the relay take the shard anew.
var errNotFenced = &relay.SinkError{
	Class: relay.ClassFatal, Code: "_STATE", Detail: "the shard has no transactional producer for this epoch: it is to be fenced",
}

func newTransactions(s *Sink) *transactions {
	return &transactions{sink: s, shards: make(map[int16]*transactorSlot)}
}

// check finds out whether librdkafka accepts the configuration.
func (x *transactions) check() error {
	c, err := x.sink.connect("check", x.sink.cfg.transactor(0), nil)
	if err != nil {
		return err
	}
	go c.run(deaf{})
	c.close()
	return nil
}

// deaf is the reactor of a client that nobody uses.
type deaf struct{}

func (deaf) delivered(*ck.Message) {}
func (deaf) failed(ck.Error)       {}

// Fences implements relay.Fencer.
func (s *Sink) Fences() bool { return s.transactions != nil }

// Fence implements relay.Fencer. It tries until ctx ends what passes by itself; other errors are *relay.SinkErrors.
func (s *Sink) Fence(ctx context.Context, shard int16, epoch int64) error {
	x := s.transactions
	slot := x.slot(shard)
	select {
	case slot.turn <- struct{}{}:
	case <-ctx.Done():
		return fmt.Errorf("fencing shard %d: %w", shard, ctx.Err())
	}
	defer func() { <-slot.turn }()

	if old := x.current(slot); old != nil {
		switch {
		case old.epoch > epoch:
			return fmt.Errorf("fencing shard %d: epoch %d is over, %d is there", shard, epoch, old.epoch)
		case old.epoch == epoch && old.works():
			return nil
		}
		old.stop()
		<-old.ended
	}
	t, err := s.newTransactor(ctx, shard, epoch, slot.size)
	if err != nil {
		return fmt.Errorf("fencing shard %d: %w", shard, err)
	}
	x.mu.Lock()
	defer x.mu.Unlock()
	if x.closed {
		t.client.close()
		return fmt.Errorf("fencing shard %d: %w", shard, errors.New("the sink is closed"))
	}
	slot.cur = t
	go t.run()
	return nil
}

func (x *transactions) slot(shard int16) *transactorSlot {
	x.mu.Lock()
	defer x.mu.Unlock()
	slot := x.shards[shard]
	if slot == nil {
		slot = &transactorSlot{turn: make(chan struct{}, 1), size: &waveSize{bound: maxWaveBytes}}
		x.shards[shard] = slot
	}
	return slot
}

func (x *transactions) current(slot *transactorSlot) *transactor {
	x.mu.Lock()
	defer x.mu.Unlock()
	return slot.cur
}

// all returns the transactors that there are.
func (x *transactions) all() []*transactor {
	x.mu.Lock()
	defer x.mu.Unlock()
	var all []*transactor
	for _, slot := range x.shards {
		if slot.cur != nil {
			all = append(all, slot.cur)
		}
	}
	return all
}

// hand gives an entry to its shard's transactor. nil: it will be reported.
func (x *transactions) hand(e *entry) *relay.SinkError {
	x.mu.Lock()
	slot := x.shards[e.d.Shard]
	var t *transactor
	if slot != nil {
		t = slot.cur
	}
	x.mu.Unlock()
	if t == nil || t.epoch != e.d.Epoch {
		return errNotFenced
	}
	return t.accept(e)
}

// purge drops everything that is queued, and aborts what is open.
func (x *transactions) purge() {
	for _, t := range x.all() {
		t.purge()
	}
}

// close ends all transactors; what they have is reported.
func (x *transactions) close() {
	x.mu.Lock()
	x.closed = true
	x.mu.Unlock()
	all := x.all()
	for _, t := range all {
		t.stop()
	}
	for _, t := range all {
		<-t.ended
	}
}

// apartFor is how long topics have transactions for themselves after one of them broke one.
const apartFor = time.Minute

// suspectTopics takes note that one of these topics broke a transaction.
func (s *Sink) suspectTopics(names map[string]bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for name := range names {
		if t := s.topics[name]; t != nil {
			t.apartUntil = time.Now().Add(apartFor)
			s.doubt(name, t)
		}
	}
}
