"""Section 6 of the contract: metrics."""

from __future__ import annotations

import importlib
import subprocess
import sys

import pytest
from prometheus_client import REGISTRY, Counter, Gauge, Histogram
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession

from outbox_client.compat.huleedu import PostgreSQLOutboxRepository, monitoring
from outbox_client.testing import FakePlatform

from .test_contract_3_repository import add

TABLE = [
    ("outbox_queue_depth", Gauge, ("service",)),
    ("outbox_events_added_total", Counter, ("service", "event_type")),
    ("outbox_events_published_total", Counter, ("service", "event_type")),
    ("outbox_events_failed_total", Counter, ("service", "event_type")),
    ("outbox_relay_errors_total", Counter, ("service", "error_type")),
    ("outbox_event_age_seconds", Histogram, ("service",)),
    ("outbox_relay_processing_seconds", Histogram, ("service",)),
]


def python(code: str) -> str:
    """Runs code in a process of its own, where nothing is imported yet."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(("name", "kind", "labels"), TABLE)
def test_6_names_kinds_and_labels(name: str, kind: type[Counter], labels: tuple[str, ...]) -> None:
    metric = getattr(monitoring, name)
    assert type(metric) is kind
    assert metric._labelnames == labels
    assert metric._name == name.removesuffix("_total")


@pytest.mark.parametrize(
    ("name", "buckets"),
    [
        ("outbox_event_age_seconds", [0.1, 0.5, 1, 5, 10, 30, 60, 300, 600, 3600]),
        ("outbox_relay_processing_seconds", [0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1, 5]),
    ],
)
def test_6_buckets(name: str, buckets: list[float]) -> None:
    assert getattr(monitoring, name)._upper_bounds == [*buckets, float("inf")]


def test_6_the_methods_of_outbox_metrics_and_their_default_labels() -> None:
    metrics = monitoring.OutboxMetrics()
    assert metrics.service_name == "unknown"
    metrics = monitoring.OutboxMetrics("test_6")
    metrics.increment_events_added("t")
    metrics.increment_published_events()
    metrics.increment_published_events("t")
    metrics.increment_failed_events()
    metrics.increment_errors()
    metrics.increment_errors("other")
    metrics.set_queue_depth(7)
    metrics.observe_event_age(2)
    metrics.observe_processing_time(0.02)

    def value(metric: Counter | Gauge, **labels: str) -> float:
        return float(metric.labels(service="test_6", **labels)._value.get())

    assert value(monitoring.outbox_events_added_total, event_type="t") == 1
    assert value(monitoring.outbox_events_published_total, event_type="unknown") == 1
    assert value(monitoring.outbox_events_published_total, event_type="t") == 1
    assert value(monitoring.outbox_events_failed_total, event_type="unknown") == 1
    assert value(monitoring.outbox_relay_errors_total, error_type="generic") == 1
    assert value(monitoring.outbox_relay_errors_total, error_type="other") == 1
    assert value(monitoring.outbox_queue_depth) == 7
    assert monitoring.outbox_event_age_seconds.labels(service="test_6")._sum.get() == 2
    assert monitoring.outbox_relay_processing_seconds.labels(service="test_6")._sum.get() == 0.02


async def test_6_one_added_per_accepted_add_event_with_the_repositorys_service_name(
    engine: AsyncEngine, platform: FakePlatform
) -> None:
    def count() -> float:
        return float(monitoring.outbox_events_added_total.labels(service="adder", event_type="some.event")._value.get())

    repository, before = PostgreSQLOutboxRepository(engine, "adder"), count()
    await add(repository)
    async with AsyncSession(engine) as session:
        await add(repository, session=session)
        await session.rollback()
    with pytest.raises(Exception, match="topic"):
        await add(repository, topic="not a topic")
    await add(PostgreSQLOutboxRepository(engine, "adder", enable_metrics=False))
    assert count() == before + 2


def test_6_only_names_with_a_source_are_registered_at_import() -> None:
    code = """
import outbox_client.compat.huleedu, outbox_client.compat.huleedu.monitoring
from prometheus_client import generate_latest
print(sorted(l.split()[2] for l in generate_latest().decode().splitlines() if l.startswith("# TYPE outbox_")))
"""
    assert python(code).strip() == "['outbox_events_added_total']"


def test_6_the_others_are_registered_when_first_used() -> None:
    code = """
from outbox_client.compat.huleedu.monitoring import OutboxMetrics
from prometheus_client import REGISTRY
OutboxMetrics("s").set_queue_depth(3)
print(REGISTRY.get_sample_value("outbox_queue_depth", {"service": "s"}))
"""
    assert python(code).strip() == "3.0"


def test_6_a_services_own_counter_of_one_of_these_names_does_not_disturb() -> None:
    """email_service has outbox_events_published_total with other labels."""
    code = """
import outbox_client.compat.huleedu.monitoring as m
from prometheus_client import REGISTRY, Counter
own = Counter("outbox_events_published_total", "email_service's", ["event_type", "status"])
own.labels("t", "ok").inc()
m.OutboxMetrics("s").increment_published_events("t")
m.OutboxMetrics("s").increment_events_added("t")
print(REGISTRY.get_sample_value("outbox_events_published_total", {"event_type": "t", "status": "ok"}),
      REGISTRY.get_sample_value("outbox_events_added_total", {"service": "s", "event_type": "t"}))
"""
    assert python(code).strip() == "1.0 1.0"


def test_6_incrementing_an_unregistered_metric_still_works() -> None:
    code = """
from outbox_client.compat.huleedu.monitoring import *
from prometheus_client import REGISTRY
for collector in list(REGISTRY._collector_to_names):
    REGISTRY.unregister(collector)
m = OutboxMetrics("s")
for _ in range(2):
    m.increment_events_added("t"); m.increment_published_events(); m.set_queue_depth(1); m.observe_event_age(1)
    for collector in list(REGISTRY._collector_to_names):
        REGISTRY.unregister(collector)
print(outbox_events_added_total.labels("s", "t")._value.get(), outbox_events_published_total.labels("s", "unknown")._value.get())
"""
    assert python(code).strip() == "2.0 2.0"


def test_6_importing_twice_does_not_raise_duplicated_timeseries() -> None:
    monitoring.OutboxMetrics("twice").increment_events_added("t")
    module = sys.modules.pop("outbox_client.compat.huleedu.monitoring")
    try:
        again = importlib.import_module("outbox_client.compat.huleedu.monitoring")
        again.OutboxMetrics("twice").increment_events_added("t")
    finally:
        sys.modules["outbox_client.compat.huleedu.monitoring"] = module
    assert REGISTRY.get_sample_value("outbox_events_added_total", {"service": "twice", "event_type": "t"}) == 2
