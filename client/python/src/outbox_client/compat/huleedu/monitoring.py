"""The metrics of HuleEdu's library, under their names and labels.

Only outbox_events_added_total has a source in a service. The others are the platform's to feed; their names are taken
in the registry when somebody uses them, so that a service may have metrics of these names itself.
"""

from __future__ import annotations

import logging
from typing import Any, TypeVar

from prometheus_client import REGISTRY, Counter, Gauge, Histogram

logger = logging.getLogger("outbox_client.huleedu")

Metric = TypeVar("Metric", Counter, Gauge, Histogram)


def _register(metric: Counter | Gauge | Histogram) -> None:
    """Registers a metric unless its name is taken: then it counts for itself."""
    try:
        REGISTRY.register(metric)
    except ValueError:
        logger.debug("a metric of this name is registered already", extra={"metric": str(metric)})


def _at_first_use(metric: Metric) -> Metric:
    """Registers a metric once, when it gets its first labels. A test suite may unregister it again, for good."""
    registered = False
    labels = metric.labels

    def registering(*values: Any, **named: Any) -> Any:
        nonlocal registered
        if not registered:
            registered = True
            _register(metric)
        return labels(*values, **named)

    metric.labels = registering  # type: ignore[method-assign]
    return metric


def _existing(name: str, kind: type[Metric]) -> Metric | None:
    """The metric that an earlier import of this module made: importing twice must not lose what is counted."""
    found = getattr(REGISTRY, "_names_to_collectors", {}).get(name)
    return (
        found if isinstance(found, kind) and getattr(found, "_labelnames", None) == ("service", "event_type") else None
    )


outbox_queue_depth = _at_first_use(
    Gauge("outbox_queue_depth", "Events that are not published yet.", ["service"], registry=None)
)
outbox_events_added_total = _existing("outbox_events_added_total", Counter) or Counter(
    "outbox_events_added_total", "Events that were added to the outbox.", ["service", "event_type"], registry=None
)
_register(outbox_events_added_total)
outbox_events_published_total = _at_first_use(
    Counter("outbox_events_published_total", "Events that were published.", ["service", "event_type"], registry=None)
)
outbox_events_failed_total = _at_first_use(
    Counter("outbox_events_failed_total", "Events that failed for good.", ["service", "event_type"], registry=None)
)
outbox_relay_errors_total = _at_first_use(
    Counter("outbox_relay_errors_total", "Errors while publishing.", ["service", "error_type"], registry=None)
)
outbox_event_age_seconds = _at_first_use(
    Histogram(
        "outbox_event_age_seconds",
        "Age of events when they were published.",
        ["service"],
        buckets=(0.1, 0.5, 1, 5, 10, 30, 60, 300, 600, 3600),
        registry=None,
    )
)
outbox_relay_processing_seconds = _at_first_use(
    Histogram(
        "outbox_relay_processing_seconds",
        "Time to publish one event.",
        ["service"],
        buckets=(0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1, 5),
        registry=None,
    )
)

# Beside HuleEdu's: what only this layer knows.
outbox_unjoined_writes_total = _at_first_use(
    Counter(
        "outbox_unjoined_writes_total",
        "Events that were added without the session of a transaction, by call site.",
        ["service", "call_site"],
        registry=None,
    )
)
outbox_breaker_open = _at_first_use(
    Gauge(
        "outbox_breaker_open",
        "1 while the platform is not asked because it did not answer.",
        ["service"],
        registry=None,
    )
)


class OutboxMetrics:
    """Counts under one service's name."""

    def __init__(self, service_name: str = "unknown") -> None:
        self.service_name = service_name

    def increment_events_added(self, event_type: str) -> None:
        """An event was added."""
        outbox_events_added_total.labels(service=self.service_name, event_type=event_type).inc()

    def increment_published_events(self, event_type: str | None = None) -> None:
        """An event was published."""
        outbox_events_published_total.labels(service=self.service_name, event_type=event_type or "unknown").inc()

    def increment_failed_events(self, event_type: str | None = None) -> None:
        """An event failed for good."""
        outbox_events_failed_total.labels(service=self.service_name, event_type=event_type or "unknown").inc()

    def increment_errors(self, error_type: str = "generic") -> None:
        """Something failed that will be tried again."""
        outbox_relay_errors_total.labels(service=self.service_name, error_type=error_type).inc()

    def set_queue_depth(self, depth: int) -> None:
        """So many events wait."""
        outbox_queue_depth.labels(service=self.service_name).set(depth)

    def observe_event_age(self, age_seconds: float) -> None:
        """An event was this old when it was published."""
        outbox_event_age_seconds.labels(service=self.service_name).observe(age_seconds)

    def observe_processing_time(self, duration_seconds: float) -> None:
        """Publishing an event took so long."""
        outbox_relay_processing_seconds.labels(service=self.service_name).observe(duration_seconds)


__all__ = [
    "OutboxMetrics",
    "outbox_event_age_seconds",
    "outbox_events_added_total",
    "outbox_events_failed_total",
    "outbox_events_published_total",
    "outbox_queue_depth",
    "outbox_relay_errors_total",
    "outbox_relay_processing_seconds",
]
