"""EventRelayWorker: services start and stop one. The platform relays, so it does nothing."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING

from outbox_client.compat.huleedu.monitoring import OutboxMetrics
from outbox_client.compat.huleedu.platform import opened
from outbox_client.compat.huleedu.repository import PostgreSQLOutboxRepository

if TYPE_CHECKING:
    from outbox_client.compat.huleedu.protocols import (
        AtomicRedisClientProtocol,
        EventTypeMapperProtocol,
        KafkaPublisherProtocol,
        OutboxRepositoryProtocol,
    )

FLUSH_SECONDS = 2.0
"""At most so long stop waits."""

logger = logging.getLogger("outbox_client.huleedu")


@dataclass
class OutboxSettings:
    """The settings of HuleEdu's relay. Of these only enable_metrics means anything now."""

    poll_interval_seconds: float = 5.0
    batch_size: int = 100
    max_retries: int = 5
    error_retry_interval_seconds: float = 30.0
    enable_metrics: bool = True
    enable_wake_notifications: bool = True


class EventRelayWorker:
    """Relays nothing. start and stop return at once, may be called as often as one likes, and need no broker."""

    def __init__(
        self,
        outbox_repository: OutboxRepositoryProtocol,
        kafka_bus: KafkaPublisherProtocol,
        settings: OutboxSettings,
        service_name: str,
        redis_client: AtomicRedisClientProtocol | None = None,
        event_mapper: EventTypeMapperProtocol | None = None,
    ) -> None:
        self.outbox_repository = outbox_repository
        self.kafka_bus = kafka_bus
        self.settings = settings
        self.service_name = service_name
        self.redis_client = redis_client
        self.event_mapper = event_mapper
        self.wake_key = f"outbox:wake:{service_name}"
        self.metrics = OutboxMetrics(service_name) if settings.enable_metrics else None
        self._running = False

    async def start(self) -> None:
        """Marks the worker as started."""
        if not self._running and not isinstance(self.outbox_repository, PostgreSQLOutboxRepository):
            logger.warning(
                "the worker relays nothing, and its repository is not the platform's: who publishes what it stores?",
                extra={"service": self.service_name, "repository": type(self.outbox_repository).__name__},
            )
        self._running = True

    async def stop(self) -> None:
        """Gives the platform a moment to acknowledge what was committed last, and marks the worker as stopped."""
        platform = opened(self.service_name) if self._running else None
        self._running = False
        if platform is not None:
            await platform.flush(FLUSH_SECONDS)


__all__ = ["EventRelayWorker", "OutboxSettings"]
