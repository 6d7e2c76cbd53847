package server

import (
	"context"
	"sync/atomic"
	"time"

	"google.golang.org/grpc/health"
	"google.golang.org/grpc/health/grpc_health_v1"

	outboxv1 "github.com/outbox-platform/outbox/gen/go/outbox/v1"
)

const (
	healthInterval = time.Second
	healthTimeout  = 2 * time.Second
)

// readiness is whether the store answers, told to health checks of both ports. It goes both ways for ever.
type readiness struct {
	health   *health.Server
	ready    atomic.Bool
	draining atomic.Bool
}

func newReadiness() *readiness {
	r := &readiness{health: health.NewServer()}
	r.set(false)
	return r
}

// set tells every service's state.
func (r *readiness) set(ready bool) {
	r.ready.Store(ready)
	state := grpc_health_v1.HealthCheckResponse_NOT_SERVING
	if ready {
		state = grpc_health_v1.HealthCheckResponse_SERVING
	}
	for _, service := range []string{"", outboxv1.OutboxService_ServiceDesc.ServiceName, outboxv1.AdminService_ServiceDesc.ServiceName} {
		r.health.SetServingStatus(service, state)
	}
}

// drain says NOT_SERVING from now on, whatever the store says.
func (r *readiness) drain() {
	r.draining.Store(true)
	r.ready.Store(false)
	r.health.Shutdown()
}

// followStore asks the store until ctx ends. One failure is enough to say NOT_SERVING, one success to say SERVING.
func (s *Server) followStore(ctx context.Context) {
	tick := time.NewTicker(healthInterval)
	defer tick.Stop()
	for first := true; ; first = false {
		up := s.pingStore(ctx)
		if ctx.Err() != nil {
			return
		}
		if up != s.readiness.ready.Load() || first {
			s.readiness.set(up)
			if up {
				s.metrics.storeUp.Set(1)
				s.log.Info("the store answers")
			} else {
				s.metrics.storeUp.Set(0)
			}
		}
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
	}
}

func (s *Server) pingStore(ctx context.Context) bool {
	ctx, cancel := context.WithTimeout(ctx, healthTimeout)
	defer cancel()
	err := s.ping(ctx)
	if err != nil && ctx.Err() == nil && s.readiness.ready.Load() {
		s.log.Error("the store does not answer", "error", err)
	}
	return err == nil
}
