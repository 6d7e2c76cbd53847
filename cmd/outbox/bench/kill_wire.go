package bench

import (
	"bytes"
	"context"
	"net"
	"sync"
)

// wire is a victim's connection to the platform. It tells when certain bytes have been handed to the kernel: from then on
// they arrive although the process dies.
type wire struct {
	mu     sync.Mutex
	needle []byte // nil: nothing is looked for
	sent   func()
}

// await calls sent, once, from within the write that carries needle. A needle never spans two messages, but it may span two
// writes.
func (w *wire) await(needle []byte, sent func()) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.needle, w.sent = needle, sent
}

// dial is for grpc.WithContextDialer.
func (w *wire) dial(ctx context.Context, address string) (net.Conn, error) {
	conn, err := (&net.Dialer{}).DialContext(ctx, "tcp", address)
	if err != nil {
		return nil, err
	}
	return &watchedConn{Conn: conn, wire: w}, nil
}

// watchedConn is one connection of a wire. As gRPC does, one goroutine writes at a time.
type watchedConn struct {
	net.Conn
	wire *wire
	tail []byte // the end of what was written
}

// Write implements net.Conn.
func (c *watchedConn) Write(b []byte) (int, error) {
	n, err := c.Conn.Write(b)
	c.written(b[:n])
	return n, err
}

func (c *watchedConn) written(b []byte) {
	c.wire.mu.Lock()
	needle, sent := c.wire.needle, c.wire.sent
	found := false
	if needle != nil {
		text := append(c.tail, b...)
		found = bytes.Contains(text, needle)
		c.tail = append([]byte(nil), text[max(0, len(text)-len(needle)+1):]...)
		if found {
			c.wire.needle, c.tail = nil, nil
		}
	}
	c.wire.mu.Unlock()
	if found {
		sent()
	}
}
