package kafka

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	ck "github.com/confluentinc/confluent-kafka-go/v2/kafka"

	"github.com/outbox-platform/outbox/relay"
	"github.com/outbox-platform/outbox/store"
)

const (
	// lookUpTimeout bounds one question to the cluster.
	lookUpTimeout = 2 * time.Second
	// topicsPerRequest bounds the size of one question.
	topicsPerRequest = 500
	// soloFor is how long a topic's records go one by one after a batch was too large for it.
	soloFor = time.Minute
	// defaultMaxMessageBytes is Kafka's own default, for topics whose configuration we may not read.
	defaultMaxMessageBytes = 1048588
)

// topicState is what is known of a topic.
type topicState int

const (
	topicAsking  topicState = iota // being looked up for the first time; deliveries wait in held
	topicKnown                     // it is there
	topicRefused                   // it is not there, or not for us
)

// topic is one entry of the cache. Sink.mu guards it.
type topic struct {
	state      topicState
	partitions int32
	version    int              // counts what was learned of it
	refusal    *relay.SinkError // while refused
	checked    time.Time        // when it was refused
	used       bool             // wanted by somebody; while refused: since the last refresh
	held       []*entry         // while asking, in order
	soloUntil  time.Time
	apartUntil time.Time // in transactional mode: in transactions without other topics
}

// alone reports whether its records go one by one.
func (t *topic) alone(now time.Time) bool { return !t.soloUntil.IsZero() && now.Before(t.soloUntil) }

// topicNews returns a number that changes when producers must hear of a topic, and whether its records go one by one.
func (s *Sink) topicNews(name string) (version int, alone bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if t := s.topics[name]; t != nil {
		return t.version, t.alone(time.Now())
	}
	return 0, false
}

// legalTopic reports whether Kafka allows the name.
func legalTopic(name string) bool {
	if name == "" || len(name) > 249 || name == "." || name == ".." {
		return false
	}
	for i := range len(name) {
		switch c := name[i]; {
		case 'a' <= c && c <= 'z', 'A' <= c && c <= 'Z', '0' <= c && c <= '9', c == '.', c == '_', c == '-':
		default:
			return false
		}
	}
	return true
}

// topicFor returns the cache's entry, or why records for the topic are refused. s.mu is held.
func (s *Sink) topicFor(name string) (*topic, *relay.SinkError) {
	t := s.topics[name]
	if t == nil {
		if !legalTopic(name) {
			return nil, &relay.SinkError{Class: relay.ClassTopic, Code: "INVALID_TOPIC_EXCEPTION", Detail: "not a legal topic name: " + strconv.Quote(name)}
		}
		t = &topic{state: topicAsking}
		s.topics[name] = t
		s.ask(name)
	}
	t.used = true
	if t.state != topicRefused {
		return t, nil
	}
	if time.Since(t.checked) >= s.cfg.TopicRecheck {
		s.ask(name)
	}
	return nil, t.refusal
}

// doubt has a topic looked up again before more is delivered to it. s.mu is held.
func (s *Sink) doubt(name string, t *topic) {
	if t.state == topicKnown {
		t.state = topicAsking
		s.ask(name)
	}
}

// mayWrite reports whether a topic lets us write, as far as the cluster says. It matters in transactions only: there a topic
// that is not for us takes the shard's producer with it.
func (s *Sink) mayWrite(d *ck.TopicDescription) bool {
	ops := d.AuthorizedOperations
	return s.transactions == nil || len(ops) == 0 || slices.Contains(ops, ck.ACLOperationWrite) || slices.Contains(ops, ck.ACLOperationAll)
}

// ask has a topic looked up soon. s.mu is held.
func (s *Sink) ask(name string) {
	s.asking[name] = struct{}{}
	s.wakeWatch()
}

func (s *Sink) wakeWatch() {
	select {
	case s.wake <- struct{}{}:
	default:
	}
}

// Partitions implements relay.Sink. While the cluster is away or the producer is being rebuilt it fails, unless all are known.
func (s *Sink) Partitions(ctx context.Context, names []string) (map[string]int32, error) {
	counts, rest := make(map[string]int32, len(names)), make([]string, 0, len(names))
	s.mu.Lock()
	for _, name := range names {
		if t := s.topics[name]; t != nil && t.state == topicKnown {
			counts[name] = t.partitions
		} else {
			rest = append(rest, name)
		}
	}
	s.mu.Unlock()
	if len(rest) == 0 {
		return counts, nil
	}
	p, done := s.batch.use()
	if p == nil {
		return nil, fmt.Errorf("asking for the partitions of topics: %w", errRebuilding)
	}
	defer done()
	topics, err := p.namedTopics(ctx, rest)
	if err != nil {
		return nil, err
	}
	for _, t := range topics {
		counts[t.Name] = t.Partitions
	}
	return counts, nil
}

// topicFailed notes that the cluster refused a record because of its topic.
func (s *Sink) topicFailed(name string, why *relay.SinkError) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if t := s.topics[name]; t != nil && t.state == topicKnown {
		t.state, t.refusal, t.checked = topicRefused, why, time.Now()
	}
}

// batchTooLarge notes that a batch was too large for a topic while a record of it alone was not: for a while its records
// go one by one.
func (s *Sink) batchTooLarge(name string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if t := s.topics[name]; t != nil {
		t.soloUntil = time.Now().Add(soloFor)
	}
}

// dropHeld reports everything that waits for a topic to be looked up.
func (s *Sink) dropHeld(why *relay.SinkError) {
	s.mu.Lock()
	var held []*entry
	for _, t := range s.topics {
		held = append(held, t.held...)
		t.held = nil
	}
	s.mu.Unlock()
	for _, e := range held {
		s.failed(e, why)
	}
}

// lookUp asks the cluster for topics and puts the answers into the cache.
func (s *Sink) lookUp(ctx context.Context, names []string) error {
	p, done := s.batch.use()
	if p == nil {
		return errRebuilding
	}
	defer done()
	found, err := p.describe(ctx, names)
	if err != nil {
		return err
	}
	for _, d := range found {
		switch v := verdictOf(d.Error.Code()); {
		case !s.mayWrite(&d):
			s.unknown(d.Name, &relay.SinkError{
				Class: relay.ClassTopic, Code: verdicts[ck.ErrTopicAuthorizationFailed].name, Detail: "we may see topic " + d.Name + " but not write it",
			})
		case len(d.Partitions) > 0 && (d.Error.Code() == ck.ErrNoError || d.Error.Code() == ck.ErrLeaderNotAvailable):
			if err := s.learned(p, d.Name, int32(len(d.Partitions))); err != nil {
				return err
			}
		case v.class == relay.ClassTopic && d.Error.Code() != ck.ErrNoError:
			s.unknown(d.Name, &relay.SinkError{Class: relay.ClassTopic, Code: v.name, Detail: d.Error.Error()})
		default: // being created: ask again
			s.mu.Lock()
			s.asking[d.Name] = struct{}{}
			s.mu.Unlock()
		}
	}
	return nil
}

// learned notes that a topic is there, and hands over what waited for it.
func (s *Sink) learned(p *producer, name string, partitions int32) error {
	s.mu.Lock()
	t := s.topics[name]
	if t == nil || (t.state == topicKnown && t.partitions == partitions) {
		s.mu.Unlock()
		return nil
	}
	s.mu.Unlock()
	// The producer has its own idea of the topic, perhaps that it is not there, or smaller: this sets it right.
	if _, err := p.rd.GetMetadata(&name, false, int(lookUpTimeout.Milliseconds())); err != nil {
		return fmt.Errorf("reading the metadata of topic %s: %w", name, err)
	}
	for {
		s.mu.Lock()
		t.partitions, t.refusal = partitions, nil
		t.version++
		held := t.held
		t.held = nil
		if len(held) == 0 {
			t.state = topicKnown
			s.mu.Unlock()
			return nil
		}
		s.mu.Unlock()
		// Deliveries that arrive now are held as well, so that none overtakes these.
		for _, e := range held {
			if v := s.hand(e, s.batch); v != nil {
				if v == errQueueFull {
					v = &relay.SinkError{Class: relay.ClassCluster, Code: v.Code, Detail: "the producer's queue is full"}
				}
				s.failed(e, v)
			}
		}
	}
}

// unknown notes that a topic is not there, and reports what waited for it.
func (s *Sink) unknown(name string, why *relay.SinkError) {
	s.mu.Lock()
	t := s.topics[name]
	if t == nil {
		s.mu.Unlock()
		return
	}
	t.state, t.refusal, t.checked = topicRefused, why, time.Now()
	held := t.held
	t.held = nil
	s.mu.Unlock()
	for _, e := range held {
		s.failed(e, why)
	}
}

// describe asks for topics by name; unlike GetMetadata it leaves no trace of unknown ones in the producer.
func (p *producer) describe(ctx context.Context, names []string) ([]ck.TopicDescription, error) {
	admin, err := ck.NewAdminClientFromProducer(p.rd)
	if err != nil {
		return nil, fmt.Errorf("describing topics: %w", err)
	}
	defer admin.Close()
	var found []ck.TopicDescription
	for part := range slices.Chunk(names, topicsPerRequest) {
		ctx, cancel := context.WithTimeout(ctx, lookUpTimeout)
		r, err := admin.DescribeTopics(ctx, ck.NewTopicCollectionOfTopicNames(part), ck.SetAdminRequestTimeout(lookUpTimeout),
			ck.SetAdminOptionIncludeAuthorizedOperations(p.sink.transactions != nil))
		cancel()
		if err != nil {
			return nil, fmt.Errorf("describing topics: %w", err)
		}
		found = append(found, r.TopicDescriptions...)
	}
	return found, nil
}

// Topics implements relay.Sink. Internal topics ("__…") are left out. A topic whose configuration we may not read has
// Kafka's default for MaxMessageBytes. While the cluster is away
// or the producer is being rebuilt it fails.
func (s *Sink) Topics(ctx context.Context, names []string) ([]store.Topic, error) {
	p, done := s.batch.use()
	if p == nil {
		return nil, fmt.Errorf("asking for topics: %w", errRebuilding)
	}
	defer done()
	var (
		topics []store.Topic
		err    error
	)
	if names == nil {
		topics, err = p.allTopics(ctx)
	} else {
		topics, err = p.namedTopics(ctx, names)
	}
	if err != nil {
		return nil, err
	}
	if err := p.readLimits(ctx, topics); err != nil {
		return nil, err
	}
	s.health.contact()
	s.remember(topics)
	return topics, nil
}

// remember puts topics that the cluster has just told of into the cache.
func (s *Sink) remember(topics []store.Topic) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, found := range topics {
		switch t := s.topics[found.Name]; {
		case t == nil:
			s.topics[found.Name] = &topic{state: topicKnown, partitions: found.Partitions}
		case t.state != topicKnown || t.partitions != found.Partitions:
			s.ask(found.Name) // the producer must hear of it too
		}
	}
}

func (p *producer) namedTopics(ctx context.Context, names []string) ([]store.Topic, error) {
	legal := make([]string, 0, len(names))
	for _, name := range names {
		if legalTopic(name) {
			legal = append(legal, name)
		}
	}
	slices.Sort(legal)
	found, err := p.describe(ctx, slices.Compact(legal))
	if err != nil {
		return nil, err
	}
	topics := make([]store.Topic, 0, len(found))
	for _, d := range found {
		if len(d.Partitions) > 0 && !strings.HasPrefix(d.Name, "__") {
			topics = append(topics, store.Topic{Name: d.Name, Partitions: int32(len(d.Partitions)), MaxMessageBytes: defaultMaxMessageBytes})
		}
	}
	return topics, nil
}

func (p *producer) allTopics(ctx context.Context) ([]store.Topic, error) {
	timeout := lookUpTimeout
	if deadline, ok := ctx.Deadline(); ok {
		timeout = min(timeout, time.Until(deadline))
	}
	if err := ctx.Err(); err != nil || timeout < time.Millisecond {
		return nil, fmt.Errorf("asking for all topics: %w", errors.Join(err, context.DeadlineExceeded))
	}
	md, err := p.rd.GetMetadata(nil, true, int(timeout.Milliseconds()))
	if err != nil {
		return nil, fmt.Errorf("asking for all topics: %w", err)
	}
	topics := make([]store.Topic, 0, len(md.Topics))
	for name, t := range md.Topics {
		if len(t.Partitions) > 0 && !strings.HasPrefix(name, "__") {
			topics = append(topics, store.Topic{Name: name, Partitions: int32(len(t.Partitions)), MaxMessageBytes: defaultMaxMessageBytes})
		}
	}
	slices.SortFunc(topics, func(a, b store.Topic) int { return strings.Compare(a.Name, b.Name) })
	return topics, nil
}

// readLimits sets MaxMessageBytes from the topics' configuration where we may read it.
func (p *producer) readLimits(ctx context.Context, topics []store.Topic) error {
	admin, err := ck.NewAdminClientFromProducer(p.rd)
	if err != nil {
		return fmt.Errorf("reading topic configuration: %w", err)
	}
	defer admin.Close()
	for part := range slices.Chunk(topics, topicsPerRequest) {
		resources := make([]ck.ConfigResource, len(part))
		at := make(map[string]*store.Topic, len(part))
		for i := range part {
			resources[i] = ck.ConfigResource{Type: ck.ResourceTopic, Name: part[i].Name}
			at[part[i].Name] = &part[i]
		}
		ctx, cancel := context.WithTimeout(ctx, lookUpTimeout)
		results, err := admin.DescribeConfigs(ctx, resources, ck.SetAdminRequestTimeout(lookUpTimeout))
		cancel()
		if err != nil {
			return fmt.Errorf("reading topic configuration: %w", err)
		}
		for _, r := range results {
			limit, err := strconv.ParseInt(r.Config["max.message.bytes"].Value, 10, 32)
			if t := at[r.Name]; t != nil && err == nil && r.Error.Code() == ck.ErrNoError {
				t.MaxMessageBytes = int32(limit)
			}
		}
	}
	return nil
}
