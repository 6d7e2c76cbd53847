package storetest

import (
	"encoding/binary"
	"io"
	"net"
	"net/url"
	"sync"
	"testing"
)

// Cut is a network between a client and PostgreSQL that breaks at a chosen statement: the connection is reset before the server
// has seen that the statement is to be run. What was sent before is answered. Safe for concurrent use.
type Cut struct {
	DSN string // goes through it

	listener net.Listener
	target   string

	mu    sync.Mutex
	left  int // statements that pass before the one that is cut; -1: all pass
	cuts  int
	conns map[net.Conn]struct{}
	ended bool
}

// NewCut puts one in front of a server; everything passes at first. It ends with the test.
func NewCut(t testing.TB, dsn string) *Cut {
	t.Helper()
	u, err := url.Parse(dsn)
	if err != nil {
		t.Fatal("storetest: a DSN that is no URL:", err)
	}
	c := &Cut{target: u.Host, left: -1, conns: map[net.Conn]struct{}{}}
	if c.listener, err = net.Listen("tcp", "127.0.0.1:0"); err != nil {
		t.Fatal("storetest: listening:", err)
	}
	u.Host = c.listener.Addr().String()
	c.DSN = u.String()
	var all sync.WaitGroup
	all.Go(func() { c.accept(&all) })
	t.Cleanup(func() { c.close(); all.Wait() })
	return c
}

// After lets n statements pass from now on, on all connections together, and cuts the connection of the one after them, once. Each
// round trip of the protocol counts: preparing a statement, running it, a batch, BEGIN and COMMIT. Connecting does not.
func (c *Cut) After(n int) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.left, c.cuts = n, 0
}

// Done lets everything pass again, and reports whether something was cut since After.
func (c *Cut) Done() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.left = -1
	return c.cuts > 0
}

func (c *Cut) accept(all *sync.WaitGroup) {
	for {
		near, err := c.listener.Accept()
		if err != nil {
			return
		}
		far, err := net.Dial("tcp", c.target)
		if err != nil || !c.register(near, far) {
			_ = near.Close()
			continue
		}
		all.Go(func() {
			c.forward(far, near)
			_, _ = near.Close(), far.Close()
		})
		all.Go(func() {
			_, _ = io.Copy(near, far)
			_, _ = near.Close(), far.Close()
			c.forget(near, far)
		})
	}
}

// register reports whether the connections may be used; they are closed if not.
func (c *Cut) register(conns ...net.Conn) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, conn := range conns {
		c.conns[conn] = struct{}{}
		if c.ended {
			_ = conn.Close()
		}
	}
	return !c.ended
}

func (c *Cut) forget(conns ...net.Conn) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, conn := range conns {
		delete(c.conns, conn)
	}
}

func (c *Cut) close() {
	_ = c.listener.Close()
	c.mu.Lock()
	defer c.mu.Unlock()
	c.ended = true
	for conn := range c.conns {
		_ = conn.Close()
	}
}

// forward copies the client's messages, until an end closes or a statement is cut. The first message has no type; the server
// answers it as it likes, for encryption is not asked for.
func (c *Cut) forward(far io.Writer, near io.Reader) {
	head := make([]byte, 5)
	for first := true; ; first = false {
		from := 0
		if first {
			from = 1
		}
		if _, err := io.ReadFull(near, head[from:]); err != nil {
			return
		}
		body := make([]byte, max(int(binary.BigEndian.Uint32(head[1:]))-4, 0))
		if _, err := io.ReadFull(near, body); err != nil {
			return
		}
		if !first && (head[0] == 'Q' || head[0] == 'S') && c.cut() { // Query, Sync
			return
		}
		if _, err := far.Write(append(head[from:5:5], body...)); err != nil {
			return
		}
	}
}

// cut reports whether this is the statement.
func (c *Cut) cut() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	switch {
	case c.left < 0:
		return false
	case c.left == 0:
		c.left = -1
		c.cuts++
		return true
	}
	c.left--
	return false
}
