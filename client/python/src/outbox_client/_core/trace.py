"""The W3C trace context of the running code, when OpenTelemetry is installed (the extra "otel")."""

from __future__ import annotations

from collections.abc import Callable, Sequence

Pairs = Sequence[tuple[str, str]]


def _finder() -> Callable[[], Pairs]:
    try:
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
    except ImportError:
        return tuple
    propagator = TraceContextTextMapPropagator()

    def current() -> Pairs:
        carrier: dict[str, str] = {}
        propagator.inject(carrier)
        return tuple(carrier.items())

    return current


current_trace: Callable[[], Pairs] = _finder()
"""Returns the current trace context as header names and values; empty when there is none."""
