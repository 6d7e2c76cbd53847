package cluster

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/outbox-platform/outbox/embedded/process"
	"github.com/outbox-platform/outbox/test/robustness/driver"
)

// startLimit bounds the start of one process on a busy machine.
const startLimit = 60 * time.Second

// Process is a server, a relay, a driver or a fake broker. It can be killed and started again any number of times.
type Process struct {
	Name    string
	Program string
	Args    []string
	env     []string
	// address is where it listens when it is ready; empty: nowhere.
	address string
	// metrics is where it exposes them, when that is another place.
	metrics string
	dir     string

	mu      sync.Mutex
	running *process.Process
	Starts  int
}

func (p *Process) log() string     { return filepath.Join(p.dir, p.Name+".log") }
func (p *Process) control() string { return filepath.Join(p.dir, p.Name+".fault") }

// Start starts it and waits until it listens. It does what a supervisor does: a process that ends because its store or
// broker is away is started again.
func (p *Process) Start(ctx context.Context) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.running != nil && !ended(p.running) {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, startLimit)
	defer cancel()
	for {
		err := p.startOnce(ctx)
		if err == nil || ctx.Err() != nil || !errors.Is(err, errEnded) {
			return err
		}
		select {
		case <-ctx.Done():
			return err
		case <-time.After(100 * time.Millisecond):
		}
	}
}

// errEnded: it ended while it started.
var errEnded = errors.New("it ended at once")

func (p *Process) startOnce(ctx context.Context) error {
	_ = os.Remove(p.control())
	running, err := process.Start(process.Options{
		Program: p.Program, Args: p.Args, Env: append(p.env, "OUTBOX_FAULT_FILE="+p.control()), LogPath: p.log(), DeathSignal: syscall.SIGKILL,
	})
	if err != nil {
		return fmt.Errorf("start %s: %w", p.Name, err)
	}
	p.running = running
	p.Starts++
	if p.address == "" {
		return nil
	}
	for {
		conn, err := (&net.Dialer{Timeout: time.Second}).DialContext(ctx, "tcp", p.address)
		if err == nil {
			return conn.Close()
		}
		select {
		case <-running.Done():
			return fmt.Errorf("start %s: %w: %s; its log ends with:\n%s", p.Name, errEnded, running.Exit(), p.Tail())
		case <-ctx.Done():
			return fmt.Errorf("start %s: %w; its log ends with:\n%s", p.Name, err, p.Tail())
		case <-time.After(10 * time.Millisecond):
		}
	}
}

func ended(p *process.Process) bool {
	select {
	case <-p.Done():
		return true
	default:
		return false
	}
}

// Kill ends it with SIGKILL.
func (p *Process) Kill() { _ = p.end(syscall.SIGKILL) }

// Stop ends it as an operator would. It is an error when it does not go by itself.
func (p *Process) Stop() error {
	p.Thaw()
	return p.end(syscall.SIGTERM)
}

func (p *Process) end(signal syscall.Signal) error {
	p.mu.Lock()
	running := p.running
	p.mu.Unlock()
	if running == nil || running.Signal(signal) != nil {
		return nil //nolint:nilerr // it has ended
	}
	select {
	case <-running.Done():
	case <-time.After(startLimit):
		_ = running.Signal(syscall.SIGKILL)
		<-running.Done()
		return fmt.Errorf("%s does not end by signal %d; its log ends with:\n%s", p.Name, signal, p.Tail())
	}
	if how := running.Exit(); signal == syscall.SIGTERM && how != "exit status 0" {
		return fmt.Errorf("%s after SIGTERM: %s; its log ends with:\n%s", p.Name, how, p.Tail())
	}
	return nil
}

// Freeze stops it in the middle of whatever it does; Thaw lets it go on.
func (p *Process) Freeze() { p.signal(syscall.SIGSTOP) }

// Thaw lets it go on.
func (p *Process) Thaw() { p.signal(syscall.SIGCONT) }

func (p *Process) signal(s syscall.Signal) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.running != nil {
		_ = p.running.Signal(s) // an error means that it has ended
	}
}

// Alive reports whether it runs.
func (p *Process) Alive() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.running != nil && !ended(p.running)
}

// PID is its process id.
func (p *Process) PID() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.running.PID()
}

// errNotHit: nothing passed the point in time.
var errNotHit = errors.New("nothing passed it")

// KillAt lets it kill itself when it passes a point for the n-th time from now, and waits for that.
func (p *Process) KillAt(ctx context.Context, point string, n int) error {
	_ = os.Remove(p.control() + ".hit")
	if err := driver.Order(p.control(), fmt.Sprintf("%s %d", point, n)); err != nil {
		return err
	}
	p.mu.Lock()
	running := p.running
	p.mu.Unlock()
	select {
	case <-running.Done():
		if p.hit() == point {
			return nil
		}
		return fmt.Errorf("%s ended before it passed %s", p.Name, point)
	case <-ctx.Done():
		_ = os.WriteFile(p.control(), nil, 0o600) // it does not matter when it is gone
		return errNotHit
	}
}

func (p *Process) hit() string {
	content, err := os.ReadFile(p.control() + ".hit")
	if err != nil {
		return ""
	}
	return string(content)
}

// Tail is the end of its log.
func (p *Process) Tail() string { return process.Tail(process.LogSince(p.log(), 0)) }

// crashes are what a process logs when it breaks, in Go and in Python.
var crashes = []string{
	"WARNING: DATA RACE", "panic:", "fatal error:", "SIGSEGV",
	"the driver broke", "a background task failed", "Task exception was never retrieved", "Exception in callback", "Fatal Python error",
}

// Crash is a panic or a data race in its log, empty when there is none.
func (p *Process) Crash() string {
	content, err := os.ReadFile(p.log())
	if err != nil {
		return ""
	}
	for _, sign := range crashes {
		if at := strings.Index(string(content), sign); at >= 0 {
			return p.Name + ": " + string(content[at:min(len(content), at+3000)])
		}
	}
	return ""
}

// Metrics are those of its HTTP port.
func (p *Process) Metrics(ctx context.Context) (string, error) {
	r, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+cmp.Or(p.metrics, p.address)+"/metrics", nil)
	if err != nil {
		return "", err
	}
	answer, err := http.DefaultClient.Do(r)
	if err != nil {
		return "", err
	}
	defer answer.Body.Close()
	body, err := io.ReadAll(answer.Body)
	return string(body), err
}
