package client

import (
	"context"
	"crypto/tls"
	"fmt"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/connectivity"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/keepalive"

	outboxv1 "github.com/outbox-platform/outbox/gen/go/outbox/v1"
)

// TokenFunc returns the bearer token to send. It is called for every stream and unary call, so it should cache.
type TokenFunc func(ctx context.Context) (string, error)

// StaticToken always returns the same token.
func StaticToken(token string) TokenFunc {
	return func(context.Context) (string, error) { return token, nil }
}

// bearer sends tokens. They are refused on connections without transport security unless the configuration says plaintext.
type bearer struct {
	token     TokenFunc
	plaintext bool
}

func (b bearer) GetRequestMetadata(ctx context.Context, _ ...string) (map[string]string, error) {
	t, err := b.token(ctx)
	if err != nil {
		return nil, fmt.Errorf("getting the token: %w", err)
	}
	return map[string]string{"authorization": "Bearer " + t}, nil
}

func (b bearer) RequireTransportSecurity() bool { return !b.plaintext }

const (
	// loadBalancingStream connects each stream to some server, not always to the first.
	loadBalancingStream = `{"loadBalancingConfig":[{"pick_first":{"shuffleAddressList":true}}]}`
	// loadBalancingUnary spreads unary calls over all servers.
	loadBalancingUnary = `{"loadBalancingConfig":[{"round_robin":{}}]}`
	// keepaliveTime is how long a connection may be silent before it is tested. Servers refuse less than 10 s.
	keepaliveTime    = 20 * time.Second
	keepaliveTimeout = 5 * time.Second
)

// dial makes a connection object; nothing is connected yet.
func (c *Client) dial(serviceConfig string) (*grpc.ClientConn, error) {
	creds := insecure.NewCredentials()
	if !c.cfg.Plaintext {
		cfg := &tls.Config{MinVersion: tls.VersionTLS12}
		if c.cfg.TLS != nil {
			cfg = c.cfg.TLS.Clone()
		}
		creds = credentials.NewTLS(cfg)
	}
	opts := []grpc.DialOption{
		grpc.WithTransportCredentials(creds),
		grpc.WithDefaultServiceConfig(serviceConfig),
		grpc.WithDisableRetry(), // retries are ours: they know RetryInfo
		grpc.WithUserAgent(Version),
		grpc.WithKeepaliveParams(keepalive.ClientParameters{Time: keepaliveTime, Timeout: keepaliveTimeout}),
	}
	if c.cfg.Token != nil {
		opts = append(opts, grpc.WithPerRPCCredentials(bearer{c.cfg.Token, c.cfg.Plaintext}))
	}
	conn, err := grpc.NewClient(c.cfg.Target, append(opts, c.cfg.DialOptions...)...)
	if err != nil {
		return nil, fmt.Errorf("client: target %q: %w", c.cfg.Target, err)
	}
	return conn, nil
}

// unaryConn is the connection of the unary calls.
type unaryConn struct {
	c    *Client
	conn *grpc.ClientConn
}

func (u *unaryConn) open(c *Client) error {
	conn, err := c.dial(loadBalancingUnary)
	u.c, u.conn = c, conn
	return err
}

func (u *unaryConn) close() error { return u.conn.Close() }

// invoke makes one call. While the connection is not up it waits for it, unless failFast is set.
func (u *unaryConn) invoke(ctx context.Context, method string, req, resp any, failFast bool) *Error {
	if u.c.life.Err() != nil {
		return errClosed
	}
	if failFast && u.conn.GetState() == connectivity.TransientFailure {
		return &Error{Code: codes.Unavailable, Message: "no connection with the platform", local: true}
	}
	opts := append(u.c.callOptions(), grpc.WaitForReady(!failFast))
	err := u.conn.Invoke(ctx, method, req, resp, opts...)
	if err == nil {
		return nil
	}
	if ctx.Err() != nil {
		return contextError(ctx, method)
	}
	return errorOf(err)
}

// unaryRoundTrip makes one of the calls that usually travel on a session.
func (c *Client) unaryRoundTrip(ctx context.Context, k kind, body encoded, timeout time.Duration, failFast bool) ([]byte, *Error) {
	limited, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	var token []byte
	var err *Error
	c.stats.calls.Add(1)
	c.stats.messages.Add(1)
	if k == kindPrepare {
		resp := new(outboxv1.PrepareResponse)
		err = c.unary.invoke(limited, kinds[k].method, body, resp, failFast)
		token = resp.GetToken()
	} else {
		// The other responses have no fields that matter here.
		err = c.unary.invoke(limited, kinds[k].method, body, new(outboxv1.CommitResponse), failFast)
	}
	switch {
	case err == nil:
		return token, nil
	case ctx.Err() != nil:
		return nil, contextError(ctx, k.String())
	case limited.Err() != nil, err.Code == codes.DeadlineExceeded && err.Reason == "":
		return nil, timeoutError(k, timeout)
	}
	return nil, err
}
