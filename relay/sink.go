package relay

import (
	"context"
	"errors"
	"time"

	"github.com/outbox-platform/outbox/store"
)

// Record is what is handed to Kafka.
type Record struct {
	Topic     string
	Key       []byte // nil never: an event without a key of its own has its aggregate id
	Value     []byte
	Headers   []store.Header
	Timestamp time.Time
}

// Delivery is one record on its way to Kafka and, in its report, what became of it.
type Delivery struct {
	Record Record
	// Shard the record comes from, and Epoch of its holder: who may write it, for a sink that fences.
	Shard int16
	Epoch int64
	// Opaque is the relay's own.
	Opaque any
	// Set in the report:
	Partition int32
	Offset    int64
	Err       error // nil: acknowledged by all in-sync replicas; else a *SinkError
}

// Class of a failure: what to do about it.
type Class int

// The classes.
const (
	// ClassRecord: this record will never be accepted (too large, invalid). Counts as an attempt.
	ClassRecord Class = iota + 1
	// ClassTopic: its topic is unknown or not authorised. Pauses that topic; no attempt.
	ClassTopic
	// ClassCluster: the cluster is away or refuses us. Pauses everything; no attempt.
	ClassCluster
	// ClassFatal: the producer died and is being rebuilt. The record may or may not be written: deliver it again.
	ClassFatal
	// ClassPurged: dropped from the queue because Purge was called. It may or may not be written.
	ClassPurged
)

// SinkError is a failed delivery.
type SinkError struct {
	Class  Class
	Code   string // the broker's or librdkafka's name of the error
	Detail string
}

func (e *SinkError) Error() string { return e.Code + ": " + e.Detail }

// ErrSinkFull: the sink's queue is full; wait for reports, then try again.
var ErrSinkFull = errors.New("the sink's queue is full")

// TopicPartition names a partition.
type TopicPartition struct {
	Topic     string
	Partition int32
}

// Sink takes records to Kafka. It keeps cgo out of this package; relay/kafka implements it over librdkafka, relaytest in
// memory. All methods are safe for concurrent use.
type Sink interface {
	// Deliver queues a record and never blocks. nil: exactly one report will follow. ErrSinkFull, or a *SinkError when the
	// record is refused on the spot: no report will follow.
	Deliver(d *Delivery) error
	// Reports is where reports arrive, in no order across records. It is closed by Close.
	Reports() <-chan *Delivery
	// Purge drops everything that is queued; each dropped delivery is reported with ClassPurged.
	Purge()
	// Partitions tells how many partitions topics have. What it does not know it asks the cluster for. Topics that are not
	// there, or not for us, are left out.
	Partitions(ctx context.Context, topics []string) (map[string]int32, error)
	// Tail reads partitions from the given offsets to the end they had when it was called, and calls fn for each record. It shows
	// nothing of transactions that were aborted or are open. Offsets that no longer exist start at the oldest that does.
	// Partitions that cannot be read are left out: then there is an error, of ClassCluster if none could. For takeovers.
	Tail(ctx context.Context, from map[TopicPartition]int64, fn func(tp TopicPartition, offset int64, headers []store.Header)) error
	// OffsetsForTimes asks for the offset of the first record of each partition whose timestamp is not before a time, or of its
	// end if there is none; whether timestamps are the records' own or the brokers' is the topic's choice. No answer is more than
	// most before the end. Partitions that are not there are left out, and so are those that cannot be asked: then there is an
	// error beside what was found, of ClassCluster if none could. For takeovers.
	OffsetsForTimes(ctx context.Context, at map[TopicPartition]time.Time, most int64) (map[TopicPartition]int64, error)
	// Topics asks the cluster for the topics named, or for all it may see, with partition count and max.message.bytes.
	// Unknown ones are left out.
	Topics(ctx context.Context, names []string) ([]store.Topic, error)
	// Close waits for what is queued until ctx ends, then purges. It must be called once.
	Close(ctx context.Context) error
}

// Fencer is a sink that can cut former holders of a shard off at the cluster, so that nothing of theirs comes into effect
// any more.
type Fencer interface {
	Sink
	// Fences reports whether it does; if not, Fence is not to be called, and Delivery.Epoch means nothing.
	Fences() bool
	// Fence cuts off everybody who fenced this shard before. When it returns nil, all that they wrote has either come into
	// effect, so that Tail shows it, or never will; and deliveries of the epoch are accepted. A caller that is not certain to
	// hold the shard still, after it returned, must deliver nothing: it has cut off the one who does.
	//
	// A report or refusal of ClassFatal means that this sink was cut off or broke down. What became of deliveries that are
	// reported so is known after the next Fence.
	Fence(ctx context.Context, shard int16, epoch int64) error
}
