package server

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	_ "google.golang.org/grpc/encoding/gzip" // callers may compress
	"google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/reflection"

	outboxv1 "github.com/outbox-platform/outbox/gen/go/outbox/v1"
	"github.com/outbox-platform/outbox/store"
)

// Server is the gRPC front with its second port. Any number of servers may work on one store.
type Server struct {
	cfg        Config
	name       string
	log        *slog.Logger
	store      *store.Store
	writer     submitter
	ping       func(context.Context) error
	shards     int
	metrics    *metrics
	validator  *validator
	sources    *sources
	sessions   *Sessions
	readiness  *readiness
	identities *reloaded[*identities]
	tls        *reloaded[*tls.Config] // nil: no TLS
	grpc       *grpc.Server
	http       *http.Server
	grpcListen net.Listener
	httpListen net.Listener
	tracing    tracing
	unaryCalls atomic.Int64   // under way
	resolver   Resolver       // nil: none
	receivers  sync.WaitGroup // the sessions' receiving goroutines
}

// New builds a server over a store and its writer, whose Run is the caller's: it must outlive Serve, so that calls under
// way are answered while the server drains. The listeners are open when New returns; nothing is served before Serve.
func New(cfg Config, st *store.Store, w *store.Writer, log *slog.Logger, reg *prometheus.Registry) (*Server, error) {
	s, err := build(cfg, w, newSources(st, log), st.Ping, st.ShardCount(), log, reg)
	if err != nil {
		return nil, err
	}
	s.store = st
	return s, nil
}

// build is New without the store itself.
func build(cfg Config, w submitter, src *sources, ping func(context.Context) error, shards int, log *slog.Logger, reg *prometheus.Registry) (*Server, error) {
	if err := cfg.Validate(); err != nil {
		return nil, fmt.Errorf("server configuration: %w", err)
	}
	host, err := os.Hostname()
	if err != nil {
		return nil, fmt.Errorf("asking for the host's name: %w", err)
	}
	s := &Server{
		cfg: cfg, name: host, log: log, writer: w, sources: src, ping: ping, shards: shards, readiness: newReadiness(),
	}
	if s.metrics, err = newMetrics(reg); err != nil {
		return nil, err
	}
	s.sessions = newSessions(s.metrics, cfg.MaxSessions)
	if s.validator, err = newValidator(cfg); err != nil {
		return nil, err
	}
	if s.identities, err = newIdentities(cfg.TokensFile); err != nil {
		return nil, err
	}
	if s.tls, err = newTLS(cfg); err != nil {
		return nil, err
	}
	if err := s.newGRPC(reg); err != nil {
		return nil, err
	}
	if s.http, err = s.newHTTP(reg); err != nil {
		return nil, err
	}
	if err := s.listen(); err != nil {
		return nil, err
	}
	return s, nil
}

// newGRPC builds the gRPC server and registers the services.
func (s *Server) newGRPC(reg *prometheus.Registry) error {
	rpc, err := newRPCMetrics(reg)
	if err != nil {
		return err
	}
	s.tracing = newTracing(s.cfg.OTLPEndpoint, s.log)
	opts := append(s.tracing.options,
		grpc.ForceServerCodecV2(newGuardedCodec(s.cfg.MaxEvents, s.metrics.undecodable.Inc)),
		grpc.MaxConcurrentStreams(s.cfg.MaxConcurrentStreams),
		grpc.MaxRecvMsgSize(s.cfg.MaxReceiveBytes),
		grpc.MaxHeaderListSize(s.cfg.MaxMetadataBytes),
		grpc.InTapHandle(s.tap),
		grpc.ConnectionTimeout(10*time.Second), // the handshake
		grpc.KeepaliveParams(keepalive.ServerParameters{
			Time: s.cfg.KeepaliveTime, Timeout: s.cfg.KeepaliveTimeout,
			// Sessions are asked to move at half the age; the grace is so long that all of them were asked before it ends.
			MaxConnectionAge: s.cfg.MaxConnectionAge, MaxConnectionAgeGrace: s.cfg.MaxConnectionAge,
		}),
		grpc.KeepaliveEnforcementPolicy(keepalive.EnforcementPolicy{MinTime: s.cfg.KeepaliveMinTime, PermitWithoutStream: true}),
		grpc.WaitForHandlers(true),
		grpc.ChainUnaryInterceptor(rpc.unary, s.unaryLog, s.unaryGuard),
		grpc.ChainStreamInterceptor(rpc.stream, s.streamLog, s.streamGuard),
	)
	if s.tls != nil {
		opts = append(opts, grpc.Creds(credentials.NewTLS(followTLS(s.tls))))
	}
	s.grpc = grpc.NewServer(opts...)
	outboxv1.RegisterOutboxServiceServer(s.grpc, outboxService{Server: s})
	outboxv1.RegisterAdminServiceServer(s.grpc, adminService{Server: s})
	grpc_health_v1.RegisterHealthServer(s.grpc, s.readiness.health)
	if s.cfg.Reflection {
		reflection.Register(s.grpc)
	}
	rpc.initialize(s.grpc)
	return nil
}

func (s *Server) listen() error {
	var err error
	if s.grpcListen, err = net.Listen("tcp", s.cfg.GRPCListen); err != nil {
		return fmt.Errorf("opening the gRPC port: %w", err)
	}
	if s.httpListen, err = net.Listen("tcp", s.cfg.HTTPListen); err != nil {
		return errors.Join(fmt.Errorf("opening the HTTP port: %w", err), s.grpcListen.Close())
	}
	if s.tls != nil {
		s.httpListen = tls.NewListener(s.httpListen, followTLS(s.tls))
	}
	return nil
}

// GRPCAddr is where the gRPC port listens.
func (s *Server) GRPCAddr() string { return s.grpcListen.Addr().String() }

// HTTPAddr is where the HTTP port listens.
func (s *Server) HTTPAddr() string { return s.httpListen.Addr().String() }

// Sessions are the live sessions; the resolver asks them.
func (s *Server) Sessions() *Sessions { return s.sessions }

// UseResolver makes the server tell r of its sessions, and let operators ask it. Call it before Serve. Without one, checks
// and confirmations are refused.
func (s *Server) UseResolver(r Resolver) {
	s.resolver = r
	s.sessions.Watch(r)
}

// Serve serves until ctx ends; then it drains for at most DrainTimeout and returns nil. It is called once. An error means
// that a port broke.
func (s *Server) Serve(ctx context.Context) error {
	if err := s.tracing.start(ctx); err != nil {
		s.log.Warn("starting to trace; serving without", "error", err)
	}
	loops, stopLoops := context.WithCancel(context.WithoutCancel(ctx))
	var running sync.WaitGroup
	for _, loop := range []func(context.Context){s.sources.run, s.followStore, s.maintain, s.followFiles} {
		running.Go(func() { loop(loops) })
	}
	broken := make(chan error, 2)
	running.Go(func() {
		if err := s.grpc.Serve(s.grpcListen); err != nil {
			broken <- fmt.Errorf("serving gRPC: %w", err)
		}
	})
	running.Go(func() {
		if err := s.http.Serve(s.httpListen); !errors.Is(err, http.ErrServerClosed) {
			broken <- fmt.Errorf("serving HTTP: %w", err)
		}
	})
	s.log.Info("serving", "grpc", s.GRPCAddr(), "http", s.HTTPAddr(), "tls", s.tls != nil, "open", s.cfg.TokensFile == "")
	var err error
	select {
	case <-ctx.Done():
	case err = <-broken:
	}
	s.drain(context.WithoutCancel(ctx))
	stopLoops()
	running.Wait()
	s.receivers.Wait()
	flush, cancel := context.WithTimeout(context.WithoutCancel(ctx), 5*time.Second)
	defer cancel()
	if e := s.tracing.end(flush); e != nil {
		s.log.Warn("sending the last traces", "error", e)
	}
	s.log.Info("stopped", "error", err)
	return err
}

// followFiles reloads identities and certificates.
func (s *Server) followFiles(ctx context.Context) {
	var running sync.WaitGroup
	running.Go(func() { s.identities.run(ctx, s.log, "tokens file") })
	if s.tls != nil {
		running.Go(func() { s.tls.run(ctx, s.log, "certificates") })
	}
	running.Wait()
}

// drain stops in order: health says NOT_SERVING, sessions are asked to move, new calls go elsewhere, and calls under way
// may end. A last part of the time is kept for sessions that did not move: they are ended, then the rest is cut.
func (s *Server) drain(ctx context.Context) {
	total := s.cfg.DrainTimeout
	polite := total - min(total/5, 2*time.Second)
	s.log.Info("draining", "timeout", total)
	s.readiness.drain()
	s.sessions.drain(polite)
	ends := time.AfterFunc(polite, s.sessions.end)
	defer ends.Stop()
	done := make(chan struct{})
	go func() {
		defer close(done)
		ctx, cancel := context.WithTimeout(ctx, polite)
		defer cancel()
		stopHTTP(ctx, s.http) // before gRPC: its calls run on the gRPC server
		s.grpc.GracefulStop()
	}()
	cut := time.NewTimer(total)
	defer cut.Stop()
	select {
	case <-done:
	case <-cut.C:
		s.log.Warn("draining took too long; cutting the calls that are left", "timeout", total)
		s.grpc.Stop()
		<-done
	}
	s.sessions.end() // nothing is left that could wait for it; for the next drain
}
