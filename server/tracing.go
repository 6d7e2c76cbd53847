package server

import (
	"context"
	"log/slog"

	"go.opentelemetry.io/contrib/instrumentation/google.golang.org/grpc/otelgrpc"
	"go.opentelemetry.io/otel"
	"go.opentelemetry.io/otel/exporters/otlp/otlptrace"
	"go.opentelemetry.io/otel/exporters/otlp/otlptrace/otlptracegrpc"
	"go.opentelemetry.io/otel/propagation"
	"go.opentelemetry.io/otel/sdk/resource"
	sdktrace "go.opentelemetry.io/otel/sdk/trace"
	semconv "go.opentelemetry.io/otel/semconv/v1.43.0"
	"google.golang.org/grpc"
	"google.golang.org/grpc/stats"

	outboxv1 "github.com/outbox-platform/outbox/gen/go/outbox/v1"
)

// tracing sends spans of unary calls to an OTLP collector. Sessions are not traced: one span for hours of calls tells
// nothing, and every message would pay for it.
type tracing struct {
	options []grpc.ServerOption
	start   func(context.Context) error
	end     func(context.Context) error // sends what is left
}

// newTracing prepares tracing; without an endpoint it does nothing.
func newTracing(endpoint string, log *slog.Logger) tracing {
	if endpoint == "" {
		nothing := func(context.Context) error { return nil }
		return tracing{start: nothing, end: nothing}
	}
	otel.SetErrorHandler(otel.ErrorHandlerFunc(func(err error) { log.Warn("tracing", "error", err) }))
	exporter := otlptrace.NewUnstarted(otlptracegrpc.NewClient(otlptracegrpc.WithEndpoint(endpoint), otlptracegrpc.WithInsecure()))
	provider := sdktrace.NewTracerProvider(
		sdktrace.WithBatcher(exporter),
		sdktrace.WithResource(resource.NewSchemaless(semconv.ServiceName("outbox-server"))),
	)
	h := otelgrpc.NewServerHandler(
		otelgrpc.WithTracerProvider(provider),
		otelgrpc.WithPropagators(propagation.TraceContext{}),
		otelgrpc.WithFilter(func(i *stats.RPCTagInfo) bool {
			return i.FullMethodName != outboxv1.OutboxService_Session_FullMethodName
		}),
	)
	return tracing{options: []grpc.ServerOption{grpc.StatsHandler(h)}, start: exporter.Start, end: provider.Shutdown}
}
