"""Section 3 of the contract: the repository. Section 3.1, transactions, is in a file of its own."""

from __future__ import annotations

import asyncio
import inspect
from typing import Any
from uuid import UUID, uuid4

import pytest
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, create_async_engine

from outbox_client import InvalidError
from outbox_client.compat.huleedu import OutboxRepositoryProtocol, PostgreSQLOutboxRepository
from outbox_client.compat.huleedu.monitoring import OutboxMetrics
from outbox_client.compat.huleedu.platform import UnsupportedDatabaseError
from outbox_client.testing import FakePlatform

SIGNATURES = {
    "__init__": ["self", "engine", "service_name", "enable_metrics"],
    "add_event": [
        *("self", "aggregate_id", "aggregate_type", "event_type", "event_data", "topic", "event_key", "session"),
    ],
    "get_unpublished_events": ["self", "limit"],
    "mark_event_published": ["self", "event_id"],
    "mark_event_failed": ["self", "event_id", "error"],
    "increment_retry_count": ["self", "event_id", "error"],
    "get_event_by_id": ["self", "event_id"],
}


async def add(repository: PostgreSQLOutboxRepository, **changes: Any) -> UUID:
    given: dict[str, Any] = {
        "aggregate_id": "a-1",
        "aggregate_type": "essay",
        "event_type": "some.event",
        "event_data": {"test": "data"},
        "topic": "some.topic",
        **changes,
    }
    return await repository.add_event(**given)


@pytest.mark.parametrize("name", SIGNATURES)
def test_3_signatures_aggregate_id_comes_before_aggregate_type(name: str) -> None:
    assert list(inspect.signature(getattr(PostgreSQLOutboxRepository, name)).parameters) == SIGNATURES[name]
    if name != "__init__":
        assert list(inspect.signature(getattr(OutboxRepositoryProtocol, name)).parameters) == SIGNATURES[name]


def test_3_defaults() -> None:
    parameters = inspect.signature(PostgreSQLOutboxRepository.__init__).parameters
    assert (parameters["service_name"].default, parameters["enable_metrics"].default) == ("unknown", True)
    add_event = inspect.signature(PostgreSQLOutboxRepository.add_event).parameters
    assert (add_event["event_key"].default, add_event["session"].default) == (None, None)
    assert inspect.signature(PostgreSQLOutboxRepository.get_unpublished_events).parameters["limit"].default == 100


@pytest.mark.parametrize("url", ["postgresql+asyncpg://nobody@127.0.0.1:1/nothing", "sqlite+aiosqlite://"])
def test_3_the_constructor_does_no_io_outside_of_a_loop_with_postgresql_or_sqlite(url: str) -> None:
    assert PostgreSQLOutboxRepository(create_async_engine(url), "file_service").metrics is not None


async def test_3_a_write_without_a_session_works_with_a_sqlite_engine(platform: FakePlatform) -> None:
    engine = create_async_engine("sqlite+aiosqlite://")
    await add(PostgreSQLOutboxRepository(engine, "file_service"))
    assert len(platform.published("some.topic")) == 1
    await engine.dispose()


async def test_3_a_sqlite_session_is_refused_because_it_cannot_hold_a_marker(platform: FakePlatform) -> None:
    engine = create_async_engine("sqlite+aiosqlite://")
    async with AsyncSession(engine) as session:
        with pytest.raises(UnsupportedDatabaseError, match="sqlite"):
            await add(PostgreSQLOutboxRepository(engine, "file_service"), session=session)
    await engine.dispose()


@pytest.mark.parametrize("enabled", [True, False])
def test_3_metrics_attribute(enabled: bool) -> None:
    repository = PostgreSQLOutboxRepository(create_async_engine("sqlite+aiosqlite://"), "file_service", enabled)
    assert isinstance(repository.metrics, OutboxMetrics) is enabled
    assert repository.metrics is None or repository.metrics.service_name == "file_service"


@pytest.mark.parametrize(
    "data",
    [
        {"test": "data"},
        {},
        {"event_type": "x", "data": {"a": 1}},
        {"event_id": str(uuid4()), "event_type": "x"},
        {"event_id": "no uuid", "data": [1, None, {"ö": 1.5}]},
        {"event_id": None, "event_timestamp": 7, "headers": "not a dict", "topic": "another"},
        {"event_id": str(uuid4()), "event_timestamp": "2025-01-01T00:00:00", "correlation_id": None},
    ],
)
async def test_3_no_json_serialisable_dict_is_refused(
    engine: AsyncEngine, platform: FakePlatform, data: dict[str, Any]
) -> None:
    await add(PostgreSQLOutboxRepository(engine, "file_service"), event_data=data)
    assert len(platform.published()) == 1


@pytest.mark.parametrize("size", [16_000, 100_000, 900_000])
async def test_3_sizes(engine: AsyncEngine, platform: FakePlatform, size: int) -> None:
    repository = PostgreSQLOutboxRepository(engine, "file_service")
    await add(repository, event_data={"text": "x" * size})
    async with AsyncSession(engine) as session, session.begin():
        await add(repository, event_data={"text": "y" * size}, session=session)
    await asyncio.to_thread(platform.wait, lambda: len(platform.published()) == 2)
    assert [len(e.payload) > size for e in platform.published()] == [True, True]


async def test_3_what_is_above_the_platforms_limit_raises(engine: AsyncEngine, platform: FakePlatform) -> None:
    repository = PostgreSQLOutboxRepository(engine, "file_service")
    with pytest.raises(InvalidError):
        await add(repository, event_data={"text": "x" * 1_100_000})
    async with AsyncSession(engine) as session:
        with pytest.raises(InvalidError):
            await add(repository, event_data={"text": "x" * 1_100_000}, session=session)
    assert platform.published() == []


async def test_3_what_is_no_json_raises(engine: AsyncEngine, platform: FakePlatform) -> None:
    repository = PostgreSQLOutboxRepository(engine, "file_service")
    with pytest.raises(TypeError):
        await add(repository, event_data={"id": uuid4()})
    with pytest.raises(ValueError, match="JSON compliant"):
        await add(repository, event_data={"n": float("nan")})


async def test_3_returns_a_uuid_unique_per_call_also_when_many_run_at_the_same_time(
    engine: AsyncEngine, platform: FakePlatform
) -> None:
    repository = PostgreSQLOutboxRepository(engine, "file_service")
    same_envelope = {"event_id": str(uuid4()), "data": {}}
    ids = await asyncio.gather(*(add(repository, event_data=same_envelope) for _ in range(20)))
    assert all(isinstance(i, UUID) for i in ids)
    assert len(set(ids)) == 20


@pytest.mark.parametrize(
    ("method", "arguments"),
    [
        ("get_unpublished_events", ()),
        ("mark_event_published", (uuid4(),)),
        ("mark_event_failed", (uuid4(), "why")),
        ("increment_retry_count", (uuid4(), "why")),
        ("get_event_by_id", (uuid4(),)),
    ],
)
async def test_3_the_methods_of_the_service_side_relay_exist(method: str, arguments: tuple[Any, ...]) -> None:
    repository = PostgreSQLOutboxRepository(create_async_engine("sqlite+aiosqlite://"))
    with pytest.raises(NotImplementedError, match="outbox platform"):
        await getattr(repository, method)(*arguments)
