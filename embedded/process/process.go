// Package process runs child processes that end with this process, and tells how much CPU time they used.
package process

import (
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"syscall"
	"time"
)

// Options say what to run.
type Options struct {
	Program string
	Args    []string
	// Env is added to the environment of this process, as "NAME=value".
	Env []string
	// Dir is the working directory. The child's user must be able to enter it. Empty: that of this process.
	Dir string
	// LogPath is the file that standard output and standard error are appended to.
	LogPath string
	// Credential is the user to run as; nil: the user of this process.
	Credential *syscall.Credential
	// DeathSignal is what the child gets when this process ends without stopping it. Linux only.
	DeathSignal syscall.Signal
}

// Process is a started child process. Its methods may be called from several goroutines.
type Process struct {
	cmd  *exec.Cmd
	done chan struct{}
}

// Start starts a child process in a session of its own, so that a Ctrl-C at the terminal does not reach it before us.
func Start(options Options) (*Process, error) {
	log, err := os.OpenFile(options.LogPath, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return nil, err
	}
	defer func() { _ = log.Close() }()
	cmd := exec.Command(options.Program, options.Args...)
	cmd.Dir = options.Dir
	cmd.Env = append(os.Environ(), options.Env...)
	cmd.Stdout, cmd.Stderr = log, log
	cmd.SysProcAttr = attributes(options)
	p := &Process{cmd: cmd, done: make(chan struct{})}
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
	return p, nil
}

// PID is the process id, also after the process ended.
func (p *Process) PID() int { return p.cmd.Process.Pid }

// Done is closed when the process has ended.
func (p *Process) Done() <-chan struct{} { return p.done }

// Signal sends a signal to the process alone. An error means that it has ended.
func (p *Process) Signal(s syscall.Signal) error { return p.cmd.Process.Signal(s) }

// Exit waits for the end of the process and says how it ended.
func (p *Process) Exit() string {
	<-p.done
	return fmt.Sprint(p.cmd.ProcessState)
}

// CPUTime is the CPU time, user and system, that the process, its living children and the children that it reaped have
// used. Of an ended process it is the sum at its end. Its grain is the kernel's clock tick, 10 ms per process.
func (p *Process) CPUTime() (time.Duration, error) {
	select {
	case <-p.done:
		return p.atExit(), nil
	default:
	}
	spent, err := cpuTime(p.PID())
	if err != nil {
		select { // it may have ended meanwhile
		case <-p.done:
			return p.atExit(), nil
		default:
		}
	}
	return spent, err
}

func (p *Process) atExit() time.Duration {
	return p.cmd.ProcessState.UserTime() + p.cmd.ProcessState.SystemTime()
}
