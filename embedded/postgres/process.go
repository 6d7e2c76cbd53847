package postgres

import (
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"syscall"
	"time"
)

// process is one postmaster.
type process struct {
	cmd  *exec.Cmd
	pid  int
	done chan struct{} // closed when the postmaster has been reaped

	counted bool // its CPU time is in Server.spent; guarded by Server.mu
}

// startProcess runs the postmaster as the account's user, with the data directory as working directory: the present one
// may be unreadable for that user.
func startProcess(a *account, dataDir, logPath, program string, args []string) (*process, error) {
	log, err := os.OpenFile(logPath, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return nil, err
	}
	defer func() { _ = log.Close() }()
	cmd := exec.Command(program, args...)
	cmd.Dir = dataDir
	cmd.Stdout, cmd.Stderr = log, log
	cmd.SysProcAttr = childAttributes(a.credential())
	p := &process{cmd: cmd, done: make(chan struct{})}
	started := make(chan error, 1)
	go func() {
		// The child gets its death signal when the thread that forked it ends, not when the process does. So this
		// thread stays until the child has ended.
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		err := cmd.Start()
		started <- err
		if err == nil {
			_ = cmd.Wait()
			close(p.done)
		}
	}()
	if err := <-started; err != nil {
		return nil, err
	}
	p.pid = cmd.Process.Pid
	return p, nil
}

// signal sends a signal to the postmaster alone; an error means that it has ended.
func (p *process) signal(s syscall.Signal) error {
	return p.cmd.Process.Signal(s)
}

// kill ends the postmaster with SIGKILL and waits until its backends are gone too. They are sessions of their own, so no
// signal to a process group reaches them: they leave when they notice that the postmaster is dead.
func (p *process) kill() {
	// A stopped postmaster starts no further backend, so that the list is complete.
	if p.signal(syscall.SIGSTOP) != nil {
		<-p.done
		return
	}
	children := childrenOf(p.pid)
	_ = p.signal(syscall.SIGKILL)
	<-p.done
	deadline := time.Now().Add(orphanGrace)
	for _, child := range children {
		for child.alive() {
			if time.Now().After(deadline) {
				_ = syscall.Kill(child.pid, syscall.SIGKILL)
			}
			time.Sleep(pollInterval)
		}
	}
}

// exit says how the process ended. Only after done.
func (p *process) exit() string {
	if p.cmd.ProcessState == nil {
		return "unknown"
	}
	return fmt.Sprint(p.cmd.ProcessState)
}

// cpuAtExit is the CPU time of the ended postmaster and of the children that it reaped. Only after done.
func (p *process) cpuAtExit() time.Duration {
	if p.cmd.ProcessState == nil {
		return 0
	}
	return p.cmd.ProcessState.UserTime() + p.cmd.ProcessState.SystemTime()
}
