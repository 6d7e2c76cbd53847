"""Section 5 of the contract: relay worker, settings, Dishka."""

from __future__ import annotations

import dataclasses
import inspect
import logging
from collections.abc import AsyncIterator
from typing import Any
from unittest.mock import AsyncMock

import pytest
from dishka import Provider, Scope, make_async_container, provide
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from outbox_client.compat.huleedu import (
    EventRelayWorker,
    EventTypeMapperProtocol,
    OutboxEvent,
    OutboxProvider,
    OutboxRepositoryProtocol,
    OutboxSettings,
    OutboxSettingsProvider,
    PostgreSQLOutboxRepository,
)
from outbox_client.compat.huleedu.manager import OutboxManager
from outbox_client.compat.huleedu.monitoring import OutboxMetrics
from outbox_client.compat.huleedu.protocols import AtomicRedisClientProtocol, KafkaPublisherProtocol

from .envelope import Kafka, Redis


class ServiceProvider(Provider):
    """What every service supplies today, and nothing more."""

    @provide(scope=Scope.APP)
    def provide_name(self) -> str:
        return "file_service"

    @provide(scope=Scope.APP)
    async def provide_engine(self) -> AsyncIterator[AsyncEngine]:
        engine = create_async_engine("sqlite+aiosqlite://")
        yield engine
        await engine.dispose()

    @provide(scope=Scope.APP)
    def provide_kafka(self) -> KafkaPublisherProtocol:
        return Kafka()

    @provide(scope=Scope.APP)
    def provide_redis(self) -> AtomicRedisClientProtocol:
        return Redis()

    @provide(scope=Scope.APP)
    def provide_manager(
        self, repository: OutboxRepositoryProtocol, redis: AtomicRedisClientProtocol, name: str
    ) -> OutboxManager:
        return OutboxManager(repository, redis, name)


def worker(repository: Any = None, settings: OutboxSettings | None = None) -> EventRelayWorker:
    return EventRelayWorker(
        outbox_repository=repository or PostgreSQLOutboxRepository(create_async_engine("sqlite+aiosqlite://")),
        kafka_bus=Kafka(),
        settings=settings or OutboxSettings(),
        service_name="file_service",
    )


def test_5_settings_and_their_defaults() -> None:
    assert dataclasses.asdict(OutboxSettings()) == {
        "poll_interval_seconds": 5.0,
        "batch_size": 100,
        "max_retries": 5,
        "error_retry_interval_seconds": 30.0,
        "enable_metrics": True,
        "enable_wake_notifications": True,
    }


def test_5_signature_of_the_worker_redis_client_and_event_mapper_have_defaults() -> None:
    parameters = inspect.signature(EventRelayWorker.__init__).parameters
    assert list(parameters) == [
        *("self", "outbox_repository", "kafka_bus", "settings", "service_name", "redis_client", "event_mapper"),
    ]
    assert (parameters["redis_client"].default, parameters["event_mapper"].default) == (None, None)


async def test_5_start_and_stop_return_promptly_are_idempotent_and_need_no_broker() -> None:
    made = worker()
    await made.stop()
    for _ in range(2):
        await made.start()
    for _ in range(2):
        await made.stop()
    await made.start()
    await made.stop()


async def test_5_start_may_run_in_a_task_of_its_own() -> None:
    import asyncio

    made = worker()
    await asyncio.wait_for(asyncio.create_task(made.start()), 1)
    await made.stop()


async def test_5_start_relays_nothing() -> None:
    repository = AsyncMock(spec=OutboxRepositoryProtocol)
    redis = Redis()
    made = EventRelayWorker(repository, Kafka(), OutboxSettings(), "s", redis)
    await made.start()
    await made.stop()
    assert repository.mock_calls == []
    assert redis.calls == []


async def test_5_a_repository_that_is_not_the_platforms_is_told(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        await worker(AsyncMock(spec=OutboxRepositoryProtocol)).start()
    assert "relays nothing" in caplog.text
    caplog.clear()
    await worker().start()
    assert caplog.text == ""


@pytest.mark.parametrize("enabled", [True, False])
def test_5_attributes_read_from_outside(enabled: bool) -> None:
    made = worker(settings=OutboxSettings(enable_metrics=enabled))
    assert isinstance(made.outbox_repository, PostgreSQLOutboxRepository)
    assert isinstance(made.kafka_bus, Kafka)
    assert made.settings.enable_metrics is enabled
    assert made.service_name == "file_service"
    assert isinstance(made.metrics, OutboxMetrics) is enabled


def test_5_attributes_that_tests_of_july_2025_set() -> None:
    made: Any = worker()
    made._kafka_publisher, made._poll_interval, made._batch_size = Kafka(), 0.1, 10
    assert made._batch_size == 10


async def test_5_the_provider_gives_everything_in_scope_app() -> None:
    container = make_async_container(ServiceProvider(), OutboxProvider())
    repository = await container.get(OutboxRepositoryProtocol)
    assert isinstance(repository, PostgreSQLOutboxRepository)
    assert repository is await container.get(OutboxRepositoryProtocol)
    assert repository.service_name == "file_service"
    assert isinstance(await container.get(OutboxSettings), OutboxSettings)
    assert await container.get(EventTypeMapperProtocol | None) is None
    made = await container.get(EventRelayWorker)
    assert made is await container.get(EventRelayWorker)
    assert made.outbox_repository is repository
    assert isinstance(made.redis_client, Redis)
    assert (await container.get(OutboxManager)).outbox_repository is repository
    await container.close()


async def test_5_the_repository_gets_enable_metrics_of_the_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ENVIRONMENT", "testing")
    container = make_async_container(ServiceProvider(), OutboxProvider())
    repository = await container.get(OutboxRepositoryProtocol)
    assert isinstance(repository, PostgreSQLOutboxRepository)
    assert repository.metrics is None
    assert (await container.get(EventRelayWorker)).metrics is None
    await container.close()


async def test_5_later_providers_override_earlier_ones() -> None:
    other = AsyncMock(spec=OutboxRepositoryProtocol)

    class TestProvider(OutboxProvider):
        @provide(scope=Scope.APP, override=False)
        def provide_outbox_repository(self) -> OutboxRepositoryProtocol:
            return other

    settings = OutboxSettings(poll_interval_seconds=2.0)
    container = make_async_container(
        ServiceProvider(), OutboxProvider(), TestProvider(), OutboxSettingsProvider(settings)
    )
    assert await container.get(OutboxRepositoryProtocol) is other
    assert await container.get(OutboxSettings) is settings
    assert (await container.get(EventRelayWorker)).settings is settings
    await container.close()


async def test_5_a_settings_provider_takes_its_settings() -> None:
    settings = OutboxSettings(batch_size=7)
    container = make_async_container(OutboxSettingsProvider(settings))
    assert await container.get(OutboxSettings) is settings


def test_5_the_provider_takes_no_arguments_and_requires_no_other_factory() -> None:
    make_async_container(ServiceProvider(), OutboxProvider())  # Dishka checks the whole graph here


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ("testing", OutboxSettings(0.1, 100, 5, 1.0, False, True)),
        ("TESTING", OutboxSettings(0.1, 100, 5, 1.0, False, True)),
        ("development", OutboxSettings(1.0, 100, 5, 10.0, True, True)),
        ("production", OutboxSettings(5.0, 100, 5, 30.0, True, True)),
        ("staging", OutboxSettings(5.0, 100, 5, 30.0, True, True)),
        (None, OutboxSettings(5.0, 100, 5, 30.0, True, True)),
    ],
)
async def test_5_settings_by_environment(
    environment: str | None, expected: OutboxSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    if environment is not None:
        monkeypatch.setenv("ENVIRONMENT", environment)
    container = make_async_container(ServiceProvider(), OutboxProvider())
    assert await container.get(OutboxSettings) == expected
    await container.close()


def test_5_the_services_own_settings_map_onto_it() -> None:
    """cj_assessment's six, nlp's two: the dataclass takes them all by keyword."""
    OutboxSettings(
        poll_interval_seconds=1,
        batch_size=2,
        max_retries=3,
        error_retry_interval_seconds=4,
        enable_metrics=False,
        enable_wake_notifications=False,
    )
    OutboxSettings(poll_interval_seconds=1, batch_size=2)


def test_5_protocols_the_layer_meets() -> None:
    assert isinstance(Kafka(), KafkaPublisherProtocol)
    assert isinstance(Redis(), AtomicRedisClientProtocol)
    assert list(inspect.signature(KafkaPublisherProtocol.publish).parameters) == [
        *("self", "topic", "envelope", "key", "headers"),
    ]
    assert list(inspect.signature(AtomicRedisClientProtocol.blpop).parameters) == ["self", "keys", "timeout"]


def test_5_event_type_mapper() -> None:
    class Mapper:
        def get_topic_for_event(self, event_type: str) -> str:
            raise ValueError(event_type)

    assert isinstance(Mapper(), EventTypeMapperProtocol)


def test_5_outbox_event_is_read_only() -> None:
    names = {
        *("id", "aggregate_id", "aggregate_type", "event_type", "event_data", "event_key"),
        *("topic", "created_at", "published_at", "retry_count", "last_error"),
    }
    for name in names:
        found = inspect.getattr_static(OutboxEvent, name)
        assert isinstance(found, property)
        assert found.fset is None
