package kafka

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
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
	t := &tail{log: s.log, fn: fn, ends: make(map[relay.TopicPartition]int64)}
	if err := s.withTail(t, func() error { return t.read(ctx, from) }); err != nil {
		return fmt.Errorf("reading tails: %w", err)
	}
	return nil
}

// OffsetsForTimes implements relay.Sink.
func (s *Sink) OffsetsForTimes(ctx context.Context, at map[relay.TopicPartition]time.Time) (found map[relay.TopicPartition]int64, err error) {
	if len(at) == 0 {
		return nil, nil //nolint:nilnil // nothing is asked for
	}
	t := &tail{log: s.log}
	if err := s.withTail(t, func() error { found, err = t.offsetsForTimes(ctx, at); return err }); err != nil {
		return nil, fmt.Errorf("looking for offsets by time: %w", err)
	}
	return found, nil
}

// withTail opens t, does something with it, and closes it.
func (s *Sink) withTail(t *tail, do func() error) error {
	l := newLogs(s.log.With("lane", "tail"), nil)
	defer l.close()
	err := t.open(s.cfg, l)
	if err == nil {
		err = do()
	}
	return errors.Join(err, t.close())
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

// tail is one run of Tail or OffsetsForTimes. In transactional mode records of aborted transactions are not delivered, and those of open ones not
// yet: it waits until the latter are either, as those it looks for may come behind them.
type tail struct {
	log   *slog.Logger
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
		missing, err := askAgain(ctx, err)
		if err != nil {
			return 0, 0, fmt.Errorf("asking for the end of %s/%d: %w", tp.Topic, tp.Partition, err)
		}
		if missing {
			t.log.Warn("a partition that was there is gone: nothing is looked for in it", "topic", tp.Topic, "partition", tp.Partition)
			return 0, 0, nil
		}
	}
}

func (t *tail) offsetsForTimes(ctx context.Context, at map[relay.TopicPartition]time.Time) (map[relay.TopicPartition]int64, error) {
	found := make(map[relay.TopicPartition]int64)
	for tp, since := range at {
		// Negative timestamps mean something else.
		offset, err := t.offsetForTime(ctx, tp, max(since.UnixMilli(), 0))
		if err != nil {
			return nil, err
		}
		if offset >= 0 {
			found[tp] = offset
		}
	}
	return found, nil
}

// offsetForTime returns a negative number where there is none.
func (t *tail) offsetForTime(ctx context.Context, tp relay.TopicPartition, milliseconds int64) (int64, error) {
	times := []ck.TopicPartition{{Topic: &tp.Topic, Partition: tp.Partition, Offset: ck.Offset(milliseconds)}}
	for {
		answer, err := t.ender.OffsetsForTimes(times, int(lookUpTimeout.Milliseconds()))
		if err == nil && len(answer) == 1 {
			err = answer[0].Error
		}
		if err == nil && len(answer) == 1 {
			return int64(answer[0].Offset), nil
		}
		missing, err := askAgain(ctx, err)
		if err != nil {
			return -1, fmt.Errorf("asking for the offset of a time of %s/%d: %w", tp.Topic, tp.Partition, err)
		}
		if missing {
			return -1, nil
		}
	}
}

// askAgain decides whether to ask for a partition's offsets again after an error: what passes by itself is tried as long as the
// caller likes. missing: there is no such partition.
func askAgain(ctx context.Context, why error) (missing bool, err error) {
	var e ck.Error
	if errors.As(why, &e) {
		switch v := verdictOf(e.Code()); {
		case e.Code() == ck.ErrUnknownTopicOrPart || e.Code() == ck.ErrUnknownTopic || e.Code() == ck.ErrUnknownPartition:
			return true, nil
		case v.class == relay.ClassTopic:
			return false, why
		}
	}
	pause := time.NewTimer(tailPoll)
	defer pause.Stop()
	select {
	case <-pause.C:
		return false, nil
	case <-ctx.Done():
		return false, ctx.Err()
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
