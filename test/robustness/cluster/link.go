// Package cluster runs a whole deployment as real processes with a proxy between any two that talk to each other: store,
// source databases, brokers, servers, relays, and services that use them.
package cluster

import (
	"context"
	"fmt"
	"strings"
	"sync"

	toxiproxy "github.com/Shopify/toxiproxy/v2"
	"github.com/rs/zerolog"
)

// Link is the way from one part to another.
type Link struct {
	// Name is "from-to".
	Name  string
	mu    sync.Mutex
	proxy *toxiproxy.Proxy
	sick  []string // names of toxics in force
	cut   bool
}

// links makes them.
type links struct {
	server *toxiproxy.ApiServer
	dir    string // for what belongs to what they lead to
	clocks bool
	all    []*Link
}

func newLinks(dir string, clocks bool) *links {
	return &links{dir: dir, clocks: clocks, server: toxiproxy.NewServer(toxiproxy.NewMetricsContainer(nil), zerolog.Nop())}
}

// add opens a link to a TCP address.
func (s *links) add(name, upstream string) (*Link, error) {
	p := toxiproxy.NewProxy(s.server, name, "127.0.0.1:0", upstream)
	if err := s.server.Collection.Add(p, true); err != nil {
		return nil, fmt.Errorf("open the link %s: %w", name, err)
	}
	link := &Link{Name: name, proxy: p}
	s.all = append(s.all, link)
	return link, nil
}

// Address is where the link is entered.
func (l *Link) Address() string { return l.proxy.Listen }

// Upstream is where it leads.
func (l *Link) Upstream() string { return l.proxy.Upstream }

// Port is its port.
func (l *Link) Port() int {
	var port int
	_, _ = fmt.Sscanf(l.proxy.Listen[strings.LastIndex(l.proxy.Listen, ":")+1:], "%d", &port)
	return port
}

// Cut breaks all connections and refuses new ones.
func (l *Link) Cut() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.cut = true
	l.proxy.Stop()
}

// Reset breaks all connections once.
func (l *Link) Reset() error {
	l.Cut()
	return l.Heal()
}

// toxic adds one to both directions or one: "upstream", "downstream" or "".
func (l *Link) toxic(kind, direction, attributes string) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, d := range []string{"upstream", "downstream"} {
		if direction != "" && direction != d {
			continue
		}
		name := kind + "-" + d
		_, err := l.proxy.Toxics.AddToxicJson(strings.NewReader(fmt.Sprintf(
			`{"name":%q,"type":%q,"stream":%q,"attributes":{%s}}`, name, kind, d, attributes)))
		if err != nil {
			return fmt.Errorf("link %s: %s: %w", l.Name, name, err)
		}
		l.sick = append(l.sick, name)
	}
	return nil
}

// Slow delays every chunk by a time with jitter, in ms, both ways.
func (l *Link) Slow(latency, jitter int) error {
	return l.toxic("latency", "", fmt.Sprintf(`"latency":%d,"jitter":%d`, latency, jitter))
}

// Narrow lets so many KB a second through, both ways.
func (l *Link) Narrow(rate int) error {
	return l.toxic("bandwidth", "", fmt.Sprintf(`"rate":%d`, rate))
}

// Slice cuts what goes through into small pieces.
func (l *Link) Slice() error {
	return l.toxic("slicer", "", `"average_size":64,"size_variation":32,"delay":200`)
}

// HalfOpen swallows everything in one direction ("upstream", "downstream") or both (""): connections stay, answers do not come.
func (l *Link) HalfOpen(direction string) error { return l.toxic("timeout", direction, `"timeout":0`) }

// CutAfter breaks each connection after so many bytes downstream: in the middle of an answer.
func (l *Link) CutAfter(bytes int) error {
	return l.toxic("limit_data", "downstream", fmt.Sprintf(`"bytes":%d`, bytes))
}

// Heal ends everything.
func (l *Link) Heal() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, name := range l.sick {
		if err := l.proxy.Toxics.RemoveToxic(context.Background(), name); err != nil {
			return fmt.Errorf("link %s: heal %s: %w", l.Name, name, err)
		}
	}
	l.sick = nil
	if l.cut {
		l.cut = false
		if err := l.proxy.Start(); err != nil {
			return fmt.Errorf("link %s: heal: %w", l.Name, err)
		}
	}
	return nil
}

// lead leads the link elsewhere and breaks its connections.
func (l *Link) lead(upstream string) error {
	l.Cut()
	l.mu.Lock()
	l.proxy.Upstream = upstream
	l.mu.Unlock()
	return l.Heal()
}
