package server

import (
	"context"
	"encoding/json"
	"fmt"
	"mime"
	"net/http"
	"time"

	"connectrpc.com/connect"
	"connectrpc.com/vanguard"
	"connectrpc.com/vanguard/vanguardgrpc"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promhttp"
	"google.golang.org/protobuf/proto"

	outboxv1 "github.com/outbox-platform/outbox/gen/go/outbox/v1"
)

// newHTTP builds the second port: every unary call as POST /package.Service/Method with JSON, /metrics, /healthz (the
// process lives) and /readyz (the store answers). It must be built after the services are registered.
func (s *Server) newHTTP(gatherer prometheus.Gatherer) (*http.Server, error) {
	transcoder, err := vanguardgrpc.NewTranscoder(s.grpc, vanguard.WithCodec(func(types vanguard.TypeResolver) vanguard.Codec {
		c := vanguard.NewJSONCodec(types)
		c.UnmarshalOptions.DiscardUnknown = false // a misspelt field must not be taken for an absent one
		return strictJSON{JSONCodec: c}
	}))
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
	mux.Handle("/", s.limitCalls(http.MaxBytesHandler(plainJSON(transcoder), int64(s.cfg.MaxReceiveBytes)*3/2)))
	return &http.Server{
		Handler:           mux,
		ReadHeaderTimeout: 5 * time.Second,
		ReadTimeout:       s.cfg.DefaultDeadline + 5*time.Second,
		IdleTimeout:       2 * time.Minute,
		MaxHeaderBytes:    int(s.cfg.MaxMetadataBytes),
	}, nil
}

// limitCalls counts the calls of this port with those of the other one, before their bodies are read: tap does not see them.
func (s *Server) limitCalls(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if !s.enter() {
			w.Header().Set("Content-Type", "application/json")
			w.Header().Set("Retry-After", "1")
			w.WriteHeader(http.StatusTooManyRequests)
			_ = json.NewEncoder(w).Encode(map[string]string{"code": "resource_exhausted", "message": errTooManyCalls.message}) // as after answerState
			return
		}
		defer s.leave()
		next.ServeHTTP(w, r)
	})
}

// strictJSON answers what is not a request of ours with INVALID_ARGUMENT.
type strictJSON struct{ *vanguard.JSONCodec }

// Unmarshal implements vanguard.Codec.
func (c strictJSON) Unmarshal(body []byte, m proto.Message) error {
	err := c.JSONCodec.Unmarshal(body, m)
	if err == nil {
		return nil
	}
	wrong := connect.NewError(connect.CodeInvalidArgument, err)
	for _, d := range fieldError("body", "%v", err).proto().GetDetails() {
		if detail, err := connect.NewErrorDetail(d); err == nil { // an Any always becomes one
			wrong.AddDetail(detail)
		}
	}
	return wrong
}

// plainJSON lets people post JSON without the header by which the transcoder recognises calls. Only JSON: a browser must
// ask before it sends that to another site, so no page can make calls with what a form can send.
func plainJSON(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		kind, _, err := mime.ParseMediaType(r.Header.Get("Content-Type"))
		if r.Method == http.MethodPost && err == nil && kind == "application/json" && r.Header.Get("Connect-Protocol-Version") == "" {
			r.Header.Set("Content-Type", kind)
			r.Header.Set("Connect-Protocol-Version", "1")
		}
		next.ServeHTTP(w, r)
	})
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
