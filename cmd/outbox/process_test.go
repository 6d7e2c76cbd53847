package main

import (
	"bufio"
	"errors"
	"os"
	"os/exec"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

// mainEnv makes the test binary behave as the program: processes get signals that a test must not send to itself.
const mainEnv = "OUTBOX_TEST_MAIN"

// program is `outbox` as a process of its own.
type program struct {
	t    *testing.T
	cmd  *exec.Cmd
	done chan struct{}
	err  error

	mu      sync.Mutex
	lines   []string
	changed chan struct{}
}

// start runs the program; change may set what else the process needs.
func start(t *testing.T, change func(*exec.Cmd), args ...string) *program {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	p := &program{t: t, cmd: exec.Command(self, args...), done: make(chan struct{}), changed: make(chan struct{})}
	p.cmd.Env = append(os.Environ(), mainEnv+"=1")
	if change != nil {
		change(p.cmd)
	}
	out, in, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	p.cmd.Stdout, p.cmd.Stderr = in, in
	if err := p.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	_ = in.Close()
	read := make(chan struct{})
	go func() {
		defer close(read)
		defer out.Close()
		for scanner := bufio.NewScanner(out); scanner.Scan(); {
			p.add(scanner.Text())
		}
	}()
	go func() {
		p.err = p.cmd.Wait()
		<-read
		close(p.done)
	}()
	t.Cleanup(func() {
		select {
		case <-p.done:
		default:
			_ = p.cmd.Process.Kill()
			<-p.done
		}
		if t.Failed() {
			t.Logf("outbox %s:\n%s", strings.Join(args, " "), p.output())
		}
	})
	return p
}

func (p *program) add(line string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.lines = append(p.lines, line)
	close(p.changed)
	p.changed = make(chan struct{})
}

func (p *program) output() string {
	p.mu.Lock()
	defer p.mu.Unlock()
	return strings.Join(p.lines, "\n")
}

// await waits for the first line that has text in it.
func (p *program) await(limit time.Duration, text string) string {
	p.t.Helper()
	timer := time.NewTimer(limit)
	defer timer.Stop()
	seen := 0
	for {
		p.mu.Lock()
		lines, changed := p.lines, p.changed
		p.mu.Unlock()
		for ; seen < len(lines); seen++ {
			if strings.Contains(lines[seen], text) {
				return lines[seen]
			}
		}
		select {
		case <-changed:
		case <-p.done:
			if output := p.output(); !strings.Contains(output, text) {
				p.t.Fatalf("it ended (%v) before it printed %q", p.err, text)
			}
		case <-timer.C:
			p.t.Fatalf("it did not print %q within %s", text, limit)
		}
	}
}

// end sends a signal and waits; it returns the exit code, -1 when a signal ended it.
func (p *program) end(signal syscall.Signal, limit time.Duration) int {
	p.t.Helper()
	if err := p.cmd.Process.Signal(signal); err != nil && !errors.Is(err, os.ErrProcessDone) {
		p.t.Fatal(err)
	}
	return p.wait(limit)
}

func (p *program) wait(limit time.Duration) int {
	p.t.Helper()
	timer := time.NewTimer(limit)
	defer timer.Stop()
	select {
	case <-p.done:
		return p.cmd.ProcessState.ExitCode()
	case <-timer.C:
		p.t.Fatalf("it has not ended after %s", limit)
		return -1
	}
}
