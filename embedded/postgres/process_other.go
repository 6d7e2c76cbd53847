//go:build !linux

package postgres

import (
	"errors"
	"syscall"
	"time"
)

// childAttributes keeps a Ctrl-C at the terminal from reaching the child before us. There is no death signal here: a
// server outlives a SIGKILL of this process.
func childAttributes(credential *syscall.Credential) *syscall.SysProcAttr {
	return &syscall.SysProcAttr{Credential: credential, Setsid: true}
}

// child is a process as it was seen once.
type child struct{ pid int }

func (c child) alive() bool { return syscall.Kill(c.pid, 0) == nil }

// childrenOf knows no children without /proc. A start that follows a kill waits for them by itself.
func childrenOf(int) []child { return nil }

func (p *process) cpu() (time.Duration, error) {
	return 0, errors.New("CPU times of child processes are known on Linux only")
}
