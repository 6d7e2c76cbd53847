package system_test

import (
	"context"
	"fmt"
	"net"
	"os"
	"os/signal"
	"path/filepath"
	"strconv"
	"syscall"
	"testing"

	"github.com/outbox-platform/outbox/embedded/kafka"
	"github.com/outbox-platform/outbox/embedded/process"
)

// broker is a Kafka cluster of one node that can be killed.
type broker interface {
	Bootstrap() string
	CreateTopic(ctx context.Context, name string, partitions int, configs map[string]string) error
	// kill ends it with SIGKILL.
	kill()
	// signal stops it in the middle of whatever it does, or lets it go on.
	signal(syscall.Signal) error
	// restart starts it again on its data and port and returns when it serves.
	restart(ctx context.Context) error
	// keepsTime reports whether it honours message.timestamp.type=LogAppendTime.
	keepsTime() bool
}

// brokers are the two kinds, by name.
var brokers = map[string]func(testing.TB) broker{
	"kfake":  newFakeBroker,
	"apache": newApacheBroker,
}

// postgresFor runs the oldest supported PostgreSQL beside one kind of broker and the newest beside the other.
var postgresFor = map[string]string{"kfake": "15", "apache": "18"}

// apacheBroker is a real Apache Kafka.
type apacheBroker struct{ *kafka.Apache }

func newApacheBroker(t testing.TB) broker {
	t.Helper()
	apache, err := kafka.StartApache(t.Context(), kafka.ApacheConfig{Log: func(line string) { t.Log(line) }})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := apache.Stop(context.WithoutCancel(t.Context())); err != nil {
			t.Error(err)
		}
	})
	return apacheBroker{apache}
}

func (b apacheBroker) kill()                             { b.Kill(0) }
func (b apacheBroker) signal(s syscall.Signal) error     { return syscall.Kill(b.PID(0), s) }
func (b apacheBroker) restart(ctx context.Context) error { return b.Restart(ctx, 0) }

func (apacheBroker) keepsTime() bool { return true }

// fakeBroker is a fake one in a process of its own: this test binary, started with roleEnv. After kill -9 it has all records
// but has forgotten what idempotent producers sent last: what was under way is then written twice.
type fakeBroker struct {
	t       testing.TB
	dir     string
	port    int
	running *process.Process
}

const (
	roleEnv       = "OUTBOX_TEST_ROLE"
	roleBroker    = "fake-broker"
	brokerDirEnv  = "OUTBOX_TEST_BROKER_DIR"
	brokerPortEnv = "OUTBOX_TEST_BROKER_PORT"
)

// runFakeBroker is main of the fake broker's process.
func runFakeBroker() error {
	port, err := strconv.Atoi(os.Getenv(brokerPortEnv))
	if err != nil {
		return fmt.Errorf("%s: %w", brokerPortEnv, err)
	}
	fake, err := kafka.StartFake(kafka.FakeConfig{Dir: os.Getenv(brokerDirEnv), Port: port})
	if err != nil {
		return err
	}
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM)
	defer stop()
	<-ctx.Done()
	fake.Close()
	return nil
}

func newFakeBroker(t testing.TB) broker {
	t.Helper()
	b := &fakeBroker{t: t, dir: t.TempDir(), port: freePort(t)}
	if err := b.restart(t.Context()); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { end(t, b.running, syscall.SIGTERM) })
	return b
}

func (b *fakeBroker) Bootstrap() string { return net.JoinHostPort("127.0.0.1", strconv.Itoa(b.port)) }

func (b *fakeBroker) CreateTopic(ctx context.Context, name string, partitions int, configs map[string]string) error {
	return kafka.CreateTopic(ctx, b.Bootstrap(), name, partitions, configs)
}

func (b *fakeBroker) kill()                         { end(b.t, b.running, syscall.SIGKILL) }
func (b *fakeBroker) signal(s syscall.Signal) error { return b.running.Signal(s) }

func (*fakeBroker) keepsTime() bool { return false }

func (b *fakeBroker) restart(context.Context) error {
	self, err := os.Executable()
	if err != nil {
		return err
	}
	b.running, err = process.Start(process.Options{
		Program: self, LogPath: filepath.Join(b.dir, "log"), DeathSignal: syscall.SIGKILL,
		Env: []string{
			roleEnv + "=" + roleBroker, brokerDirEnv + "=" + filepath.Join(b.dir, "data"), brokerPortEnv + "=" + strconv.Itoa(b.port),
		},
	})
	if err != nil {
		return err
	}
	awaitPort(b.t, b.running, b.Bootstrap(), filepath.Join(b.dir, "log"))
	return nil
}
