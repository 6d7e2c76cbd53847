package cluster

import (
	"context"
	"encoding/json"
	"fmt"
	"net"
	"os"
	"os/signal"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/twmb/franz-go/pkg/kerr"
	"github.com/twmb/franz-go/pkg/kfake"
	"github.com/twmb/franz-go/pkg/kgo"
	"github.com/twmb/franz-go/pkg/kmsg"

	"github.com/outbox-platform/outbox/embedded/kafka"
	"github.com/outbox-platform/outbox/test/robustness/driver"
)

// Broker is a Kafka cluster behind proxies.
type Broker interface {
	// Bootstrap names the brokers as clients reach them.
	Bootstrap() string
	// Nodes is how many can be killed apart from each other.
	Nodes() int
	Kill(node int)
	Restart(ctx context.Context, node int) error
	Freeze(node int)
	Thaw(node int)
	// MoveLeaders gives partitions to other brokers. False: it cannot.
	MoveLeaders(ctx context.Context) (bool, error)
	// Refuse answers the next n produce requests to a topic with an error, -1 until Forgive. False: it cannot.
	Refuse(ctx context.Context, topic string, code int16, n int) (bool, error)
	Forgive(ctx context.Context) error
	// KeepsTime reports whether it honours message.timestamp.type=LogAppendTime.
	KeepsTime() bool
	Stop(ctx context.Context)
}

// fakeBrokers are three fake brokers in one process. After a kill they have all records, but have forgotten what idempotent
// producers sent last: what was under way is then written twice.
type fakeBrokers struct {
	process *Process
	links   []*Link
	control string
}

// fakeConfig is what the process is told.
type fakeConfig struct {
	Dir     string
	Port    int
	Proxies map[int]int
	Control string
}

const fakeNodes = 3

func (s *links) fakeBrokers(ctx context.Context, dir, self string) (*fakeBrokers, error) {
	port, err := consecutivePorts(fakeNodes)
	if err != nil {
		return nil, err
	}
	b := &fakeBrokers{control: filepath.Join(dir, "broker.orders")}
	c := fakeConfig{Dir: filepath.Join(dir, "broker"), Port: port, Proxies: map[int]int{}, Control: b.control}
	for i := range fakeNodes {
		l, err := s.add(fmt.Sprintf("any-kafka%d", i), local(port+i))
		if err != nil {
			return nil, err
		}
		b.links = append(b.links, l)
		c.Proxies[port+i] = l.Port()
	}
	config, err := json.Marshal(c)
	if err != nil {
		return nil, err
	}
	b.process = &Process{Name: "broker", Program: self, Args: []string{"broker", string(config)}, address: local(port), dir: dir}
	return b, b.process.Start(ctx)
}

// nextPort is where the next search for free ports begins: no two parts of this process get the same.
var nextPort = struct {
	sync.Mutex
	n int
}{n: 20000 + os.Getpid()*7%9000}

// consecutivePorts finds free ones below the range from which the kernel takes those of clients.
func consecutivePorts(n int) (int, error) {
	nextPort.Lock()
	defer nextPort.Unlock()
	for ; nextPort.n < 32000; nextPort.n++ {
		free := 0
		for i := range n {
			if l, err := net.Listen("tcp", local(nextPort.n+i)); err == nil {
				_ = l.Close()
				free++
			}
		}
		if free == n {
			base := nextPort.n
			nextPort.n += n
			return base, nil
		}
	}
	return 0, fmt.Errorf("no %d free ports in a row", n)
}

// BrokerMain is the fake brokers' process. config is JSON.
func BrokerMain(ctx context.Context, config string) error {
	var c fakeConfig
	if err := json.Unmarshal([]byte(config), &c); err != nil {
		return err
	}
	fake, err := kafka.StartFake(kafka.FakeConfig{
		Dir: c.Dir, Port: c.Port, Brokers: fakeNodes, SyncWrites: true, Advertise: func(port int) int { return c.Proxies[port] },
	})
	if err != nil {
		return err
	}
	defer fake.Close()
	ctx, stop := signal.NotifyContext(ctx, syscall.SIGTERM)
	defer stop()
	var faults []*kfake.FaultHandle
	last := ""
	for {
		if content, err := os.ReadFile(c.Control); err == nil && string(content) != last {
			last = string(content)
			words := strings.Fields(last)
			switch words[0] {
			case "shuffle":
				fake.Cluster().ShufflePartitionLeaders()
			case "refuse": // topic code n
				code, _ := strconv.ParseInt(words[2], 10, 16)
				n, _ := strconv.Atoi(words[3])
				faults = append(faults, fake.Cluster().Fault(kfake.Fault{
					Keys: []kmsg.Key{kmsg.Produce}, Topic: strings.Trim(words[1], "*"), Err: asKafkaError(int16(code)), Count: n,
				}))
			case "forgive":
				for _, f := range faults {
					f.Remove()
				}
				faults = nil
			}
			_ = os.WriteFile(c.Control+".done", content, 0o600) // the suite waits for it, and says so when it is missing
		}
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(10 * time.Millisecond):
		}
	}
}

func asKafkaError(code int16) *kerr.Error {
	e, _ := kerr.ErrorForCode(code).(*kerr.Error) //nolint:errorlint // it is that type
	return e
}

func (b *fakeBrokers) order(ctx context.Context, order string) error {
	content := fmt.Sprintf("%s %d", order, time.Now().UnixNano())
	if err := driver.Order(b.control, content); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, startLimit)
	defer cancel()
	for {
		if done, err := os.ReadFile(b.control + ".done"); err == nil && string(done) == content {
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("the broker does not %q: %w", order, ctx.Err())
		case <-time.After(10 * time.Millisecond):
		}
	}
}

func (b *fakeBrokers) Bootstrap() string {
	var all []string
	for _, l := range b.links {
		all = append(all, l.Address())
	}
	return strings.Join(all, ",")
}

func (*fakeBrokers) Nodes() int                                 { return 1 }
func (b *fakeBrokers) Kill(int)                                 { b.process.Kill() }
func (b *fakeBrokers) Restart(ctx context.Context, _ int) error { return b.process.Start(ctx) }
func (b *fakeBrokers) Freeze(int)                               { b.process.Freeze() }
func (b *fakeBrokers) Thaw(int)                                 { b.process.Thaw() }
func (b *fakeBrokers) MoveLeaders(ctx context.Context) (bool, error) {
	return true, b.order(ctx, "shuffle")
}

func (b *fakeBrokers) Refuse(ctx context.Context, topic string, code int16, n int) (bool, error) {
	return true, b.order(ctx, fmt.Sprintf("refuse %s %d %d", topic, code, n))
}
func (b *fakeBrokers) Forgive(ctx context.Context) error { return b.order(ctx, "forgive") }
func (*fakeBrokers) KeepsTime() bool                     { return false }
func (b *fakeBrokers) Stop(context.Context)              { b.process.Kill() }

// apacheBrokers is real Apache Kafka: three nodes, three replicas, two of them needed for a write; or one node.
type apacheBrokers struct {
	*kafka.Apache
	links []*Link
	nodes int
}

func (s *links) apacheBrokers(ctx context.Context, dir string, nodes int) (*apacheBrokers, error) {
	b := &apacheBrokers{nodes: nodes}
	proxies := map[int]int{}
	base, err := consecutivePorts(2 * nodes)
	if err != nil {
		return nil, err
	}
	for i := range nodes {
		l, err := s.add(fmt.Sprintf("any-kafka%d", i), local(base+2*i))
		if err != nil {
			return nil, err
		}
		b.links = append(b.links, l)
		proxies[base+2*i] = l.Port()
	}
	b.Apache, err = kafka.StartApache(ctx, kafka.ApacheConfig{
		Dir: filepath.Join(dir, "kafka"), Nodes: nodes, BasePort: base, Heap: "320m", Advertise: func(port int) int { return proxies[port] },
	})
	return b, err
}

func (b *apacheBrokers) Nodes() int                                { return b.nodes }
func (b *apacheBrokers) Freeze(i int)                              { _ = syscall.Kill(b.PID(i), syscall.SIGSTOP) }
func (b *apacheBrokers) Thaw(i int)                                { _ = syscall.Kill(b.PID(i), syscall.SIGCONT) }
func (b *apacheBrokers) MoveLeaders(context.Context) (bool, error) { return false, nil }
func (b *apacheBrokers) Forgive(context.Context) error             { return nil }
func (*apacheBrokers) KeepsTime() bool                             { return true }
func (b *apacheBrokers) Stop(ctx context.Context)                  { _ = b.Apache.Stop(ctx) }
func (b *apacheBrokers) Refuse(context.Context, string, int16, int) (bool, error) {
	return false, nil
}

// addPartitions raises a topic's partition count.
func addPartitions(ctx context.Context, bootstrap, topic string, count int) error {
	c, err := kgo.NewClient(kgo.SeedBrokers(strings.Split(bootstrap, ",")...))
	if err != nil {
		return err
	}
	defer c.Close()
	r := kmsg.NewPtrCreatePartitionsRequest()
	r.TimeoutMillis = 5000
	t := kmsg.NewCreatePartitionsRequestTopic()
	t.Topic, t.Count = topic, int32(count) //nolint:gosec // few
	r.Topics = append(r.Topics, t)
	answer, err := r.RequestWith(ctx, c)
	if err != nil {
		return fmt.Errorf("add partitions to %s: %w", topic, err)
	}
	for _, t := range answer.Topics {
		if err := kerr.ErrorForCode(t.ErrorCode); err != nil {
			return fmt.Errorf("add partitions to %s: %w", topic, err)
		}
	}
	return nil
}
