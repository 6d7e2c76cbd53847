package system_test

import (
	"context"
	"encoding/json"
	"flag"
	"fmt"
	"iter"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/outbox-platform/outbox/embedded/postgres"
)

// keepLogs is where the processes' logs go, for a look at them after the run.
var keepLogs = flag.String("keep-logs", "", "directory for the logs of all processes; empty: they go with the test")

// sourceName is the service's name at the platform.
const sourceName = "shop"

const (
	// leaseTTL is shorter than the default, so that takeovers come quickly.
	leaseTTL = 3 * time.Second
	// steadyTTL is so long that even on a busy machine no relay loses a shard by chance.
	steadyTTL = 30 * time.Second
)

// platform is a deployment: a PostgreSQL of its own, servers and relays as processes.
type platform struct {
	t       testing.TB
	store   *postgres.Server
	dsn     string
	servers []*service
	relays  []*service
	env     []string // of every process, beside the usual
}

// deployment says what to deploy.
type deployment struct {
	servers, relays int
	broker          broker
	lease           time.Duration // of the relays
	version         string        // of PostgreSQL; empty: the newest
	env             []string      // settings of all processes
}

// deploy starts everything, registers the source and returns when the platform serves.
func deploy(t testing.TB, d deployment) *platform {
	t.Helper()
	p := &platform{t: t, store: startPostgres(t, d.version), env: d.env}
	var err error
	if p.dsn, err = p.store.CreateDatabase(t.Context(), "outbox"); err != nil {
		t.Fatal(err)
	}
	dir := *keepLogs
	if dir == "" {
		dir = t.TempDir()
	}
	if out, err := outbox(t, "", "migrate", "up", "--store-dsn", p.dsn); err != nil {
		t.Fatalf("migrate: %v: %s", err, out)
	}
	for i := range d.servers {
		p.servers = append(p.servers, p.server(dir, i))
	}
	for i := range d.relays {
		p.relays = append(p.relays, p.relay(dir, i, d))
	}
	t.Cleanup(p.checkLogs)
	for _, s := range append(p.servers, p.relays...) {
		s.start()
		t.Cleanup(func() { end(t, s.running, syscall.SIGKILL) })
	}
	p.register(sourceName, "block")
	return p
}

func startPostgres(t testing.TB, version string) *postgres.Server {
	t.Helper()
	server, err := postgres.Start(t.Context(), postgres.Config{Version: version, Log: func(line string) { t.Log(line) }})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := server.Stop(context.WithoutCancel(t.Context())); err != nil {
			t.Error(err)
		}
	})
	return server
}

// environment of every process. A race ends the process that has it at once.
func (p *platform) environment(more ...string) []string {
	return append(slices.Concat(more, p.env), "OUTBOX_STORE_DSN="+p.dsn, "OUTBOX_LOG_FORMAT=text", "GORACE=halt_on_error=1")
}

func (p *platform) server(dir string, i int) *service {
	grpc, http := local(freePort(p.t)), local(freePort(p.t))
	name := fmt.Sprintf("server-%d", i)
	return &service{
		t: p.t, name: name, address: grpc, log: filepath.Join(dir, name+".log"), args: []string{"server"},
		env: p.environment("OUTBOX_SERVER_GRPC_LISTEN="+grpc, "OUTBOX_SERVER_HTTP_LISTEN="+http),
	}
}

func (p *platform) relay(dir string, i int, d deployment) *service {
	http := local(freePort(p.t))
	name := fmt.Sprintf("relay-%d", i)
	return &service{
		t: p.t, name: name, address: http, log: filepath.Join(dir, name+".log"), args: []string{"relay"},
		env: p.environment("OUTBOX_RELAY_HTTP_LISTEN="+http, "OUTBOX_KAFKA_BROKERS="+d.broker.Bootstrap(),
			"OUTBOX_RELAY_LEASE_TTL="+d.lease.String()),
	}
}

func local(port int) string { return net.JoinHostPort("127.0.0.1", strconv.Itoa(port)) }

// register makes a service known, with what happens to an event that Kafka refuses.
func (p *platform) register(name, policy string) {
	p.t.Helper()
	source := fmt.Sprintf("name: %s\ntopics: [\"*\"]\nrecord_profile: cloudevents\nfailure_policy: %s\ndatabases:\n  - name: default\n    mode: marker\n", name, policy)
	if _, err := p.operate(source, "source", "apply", "-"); err != nil {
		p.t.Fatalf("register source %s: %v", name, err)
	}
}

// operate runs an operator's command against the first server.
func (p *platform) operate(stdin string, args ...string) (string, error) {
	p.t.Helper()
	return outbox(p.t, stdin, append(args, "--address", p.servers[0].address)...)
}

// operateJSON decodes the answer of an operator's command.
func operateJSON[T any](p *platform, args ...string) (answer T) {
	p.t.Helper()
	out, err := p.operate("", append(args, "-o", "json")...)
	if err != nil {
		p.t.Fatalf("outbox %s: %v", strings.Join(args, " "), err)
	}
	if err := json.Unmarshal([]byte(out), &answer); err != nil {
		p.t.Fatalf("outbox %s: %v: %s", strings.Join(args, " "), err, out)
	}
	return answer
}

// addresses of the servers' gRPC ports.
func (p *platform) addresses() []string {
	addresses := make([]string, len(p.servers))
	for i, s := range p.servers {
		addresses[i] = s.address
	}
	return addresses
}

// verify lets the platform check its own stored state.
func (p *platform) verify() {
	p.t.Helper()
	if out, err := outbox(p.t, "", "verify", "--store-dsn", p.dsn); err != nil {
		p.t.Errorf("outbox verify: %v:\n%s", err, out)
	}
}

// logShard shows what the relays said of a shard.
func (p *platform) logShard(shard int) {
	p.t.Helper()
	for line := range p.said(shard) {
		p.t.Log(line)
	}
}

// tailCutShort reports whether the holder of a shard could not read all that its predecessor had delivered, and said so. A
// broker that was stopped in the middle of a transaction may leave it open without knowing it (KIP-890): nothing behind it can
// be read then.
func (p *platform) tailCutShort(shard int, epoch int64) bool {
	p.t.Helper()
	for line := range p.said(shard) {
		if strings.Contains(line, fmt.Sprintf(" epoch=%d ", epoch)) && strings.Contains(line, "could not be read to the end") {
			return true
		}
	}
	return false
}

// said yields what the relays said of a shard.
func (p *platform) said(shard int) iter.Seq[string] {
	return func(yield func(string) bool) {
		for _, s := range p.relays {
			content, err := os.ReadFile(s.log)
			if err != nil {
				continue // it never started
			}
			for line := range strings.Lines(string(content)) {
				if strings.Contains(line, fmt.Sprintf(" shard=%d ", shard)) && !yield(s.name+": "+strings.TrimSpace(line)) {
					return
				}
			}
		}
	}
}

// checkLogs fails the test when a process found a race or panicked; and shows the logs of a failed test.
func (p *platform) checkLogs() {
	for _, s := range append(p.servers, p.relays...) {
		content, err := os.ReadFile(s.log)
		if err != nil {
			continue // it never started
		}
		for _, sign := range []string{"WARNING: DATA RACE", "panic:", "fatal error:"} {
			if at := strings.Index(string(content), sign); at >= 0 {
				p.t.Errorf("%s: %s", s.name, content[at:min(len(content), at+4000)])
			}
		}
		if p.t.Failed() {
			p.t.Logf("the log of %s ends with:\n%s", s.name, tail(s.log))
		}
	}
}
