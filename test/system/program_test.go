package system_test

import (
	"flag"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/outbox-platform/outbox/embedded/process"
)

// startLimit bounds the start of one of our processes. They are built with the race detector and share the machine.
const startLimit = 60 * time.Second

// programPath is for measurements: a binary without the race detector.
var programPath = flag.String("program", "", "binary to test; empty: it is built, with the race detector")

// program builds the binary once per run, with the race detector: a race in a server or relay makes it exit with raceExit.
var program = sync.OnceValues(func() (string, error) {
	if *programPath != "" {
		return filepath.Abs(*programPath)
	}
	dir, err := os.MkdirTemp("", "outbox-system-")
	if err != nil {
		return "", err
	}
	programDir = dir
	path := filepath.Join(dir, "outbox")
	build := exec.Command("go", "build", "-race", "-o", path, "github.com/outbox-platform/outbox/cmd/outbox")
	if out, err := build.CombinedOutput(); err != nil {
		return "", &buildError{err, string(out)}
	}
	return path, nil
})

// programDir holds what was built; TestMain removes it.
var programDir string

type buildError struct {
	err    error
	output string
}

func (e *buildError) Error() string { return "building outbox: " + e.err.Error() + "\n" + e.output }

// outbox runs a command of the binary to its end and returns what it printed to standard output.
func outbox(t testing.TB, stdin string, args ...string) (string, error) {
	t.Helper()
	path, err := program()
	if err != nil {
		t.Fatal(err)
	}
	command := exec.CommandContext(t.Context(), path, args...)
	command.Stdin = strings.NewReader(stdin)
	var errOut strings.Builder
	command.Stderr = &errOut
	out, err := command.Output()
	if err != nil {
		t.Logf("outbox %s: %s", strings.Join(args[:min(2, len(args))], " "), errOut.String())
	}
	return string(out), err
}

// service is a long-running process of the binary: a server or a relay.
type service struct {
	t       testing.TB
	name    string
	args    []string
	env     []string
	address string // host:port that serves when it is ready
	log     string
	running *process.Process
}

// start starts it and waits until its HTTP port answers.
func (s *service) start() {
	s.t.Helper()
	s.launch()
	awaitPort(s.t, s.running, s.address, s.log)
}

// launch starts it without waiting.
func (s *service) launch() {
	s.t.Helper()
	path, err := program()
	if err != nil {
		s.t.Fatal(err)
	}
	s.running, err = process.Start(process.Options{
		Program: path, Args: s.args, Env: s.env, LogPath: s.log, DeathSignal: syscall.SIGKILL,
	})
	if err != nil {
		s.t.Fatalf("start %s: %v", s.name, err)
	}
}

func (s *service) kill() { end(s.t, s.running, syscall.SIGKILL) }

// freeze stops it in the middle of whatever it does; thaw lets it go on.
func (s *service) freeze() { s.signal(syscall.SIGSTOP) }
func (s *service) thaw()   { s.signal(syscall.SIGCONT) }

func (s *service) signal(signal syscall.Signal) {
	s.t.Helper()
	if err := s.running.Signal(signal); err != nil {
		s.t.Fatalf("%s is not there: %v; its log ends with:\n%s", s.name, err, tail(s.log))
	}
}

// stop ends it as an operator would, and fails the test when it does not go quietly.
func (s *service) stop() {
	s.t.Helper()
	end(s.t, s.running, syscall.SIGTERM)
	if how := s.running.Exit(); how != "exit status 0" {
		s.t.Errorf("%s after SIGTERM: %s; its log ends with:\n%s", s.name, how, tail(s.log))
	}
}

// end sends a signal and waits for the process, by force after a while.
func end(t testing.TB, p *process.Process, signal syscall.Signal) {
	t.Helper()
	_ = p.Signal(signal) // an error means that it has ended
	select {
	case <-p.Done():
	case <-time.After(startLimit):
		t.Errorf("process %d does not end by signal %d", p.PID(), signal)
		_ = p.Signal(syscall.SIGKILL)
		<-p.Done()
	}
}

// awaitPort waits until something accepts connections.
func awaitPort(t testing.TB, p *process.Process, address, log string) {
	t.Helper()
	eventually(t, startLimit, address+" to open", func() (bool, string) {
		select {
		case <-p.Done():
			t.Fatalf("it ended at once: %s; its log ends with:\n%s", p.Exit(), tail(log))
		default:
		}
		conn, err := (&net.Dialer{Timeout: time.Second}).DialContext(t.Context(), "tcp", address)
		if err != nil {
			return false, err.Error()
		}
		_ = conn.Close()
		return true, ""
	})
}

func freePort(t testing.TB) int {
	t.Helper()
	ports, err := process.FreePorts(1)
	if err != nil {
		t.Fatal(err)
	}
	return ports[0]
}

// tail returns the last lines of a log.
func tail(path string) string { return process.Tail(process.LogSince(path, 0)) }
