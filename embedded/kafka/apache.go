package kafka

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/outbox-platform/outbox/embedded/process"
)

const (
	// ApacheVersion is the release of Apache Kafka that StartApache runs.
	ApacheVersion = "4.4.0"

	// clusterID only has to be the same for all nodes of a cluster.
	clusterID = "MkU3OEVBNTcwNTJENDM2Qg"
	// readyLine is logged when a broker serves; its port opens earlier.
	readyLine = "Kafka Server started"
	// readyTimeout bounds the start of a cluster when the context sets no earlier end.
	readyTimeout = 2 * time.Minute
	// pollInterval is the pause between two looks at a log.
	pollInterval = 20 * time.Millisecond
)

// ApacheConfig says which cluster to run.
type ApacheConfig struct {
	// Dir keeps the cluster between starts. Empty: a temporary directory, removed by Stop.
	Dir string
	// Nodes is how many there are, each broker and controller. 0: one. With three or more, topics have three replicas
	// and need two of them for a write.
	Nodes int
	// BasePort: node i listens on BasePort+2i, its controller on the next port. 0: free ports, chosen at every
	// StartApache and kept by Restart.
	BasePort int
	// Heap of each node, as java's -Xmx. Empty: "384m".
	Heap string
	// Settings are server properties that win over this package's.
	Settings map[string]string
	// Advertise, when set, returns the port of 127.0.0.1 that clients are told for the node that listens on one: that of a
	// proxy in front of it. The other nodes use it too.
	Advertise func(port int) int
	// Log receives a line when something takes long, such as the one download. Nil: silent.
	Log func(line string)
}

// Apache is a cluster of real Apache Kafka nodes, numbered from 0. Its methods may be called from several goroutines;
// those that start or stop nodes run one after the other.
type Apache struct {
	config ApacheConfig
	java   string
	jars   string
	dir    string
	nodes  []*node

	lifecycle sync.Mutex // one of Stop, Kill, Restart at a time
}

// node is one place of the cluster: its ports and directory stay, its process changes.
type node struct {
	index          int
	dir            string
	port, voterTCP int

	mu      sync.Mutex
	running *process.Process
	spent   time.Duration // CPU time of processes that have ended
}

// StartApache starts a cluster and returns when all its brokers serve. The first start on a machine fetches the jars.
// The context bounds only the start.
func StartApache(ctx context.Context, config ApacheConfig) (*Apache, error) {
	if config.Log == nil {
		config.Log = func(string) {}
	}
	if config.Heap == "" {
		config.Heap = "384m"
	}
	config.Nodes = max(1, config.Nodes)
	a := &Apache{config: config}
	var err error
	if a.java, err = findJava(ctx); err != nil {
		return nil, err
	}
	if a.jars, err = fetchJars(ctx, config.Log); err != nil {
		return nil, err
	}
	if a.dir, err = homeDir(config.Dir); err != nil {
		return nil, fmt.Errorf("prepare directory for Kafka: %w", err)
	}
	if err := a.layOut(); err != nil {
		a.removeTemporary()
		return nil, fmt.Errorf("prepare Kafka nodes: %w", err)
	}
	if err := a.eachNode(func(n *node) error { return a.launch(ctx, n) }); err != nil {
		_ = a.eachNode(func(n *node) error { n.kill(); return nil })
		a.removeTemporary()
		return nil, err
	}
	return a, nil
}

func homeDir(dir string) (string, error) {
	if dir == "" {
		return os.MkdirTemp("", "outbox-kafka-")
	}
	dir, err := filepath.Abs(dir)
	if err != nil {
		return "", err
	}
	return dir, os.MkdirAll(dir, 0o755)
}

// layOut chooses ports and writes the properties of every node.
func (a *Apache) layOut() error {
	ports := make([]int, 2*a.config.Nodes)
	for i := range ports {
		ports[i] = a.config.BasePort + i
	}
	if a.config.BasePort == 0 {
		var err error
		if ports, err = process.FreePorts(len(ports)); err != nil {
			return err
		}
	}
	for i := range a.config.Nodes {
		a.nodes = append(a.nodes, &node{
			index: i, dir: filepath.Join(a.dir, strconv.Itoa(i)), port: ports[2*i], voterTCP: ports[2*i+1],
		})
	}
	for _, n := range a.nodes {
		if err := os.MkdirAll(n.dir, 0o755); err != nil {
			return err
		}
		if err := os.WriteFile(n.properties(), a.properties(n), 0o644); err != nil {
			return err
		}
	}
	return nil
}

// eachNode runs a function for all nodes at the same time.
func (a *Apache) eachNode(do func(*node) error) error {
	errs := make([]error, len(a.nodes))
	var all sync.WaitGroup
	for i, n := range a.nodes {
		all.Go(func() { errs[i] = do(n) })
	}
	all.Wait()
	return errors.Join(errs...)
}

// launch formats a new node, starts it and waits until it serves.
func (a *Apache) launch(ctx context.Context, n *node) error {
	ctx, cancel := context.WithTimeout(ctx, readyTimeout)
	defer cancel()
	if err := a.format(ctx, n); err != nil {
		return err
	}
	logStart := process.LogSize(n.log())
	p, err := process.Start(process.Options{
		Program: a.java, Args: a.arguments(n, "kafka.Kafka", n.properties()),
		Dir: n.dir, LogPath: n.log(), DeathSignal: syscall.SIGKILL,
	})
	if err != nil {
		return fmt.Errorf("start Kafka node %d: %w", n.index, err)
	}
	n.replace(p)
	if err := awaitLine(ctx, p, n.log(), logStart); err != nil {
		n.kill()
		return fmt.Errorf("start Kafka node %d: %w; its log ends with:\n%s", n.index, err, process.Tail(process.LogSince(n.log(), logStart)))
	}
	return nil
}

func awaitLine(ctx context.Context, p *process.Process, log string, from int64) error {
	for {
		if strings.Contains(process.LogSince(log, from), readyLine) {
			return nil
		}
		select {
		case <-p.Done():
			return fmt.Errorf("it ended at once: %s", p.Exit())
		case <-ctx.Done():
			return fmt.Errorf("not ready: %w", context.Cause(ctx))
		case <-time.After(pollInterval):
		}
	}
}

// Bootstrap lists the brokers' addresses, separated by commas.
func (a *Apache) Bootstrap() string {
	addresses := make([]string, len(a.nodes))
	for i, n := range a.nodes {
		port := n.port
		if a.config.Advertise != nil {
			port = a.config.Advertise(port)
		}
		addresses[i] = net.JoinHostPort("127.0.0.1", strconv.Itoa(port))
	}
	return strings.Join(addresses, ",")
}

// CreateTopic creates a topic and returns when every broker that runs knows it. 0 partitions are the cluster's default.
// A topic of that name is an error.
func (a *Apache) CreateTopic(ctx context.Context, name string, partitions int, configs map[string]string) error {
	return CreateTopic(ctx, a.Bootstrap(), name, partitions, configs)
}

// Kill ends node i with SIGKILL. Its data stays, so that Restart can follow.
func (a *Apache) Kill(i int) {
	a.lifecycle.Lock()
	defer a.lifecycle.Unlock()
	a.nodes[i].kill()
}

// Restart starts node i again on its data and ports, after stopping it (orderly) if it runs.
func (a *Apache) Restart(ctx context.Context, i int) error {
	a.lifecycle.Lock()
	defer a.lifecycle.Unlock()
	a.nodes[i].stop(ctx)
	return a.launch(ctx, a.nodes[i])
}

// Stop ends all nodes and removes a temporary directory. Nodes that are not gone when the context ends, or after ten
// seconds, are killed: Kafka recovers from that at its next start.
func (a *Apache) Stop(ctx context.Context) error {
	a.lifecycle.Lock()
	defer a.lifecycle.Unlock()
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	err := a.eachNode(func(n *node) error {
		if a.config.Dir == "" {
			n.kill() // nobody needs its data any more
		}
		n.stop(ctx)
		return nil
	})
	a.removeTemporary()
	return err
}

// PID is the process id of node i, also after it ended.
func (a *Apache) PID(i int) int {
	n := a.nodes[i]
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.running.PID()
}

// CPUTime is the CPU time (user and system) that all nodes have used since StartApache, ended processes included.
func (a *Apache) CPUTime() (time.Duration, error) {
	var sum time.Duration
	for _, n := range a.nodes {
		spent, err := n.cpuTime()
		if err != nil {
			return 0, fmt.Errorf("read CPU time of Kafka node %d: %w", n.index, err)
		}
		sum += spent
	}
	return sum, nil
}

func (a *Apache) removeTemporary() {
	if a.config.Dir == "" {
		_ = os.RemoveAll(a.dir)
	}
}

func (n *node) properties() string { return filepath.Join(n.dir, "server.properties") }
func (n *node) log() string        { return filepath.Join(n.dir, "server.log") }
func (n *node) data() string       { return filepath.Join(n.dir, "data") }

// kill ends the node's process with SIGKILL and waits for it.
func (n *node) kill() {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.running != nil {
		_ = n.running.Signal(syscall.SIGKILL) // an error means that it has ended
		<-n.running.Done()
	}
}

// replace makes p the node's process. The CPU time of the one before, which has ended, goes into the sum.
func (n *node) replace(p *process.Process) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.running != nil {
		spent, _ := n.running.CPUTime() // of an ended process it is known
		n.spent += spent
	}
	n.running = p
}

// stop ends the node's process, by force when the context ends first.
func (n *node) stop(ctx context.Context) {
	n.mu.Lock()
	defer n.mu.Unlock()
	p := n.running
	if p == nil || ended(p) {
		return
	}
	_ = p.Signal(syscall.SIGTERM)
	select {
	case <-p.Done():
	case <-ctx.Done():
		_ = p.Signal(syscall.SIGKILL)
		<-p.Done()
	}
}

func (n *node) cpuTime() (time.Duration, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	spent, err := n.running.CPUTime()
	return n.spent + spent, err
}

func ended(p *process.Process) bool {
	select {
	case <-p.Done():
		return true
	default:
		return false
	}
}
