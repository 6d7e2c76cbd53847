//go:build !linux

package process

import (
	"errors"
	"syscall"
	"time"
)

// attributes knows no death signal here: a child outlives a SIGKILL of this process.
func attributes(options Options) *syscall.SysProcAttr {
	return &syscall.SysProcAttr{Credential: options.Credential, Setsid: true}
}

// Child is a process as it was seen once.
type Child struct{ pid int }

// Alive reports whether the process still runs.
func (c Child) Alive() bool { return syscall.Kill(c.pid, 0) == nil }

// Signal sends it a signal; an error means that it is gone.
func (c Child) Signal(s syscall.Signal) error { return syscall.Kill(c.pid, s) }

// PID is its process id.
func (c Child) PID() int { return c.pid }

// Children lists the living children of a process. Elsewhere than on Linux it knows none.
func Children(int) []Child { return nil }

func cpuTime(int) (time.Duration, error) {
	return 0, errors.New("CPU times of child processes are known on Linux only")
}
