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

// runningMark is a file in Dir while brokers use it: there at the start, it says that they were killed, or never came up.
const runningMark = "running"

// Files of kfake: what it takes up again after an orderly end, open transactions included, and what it knows of a partition
// without reading it.
const (
	sessionState = "session_state.json"
	snapshots    = "partitions/*/snapshot.json"
)

// abandonedLimit bounds how long looking for abandoned transactions may take.
const abandonedLimit = 2 * time.Minute

// takeUp makes a directory ready for brokers.
func takeUp(dir string, brokers int) error {
	killed := exists(filepath.Join(dir, runningMark)) && !exists(filepath.Join(dir, sessionState))
	if killed {
		if err := endAbandoned(dir, brokers); err != nil {
			_ = os.Remove(filepath.Join(dir, sessionState)) // the end of that was not the orderly end of anybody's brokers
			return fmt.Errorf("end abandoned transactions: %w", err)
		}
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(dir, runningMark), nil, 0o600)
}

// leave says that a directory's brokers ended by themselves. Without, the next start looks for abandoned transactions, and finds
// none.
func leave(dir string) { _ = os.Remove(filepath.Join(dir, runningMark)) }

func exists(path string) bool {
	_, err := os.Stat(path)
	return err == nil
}

// endAbandoned aborts the transactions that were open when brokers were killed, with a marker in each partition. The fake, which
// fences their producers itself, aborts them without: consumers of committed records then take what the producer commits later
// for more of the transaction that ended nowhere, and the next replay does the opposite. A commit that the kill cut in two is
// aborted in the partitions that it did not get to, where a real coordinator would go on with it.
//
// It has brokers of its own on other ports, so that no client is there meanwhile.
func endAbandoned(dir string, brokers int) error {
	// A snapshot is from the last orderly end. It does not say what was open then, which is over now, too.
	stale, err := fs.Glob(os.DirFS(dir), snapshots)
	if err != nil {
		return err
	}
	for _, name := range stale {
		if err := os.Remove(filepath.Join(dir, name)); err != nil {
			return err
		}
	}
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
