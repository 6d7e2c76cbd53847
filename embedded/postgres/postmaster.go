package postgres

import (
	"path/filepath"
	"syscall"
	"time"

	"github.com/outbox-platform/outbox/embedded/process"
)

// orphanGrace is how long backends may take to notice that their postmaster is gone. A backend that computes without
// ever waiting does not notice at all, and would keep the data directory in use.
const orphanGrace = 10 * time.Second

// postmaster is one run of the server.
type postmaster struct {
	*process.Process
	counted bool // its CPU time is in Server.spent; guarded by Server.mu
}

// startPostmaster runs the server as the account's user, with the data directory as working directory: the present one
// may be unreadable for that user.
func (s *Server) startPostmaster() (*postmaster, error) {
	p, err := process.Start(process.Options{
		Program: filepath.Join(s.binaries.dir, "postgres"), Args: s.arguments(),
		Env: s.config.Env, Dir: s.DataDir(), LogPath: s.LogFile(),
		Credential: s.account.credential(),
		// Immediate shutdown: nobody is there any more to wait for an orderly one.
		DeathSignal: syscall.SIGQUIT,
	})
	if err != nil {
		return nil, err
	}
	return &postmaster{Process: p}, nil
}

// kill ends the postmaster with SIGKILL and waits until its backends are gone too. They are sessions of their own, so no
// signal to a process group reaches them: they leave when they notice that the postmaster is dead.
func (p *postmaster) kill() {
	// A stopped postmaster starts no further backend, so that the list is complete.
	if p.Signal(syscall.SIGSTOP) != nil {
		<-p.Done()
		return
	}
	children := process.Children(p.PID())
	_ = p.Signal(syscall.SIGKILL)
	<-p.Done()
	deadline := time.Now().Add(orphanGrace)
	for _, child := range children {
		for child.Alive() {
			if time.Now().After(deadline) {
				_ = child.Signal(syscall.SIGKILL)
			}
			<-time.After(pollInterval)
		}
	}
}
