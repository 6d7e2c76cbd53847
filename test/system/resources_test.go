package system_test

import (
	"bytes"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/net/http2"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	"github.com/outbox-platform/outbox/embedded/process"
	outboxv1 "github.com/outbox-platform/outbox/gen/go/outbox/v1"
)

const mib = 1 << 20

// TestResources: what thousands of idle connections and of large uploads cost a server is bounded, and it serves others
// meanwhile. The binary is built as it is released: the race detector multiplies memory.
func TestResources(t *testing.T) {
	store := startPostgres(t, "")
	dsn, err := store.CreateDatabase(t.Context(), "outbox")
	if err != nil {
		t.Fatal(err)
	}
	binary := filepath.Join(t.TempDir(), "outbox")
	if out, err := exec.Command("go", "build", "-o", binary, "github.com/outbox-platform/outbox/cmd/outbox").CombinedOutput(); err != nil {
		t.Fatalf("building outbox: %v\n%s", err, out)
	}
	if out, err := exec.Command(binary, "migrate", "up", "--store-dsn", dsn).CombinedOutput(); err != nil {
		t.Fatalf("migrating: %v\n%s", err, out)
	}
	address, log := local(freePort(t)), filepath.Join(t.TempDir(), "server.log")
	server, err := process.Start(process.Options{
		Program: binary, Args: []string{"server"}, LogPath: log, DeathSignal: syscall.SIGKILL,
		Env: []string{"OUTBOX_STORE_DSN=" + dsn, "OUTBOX_SERVER_GRPC_LISTEN=" + address, "OUTBOX_SERVER_HTTP_LISTEN=" + local(freePort(t)),
			"OUTBOX_SERVER_MAX_CALLS=200"},
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { end(t, server, syscall.SIGKILL) })
	awaitPort(t, server, address, log)
	serves := func(when string) {
		t.Helper()
		conn := dialPlain(t, address)
		_, err := outboxv1.NewOutboxServiceClient(conn).Commit(t.Context(), &outboxv1.CommitRequest{Source: "nobody", TransactionId: make([]byte, 16)})
		if status.Code(err) != codes.PermissionDenied {
			t.Errorf("%s: %v", when, err)
		}
	}
	serves("at first")
	memory, files := residentMiB(t, server.PID(), "VmRSS"), openFiles(t, server.PID())

	idle := idleConnections(t)
	for range idle {
		conn, err := net.Dial("tcp", address)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = conn.Close() })
		if _, err := io.WriteString(conn, http2.ClientPreface); err != nil {
			t.Fatal(err)
		}
		if err := http2.NewFramer(conn, conn).WriteSettings(); err != nil {
			t.Fatal(err)
		}
	}
	eventually(t, time.Minute, "all connections are taken", func() (bool, string) {
		n := openFiles(t, server.PID())
		return n >= files+idle, strconv.Itoa(n)
	})
	serves("beside idle connections")
	if more := openFiles(t, server.PID()) - files - idle; more > 100 {
		t.Errorf("%d open files more than connections", more)
	}
	if per := float64(residentMiB(t, server.PID(), "VmRSS")-memory) / float64(idle); per > 0.1 {
		t.Errorf("an idle connection costs %.2f MiB", per)
	}
	t.Logf("%d idle connections: %d MiB more", idle, residentMiB(t, server.PID(), "VmRSS")-memory)

	refused := uploads(t, address)
	serves("after the uploads")
	peak := residentMiB(t, server.PID(), "VmHWM")
	t.Logf("1,000 uploads of 4 MiB, %d of them refused: %d MiB at most", refused, peak)
	// 200 calls at a time, of 4 MiB in the transport and as much decoded, and what the garbage collector leaves.
	if limit := 200*4*2*2 + 1024; peak > limit {
		t.Errorf("%d MiB resident, want at most %d", peak, limit)
	}
}

// uploads makes 1,000 calls of 4 MiB at a time over 10 connections and returns how many were refused for lack of room. All
// of them are wrong: the source does not exist.
func uploads(t *testing.T, address string) (refused int) {
	t.Helper()
	body, err := proto.Marshal(&outboxv1.PrepareRequest{
		Source: "nobody", TransactionId: make([]byte, 16),
		Events: []*outboxv1.Event{{Payload: bytes.Repeat([]byte{1}, 4*mib-1024)}},
	})
	if err != nil {
		t.Fatal(err)
	}
	var (
		wg      sync.WaitGroup
		mu      sync.Mutex
		seen    = map[codes.Code]int{}
		example = map[codes.Code]error{}
	)
	for range 10 {
		conn := dialPlain(t, address)
		if _, err := healthpb.NewHealthClient(conn).Check(t.Context(), &healthpb.HealthCheckRequest{}); err != nil {
			t.Fatal(err)
		}
		for range 100 {
			wg.Go(func() {
				err := conn.Invoke(t.Context(), outboxv1.OutboxService_Prepare_FullMethodName, body, new([]byte), grpc.ForceCodec(encoded{}))
				mu.Lock()
				defer mu.Unlock()
				seen[status.Code(err)]++
				example[status.Code(err)] = err
			})
		}
	}
	wg.Wait()
	for code := range seen {
		// The deadline that the server gives calls that bring none may pass while everything waits for the processors.
		if code != codes.PermissionDenied && code != codes.ResourceExhausted && code != codes.InvalidArgument && code != codes.DeadlineExceeded {
			t.Errorf("%d uploads ended like this: %v", seen[code], example[code])
		}
	}
	return seen[codes.ResourceExhausted]
}

// encoded is a codec for messages that are encoded already, once for all uploads.
type encoded struct{}

func (encoded) Marshal(v any) ([]byte, error)      { return v.([]byte), nil }
func (encoded) Unmarshal(data []byte, v any) error { *v.(*[]byte) = bytes.Clone(data); return nil }
func (encoded) Name() string                       { return "proto" }

func dialPlain(t *testing.T, address string) *grpc.ClientConn {
	t.Helper()
	conn, err := grpc.NewClient(address, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	return conn
}

// idleConnections is 10,000, or as many as this process may open.
func idleConnections(t *testing.T) int {
	t.Helper()
	var limit syscall.Rlimit
	if err := syscall.Getrlimit(syscall.RLIMIT_NOFILE, &limit); err != nil {
		t.Fatal(err)
	}
	n := min(10_000, int(limit.Cur)-1000) //nolint:gosec // small
	if n < 1000 {
		t.Fatalf("only %d open files are allowed (ulimit -n): allow at least 2,000", limit.Cur)
	}
	return n
}

func openFiles(t *testing.T, pid int) int {
	t.Helper()
	entries, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", pid))
	if err != nil {
		t.Fatal(err)
	}
	return len(entries)
}

// residentMiB reads a line of /proc/PID/status: VmRSS, resident now, or VmHWM, the most it ever was.
func residentMiB(t *testing.T, pid int, name string) int {
	t.Helper()
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		t.Fatal(err)
	}
	for line := range bytes.Lines(b) {
		if f := bytes.Fields(line); len(f) == 3 && string(f[0]) == name+":" {
			kib, err := strconv.Atoi(string(f[1]))
			if err != nil {
				t.Fatal(err)
			}
			return kib >> 10
		}
	}
	t.Fatalf("no %s of process %d", name, pid)
	return 0
}
