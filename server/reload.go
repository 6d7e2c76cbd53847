package server

import (
	"bytes"
	"context"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"sync/atomic"
	"time"
)

// reloadInterval is how often files are looked at.
const reloadInterval = 5 * time.Second

// reloaded is a value made of files. It follows their content; while the files are wrong the last good value stays.
type reloaded[T any] struct {
	files   []string
	make    func() (T, error)
	current atomic.Pointer[T]
	sum     [sha256.Size]byte
}

// newReloaded reads the value for the first time. Without files it is make's for ever.
func newReloaded[T any](files []string, mk func() (T, error)) (*reloaded[T], error) {
	r := &reloaded[T]{files: files, make: mk}
	if _, err := r.check(); err != nil {
		return nil, err
	}
	return r, nil
}

func (r *reloaded[T]) get() T { return *r.current.Load() }

// check makes the value anew if a file's content changed.
func (r *reloaded[T]) check() (changed bool, err error) {
	h := sha256.New()
	for _, f := range r.files {
		b, err := os.ReadFile(f) //nolint:gosec // the operator names the files
		if err != nil {
			return false, fmt.Errorf("reading a configured file: %w", err)
		}
		_, _ = fmt.Fprintf(h, "%d\n", len(b))
		_, _ = h.Write(b)
	}
	sum := [sha256.Size]byte(h.Sum(nil))
	if r.current.Load() != nil && bytes.Equal(sum[:], r.sum[:]) {
		return false, nil
	}
	v, err := r.make()
	if err != nil {
		return false, err
	}
	r.sum = sum
	r.current.Store(&v)
	return true, nil
}

// run follows the files until ctx ends.
func (r *reloaded[T]) run(ctx context.Context, log *slog.Logger, what string) {
	if len(r.files) == 0 {
		return
	}
	tick := time.NewTicker(reloadInterval)
	defer tick.Stop()
	var last string
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		changed, err := r.check()
		switch {
		case err != nil && err.Error() != last:
			last = err.Error()
			log.Error("reloading "+what+"; the last good state stays in force", "error", err)
		case changed:
			last = ""
			log.Info("reloaded " + what)
		}
	}
}

// newIdentities follows the tokens file.
func newIdentities(path string) (*reloaded[*identities], error) {
	if path == "" {
		return newReloaded(nil, func() (*identities, error) { return nil, nil })
	}
	return newReloaded([]string{path}, func() (*identities, error) { return readIdentities(path) })
}

// newTLS follows the certificate files; nil without a certificate.
func newTLS(c Config) (*reloaded[*tls.Config], error) {
	if c.TLSCert == "" {
		return nil, nil
	}
	files := []string{c.TLSCert, c.TLSKey}
	if c.ClientCA != "" {
		files = append(files, c.ClientCA)
	}
	return newReloaded(files, func() (*tls.Config, error) { return readTLS(c) })
}

func readTLS(c Config) (*tls.Config, error) {
	cert, err := tls.LoadX509KeyPair(c.TLSCert, c.TLSKey)
	if err != nil {
		return nil, fmt.Errorf("reading the certificate: %w", err)
	}
	t := &tls.Config{MinVersion: tls.VersionTLS12, Certificates: []tls.Certificate{cert}, NextProtos: []string{"h2", "http/1.1"}}
	if c.ClientCA != "" {
		pem, err := os.ReadFile(c.ClientCA)
		if err != nil {
			return nil, fmt.Errorf("reading the client CAs: %w", err)
		}
		t.ClientCAs = x509.NewCertPool()
		if !t.ClientCAs.AppendCertsFromPEM(pem) {
			return nil, errors.New("no certificate in " + c.ClientCA)
		}
		// Not required: a caller may bring a token instead.
		t.ClientAuth = tls.VerifyClientCertIfGiven
	}
	return t, nil
}

// followTLS is a configuration that always uses the current one.
func followTLS(r *reloaded[*tls.Config]) *tls.Config {
	now := r.get().Clone()
	now.GetConfigForClient = func(*tls.ClientHelloInfo) (*tls.Config, error) { return r.get(), nil }
	return now
}
