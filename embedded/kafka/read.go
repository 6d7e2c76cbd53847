package kafka

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/twmb/franz-go/pkg/kerr"
	"github.com/twmb/franz-go/pkg/kgo"
	"github.com/twmb/franz-go/pkg/kmsg"
)

// Record is a record as a foreign client sees it.
type Record struct {
	Topic     string
	Partition int32
	Offset    int64
	Key       []byte // nil: no key
	Value     []byte // nil: a tombstone
	Headers   []Header
	Timestamp time.Time
}

// Header is one header of a record, in the record's order.
type Header struct {
	Key   string
	Value []byte
}

// Header returns the value of the first header of that name.
func (r Record) Header(key string) (value []byte, found bool) {
	for _, h := range r.Headers {
		if h.Key == key {
			return h.Value, true
		}
	}
	return nil, false
}

// ReadAll reads topics from their first record to the one that was the last when it was called. The records of a
// partition come in order. A topic that does not exist is an error.
func ReadAll(ctx context.Context, bootstrap string, topics ...string) ([]Record, error) {
	return readAll(ctx, bootstrap, topics)
}

// ReadCommitted is ReadAll for a consumer with isolation.level=read_committed: it leaves out what was aborted, and waits for
// the end of transactions that are open.
func ReadCommitted(ctx context.Context, bootstrap string, topics ...string) ([]Record, error) {
	return readAll(ctx, bootstrap, topics, kgo.FetchIsolationLevel(kgo.ReadCommitted()))
}

func readAll(ctx context.Context, bootstrap string, topics []string, more ...kgo.Opt) ([]Record, error) {
	client, err := newClient(bootstrap, append(readFrom(topics), more...)...)
	if err != nil {
		return nil, err
	}
	defer client.Close()
	var records []Record
	err = readToEnd(ctx, client, topics, func(record *kgo.Record) {
		// A control record ends a transaction and is nobody's data.
		if !record.Attrs.IsControl() {
			records = append(records, convert(record))
		}
	})
	return records, err
}

// readToEnd calls each for the records, control records included, from where the client begins to the one that was the last of
// its partition when it was called.
func readToEnd(ctx context.Context, client *kgo.Client, topics []string, each func(*kgo.Record)) error {
	ends, err := endOffsets(ctx, client, topics)
	if err != nil {
		return fmt.Errorf("find the ends of topics %q: %w", topics, err)
	}
	for len(ends) > 0 {
		fetched, err := poll(ctx, client)
		if err != nil {
			return err
		}
		for _, record := range fetched {
			at := place{record.Topic, record.Partition}
			end, open := ends[at]
			if !open || record.Offset >= end {
				delete(ends, at)
				continue
			}
			each(record)
			if record.Offset == end-1 {
				delete(ends, at)
			}
		}
	}
	return nil
}

// ReadUntil reads topics from their first record until enough says so. It is asked after every fetch that brought
// something, with all records read so far. When the context ends first, the records come with its error.
func ReadUntil(ctx context.Context, bootstrap string, enough func(read []Record) bool, topics ...string) ([]Record, error) {
	return readUntil(ctx, bootstrap, enough, topics)
}

// ReadCommittedUntil is ReadUntil for a consumer with isolation.level=read_committed.
func ReadCommittedUntil(ctx context.Context, bootstrap string, enough func(read []Record) bool, topics ...string) ([]Record, error) {
	return readUntil(ctx, bootstrap, enough, topics, kgo.FetchIsolationLevel(kgo.ReadCommitted()))
}

func readUntil(ctx context.Context, bootstrap string, enough func(read []Record) bool, topics []string, more ...kgo.Opt) ([]Record, error) {
	client, err := newClient(bootstrap, append(readFrom(topics), more...)...)
	if err != nil {
		return nil, err
	}
	defer client.Close()
	var records []Record
	for {
		fetched, err := poll(ctx, client)
		if err != nil {
			return records, err
		}
		for _, record := range fetched {
			if !record.Attrs.IsControl() {
				records = append(records, convert(record))
			}
		}
		if len(fetched) > 0 && enough(records) {
			return records, nil
		}
	}
}

// AtLeast is an end for ReadUntil: n records have been read.
func AtLeast(n int) func([]Record) bool {
	return func(read []Record) bool { return len(read) >= n }
}

func readFrom(topics []string) []kgo.Opt {
	return []kgo.Opt{
		kgo.ConsumeTopics(topics...),
		kgo.ConsumeResetOffset(kgo.NewOffset().AtStart()),
		kgo.KeepControlRecords(),
		kgo.FetchMaxWait(100 * time.Millisecond),
	}
}

// poll returns the next records. Errors that the client retries by itself, such as a broker that is away, are waited out.
func poll(ctx context.Context, client *kgo.Client) ([]*kgo.Record, error) {
	fetches := client.PollFetches(ctx)
	for _, failed := range fetches.Errors() {
		if ctx.Err() == nil && !kerr.IsRetriable(failed.Err) {
			return nil, fmt.Errorf("read topic %q partition %d: %w", failed.Topic, failed.Partition, failed.Err)
		}
	}
	if ctx.Err() != nil {
		return nil, fmt.Errorf("read topics: %w", context.Cause(ctx))
	}
	return fetches.Records(), nil
}

// place is a partition of a topic.
type place struct {
	topic     string
	partition int32
}

// endOffsets returns the offset after the last record of every partition that holds any.
func endOffsets(ctx context.Context, client *kgo.Client, topics []string) (map[place]int64, error) {
	partitions, err := partitionsOf(ctx, client, topics)
	if err != nil {
		return nil, err
	}
	starts, err := offsets(ctx, client, partitions, -2)
	if err != nil {
		return nil, err
	}
	ends, err := offsets(ctx, client, partitions, -1)
	if err != nil {
		return nil, err
	}
	for at, end := range ends {
		if end <= starts[at] {
			delete(ends, at)
		}
	}
	return ends, nil
}

// offsets asks for the offset at a timestamp; -2 is the first record, -1 the end.
func offsets(ctx context.Context, client *kgo.Client, partitions map[string][]int32, timestamp int64) (map[place]int64, error) {
	request := kmsg.NewPtrListOffsetsRequest()
	request.ReplicaID = -1
	for name, numbers := range partitions {
		topic := kmsg.NewListOffsetsRequestTopic()
		topic.Topic = name
		for _, number := range numbers {
			partition := kmsg.NewListOffsetsRequestTopicPartition()
			partition.Partition, partition.Timestamp = number, timestamp
			topic.Partitions = append(topic.Partitions, partition)
		}
		request.Topics = append(request.Topics, topic)
	}
	response, err := request.RequestWith(ctx, client)
	if err != nil {
		return nil, err
	}
	found := make(map[place]int64)
	var errs []error
	for _, topic := range response.Topics {
		for _, partition := range topic.Partitions {
			if err := kerr.ErrorForCode(partition.ErrorCode); err != nil {
				errs = append(errs, fmt.Errorf("topic %q partition %d: %w", topic.Topic, partition.Partition, err))
			}
			found[place{topic.Topic, partition.Partition}] = partition.Offset
		}
	}
	return found, errors.Join(errs...)
}

func convert(record *kgo.Record) Record {
	headers := make([]Header, len(record.Headers))
	for i, h := range record.Headers {
		headers[i] = Header{Key: h.Key, Value: h.Value}
	}
	return Record{
		Topic: record.Topic, Partition: record.Partition, Offset: record.Offset,
		Key: record.Key, Value: record.Value, Headers: headers, Timestamp: record.Timestamp,
	}
}
