package main

import (
	"os/exec"
	"syscall"
	"testing"
	"time"

	"github.com/outbox-platform/outbox/store/storetest"
)

// TestStartBeforeTheStore starts a server while its database is down: it says so, and serves once the database is there.
func TestStartBeforeTheStore(t *testing.T) {
	t.Parallel()
	cluster := storetest.NewCluster(t)
	db := cluster.New(t)
	cluster.Kill()
	const limit = time.Minute
	p := start(t, func(cmd *exec.Cmd) { cmd.Env = append(cmd.Env, "OUTBOX_STORE_DSN="+db.DSN) },
		"server", "--server-grpc-listen", "127.0.0.1:0", "--server-http-listen", "127.0.0.1:0")
	p.await(limit, "the store cannot be reached")
	cluster.Restart(t)
	p.await(limit, "the store answers")
	if code := p.end(syscall.SIGTERM, limit); code != 0 {
		t.Errorf("exit code %d", code)
	}

	cluster.Kill()
	p = start(t, func(cmd *exec.Cmd) { cmd.Env = append(cmd.Env, "OUTBOX_STORE_DSN="+db.DSN) }, "server")
	p.await(limit, "the store cannot be reached")
	if code := p.end(syscall.SIGTERM, limit); code != exitUnavailable {
		t.Errorf("exit code %d of a server that never had a store", code)
	}
	cluster.Restart(t) // as the end of the test expects it
}
