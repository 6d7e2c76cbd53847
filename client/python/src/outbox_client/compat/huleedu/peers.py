"""What the layer asks of a service's Kafka and Redis, where HuleEdu's own protocols are not installed."""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable


@runtime_checkable
class KafkaPublisherProtocol(Protocol):
    """Publishes to Kafka. The layer never calls it; services supply it to their containers."""

    async def start(self) -> None:
        """Connects."""

    async def stop(self) -> None:
        """Disconnects."""

    async def publish(
        self, topic: str, envelope: Any, key: str | None = None, headers: dict[str, str] | None = None
    ) -> None:
        """Publishes one envelope."""


@runtime_checkable
class AtomicRedisClientProtocol(Protocol):
    """The two Redis commands that concern an outbox."""

    async def lpush(self, key: str, *values: str) -> int:
        """Puts values at the head of a list. Returns its length."""

    async def blpop(self, keys: list[str], timeout: float) -> tuple[str, str] | None:
        """Takes the first value of the first list that has one. None: none had within timeout seconds."""
