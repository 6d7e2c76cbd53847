package server

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"math/big"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"

	outboxv1 "github.com/outbox-platform/outbox/gen/go/outbox/v1"
	"github.com/outbox-platform/outbox/store"
)

func TestValidateConfig(t *testing.T) {
	good := testConfig(t)
	if err := good.Validate(); err != nil {
		t.Fatal("the defaults:", err)
	}
	for want, change := range map[string]func(*Config){
		"max-events must be positive: 0":        func(c *Config) { c.MaxEvents = 0 },
		"10001 > 10000":                         func(c *Config) { c.MaxEvents = 10001 },
		"65, 64":                                func(c *Config) { c.MaxHeaders = 65 },
		"max-header-bytes":                      func(c *Config) { c.MaxHeaderBytes = -1 },
		"max-source-calls":                      func(c *Config) { c.MaxSourceCalls = -1 },
		"5000000 > 4194304":                     func(c *Config) { c.MaxEventBytes = 5000000 },
		"5242879, 4194304":                      func(c *Config) { c.MaxReceiveBytes = 5242879 },
		`tls-cert and tls-key go together: "x"`: func(c *Config) { c.TLSCert = "x" },
		"client-ca needs tls-cert":              func(c *Config) { c.ClientCA, c.TokensFile = "x", "y" },
		"client-ca needs a tokens-file":         func(c *Config) { c.ClientCA, c.TLSCert, c.TLSKey = "x", "y", "z" },
		`listen on loopback, not "0.0.0.0:1"`:   func(c *Config) { c.GRPCListen = "0.0.0.0:1" },
		`listen on loopback, not ":1"`:          func(c *Config) { c.HTTPListen = ":1" },
		"http-listen":                           func(c *Config) { c.HTTPListen = "nonsense" },
		"drain-timeout":                         func(c *Config) { c.DrainTimeout = 0 },
	} {
		c := good
		change(&c)
		if err := c.Validate(); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%v, want %q in it", err, want)
		}
	}
	open := good
	open.GRPCListen, open.AllowAnonymous = "0.0.0.0:1", true
	if err := open.Validate(); err != nil {
		t.Error("allowed explicitly:", err)
	}
	for addr, want := range map[string]bool{"127.0.0.1:1": true, "[::1]:1": true, "localhost:1": true, "10.0.0.1:1": false, ":1": false, "x": false} {
		if isLoopback(addr) != want {
			t.Errorf("isLoopback(%q) is not %v", addr, want)
		}
	}
}

// A server that cannot start says why, and leaves nothing open.
func TestBuildFails(t *testing.T) {
	taken := freeListener(t).Addr().String()
	for name, change := range map[string]func(*Config){
		"configuration": func(c *Config) { c.MaxEvents = 0 },
		"tokens file":   func(c *Config) { c.TokensFile = filepath.Join(t.TempDir(), "missing") },
		"certificate":   func(c *Config) { c.TLSCert, c.TLSKey = "missing", "missing" },
		"gRPC port":     func(c *Config) { c.GRPCListen = taken },
		"HTTP port":     func(c *Config) { c.HTTPListen = taken },
	} {
		c := testConfig(t)
		change(&c)
		if _, err := build(c, newMemoryWriter(t), &sources{log: discard()}, nil, 16, discard(), prometheus.NewRegistry()); err == nil {
			t.Errorf("%s: it starts", name)
		}
	}
	reg := prometheus.NewRegistry()
	if _, err := newMetrics(reg); err != nil {
		t.Fatal(err)
	}
	if _, err := build(testConfig(t), newMemoryWriter(t), &sources{log: discard()}, nil, 16, discard(), reg); err == nil {
		t.Error("metrics registered twice are accepted")
	}
}

// authority makes certificates.
type authority struct {
	t    *testing.T
	dir  string
	key  *ecdsa.PrivateKey
	cert *x509.Certificate
	next int64
}

func newAuthority(t *testing.T) *authority {
	t.Helper()
	a := &authority{t: t, dir: t.TempDir(), next: 1}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	a.key = key
	template := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "test CA"}, IsCA: true, BasicConstraintsValid: true,
		KeyUsage: x509.KeyUsageCertSign, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour)}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	if a.cert, err = x509.ParseCertificate(der); err != nil {
		t.Fatal(err)
	}
	a.write("ca.pem", "CERTIFICATE", der)
	return a
}

func (a *authority) path(name string) string { return filepath.Join(a.dir, name) }

func (a *authority) write(name, kind string, der []byte) {
	a.t.Helper()
	if err := os.WriteFile(a.path(name), pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der}), 0o600); err != nil {
		a.t.Fatal(err)
	}
}

// issue writes name.pem and name.key.
func (a *authority) issue(name string, change func(*x509.Certificate)) tls.Certificate {
	a.t.Helper()
	a.next++
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		a.t.Fatal(err)
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(a.next), Subject: pkix.Name{CommonName: name},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth}}
	change(template)
	der, err := x509.CreateCertificate(rand.Reader, template, a.cert, key.Public(), a.key)
	if err != nil {
		a.t.Fatal(err)
	}
	a.write(name+".pem", "CERTIFICATE", der)
	keyDER, err := x509.MarshalECPrivateKey(key)
	if err != nil {
		a.t.Fatal(err)
	}
	a.write(name+".key", "EC PRIVATE KEY", keyDER)
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}
}

func TestClientCertificates(t *testing.T) {
	ca, strangers := newAuthority(t), newAuthority(t)
	local := func(c *x509.Certificate) { c.IPAddresses = []net.IP{net.IPv4(127, 0, 0, 1)} }
	ca.issue("server", local)
	spiffe := func(c *x509.Certificate) { c.URIs = []*url.URL{{Scheme: "spiffe", Host: "example", Path: "/orders"}} }
	tokens := ca.path("tokens.yaml")
	text := fmt.Sprintf("principals:\n- {name: orders, sources: [orders], certificates: [\"spiffe://example/orders\", orders.example]}\n- {name: ops, admin: true, token_sha256: [%s]}\n", hashOf("ops-secret"))
	if err := os.WriteFile(tokens, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	r := startWithTLS(t, ca, tokens)
	for name, c := range map[string]struct {
		cert tls.Certificate
		ok   bool
	}{
		"by URI":            {ca.issue("a", spiffe), true},
		"by DNS name":       {ca.issue("b", func(c *x509.Certificate) { c.DNSNames = []string{"orders.example"} }), true},
		"common name only":  {ca.issue("orders.example", func(*x509.Certificate) {}), false},
		"another name":      {ca.issue("c", func(c *x509.Certificate) { c.DNSNames = []string{"orders.example.evil"} }), false},
		"of another CA":     {strangers.issue("d", spiffe), false},
		"expired":           {ca.issue("e", func(c *x509.Certificate) { spiffe(c); c.NotAfter = time.Now().Add(-time.Minute) }), false},
		"no client purpose": {ca.issue("f", func(c *x509.Certificate) { spiffe(c); c.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth} }), false},
		"without":           {tls.Certificate{}, false},
	} {
		t.Run(name, func(t *testing.T) {
			client := outboxv1.NewOutboxServiceClient(dial(t, r.GRPCAddr(), clientTLS(ca, c.cert)))
			_, err := client.Prepare(t.Context(), newPrepare("orders"))
			if (err == nil) != c.ok {
				t.Fatalf("%v", err)
			}
		})
	}
	// A token wins over the certificate, and a wrong one is not repaired by it.
	client := outboxv1.NewOutboxServiceClient(dial(t, r.GRPCAddr(), clientTLS(ca, ca.issue("g", spiffe))))
	_, err := client.Prepare(withToken(t.Context(), "wrong"), newPrepare("orders"))
	wantError(t, err, codes.Unauthenticated, outboxv1.ErrorReason_ERROR_REASON_IDENTITY_UNKNOWN)
	_, err = client.Prepare(withToken(t.Context(), "ops-secret"), newPrepare("orders"))
	wantError(t, err, codes.PermissionDenied, outboxv1.ErrorReason_ERROR_REASON_SOURCE_DENIED)

	// Revoked: the file changes, and the server follows.
	if err := os.WriteFile(tokens, []byte("principals: []\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if changed, err := r.identities.check(); !changed || err != nil {
		t.Fatalf("%v, %v", changed, err)
	}
	_, err = client.Prepare(t.Context(), newPrepare("orders"))
	wantError(t, err, codes.Unauthenticated, outboxv1.ErrorReason_ERROR_REASON_IDENTITY_UNKNOWN)
	// A broken file leaves the last good state in force.
	if err := os.WriteFile(tokens, []byte("{{{"), 0o600); err != nil {
		t.Fatal(err)
	}
	if changed, err := r.identities.check(); changed || err == nil {
		t.Fatalf("a broken file: %v, %v", changed, err)
	}
	_, err = client.Prepare(t.Context(), newPrepare("orders"))
	wantError(t, err, codes.Unauthenticated, outboxv1.ErrorReason_ERROR_REASON_IDENTITY_UNKNOWN)
	// A new server certificate is served to new connections.
	before := serial(t, r, ca)
	ca.issue("server", local)
	if changed, err := r.tls.check(); !changed || err != nil {
		t.Fatalf("%v, %v", changed, err)
	}
	if after := serial(t, r, ca); after == before {
		t.Error("the old certificate is served")
	}
}

func startWithTLS(t *testing.T, ca *authority, tokens string) *running {
	t.Helper()
	cfg := testConfig(t)
	cfg.MaintenanceInterval = time.Hour
	cfg.TLSCert, cfg.TLSKey, cfg.ClientCA, cfg.TokensFile = ca.path("server.pem"), ca.path("server.key"), ca.path("ca.pem"), tokens
	return startWithout(t, newMemoryWriter(t), func(c *Config) {
		grpcListen, httpListen := c.GRPCListen, c.HTTPListen
		*c = cfg
		c.GRPCListen, c.HTTPListen = grpcListen, httpListen
	})
}

func clientTLS(ca *authority, cert tls.Certificate) grpc.DialOption {
	pool := x509.NewCertPool()
	pool.AddCert(ca.cert)
	c := &tls.Config{RootCAs: pool, MinVersion: tls.VersionTLS12}
	if len(cert.Certificate) > 0 {
		c.Certificates = []tls.Certificate{cert}
	}
	return grpc.WithTransportCredentials(credentials.NewTLS(c))
}

// serial is the serial number of the certificate on the HTTP port.
func serial(t *testing.T, r *running, ca *authority) string {
	t.Helper()
	pool := x509.NewCertPool()
	pool.AddCert(ca.cert)
	conn, err := tls.Dial("tcp", r.HTTPAddr(), &tls.Config{RootCAs: pool, MinVersion: tls.VersionTLS12})
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close() //nolint:errcheck // the test ends
	return conn.ConnectionState().PeerCertificates[0].SerialNumber.String()
}

func TestReadTLSFails(t *testing.T) {
	ca := newAuthority(t)
	ca.issue("server", func(*x509.Certificate) {})
	good := Config{TLSCert: ca.path("server.pem"), TLSKey: ca.path("server.key")}
	if _, err := readTLS(good); err != nil {
		t.Fatal(err)
	}
	for name, change := range map[string]func(*Config){
		"key of another": func(c *Config) { ca.issue("other", func(*x509.Certificate) {}); c.TLSKey = ca.path("other.key") },
		"missing CA":     func(c *Config) { c.ClientCA = ca.path("missing") },
		"empty CA":       func(c *Config) { c.ClientCA = ca.path("server.key") },
	} {
		c := good
		change(&c)
		if _, err := readTLS(c); err == nil {
			t.Errorf("%s: accepted", name)
		}
	}
}

// Sources are served from memory while the store is away, unknown names are asked for once for all callers, and a name
// that has just been registered is never refused.
func TestSources(t *testing.T) {
	var asked atomic.Int64
	var away atomic.Bool
	var registered atomic.Pointer[[]store.Source]
	registered.Store(&[]store.Source{{ID: 1, Name: "orders", Topics: []string{"a"}}})
	s := &sources{
		loadSources: func(context.Context) ([]store.Source, error) {
			asked.Add(1)
			if away.Load() {
				return nil, store.ErrUnavailable
			}
			return *registered.Load(), nil
		},
		loadTopics: func(context.Context) ([]store.Topic, error) { return nil, nil },
		log:        discard(),
	}
	if s.known("orders") != nil || s.byID(1) != nil {
		t.Fatal("known before it was read")
	}
	if _, known := s.topics().maxBytes("a"); known {
		t.Fatal("a topic is known before it was read")
	}
	src, err := s.find(t.Context(), "orders")
	if err != nil || src == nil {
		t.Fatalf("%v, %v", src, err)
	}
	src.open.Add(1)
	// Many unknown names at once: one reading, or two when they straddle one.
	before := asked.Load()
	done := make(chan error, 50)
	for i := range 50 {
		go func() {
			unknown, err := s.find(t.Context(), fmt.Sprintf("unknown-%d", i))
			if err == nil && unknown != nil {
				err = errors.New("it is known")
			}
			done <- err
		}()
	}
	for range 50 {
		if err := <-done; err != nil {
			t.Fatal(err)
		}
	}
	if n := asked.Load() - before; n > 2 {
		t.Errorf("%d readings for 50 unknown names", n)
	}
	// Registered just now, asked for just now.
	registered.Store(&[]store.Source{{ID: 1, Name: "orders", Topics: []string{"a"}}, {ID: 2, Name: "new"}})
	if src, err := s.find(t.Context(), "new"); err != nil || src == nil {
		t.Fatalf("%v, %v", src, err)
	}
	if n := s.known("orders").open.Load(); n != 1 {
		t.Errorf("the calls under way are forgotten: %d", n)
	}
	away.Store(true)
	if src, err := s.find(t.Context(), "orders"); err != nil || src == nil {
		t.Fatalf("while the store is away: %v, %v", src, err)
	}
	if _, err := s.find(t.Context(), "unknown"); !errors.Is(err, store.ErrUnavailable) {
		t.Fatalf("an unknown name while the store is away: %v", err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := s.find(ctx, "unknown"); !errors.Is(err, context.Canceled) {
		t.Fatalf("a caller that went away: %v", err)
	}
	// An older reading does not replace a newer one.
	s.put(nil, nil, time.Now().Add(-time.Hour))
	if s.known("orders") == nil {
		t.Error("an old reading replaced a newer one")
	}
}
