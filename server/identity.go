package server

import (
	"bytes"
	"context"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"

	"go.yaml.in/yaml/v3"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/peer"
)

// principal is who calls.
type principal struct {
	name    string
	admin   bool
	all     bool // may act for every source
	sources map[string]struct{}
}

// actsFor reports whether the principal may act for a source.
func (p *principal) actsFor(source string) bool {
	if p.all {
		return true
	}
	_, ok := p.sources[source]
	return ok
}

// anonymous is everybody when there is no tokens file.
var anonymous = &principal{name: "anonymous", admin: true, all: true}

// identities knows who may do what. The zero value believes nobody; nil believes everybody.
type identities struct {
	tokens       map[[sha256.Size]byte]*principal
	certificates map[string]*principal
}

// identityFile is the tokens file. Example:
//
//	principals:
//	  - name: orders
//	    sources: [orders]
//	    token_sha256: [9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08]
//	    certificates: ["spiffe://example/orders"]    # a URI or DNS name in the client certificate
//	  - name: platform
//	    admin: true
//	    token_sha256: […]
type identityFile struct {
	Principals []struct {
		Name         string   `yaml:"name"`
		Admin        bool     `yaml:"admin"`
		Sources      []string `yaml:"sources"`
		TokenSHA256  []string `yaml:"token_sha256"`
		Certificates []string `yaml:"certificates"`
	} `yaml:"principals"`
}

// readIdentities reads a tokens file. Unknown keys, a token or certificate given to two principals, and a principal that
// cannot be recognised are errors.
func readIdentities(path string) (*identities, error) {
	text, err := os.ReadFile(path) //nolint:gosec // the operator names the file
	if err != nil {
		return nil, fmt.Errorf("reading the tokens file: %w", err)
	}
	var f identityFile
	d := yaml.NewDecoder(bytes.NewReader(text))
	d.KnownFields(true)
	if err := d.Decode(&f); err != nil && !errors.Is(err, io.EOF) {
		return nil, fmt.Errorf("reading the tokens file %s: %w", path, err)
	}
	ids := &identities{tokens: make(map[[sha256.Size]byte]*principal), certificates: make(map[string]*principal)}
	for _, entry := range f.Principals {
		p := &principal{name: entry.Name, admin: entry.Admin, sources: make(map[string]struct{})}
		if p.name == "" {
			return nil, fmt.Errorf("tokens file %s: a principal has no name", path)
		}
		if len(entry.TokenSHA256)+len(entry.Certificates) == 0 {
			return nil, fmt.Errorf("tokens file %s: %s has neither token_sha256 nor certificates", path, p.name)
		}
		for _, s := range entry.Sources {
			if s == "*" {
				p.all = true
			}
			p.sources[s] = struct{}{}
		}
		for _, h := range entry.TokenSHA256 {
			sum, err := hex.DecodeString(h)
			if err != nil || len(sum) != sha256.Size {
				return nil, fmt.Errorf("tokens file %s: %s has a token_sha256 that is not 64 hexadecimal digits", path, p.name)
			}
			if other := ids.tokens[[sha256.Size]byte(sum)]; other != nil {
				return nil, fmt.Errorf("tokens file %s: %s and %s have the same token", path, other.name, p.name)
			}
			ids.tokens[[sha256.Size]byte(sum)] = p
		}
		for _, c := range entry.Certificates {
			if other := ids.certificates[c]; other != nil {
				return nil, fmt.Errorf("tokens file %s: %s and %s have the same certificate %q", path, other.name, p.name, c)
			}
			ids.certificates[c] = p
		}
	}
	return ids, nil
}

// identify finds out who makes a call: by its bearer token, else by the client certificate of its connection. A token
// that is not known is refused even if there is a certificate.
func (ids *identities) identify(ctx context.Context) (*principal, error) {
	if ids == nil {
		return anonymous, nil
	}
	md, _ := metadata.FromIncomingContext(ctx)
	if values := md.Get("authorization"); len(values) > 0 {
		if len(values) > 1 {
			return nil, errUnauthenticated
		}
		scheme, token, _ := strings.Cut(values[0], " ")
		if !strings.EqualFold(scheme, "bearer") {
			return nil, errUnauthenticated
		}
		// Looking up the hash takes a time that tells nothing about the token.
		if p := ids.tokens[sha256.Sum256([]byte(token))]; p != nil {
			return p, nil
		}
		return nil, errUnauthenticated
	}
	if p := ids.fromCertificate(ctx); p != nil {
		return p, nil
	}
	return nil, errUnauthenticated
}

func (ids *identities) fromCertificate(ctx context.Context) *principal {
	pr, ok := peer.FromContext(ctx)
	if !ok {
		return nil
	}
	info, ok := pr.AuthInfo.(credentials.TLSInfo)
	if !ok || len(info.State.VerifiedChains) == 0 {
		return nil
	}
	for _, name := range certificateNames(info.State.VerifiedChains[0][0]) {
		if p := ids.certificates[name]; p != nil {
			return p
		}
	}
	return nil
}

// certificateNames are the names a certificate is known by. The common name is not one: anybody who may choose it could
// choose another's.
func certificateNames(c *x509.Certificate) []string {
	names := make([]string, 0, len(c.URIs)+len(c.DNSNames))
	for _, u := range c.URIs {
		names = append(names, u.String())
	}
	return append(names, c.DNSNames...)
}

type principalKey struct{}

func withPrincipal(ctx context.Context, p *principal) context.Context {
	return context.WithValue(ctx, principalKey{}, p)
}

// principalOf returns who makes the call, or nil.
func principalOf(ctx context.Context) *principal {
	p, _ := ctx.Value(principalKey{}).(*principal)
	return p
}
