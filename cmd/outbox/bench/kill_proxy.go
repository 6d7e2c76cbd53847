package bench

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"strings"
	"sync"
	"sync/atomic"

	"github.com/jackc/pgx/v5/pgconn"
)

// cutter stands between one victim and the source database. It forwards everything until COMMIT, forwards that too, and
// lets nothing back from then on.
type cutter struct {
	listener net.Listener
	network  string
	database string // its address
	onCommit func() // COMMIT is on its way
	wg       sync.WaitGroup
}

// newCutter listens for the victim. close ends it.
func newCutter(host string, port uint16, onCommit func()) (*cutter, error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, fmt.Errorf("listening for a victim: %w", err)
	}
	network, database := pgconn.NetworkAddress(host, port)
	c := &cutter{listener: l, network: network, database: database, onCommit: onCommit}
	c.wg.Go(func() {
		conn, err := l.Accept()
		if err != nil {
			return
		}
		defer conn.Close()
		c.serve(conn)
	})
	return c, nil
}

// port is on 127.0.0.1.
func (c *cutter) port() int { return c.listener.Addr().(*net.TCPAddr).Port }

// close waits for the victim's connection to end: the victim is dead, or gets its standard input closed, before.
func (c *cutter) close() error {
	err := c.listener.Close()
	c.wg.Wait()
	return err
}

func (c *cutter) serve(victim net.Conn) {
	server, err := net.Dial(c.network, c.database)
	if err != nil {
		return // the victim says that it cannot connect
	}
	var cut atomic.Bool
	var wg sync.WaitGroup
	wg.Go(func() {
		defer victim.Close()
		_, _ = io.Copy(cuttable{victim, &cut}, server) // either end may go first
	})
	_ = forward(server, victim, func() { cut.Store(true) }, c.onCommit)
	_ = server.Close()
	wg.Wait()
}

// cuttable drops what is written once it is cut.
type cuttable struct {
	w   io.Writer
	cut *atomic.Bool
}

// Write implements io.Writer.
func (c cuttable) Write(b []byte) (int, error) {
	if c.cut.Load() {
		return len(b), nil
	}
	return c.w.Write(b)
}

// longestMessage bounds one message of a victim.
const longestMessage = 1 << 20

// forward copies the messages that a client sends. before and after are called around the one that is COMMIT.
func forward(server io.Writer, client io.Reader, before, after func()) error {
	// The first message has no type.
	for header := 4; ; header = 5 {
		m := make([]byte, header)
		if _, err := io.ReadFull(client, m); err != nil {
			return err
		}
		n := int(binary.BigEndian.Uint32(m[header-4:])) - 4
		if n < 0 || n > longestMessage {
			return errors.New("not PostgreSQL's protocol")
		}
		m = append(m, make([]byte, n)...)
		if _, err := io.ReadFull(client, m[header:]); err != nil {
			return err
		}
		commit := header == 5 && isCommit(m)
		if commit {
			before()
		}
		if _, err := server.Write(m); err != nil {
			return err
		}
		if commit {
			after()
		}
	}
}

// isCommit recognises a simple query that is nothing but COMMIT.
func isCommit(message []byte) bool {
	return message[0] == 'Q' && strings.EqualFold(string(bytes.Trim(message[5:], " ;\x00")), "commit")
}
