package kafka

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"sync"
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
func (s *Sink) OffsetsForTimes(ctx context.Context, at map[relay.TopicPartition]time.Time, most int64) (found map[relay.TopicPartition]int64, err error) {
	if len(at) == 0 {
		return nil, nil //nolint:nilnil // nothing is asked for
	}
	t := &tail{log: s.log}
	if err = s.withTail(t, func() error { found, err = t.offsetsForTimes(ctx, at, most); return err }); err != nil {
		err = fmt.Errorf("looking for offsets by time: %w", err)
	}
	return found, err
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

// open makes the consumers. Also where we use no transactions, what was aborted is not there, nor what is of an open one: a
// relay in transactional mode may have died before this one.
func (t *tail) open(cfg Config, l *logs) (err error) {
	consumer := func(committed bool) (*ck.Consumer, error) {
		conf := cfg.consumer(committed)
		conf["go.logs.channel"] = l.ch
		return ck.NewConsumer(&conf)
	}
	if t.c, err = consumer(true); err != nil {
		return err
	}
	t.ender = t.c
	uncommitted := sync.OnceValues(func() (c *ck.Consumer, err error) {
		t.other, err = consumer(false)
		return t.other, err
	})
	if cfg.Transactional {
		t.ender, err = uncommitted()
		return err
	}
	t.uncommitted = uncommitted
	return nil
}

func (t *tail) close() error {
	var errs []error
	if t.c != nil {
		errs = append(errs, t.c.Close())
	}
	if t.other != nil {
		errs = append(errs, t.other.Close())
	}
	return errors.Join(errs...)
}

// tail is one run of Tail or OffsetsForTimes. Records of aborted transactions are not delivered, and those of open ones not
// yet. In transactional mode it waits until the latter are either, as those it looks for may come behind them; else it ends before
// the first open one, which is somebody else's and may be open for long.
type tail struct {
	log   *slog.Logger
	c     *ck.Consumer // reads
	ender *ck.Consumer // asks for the ends: in transactional mode it sees what is not committed yet
	other *ck.Consumer // sees that; nil: not made
	// uncommitted makes other; nil in transactional mode, where ender is it.
	uncommitted func() (*ck.Consumer, error)
	fn          func(tp relay.TopicPartition, offset int64, headers []store.Header)
	ends        map[relay.TopicPartition]int64 // of partitions not read to their end yet: the offset after their last record
}

func (t *tail) read(ctx context.Context, from map[relay.TopicPartition]int64) error {
	ends, errs := eachPartition(ctx, from, t.bounds)
	var assign []ck.TopicPartition
	for tp, e := range ends {
		offset := from[tp]
		if offset > e.high && t.hidden(ctx, tp, offset) {
			continue
		}
		if offset < e.low || offset > e.high {
			offset = e.low
		}
		if offset >= e.high {
			continue
		}
		t.ends[tp] = e.high
		assign = append(assign, ck.TopicPartition{Topic: &tp.Topic, Partition: tp.Partition, Offset: ck.Offset(offset)})
	}
	if len(assign) > 0 {
		errs = append(errs, t.consume(ctx, assign))
	}
	return leftOut(errs, len(from))
}

// hidden reports whether there is an offset behind the end that this reader sees, where somebody else's transaction is open.
func (t *tail) hidden(ctx context.Context, tp relay.TopicPartition, offset int64) bool {
	if t.uncommitted == nil {
		return false
	}
	other, err := t.uncommitted()
	if err != nil {
		return true
	}
	high := int64(-1)
	_, err = ask(ctx, func(timeout int) error {
		_, high, err = other.QueryWatermarkOffsets(tp.Topic, tp.Partition, timeout)
		return err
	})
	if err == nil && offset > high {
		return false
	}
	t.log.Warn("an open transaction of another producer hides what may have been delivered: it may be delivered twice",
		"topic", tp.Topic, "partition", tp.Partition, "offset", offset)
	return true
}

// consume reads partitions to their ends.
func (t *tail) consume(ctx context.Context, assign []ck.TopicPartition) error {
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

func (t *tail) offsetsForTimes(ctx context.Context, at map[relay.TopicPartition]time.Time, most int64) (map[relay.TopicPartition]int64, error) {
	found, errs := eachPartition(ctx, at, func(ctx context.Context, tp relay.TopicPartition) (offset int64, there bool, err error) {
		e, there, err := t.bounds(ctx, tp)
		if err != nil || !there || e.low == e.high {
			return e.low, there, err
		}
		offset, err = t.offsetForTime(ctx, tp, at[tp])
		switch {
		case offset < 0 || offset > e.high:
			offset = e.high
		case offset < e.high-most:
			t.log.Warn("only the last records of a partition are looked at: what is in those before may be delivered twice",
				"topic", tp.Topic, "partition", tp.Partition, "records", most, "of", e.high-offset)
			offset = e.high - most
		}
		return max(e.low, offset), true, err
	})
	return found, leftOut(errs, len(at))
}

// atOnce bounds the questions about partitions that are on their way at once.
const atOnce = 16

// eachPartition asks something about each of the partitions that are keys of a map. It has the answers of those that are there,
// and the errors.
func eachPartition[V, A any](ctx context.Context, of map[relay.TopicPartition]V,
	question func(context.Context, relay.TopicPartition) (answer A, there bool, err error),
) (answers map[relay.TopicPartition]A, errs []error) {
	answers = make(map[relay.TopicPartition]A, len(of))
	var mu sync.Mutex
	var all sync.WaitGroup
	turns := make(chan struct{}, atOnce)
	for tp := range of {
		turns <- struct{}{}
		all.Go(func() {
			defer func() { <-turns }()
			answer, there, err := question(ctx, tp)
			mu.Lock()
			defer mu.Unlock()
			if err != nil {
				errs = append(errs, err)
			} else if there {
				answers[tp] = answer
			}
		})
	}
	all.Wait()
	return answers, errs
}

// leftOut says why some or all of n partitions were left out.
func leftOut(errs []error, n int) error {
	errs = slices.DeleteFunc(errs, func(err error) bool { return err == nil })
	if len(errs) == 0 {
		return nil
	}
	class := relay.ClassTopic
	for _, err := range errs {
		var refused *relay.SinkError
		if len(errs) == n && (!errors.As(err, &refused) || refused.Class != relay.ClassTopic) {
			class = relay.ClassCluster
		}
	}
	return fmt.Errorf("%w: %w", &relay.SinkError{Class: class, Code: "_PARTIAL", Detail: fmt.Sprintf("%d of %d partitions", len(errs), n)},
		errors.Join(errs...))
}

// span is the first offset of a partition and the one after its last.
type span struct{ low, high int64 }

func (t *tail) bounds(ctx context.Context, tp relay.TopicPartition) (e span, there bool, err error) {
	there, err = ask(ctx, func(timeout int) error {
		e.low, e.high, err = t.ender.QueryWatermarkOffsets(tp.Topic, tp.Partition, timeout)
		return err
	})
	if err != nil {
		return e, false, fmt.Errorf("asking for the end of %s/%d: %w", tp.Topic, tp.Partition, err)
	}
	if !there {
		t.log.Warn("a partition that was there is gone: nothing is looked for in it", "topic", tp.Topic, "partition", tp.Partition)
	}
	return e, there, nil
}

// offsetForTime returns a negative number where there is none.
func (t *tail) offsetForTime(ctx context.Context, tp relay.TopicPartition, since time.Time) (offset int64, err error) {
	// Negative timestamps mean something else.
	times := []ck.TopicPartition{{Topic: &tp.Topic, Partition: tp.Partition, Offset: ck.Offset(max(since.UnixMilli(), 0))}}
	offset = -1
	_, err = ask(ctx, func(timeout int) error {
		answer, err := t.ender.OffsetsForTimes(times, timeout)
		if err != nil || len(answer) != 1 {
			return err
		}
		offset = int64(answer[0].Offset)
		return answer[0].Error
	})
	if err != nil {
		return -1, fmt.Errorf("asking for the offset of a time of %s/%d: %w", tp.Topic, tp.Partition, err)
	}
	return offset, nil
}

// ask asks something about a partition until there is an answer, for lookUpTimeout: what passes by itself is tried again. A
// partition without a leader must not cost the others all the time there is. there: there is such a partition.
func ask(ctx context.Context, question func(timeoutMilliseconds int) error) (there bool, err error) {
	ctx, cancel := context.WithTimeout(ctx, lookUpTimeout)
	defer cancel()
	why := errors.New("not asked")
	for {
		if err := ctx.Err(); err != nil {
			return false, fmt.Errorf("%w: %w", err, why)
		}
		deadline, _ := ctx.Deadline()
		// librdkafka heeds the time it is given, and no context.
		if why = question(max(int(time.Until(deadline).Milliseconds()), 1)); why == nil {
			return true, nil
		}
		var e ck.Error
		if errors.As(why, &e) {
			switch v, known := verdicts[e.Code()]; {
			case e.Code() == ck.ErrUnknownTopicOrPart || e.Code() == ck.ErrUnknownTopic || e.Code() == ck.ErrUnknownPartition:
				return false, nil
			case known && v.class == relay.ClassTopic:
				return false, judge(why)
			}
		}
		pause := time.NewTimer(tailPoll)
		select {
		case <-pause.C:
		case <-ctx.Done():
			pause.Stop()
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
