package kafka

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/twmb/franz-go/pkg/kerr"
	"github.com/twmb/franz-go/pkg/kgo"
	"github.com/twmb/franz-go/pkg/kmsg"
)

// CreateTopic creates a topic on any cluster and returns when its partitions have leaders. 0 partitions are the cluster's
// default. A topic of that name is an error.
func CreateTopic(ctx context.Context, bootstrap, name string, partitions int, configs map[string]string) error {
	client, err := newClient(bootstrap)
	if err != nil {
		return err
	}
	defer client.Close()
	topic := kmsg.NewCreateTopicsRequestTopic()
	topic.Topic = name
	topic.NumPartitions = -1
	if partitions > 0 {
		topic.NumPartitions = int32(partitions)
	}
	topic.ReplicationFactor = -1
	for _, key := range slices.Sorted(maps.Keys(configs)) {
		config := kmsg.NewCreateTopicsRequestTopicConfig()
		config.Name, config.Value = key, kmsg.StringPtr(configs[key])
		topic.Configs = append(topic.Configs, config)
	}
	request := kmsg.NewPtrCreateTopicsRequest()
	request.TimeoutMillis = 15_000
	request.Topics = append(request.Topics, topic)
	response, err := request.RequestWith(ctx, client)
	if err != nil {
		return fmt.Errorf("create topic %q: %w", name, err)
	}
	for _, answer := range response.Topics {
		if err := kerr.ErrorForCode(answer.ErrorCode); err != nil {
			message := ""
			if answer.ErrorMessage != nil {
				message = ": " + *answer.ErrorMessage
			}
			return fmt.Errorf("create topic %q: %w%s", name, err, message)
		}
	}
	for {
		if _, err = partitionsOf(ctx, client, []string{name}); err == nil {
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("wait for topic %q: %w (last answer: %w)", name, context.Cause(ctx), err)
		case <-time.After(pollInterval):
		}
	}
}

// partitionsOf returns the partition numbers of topics, or an error while one of them has no leader.
func partitionsOf(ctx context.Context, client *kgo.Client, topics []string) (map[string][]int32, error) {
	request := kmsg.NewPtrMetadataRequest()
	for _, name := range topics {
		topic := kmsg.NewMetadataRequestTopic()
		topic.Topic = kmsg.StringPtr(name)
		request.Topics = append(request.Topics, topic)
	}
	response, err := request.RequestWith(ctx, client)
	if err != nil {
		return nil, err
	}
	found := make(map[string][]int32, len(topics))
	for _, topic := range response.Topics {
		if err := kerr.ErrorForCode(topic.ErrorCode); err != nil {
			return nil, fmt.Errorf("topic %q: %w", *topic.Topic, err)
		}
		for _, partition := range topic.Partitions {
			if err := kerr.ErrorForCode(partition.ErrorCode); err != nil {
				return nil, fmt.Errorf("topic %q partition %d: %w", *topic.Topic, partition.Partition, err)
			}
			found[*topic.Topic] = append(found[*topic.Topic], partition.Partition)
		}
	}
	return found, nil
}

func newClient(bootstrap string, options ...kgo.Opt) (*kgo.Client, error) {
	options = append([]kgo.Opt{kgo.SeedBrokers(strings.Split(bootstrap, ",")...), kgo.DisableClientMetrics()}, options...)
	client, err := kgo.NewClient(options...)
	if err != nil {
		return nil, fmt.Errorf("create Kafka client: %w", err)
	}
	return client, nil
}
