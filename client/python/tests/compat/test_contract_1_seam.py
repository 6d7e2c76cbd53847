"""Section 1 of the contract: where the seam is."""

from __future__ import annotations

import importlib
import inspect
import subprocess
import sys
from unittest.mock import AsyncMock

import pytest
from sqlalchemy.ext.asyncio import AsyncEngine

from outbox_client.compat import huleedu
from outbox_client.compat.huleedu import OutboxRepositoryProtocol, PostgreSQLOutboxRepository
from outbox_client.compat.huleedu.manager import OutboxManager
from outbox_client.testing import FakePlatform

from .envelope import envelope

PATHS = {
    "": [
        "OutboxRepositoryProtocol",
        "OutboxEvent",
        "EventTypeMapperProtocol",
        "EventOutbox",
        "PostgreSQLOutboxRepository",
        "EventRelayWorker",
        "OutboxProvider",
        "OutboxSettingsProvider",
        "OutboxSettings",
    ],
    ".manager": ["OutboxManager", "resolve_partition_key"],
    ".protocols": ["OutboxRepositoryProtocol", "OutboxEvent", "EventTypeMapperProtocol"],
    ".repository": ["PostgreSQLOutboxRepository"],
    ".relay": ["EventRelayWorker", "OutboxSettings"],
    ".di": ["OutboxProvider", "OutboxSettingsProvider"],
    ".monitoring": [
        "OutboxMetrics",
        "outbox_queue_depth",
        "outbox_events_added_total",
        "outbox_events_published_total",
        "outbox_events_failed_total",
        "outbox_relay_errors_total",
        "outbox_event_age_seconds",
        "outbox_relay_processing_seconds",
    ],
    ".models": ["EventOutbox", "Base"],
}


async def test_1_1_both_entry_points_write_events(engine: AsyncEngine, platform: FakePlatform) -> None:
    repository = PostgreSQLOutboxRepository(engine, "file_service")
    await OutboxManager(repository, service_name="file_service").publish_to_outbox(
        aggregate_type="essay",
        aggregate_id="e-1",
        event_type="t",
        event_data=envelope(),
        topic="by.manager",
    )
    await repository.add_event(
        aggregate_id="e-1", aggregate_type="essay", event_type="t", event_data={"a": 1}, topic="by.repository"
    )
    assert [e.topic for e in platform.published()] == ["by.manager", "by.repository"]


async def test_1_2_the_manager_reaches_storage_only_through_add_event_of_the_object_it_was_given() -> None:
    repository = AsyncMock(spec=OutboxRepositoryProtocol)
    await OutboxManager(repository).publish_to_outbox(
        aggregate_type="essay", aggregate_id="e-1", event_type="t", event_data=envelope(), topic="t"
    )
    assert [call[0] for call in repository.mock_calls] == ["add_event"]
    assert repository.add_event.call_args.args == ()


async def test_1_2_the_manager_is_storage_agnostic() -> None:
    class Own:
        stored: list[object]

        def __init__(self) -> None:
            self.stored = []

        async def add_event(self, **given: object) -> int:
            self.stored.append(given)
            return 7

    own = Own()
    await OutboxManager(own).publish_to_outbox(  # type: ignore[arg-type]  # a test's own fake
        aggregate_type="essay", aggregate_id="e-1", event_type="t", event_data=envelope(), topic="t"
    )
    assert len(own.stored) == 1


@pytest.mark.parametrize(("module", "name"), [(m, n) for m, names in PATHS.items() for n in names])
def test_1_3_import_paths(module: str, name: str) -> None:
    assert hasattr(importlib.import_module("outbox_client.compat.huleedu" + module), name)


def test_1_3_outbox_manager_is_not_exported_by_the_package_itself() -> None:
    assert not hasattr(huleedu, "OutboxManager")
    assert "OutboxManager" not in huleedu.__all__


def test_1_4_the_layer_does_not_import_the_name_it_takes() -> None:
    """In a process where importing it, or anything below, would fail loudly; error_handling and protocols are
    allowed.
    """
    code = """
import sys
class Watch:
    def find_spec(self, name, path=None, target=None):
        if name.startswith("huleedu_service_libs.outbox"):
            raise SystemExit("imported " + name)
        return None
sys.meta_path.insert(0, Watch())
import outbox_client.compat.huleedu, outbox_client.compat.huleedu.manager, outbox_client.compat.huleedu.di
import outbox_client.compat.huleedu.models, outbox_client.compat.huleedu.monitoring
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", PATHS[""])
def test_1_5_one_class_object_per_name(name: str) -> None:
    package = getattr(huleedu, name)
    for module, names in PATHS.items():
        if name in names:
            assert getattr(importlib.import_module("outbox_client.compat.huleedu" + module), name) is package


@pytest.mark.parametrize(
    "method",
    [
        OutboxManager.publish_to_outbox,
        *(
            getattr(c, n)
            for c in (PostgreSQLOutboxRepository, OutboxRepositoryProtocol)
            for n in (
                "add_event",
                "get_unpublished_events",
                "mark_event_published",
                "mark_event_failed",
                "increment_retry_count",
                "get_event_by_id",
            )
        ),
        huleedu.EventRelayWorker.start,
        huleedu.EventRelayWorker.stop,
    ],
)
def test_1_5_public_coroutine_methods_are_async_def(method: object) -> None:
    assert inspect.iscoroutinefunction(method)


def test_1_5_isinstance_works(engine: AsyncEngine) -> None:
    assert isinstance(PostgreSQLOutboxRepository(engine), OutboxRepositoryProtocol)
