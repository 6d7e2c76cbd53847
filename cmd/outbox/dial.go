package main

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"os"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"

	outboxv1 "github.com/outbox-platform/outbox/gen/go/outbox/v1"
)

// apiSettings say how to reach a server's API.
type apiSettings struct {
	Address   string        `name:"address" default:"127.0.0.1:7070" help:"Address of a server's gRPC port."`
	TLS       bool          `name:"tls" help:"Use TLS with the system's CAs. Implied by the other TLS settings."`
	TLSCA     string        `name:"tls-ca" type:"path" placeholder:"FILE" help:"CAs (PEM) that the server's certificate must come from."`
	TLSCert   string        `name:"tls-cert" type:"path" placeholder:"FILE" help:"Client certificate (PEM)."`
	TLSKey    string        `name:"tls-key" type:"path" placeholder:"FILE" help:"Its key (PEM)."`
	Token     secret        `name:"token" help:"Bearer token. Better: token-file, or OUTBOX_TOKEN."`
	TokenFile string        `name:"token-file" type:"path" placeholder:"FILE" help:"File that holds it."`
	Timeout   time.Duration `name:"timeout" default:"10s" help:"Limit of each call."`
}

// api is an open connection to a server.
type api struct {
	admin   outboxv1.AdminServiceClient
	data    outboxv1.OutboxServiceClient
	conn    *grpc.ClientConn
	timeout time.Duration
}

func (a *api) close() { _ = a.conn.Close() }

// call returns the context of one call.
func (a *api) call(ctx context.Context) (context.Context, context.CancelFunc) {
	return context.WithTimeout(ctx, a.timeout)
}

// dial prepares a connection; the first call connects.
func (s apiSettings) dial() (*api, error) {
	if s.Timeout <= 0 {
		return nil, usagef("timeout must be positive: %s", s.Timeout)
	}
	transport, err := s.transport()
	if err != nil {
		return nil, err
	}
	options := []grpc.DialOption{grpc.WithTransportCredentials(transport), grpc.WithUserAgent("outbox-cli/" + version)}
	token, err := s.Token.fromFile("token", s.TokenFile)
	if err != nil {
		return nil, err
	}
	if token != "" {
		options = append(options, grpc.WithPerRPCCredentials(bearer{token, transport.Info().SecurityProtocol == "tls"}))
	}
	conn, err := grpc.NewClient(s.Address, options...)
	if err != nil {
		return nil, usagef("address %q: %w", s.Address, err)
	}
	return &api{
		admin: outboxv1.NewAdminServiceClient(conn), data: outboxv1.NewOutboxServiceClient(conn), conn: conn, timeout: s.Timeout,
	}, nil
}

func (s apiSettings) transport() (credentials.TransportCredentials, error) {
	if !s.TLS && s.TLSCA == "" && s.TLSCert == "" {
		return insecure.NewCredentials(), nil
	}
	config := &tls.Config{MinVersion: tls.VersionTLS12}
	if s.TLSCA != "" {
		pem, err := os.ReadFile(s.TLSCA)
		if err != nil {
			return nil, usagef("tls-ca: %w", err)
		}
		config.RootCAs = x509.NewCertPool()
		if !config.RootCAs.AppendCertsFromPEM(pem) {
			return nil, usagef("tls-ca %s holds no certificate", s.TLSCA)
		}
	}
	if (s.TLSCert == "") != (s.TLSKey == "") {
		return nil, usagef("tls-cert and tls-key go together: %q, %q", s.TLSCert, s.TLSKey)
	}
	if s.TLSCert != "" {
		certificate, err := tls.LoadX509KeyPair(s.TLSCert, s.TLSKey)
		if err != nil {
			return nil, usagef("tls-cert, tls-key: %w", err)
		}
		config.Certificates = []tls.Certificate{certificate}
	}
	return credentials.NewTLS(config), nil
}

// bearer sends a token with every call.
type bearer struct {
	token string
	tls   bool
}

// GetRequestMetadata implements credentials.PerRPCCredentials.
func (b bearer) GetRequestMetadata(context.Context, ...string) (map[string]string, error) {
	return map[string]string{"authorization": "Bearer " + b.token}, nil
}

// RequireTransportSecurity implements credentials.PerRPCCredentials. Without TLS a token goes only where the address was
// given for plain text, which is the operator's choice.
func (b bearer) RequireTransportSecurity() bool { return b.tls }

// pages calls next until the last page.
func pages(next func(token string) (string, error)) error {
	token := ""
	for {
		following, err := next(token)
		if err != nil {
			return err
		}
		if following == "" {
			return nil
		}
		if following == token {
			return fmt.Errorf("the server answered with the same page token twice: %q", token)
		}
		token = following
	}
}

// waitForReady lets a call wait for a server that is about to start.
var waitForReady = grpc.WaitForReady(true)
