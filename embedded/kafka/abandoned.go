package kafka

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/twmb/franz-go/pkg/kerr"
	"github.com/twmb/franz-go/pkg/kfake"
	"github.com/twmb/franz-go/pkg/kgo"
	"github.com/twmb/franz-go/pkg/kmsg"
)

// runningMark is a file in Dir while brokers use it: there at the start, it says that they were killed.
const runningMark = "running"

// abandonedLimit bounds how long looking for abandoned transactions may take.
const abandonedLimit = 2 * time.Minute

// takeUp makes a directory ready for brokers.
func takeUp(dir string, brokers int) error {
	_, err := os.Stat(filepath.Join(dir, runningMark))
	switch {
	case err == nil:
		if err := endAbandoned(dir, brokers); err != nil {
			return fmt.Errorf("end abandoned transactions: %w", err)
		}
		return nil
	case !errors.Is(err, fs.ErrNotExist):
		return err
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(dir, runningMark), nil, 0o600)
}

// leave says that a directory's brokers ended by themselves. Without, the next start looks for abandoned transactions, and finds
// none.
func leave(dir string) { _ = os.Remove(filepath.Join(dir, runningMark)) }

// endAbandoned ends the transactions that were open when brokers were killed, as a real cluster's coordinator does: with a marker
// in each partition. The fake does it without: consumers of committed records then take what the producer commits later for more
// of the transaction that ended nowhere, and the next replay does the opposite.
//
// It has brokers of its own on other ports, so that no client is there meanwhile.
func endAbandoned(dir string, brokers int) error {
	cluster, err := kfake.NewCluster(kfake.NumBrokers(brokers), kfake.DataDir(dir), kfake.SyncWrites())
	if err != nil {
		return err
	}
	defer cluster.Close()
	ctx, cancel := context.WithTimeout(context.Background(), abandonedLimit) //nolint:forbidigo // of brokers that nobody else has
	defer cancel()
	bootstrap := strings.Join(cluster.ListenAddrs(), ",")
	admin, err := newClient(bootstrap)
	if err != nil {
		return err
	}
	defer admin.Close()
	listed, err := kmsg.NewPtrListTransactionsRequest().RequestWith(ctx, admin)
	if err != nil {
		return fmt.Errorf("list transactions: %w", err)
	}
	if len(listed.TransactionStates) == 0 {
		return nil // no producer was ever transactional: nothing need be read
	}
	open, err := openTransactions(ctx, admin, bootstrap)
	if err != nil {
		return err
	}
	for p, at := range open {
		if err := abort(ctx, admin, p, at); err != nil {
			return fmt.Errorf("abort the transaction of producer %d: %w", p.id, err)
		}
	}
	return nil
}

// producer is a transactional producer in one of its epochs.
type producer struct {
	id    int64
	epoch int16
}

// openTransactions reads everything, and returns where producers have transactional records behind their last marker.
func openTransactions(ctx context.Context, admin *kgo.Client, bootstrap string) (map[producer][]place, error) {
	described, err := kmsg.NewPtrMetadataRequest().RequestWith(ctx, admin)
	if err != nil {
		return nil, fmt.Errorf("list topics: %w", err)
	}
	var topics []string
	for _, t := range described.Topics {
		topics = append(topics, *t.Topic)
	}
	client, err := newClient(bootstrap, readFrom(topics)...)
	if err != nil {
		return nil, err
	}
	defer client.Close()
	epochs := make(map[place]map[int64]int16)
	err = readToEnd(ctx, client, topics, func(record *kgo.Record) {
		at := place{record.Topic, record.Partition}
		switch {
		case record.Attrs.IsControl():
			delete(epochs[at], record.ProducerID)
		case record.Attrs.IsTransactional():
			if epochs[at] == nil {
				epochs[at] = make(map[int64]int16)
			}
			epochs[at][record.ProducerID] = record.ProducerEpoch
		}
	})
	if err != nil {
		return nil, err
	}
	open := make(map[producer][]place)
	for at, producers := range epochs {
		for id, epoch := range producers {
			p := producer{id, epoch}
			open[p] = append(open[p], at)
		}
	}
	return open, nil
}

// abort writes the markers that end a transaction in its partitions.
func abort(ctx context.Context, client *kgo.Client, p producer, at []place) error {
	marker := kmsg.NewWriteTxnMarkersRequestMarker()
	marker.ProducerID, marker.ProducerEpoch = p.id, p.epoch
	partitions := make(map[string][]int32)
	for _, a := range at {
		partitions[a.topic] = append(partitions[a.topic], a.partition)
	}
	for _, name := range slices.Sorted(maps.Keys(partitions)) {
		topic := kmsg.NewWriteTxnMarkersRequestMarkerTopic()
		topic.Topic, topic.Partitions = name, partitions[name]
		marker.Topics = append(marker.Topics, topic)
	}
	request := kmsg.NewPtrWriteTxnMarkersRequest()
	request.Markers = append(request.Markers, marker)
	response, err := request.RequestWith(ctx, client)
	if err != nil {
		return err
	}
	var errs []error
	for _, m := range response.Markers {
		for _, t := range m.Topics {
			for _, p := range t.Partitions {
				if err := kerr.ErrorForCode(p.ErrorCode); err != nil {
					errs = append(errs, fmt.Errorf("topic %q partition %d: %w", t.Topic, p.Partition, err))
				}
			}
		}
	}
	return errors.Join(errs...)
}
