package server

import (
	"errors"
	"fmt"
	"net"
	"time"

	"github.com/alecthomas/kong"

	"github.com/outbox-platform/outbox/store"
)

// Config says how a server listens, whom it believes and what it allows. The default tags are the defaults; see
// DefaultConfig.
type Config struct {
	GRPCListen string `name:"grpc-listen" default:"127.0.0.1:7070" help:"Address of the gRPC port."`
	HTTPListen string `name:"http-listen" default:"127.0.0.1:7071" help:"Address of the HTTP port: JSON, /metrics, /healthz, /readyz."`

	TLSCert        string `name:"tls-cert" type:"path" help:"Certificate (PEM) of both ports; reloaded when it changes. Empty: no TLS."`
	TLSKey         string `name:"tls-key" type:"path" help:"Its key (PEM)."`
	ClientCA       string `name:"client-ca" type:"path" help:"CAs (PEM) whose client certificates are believed; reloaded when it changes."`
	TokensFile     string `name:"tokens-file" type:"path" help:"Who may do what (YAML); reloaded when it changes. Empty: everybody may do everything, allowed on loopback only."`
	AllowAnonymous bool   `name:"allow-anonymous" help:"Allow running without a tokens file on an address that is not loopback."`
	Reflection     bool   `name:"reflection" default:"true" negatable:"" help:"Offer gRPC reflection."`

	MaxEvents           int   `name:"max-events" default:"1000" help:"Events in one transaction."`
	MaxTransactionBytes int64 `name:"max-transaction-bytes" default:"4194304" help:"Bytes of one transaction: payloads, keys, headers and names."`
	MaxEventBytes       int64 `name:"max-event-bytes" default:"983040" help:"Bytes of one event; a topic may allow less."`
	MaxHeaders          int   `name:"max-headers" default:"64" help:"Headers of one event."`
	MaxHeaderBytes      int   `name:"max-header-bytes" default:"16384" help:"Bytes of all header names and values of one event."`
	MaxOpenCalls        int   `name:"max-open-calls" default:"4096" help:"Calls of one session that are not answered yet."`
	MaxSourceCalls      int   `name:"max-source-calls" default:"0" help:"Calls of one source under way in this server. 0: no limit of its own."`

	MaxReceiveBytes      int           `name:"max-receive-bytes" default:"8388608" help:"Bytes of one gRPC message, decompressed."`
	MaxMetadataBytes     uint32        `name:"max-metadata-bytes" default:"16384" help:"Bytes of a call's metadata."`
	MaxConcurrentStreams uint32        `name:"max-concurrent-streams" default:"1000" help:"Calls and sessions at a time on one connection."`
	MaxCalls             int           `name:"max-calls" default:"1000" help:"Unary calls at a time in this server, those still arriving included; beyond it RESOURCE_EXHAUSTED. With max-receive-bytes it bounds the memory that uploads take."`
	MaxSessions          int           `name:"max-sessions" default:"10000" help:"Sessions at a time in this server."`
	KeepaliveTime        time.Duration `name:"keepalive-time" default:"30s" help:"Silence after which a connection is pinged."`
	KeepaliveTimeout     time.Duration `name:"keepalive-timeout" default:"10s" help:"Silence after a ping after which a connection is dead."`
	KeepaliveMinTime     time.Duration `name:"keepalive-min-time" default:"10s" help:"Clients that ping more often are disconnected."`
	MaxConnectionAge     time.Duration `name:"max-connection-age" default:"30m" help:"Age at which connections are replaced, so that load balancers can balance. Sessions are asked to move at half of it."`
	DefaultDeadline      time.Duration `name:"default-deadline" default:"10s" help:"Deadline of calls that bring none, and for the first message of a session."`
	DrainTimeout         time.Duration `name:"drain-timeout" default:"20s" help:"How long calls under way may take when the server stops."`

	OTLPEndpoint string `name:"otlp-endpoint" help:"host:port of an OTLP/gRPC collector for traces. Empty: no tracing."`

	MaintenanceInterval time.Duration `name:"maintenance-interval" default:"1s" help:"Pause between passes of the log and retention maintenance."`
	GenerationBytes     int64         `name:"generation-bytes" default:"536870912" help:"Size at which a generation of the log is closed."`
	LogRetention        time.Duration `name:"log-retention" default:"1h" help:"How long published events stay readable."`
	TxRetention         time.Duration `name:"tx-retention" default:"15m" help:"How long transactions decided by the client itself are known."`
	ResolutionRetention time.Duration `name:"resolution-retention" default:"168h" help:"How long transactions decided by anybody else, and publishes that their callers keep (spilled, imported), are known."`
}

// DefaultConfig returns the defaults.
func DefaultConfig() (Config, error) {
	var c Config
	if err := kong.ApplyDefaults(&c); err != nil {
		return c, fmt.Errorf("applying defaults of the server's configuration: %w", err)
	}
	return c, nil
}

// Validate reports everything that is wrong, all at once, with the values.
func (c Config) Validate() error {
	var errs []error
	bad := func(format string, args ...any) { errs = append(errs, fmt.Errorf(format, args...)) }
	positive := func(name string, v int64) {
		if v <= 0 {
			bad("%s must be positive: %d", name, v)
		}
	}
	positive("max-events", int64(c.MaxEvents))
	positive("max-transaction-bytes", c.MaxTransactionBytes)
	positive("max-event-bytes", c.MaxEventBytes)
	positive("max-open-calls", int64(c.MaxOpenCalls))
	positive("max-calls", int64(c.MaxCalls))
	positive("max-sessions", int64(c.MaxSessions))
	positive("max-metadata-bytes", int64(c.MaxMetadataBytes))
	positive("max-concurrent-streams", int64(c.MaxConcurrentStreams))
	positive("keepalive-time", int64(c.KeepaliveTime))
	positive("keepalive-timeout", int64(c.KeepaliveTimeout))
	positive("max-connection-age", int64(c.MaxConnectionAge))
	positive("default-deadline", int64(c.DefaultDeadline))
	positive("drain-timeout", int64(c.DrainTimeout))
	positive("maintenance-interval", int64(c.MaintenanceInterval))
	if c.MaxEvents > maxEventsOfProto {
		bad("max-events must not be above the API's own limit: %d > %d", c.MaxEvents, maxEventsOfProto)
	}
	if c.MaxHeaders < 0 || c.MaxHeaders > maxHeadersOfProto {
		bad("max-headers must be between 0 and the API's own limit: %d, %d", c.MaxHeaders, maxHeadersOfProto)
	}
	if c.MaxHeaderBytes < 0 {
		bad("max-header-bytes must not be negative: %d", c.MaxHeaderBytes)
	}
	if c.MaxSourceCalls < 0 {
		bad("max-source-calls must not be negative: %d", c.MaxSourceCalls)
	}
	if c.MaxEventBytes > c.MaxTransactionBytes {
		bad("max-event-bytes must not be above max-transaction-bytes: %d > %d", c.MaxEventBytes, c.MaxTransactionBytes)
	}
	if int64(c.MaxReceiveBytes) < c.MaxTransactionBytes+receiveSlack {
		bad("max-receive-bytes must leave %d bytes of room above max-transaction-bytes: %d, %d",
			int64(receiveSlack), c.MaxReceiveBytes, c.MaxTransactionBytes)
	}
	if (c.TLSCert == "") != (c.TLSKey == "") {
		bad("tls-cert and tls-key go together: %q, %q", c.TLSCert, c.TLSKey)
	}
	if c.ClientCA != "" && c.TLSCert == "" {
		bad("client-ca needs tls-cert: %q, %q", c.ClientCA, c.TLSCert)
	}
	if c.ClientCA != "" && c.TokensFile == "" {
		bad("client-ca needs a tokens-file that says what each certificate may do: %q, %q", c.ClientCA, c.TokensFile)
	}
	if c.TokensFile == "" && !c.AllowAnonymous {
		for _, a := range []string{c.GRPCListen, c.HTTPListen} {
			if a != "" && !isLoopback(a) {
				bad("without a tokens-file everybody may do everything: listen on loopback, not %q, or set allow-anonymous", a)
			}
		}
	}
	for name, a := range map[string]string{"grpc-listen": c.GRPCListen, "http-listen": c.HTTPListen} {
		if _, _, err := net.SplitHostPort(a); err != nil {
			bad("%s: %w", name, err)
		}
	}
	return errors.Join(errs...)
}

// maintenance returns the store's part of the configuration.
func (c Config) maintenance() store.MaintenanceConfig {
	return store.MaintenanceConfig{
		Interval:            c.MaintenanceInterval,
		GenerationBytes:     c.GenerationBytes,
		LogRetention:        c.LogRetention,
		TxRetention:         c.TxRetention,
		ResolutionRetention: c.ResolutionRetention,
	}
}

const (
	// Limits written in the proto; configuration can only be stricter.
	maxEventsOfProto  = 10000
	maxHeadersOfProto = 64
	maxCallsOfProto   = 4096
	// receiveSlack is what the framing of a transaction may need beside what MaxTransactionBytes counts.
	receiveSlack = 1 << 20
)

// isLoopback reports whether only this machine can reach the address.
func isLoopback(address string) bool {
	host, _, err := net.SplitHostPort(address)
	if err != nil {
		return false
	}
	if host == "localhost" {
		return true
	}
	ip := net.ParseIP(host)
	return ip != nil && ip.IsLoopback()
}
