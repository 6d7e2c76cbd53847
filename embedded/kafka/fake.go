package kafka

import (
	"fmt"
	"maps"
	"net"
	"slices"
	"strings"
	"sync"

	"github.com/twmb/franz-go/pkg/kfake"
)

// DefaultPartitions is the partition count of a topic that names none.
const DefaultPartitions = 6

// FakeConfig says which fake cluster to run.
type FakeConfig struct {
	// Dir keeps topics and records between starts, for one Fake at a time. Empty: they live in memory.
	Dir string
	// Port on 127.0.0.1 of the first broker; the others take the next ones. 0: free ports.
	Port int
	// Brokers is how many there are. 0: one.
	Brokers int
	// Partitions of a topic that names none. 0: DefaultPartitions.
	Partitions int
	// Topics are created when they do not exist, with their partition counts (0: Partitions).
	Topics map[string]int
	// Settings are broker settings, for instance "message.max.bytes".
	Settings map[string]string
	// SyncWrites makes every write reach the disk before it is acknowledged. Only with Dir.
	SyncWrites bool
	// Advertise, when set, returns the port of 127.0.0.1 that clients are told for the broker that listens on one: that of a
	// proxy in front of it.
	Advertise func(port int) int
}

// Fake is a cluster of fake brokers in this process. It speaks Kafka's protocol with any client, but replicates nothing.
// Topics are never created by a client's metadata request.
type Fake struct {
	cluster   *kfake.Cluster
	bootstrap string
	dir       string
	closed    sync.Once
}

// StartFake starts a fake cluster. Transactions that were open when the last one of its directory was killed are aborted.
func StartFake(config FakeConfig) (*Fake, error) {
	brokers := max(1, config.Brokers)
	partitions := config.Partitions
	if partitions == 0 {
		partitions = DefaultPartitions
	}
	options := []kfake.Opt{
		kfake.NumBrokers(brokers),
		kfake.DefaultNumPartitions(partitions),
		kfake.BrokerConfigs(config.Settings),
	}
	if config.Port != 0 {
		ports := make([]int, brokers)
		for i := range ports {
			ports[i] = config.Port + i
		}
		options = append(options, kfake.Ports(ports...))
	}
	if config.Dir != "" {
		options = append(options, kfake.DataDir(config.Dir))
	}
	if config.SyncWrites {
		options = append(options, kfake.SyncWrites())
	}
	if config.Advertise != nil {
		options = append(options, kfake.ListenFn(func(network, address string) (net.Listener, error) {
			l, err := net.Listen(network, address)
			if err != nil {
				return nil, err
			}
			at := *l.Addr().(*net.TCPAddr)
			at.Port = config.Advertise(at.Port)
			return advertised{l, &at}, nil
		}))
	}
	if config.Dir != "" {
		if err := takeUp(config.Dir, brokers); err != nil {
			return nil, fmt.Errorf("start fake Kafka: %w", err)
		}
	}
	cluster, err := kfake.NewCluster(options...)
	if err != nil {
		return nil, fmt.Errorf("start fake Kafka: %w", err)
	}
	f := &Fake{cluster: cluster, bootstrap: strings.Join(cluster.ListenAddrs(), ","), dir: config.Dir}
	for _, topic := range slices.Sorted(maps.Keys(config.Topics)) {
		if cluster.TopicInfo(topic) != nil {
			continue // kept from an earlier start
		}
		if err := f.CreateTopic(topic, config.Topics[topic], nil); err != nil {
			f.Close()
			return nil, err
		}
	}
	return f, nil
}

// advertised is a listener that names another address than its own: the fake tells clients what its listener says.
type advertised struct {
	net.Listener
	at net.Addr
}

func (a advertised) Addr() net.Addr { return a.at }

// Bootstrap lists the brokers' addresses, separated by commas.
func (f *Fake) Bootstrap() string { return f.bootstrap }

// Cluster is the fake's own handle, for faults and for moving partitions.
func (f *Fake) Cluster() *kfake.Cluster { return f.cluster }

// CreateTopic creates a topic; 0 partitions are the cluster's default. A topic of that name is an error.
func (f *Fake) CreateTopic(name string, partitions int, configs map[string]string) error {
	if err := f.cluster.CreateTopic(name, int32(partitions), configs); err != nil {
		return fmt.Errorf("create topic %q: %w", name, err)
	}
	return nil
}

// Close stops the brokers. What Dir holds stays. It may be called more than once.
func (f *Fake) Close() {
	f.closed.Do(func() {
		f.cluster.Close()
		if f.dir != "" {
			leave(f.dir)
		}
	})
}
