package kafka

import (
	"fmt"
	"sync"

	ck "github.com/confluentinc/confluent-kafka-go/v2/kafka"

	"github.com/outbox-platform/outbox/relay"
	"github.com/outbox-platform/outbox/store"
)

// client is one librdkafka producer, with the goroutine that reads its events.
type client struct {
	sink *Sink
	name string // as metrics and logs call it
	rd   *ck.Producer
	logs *logs
	done chan struct{} // closed when its events are read to the end
}

// reactor is told what happens to a client, by the goroutine that reads its events.
type reactor interface {
	// delivered is told of each record that was handed over.
	delivered(m *ck.Message)
	// failed is told of errors that concern no record.
	failed(err ck.Error)
}

// connect makes a client, which contacts the cluster by itself. Its events wait until run. onLog, which may be nil, is told
// the facility of each line that librdkafka logs.
func (s *Sink) connect(name string, conf ck.ConfigMap, onLog func(facility string)) (*client, error) {
	c := &client{sink: s, name: name, done: make(chan struct{})}
	c.logs = newLogs(s.log.With("lane", name), onLog)
	conf["go.logs.channel"] = c.logs.ch
	rd, err := ck.NewProducer(&conf)
	if err != nil {
		c.logs.close()
		return nil, fmt.Errorf("starting the kafka producer: %w", err)
	}
	c.rd = rd
	return c, nil
}

// run reads events until the client is closed.
func (c *client) run(r reactor) {
	defer close(c.done)
	for ev := range c.rd.Events() {
		switch ev := ev.(type) {
		case *ck.Message:
			r.delivered(ev)
		case ck.Error:
			r.failed(ev)
		case *ck.Stats:
			c.sink.metrics.stats(c.name, ev.String(), c.sink.log)
		case ck.OAuthBearerTokenRefresh:
			c.sink.log.Warn("kafka asks for an OAUTHBEARER token; only sasl.oauthbearer.method=oidc is supported")
		}
	}
}

// troubled takes note of an error that is not fatal and concerns no record.
func (c *client) troubled(err ck.Error) {
	s, v := c.sink, judge(err)
	s.metrics.errors[v.Class].Inc()
	s.log.Debug("kafka error", "lane", c.name, "code", v.Code, "error", v.Detail)
	if v.Class == relay.ClassCluster {
		s.health.suspect(v.Error())
		s.wakeWatch()
	}
}

// purge drops what is queued and what is on its way; each is reported. It does not wait for that.
func (c *client) purge() {
	if err := c.rd.Purge(ck.PurgeQueue | ck.PurgeInFlight | ck.PurgeNonBlocking); err != nil {
		c.sink.log.Error("purging the kafka producer", "lane", c.name, "error", err)
	}
}

// close ends a client that runs. Records that are not reported when it returns never will be.
func (c *client) close() {
	c.rd.Close()
	<-c.done
	c.logs.close()
}

// scratch is what a Produce call needs for a moment.
type scratch struct {
	msg     ck.Message
	headers []ck.Header
}

var scratches = sync.Pool{New: func() any { return new(scratch) }}

// emptyValue is what a header without a value gets: nil would be a null on the wire.
var emptyValue = []byte{}

// produce copies an entry's record into librdkafka's queue.
func (c *client) produce(e *entry) error {
	r := &e.d.Record
	sc := scratches.Get().(*scratch) //nolint:forcetypeassert // the pool makes nothing else
	sc.headers = appendHeaders(sc.headers[:0], r.Headers)
	sc.msg = ck.Message{
		TopicPartition: ck.TopicPartition{Topic: &r.Topic, Partition: ck.PartitionAny},
		Key:            r.Key, Value: r.Value, Timestamp: r.Timestamp, Headers: sc.headers, Opaque: e,
	}
	err := c.rd.Produce(&sc.msg, nil)
	clear(sc.headers)
	sc.msg = ck.Message{}
	scratches.Put(sc)
	return err
}

func appendHeaders(to []ck.Header, from []store.Header) []ck.Header {
	for i := range from {
		h := ck.Header{Key: from[i].Name, Value: from[i].Value}
		if h.Value == nil {
			h.Value = emptyValue
		}
		to = append(to, h)
	}
	return to
}
