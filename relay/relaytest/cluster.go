package relaytest

import (
	"slices"
	"sync"

	"github.com/outbox-platform/outbox/relay"
	"github.com/outbox-platform/outbox/store"
)

// Stored is a record as the cluster keeps it.
type Stored struct {
	relay.Record
	relay.TopicPartition
	Offset int64
}

// Header returns the first header with this name, or "".
func (s Stored) Header(name string) string {
	for _, h := range s.Record.Headers {
		if h.Name == name {
			return string(h.Value)
		}
	}
	return ""
}

// Cluster is the brokers. Safe for concurrent use.
type Cluster struct {
	mu      sync.Mutex
	topics  map[string]*topic
	written []Stored
	refuse  func(relay.Record) *relay.SinkError
	down    bool
	sinks   []*Sink
}

type topic struct {
	maxMessageBytes int32
	partitions      [][]Stored
}

// NewCluster returns a cluster with these topics, each with some partitions.
func NewCluster(partitions int32, topics ...string) *Cluster {
	c := &Cluster{topics: map[string]*topic{}}
	for _, name := range topics {
		c.CreateTopic(name, partitions)
	}
	return c
}

// CreateTopic creates a topic, with a max.message.bytes of 1 MiB.
func (c *Cluster) CreateTopic(name string, partitions int32) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.topics[name] = &topic{maxMessageBytes: 1 << 20, partitions: make([][]Stored, partitions)}
}

// DeleteTopic deletes a topic. What was written stays in Written.
func (c *Cluster) DeleteTopic(name string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	delete(c.topics, name)
}

// Refuse sets what refuses records: it returns the error to report, or nil to accept. nil ends it.
func (c *Cluster) Refuse(by func(relay.Record) *relay.SinkError) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.refuse = by
}

// RefuseTooLarge refuses records with this value, as a topic with a small max.message.bytes would.
func (c *Cluster) RefuseTooLarge(value string) {
	c.Refuse(func(r relay.Record) *relay.SinkError {
		if string(r.Value) == value {
			return &relay.SinkError{Class: relay.ClassRecord, Code: "MESSAGE_TOO_LARGE", Detail: "test"}
		}
		return nil
	})
}

// SetDown takes the cluster away, or brings it back: then what is queued is written.
func (c *Cluster) SetDown(down bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.down = down
	for _, s := range c.sinks {
		s.flush()
	}
}

// Written returns everything written so far, in the order in which it was.
func (c *Cluster) Written() []Stored {
	c.mu.Lock()
	defer c.mu.Unlock()
	return slices.Clone(c.written)
}

// Len is the number of records written so far.
func (c *Cluster) Len() int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return len(c.written)
}

// Values returns the values of everything written so far with this key, in the order in which it was.
func (c *Cluster) Values(key string) []string {
	var values []string
	for _, r := range c.Written() {
		if string(r.Key) == key {
			values = append(values, string(r.Value))
		}
	}
	return values
}

// write is a broker's part: the partition and offset, or why not. c.mu is held.
func (c *Cluster) write(r relay.Record) (relay.TopicPartition, int64, *relay.SinkError) {
	t := c.topics[r.Topic]
	if t == nil {
		return relay.TopicPartition{}, 0, &relay.SinkError{Class: relay.ClassTopic, Code: "UNKNOWN_TOPIC_OR_PART", Detail: r.Topic}
	}
	if c.refuse != nil {
		if err := c.refuse(r); err != nil {
			return relay.TopicPartition{}, 0, err
		}
	}
	p := relay.Partition(r.Key, int32(len(t.partitions))) //nolint:gosec // few partitions
	stored := Stored{
		Record:         copyRecord(r),
		TopicPartition: relay.TopicPartition{Topic: r.Topic, Partition: p},
		Offset:         int64(len(t.partitions[p])),
	}
	t.partitions[p] = append(t.partitions[p], stored)
	c.written = append(c.written, stored)
	return stored.TopicPartition, stored.Offset, nil
}

// copyRecord copies everything that points into the caller's memory.
func copyRecord(r relay.Record) relay.Record {
	r.Topic = string([]byte(r.Topic))
	r.Key = slices.Clone(r.Key)
	r.Value = slices.Clone(r.Value)
	headers := make([]store.Header, len(r.Headers))
	for i, h := range r.Headers {
		headers[i] = store.Header{Name: string([]byte(h.Name)), Value: slices.Clone(h.Value)}
	}
	r.Headers = headers
	return r
}
