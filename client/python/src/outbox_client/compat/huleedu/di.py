"""Dishka providers."""

from __future__ import annotations

import logging
import os

from dishka import Provider, Scope, provide
from sqlalchemy.ext.asyncio import AsyncEngine

from outbox_client.compat.huleedu.protocols import (
    AtomicRedisClientProtocol,
    EventTypeMapperProtocol,
    KafkaPublisherProtocol,
    OutboxRepositoryProtocol,
)
from outbox_client.compat.huleedu.relay import EventRelayWorker, OutboxSettings
from outbox_client.compat.huleedu.repository import PostgreSQLOutboxRepository

logger = logging.getLogger("outbox_client.huleedu")


def settings_for(environment: str) -> OutboxSettings:
    """Returns the settings of an environment: testing, development, or anything else."""
    if environment == "testing":
        return OutboxSettings(poll_interval_seconds=0.1, error_retry_interval_seconds=1.0, enable_metrics=False)
    if environment == "development":
        return OutboxSettings(poll_interval_seconds=1.0, error_retry_interval_seconds=10.0)
    return OutboxSettings()


class OutboxProvider(Provider):
    """Provides the repository and the worker. Services supply AsyncEngine, str (their name), KafkaPublisherProtocol and
    AtomicRedisClientProtocol; providers that come later in a container go before this one.
    """

    @provide(scope=Scope.APP)
    def provide_outbox_settings(self) -> OutboxSettings:
        """By the environment variable ENVIRONMENT."""
        return settings_for(os.getenv("ENVIRONMENT", "production").lower())

    @provide(scope=Scope.APP)
    def provide_outbox_repository(
        self, engine: AsyncEngine, service_name: str, settings: OutboxSettings
    ) -> OutboxRepositoryProtocol:
        """The platform's repository."""
        return PostgreSQLOutboxRepository(
            engine=engine, service_name=service_name, enable_metrics=settings.enable_metrics
        )

    @provide(scope=Scope.APP)
    def provide_event_type_mapper(self) -> EventTypeMapperProtocol | None:
        """None: topics are given by callers."""
        return None

    @provide(scope=Scope.APP)
    def provide_event_relay_worker(
        self,
        outbox_repository: OutboxRepositoryProtocol,
        kafka_bus: KafkaPublisherProtocol,
        redis_client: AtomicRedisClientProtocol,
        settings: OutboxSettings,
        service_name: str,
        event_mapper: EventTypeMapperProtocol | None,
    ) -> EventRelayWorker:
        """A worker that relays nothing."""
        return EventRelayWorker(
            outbox_repository=outbox_repository,
            kafka_bus=kafka_bus,
            settings=settings,
            service_name=service_name,
            redis_client=redis_client,
            event_mapper=event_mapper,
        )


class OutboxSettingsProvider(Provider):
    """Provides settings that the service chose. It goes behind OutboxProvider in the container, or before it as
    services do: the later one counts.
    """

    def __init__(self, settings: OutboxSettings) -> None:
        super().__init__()
        self._settings = settings

    @provide(scope=Scope.APP)
    def provide_outbox_settings(self) -> OutboxSettings:
        """The service's own."""
        return self._settings


__all__ = ["OutboxProvider", "OutboxSettingsProvider"]
