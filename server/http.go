package server

import (
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"time"

	"connectrpc.com/vanguard/vanguardgrpc"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promhttp"

	outboxv1 "github.com/outbox-platform/outbox/gen/go/outbox/v1"
)

// newHTTP builds the second port: every unary call as POST /package.Service/Method with JSON, /metrics, /healthz (the
// process lives) and /readyz (the store answers). It must be built after the services are registered.
func (s *Server) newHTTP(gatherer prometheus.Gatherer) (*http.Server, error) {
	transcoder, err := vanguardgrpc.NewTranscoder(s.grpc)
	if err != nil {
		return nil, fmt.Errorf("building the JSON transcoder: %w", err)
	}
	mux := http.NewServeMux()
	mux.Handle("GET /metrics", promhttp.HandlerFor(gatherer, promhttp.HandlerOpts{}))
	mux.HandleFunc("GET /healthz", func(w http.ResponseWriter, _ *http.Request) { answerState(w, true, "alive") })
	mux.HandleFunc("GET /readyz", s.readyz)
	// A session over HTTP/1.1 cannot work, and one over HTTP/2 belongs on the gRPC port, where streams are bounded.
	mux.HandleFunc(outboxv1.OutboxService_Session_FullMethodName, func(w http.ResponseWriter, _ *http.Request) {
		http.Error(w, "sessions are served on the gRPC port", http.StatusNotImplemented)
	})
	// Base64 makes payloads a third larger.
	mux.Handle("/", http.MaxBytesHandler(transcoder, int64(s.cfg.MaxReceiveBytes)*3/2))
	return &http.Server{
		Handler:           mux,
		ReadHeaderTimeout: 5 * time.Second,
		ReadTimeout:       s.cfg.DefaultDeadline + 5*time.Second,
		IdleTimeout:       2 * time.Minute,
		MaxHeaderBytes:    int(s.cfg.MaxMetadataBytes),
	}, nil
}

func (s *Server) readyz(w http.ResponseWriter, _ *http.Request) {
	switch {
	case s.readiness.draining.Load():
		answerState(w, false, "draining")
	case !s.readiness.ready.Load():
		answerState(w, false, "the store does not answer")
	default:
		answerState(w, true, "ready")
	}
}

func answerState(w http.ResponseWriter, ok bool, state string) {
	w.Header().Set("Content-Type", "application/json")
	if !ok {
		w.WriteHeader(http.StatusServiceUnavailable)
	}
	_ = json.NewEncoder(w).Encode(map[string]string{"state": state}) // fails when nobody listens any more
}

// stopHTTP ends the second port, politely until ctx ends.
func stopHTTP(ctx context.Context, h *http.Server) {
	if err := h.Shutdown(ctx); err != nil {
		_ = h.Close() // closing what polite waiting left; there is nothing more to do about an error
	}
}
