package relay_test

import (
	"net"
	"net/url"
	"sync"
	"testing"

	"github.com/outbox-platform/outbox/store"
)

// link is a network between a relay and its store that can be frozen: nothing goes through, nothing is closed.
type link struct {
	listener net.Listener
	target   string

	mu     sync.Mutex
	thawed *sync.Cond
	frozen bool
	ended  bool
	conns  []net.Conn
}

// openLink returns a store behind a link.
func (p *platform) openLink() (*link, *store.Store) {
	p.t.Helper()
	u, err := url.Parse(p.db.DSN)
	if err != nil {
		p.t.Fatal(err)
	}
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		p.t.Fatal(err)
	}
	l := &link{listener: listener, target: u.Host}
	l.thawed = sync.NewCond(&l.mu)
	var all sync.WaitGroup
	all.Go(func() { l.accept(&all) })
	p.t.Cleanup(func() { l.close(p.t); all.Wait() })
	u.Host = listener.Addr().String()
	st, err := store.Open(p.t.Context(), store.Config{DSN: u.String()})
	if err != nil {
		p.t.Fatal(err)
	}
	p.t.Cleanup(st.Close)
	return l, st
}

func (l *link) accept(all *sync.WaitGroup) {
	for {
		near, err := l.listener.Accept()
		if err != nil {
			return
		}
		far, err := net.Dial("tcp", l.target)
		if err != nil {
			_ = near.Close()
			continue
		}
		l.mu.Lock()
		l.conns = append(l.conns, near, far)
		l.mu.Unlock()
		all.Go(func() { l.carry(far, near) })
		all.Go(func() { l.carry(near, far) })
	}
}

// carry copies until an end closes.
func (l *link) carry(to, from net.Conn) {
	defer func() { _, _ = to.Close(), from.Close() }()
	buf := make([]byte, 32<<10)
	for {
		n, err := from.Read(buf)
		l.mu.Lock()
		for l.frozen && !l.ended {
			l.thawed.Wait()
		}
		l.mu.Unlock()
		if n > 0 {
			if _, err := to.Write(buf[:n]); err != nil {
				return
			}
		}
		if err != nil {
			return
		}
	}
}

func (l *link) freeze(frozen bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.frozen = frozen
	l.thawed.Broadcast()
}

func (l *link) close(t *testing.T) {
	if err := l.listener.Close(); err != nil {
		t.Error(err)
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.ended = true
	l.thawed.Broadcast()
	for _, c := range l.conns {
		_ = c.Close()
	}
}
