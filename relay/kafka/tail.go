package kafka

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	ck "github.com/confluentinc/confluent-kafka-go/v2/kafka"

	"github.com/outbox-platform/outbox/relay"
	"github.com/outbox-platform/outbox/store"
)

// tailPoll is how long one poll waits, and so how late Tail sees that its context ended.
const tailPoll = 100 * time.Millisecond

// Tail implements relay.Sink. Partitions that do not exist (any more) are left out. fn is called by the caller's goroutine.
func (s *Sink) Tail(ctx context.Context, from map[relay.TopicPartition]int64, fn func(tp relay.TopicPartition, offset int64, headers []store.Header)) error {
	if len(from) == 0 {
		return nil
	}
	l := newLogs(s.log.With("lane", "tail"), nil)
	defer l.close()
	t := &tail{fn: fn, ends: make(map[relay.TopicPartition]int64)}
	err := t.open(s.cfg, l)
	if err == nil {
		err = t.read(ctx, from)
	}
	if err = errors.Join(err, t.close()); err != nil {
		return fmt.Errorf("reading tails: %w", err)
	}
	return nil
}

// open makes the consumers.
func (t *tail) open(cfg Config, l *logs) (err error) {
	consumer := func(committed bool) (*ck.Consumer, error) {
		conf := cfg.consumer(committed)
		conf["go.logs.channel"] = l.ch
		return ck.NewConsumer(&conf)
	}
	if t.ender, err = consumer(false); err != nil || !cfg.Transactional {
		t.c = t.ender
		return err
	}
	t.c, err = consumer(true)
	return err
}

func (t *tail) close() error {
	var errs []error
	if t.c != nil && t.c != t.ender {
		errs = append(errs, t.c.Close())
	}
	if t.ender != nil {
		errs = append(errs, t.ender.Close())
	}
	return errors.Join(errs...)
}

// tail is one run of Tail. In transactional mode records of aborted transactions are not delivered, and those of open ones not
// yet: it waits until the latter are either, as those it looks for may come behind them.
type tail struct {
	c     *ck.Consumer // reads
	ender *ck.Consumer // asks for the ends: it sees what is not committed yet
	fn    func(tp relay.TopicPartition, offset int64, headers []store.Header)
	ends  map[relay.TopicPartition]int64 // of partitions not read to their end yet: the offset after their last record
}

func (t *tail) read(ctx context.Context, from map[relay.TopicPartition]int64) error {
	var assign []ck.TopicPartition
	for tp, offset := range from {
		low, high, err := t.bounds(ctx, tp)
		if err != nil {
			return err
		}
		if offset < low || offset > high {
			offset = low
		}
		if offset >= high {
			continue
		}
		t.ends[tp] = high
		assign = append(assign, ck.TopicPartition{Topic: &tp.Topic, Partition: tp.Partition, Offset: ck.Offset(offset)})
	}
	if len(assign) == 0 {
		return nil
	}
	if err := t.c.Assign(assign); err != nil {
		return fmt.Errorf("assigning %d partitions: %w", len(assign), err)
	}
	for len(t.ends) > 0 {
		if err := ctx.Err(); err != nil {
			return fmt.Errorf("%w: not at the end of %s", err, t.rest())
		}
		if err := t.handle(t.c.Poll(int(tailPoll.Milliseconds()))); err != nil {
			return err
		}
	}
	return nil
}

// rest names the partitions that are not read to their end: where the reader is, and the end.
func (t *tail) rest() string {
	var left []string
	for tp, end := range t.ends {
		at := ck.OffsetInvalid
		if found, err := t.c.Position([]ck.TopicPartition{{Topic: &tp.Topic, Partition: tp.Partition}}); err == nil && len(found) == 1 {
			at = found[0].Offset
		}
		left = append(left, fmt.Sprintf("%s/%d (at %s of %d)", tp.Topic, tp.Partition, at, end))
	}
	slices.Sort(left)
	return strings.Join(left, ", ")
}

// bounds returns the first offset and the one after the last; both 0 for a partition that is not there.
func (t *tail) bounds(ctx context.Context, tp relay.TopicPartition) (low, high int64, err error) {
	for {
		low, high, err = t.ender.QueryWatermarkOffsets(tp.Topic, tp.Partition, int(lookUpTimeout.Milliseconds()))
		if err == nil {
			return low, high, nil
		}
		var e ck.Error
		if errors.As(err, &e) {
			switch v := verdictOf(e.Code()); {
			case e.Code() == ck.ErrUnknownTopicOrPart || e.Code() == ck.ErrUnknownTopic || e.Code() == ck.ErrUnknownPartition:
				return 0, 0, nil
			case v.class == relay.ClassTopic:
				return 0, 0, fmt.Errorf("asking for the end of %s/%d: %w", tp.Topic, tp.Partition, err)
			}
		}
		if err := ctx.Err(); err != nil { // what passes by itself is tried again as long as the caller likes
			return 0, 0, err
		}
	}
}

func (t *tail) handle(ev ck.Event) error {
	switch ev := ev.(type) {
	case *ck.Message:
		if err := ev.TopicPartition.Error; err != nil {
			return t.failed(err)
		}
		t.record(ev)
	case ck.PartitionEOF:
		// Where compaction or transaction markers took the last offsets no record tells that the end is reached. An end before
		// the one we were told is none: not everything was shown to us.
		tp := relay.TopicPartition{Topic: *ev.Topic, Partition: ev.Partition}
		if int64(ev.Offset) >= t.ends[tp] {
			delete(t.ends, tp)
		}
	case ck.Error:
		return t.failed(ev)
	}
	return nil
}

func (t *tail) record(m *ck.Message) {
	tp := relay.TopicPartition{Topic: *m.TopicPartition.Topic, Partition: m.TopicPartition.Partition}
	end, ok := t.ends[tp]
	offset := int64(m.TopicPartition.Offset)
	if ok && offset < end {
		headers := make([]store.Header, len(m.Headers))
		for i, h := range m.Headers {
			headers[i] = store.Header{Name: h.Key, Value: h.Value}
		}
		t.fn(tp, offset, headers)
	}
	if offset+1 >= end {
		delete(t.ends, tp)
	}
}

// failed decides whether an error ends the reading: only one that waiting does not heal. A group that may not be used is
// none: librdkafka looks for its coordinator, we do not need it.
func (t *tail) failed(err error) error {
	var e ck.Error
	if !errors.As(err, &e) {
		return err
	}
	if v, known := verdicts[e.Code()]; known && v.class == relay.ClassTopic {
		return judge(err)
	}
	return nil
}
