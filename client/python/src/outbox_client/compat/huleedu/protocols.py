"""What services and tests depend on, and what the layer asks of them."""

from __future__ import annotations

from datetime import datetime
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable
from uuid import UUID

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncSession

    from outbox_client.compat.huleedu.peers import AtomicRedisClientProtocol, KafkaPublisherProtocol
else:
    # Dishka resolves by the identity of a type: where HuleEdu's own are there, services supply those.
    try:
        from huleedu_service_libs.protocols import AtomicRedisClientProtocol, KafkaPublisherProtocol
    except ImportError:
        from outbox_client.compat.huleedu.peers import AtomicRedisClientProtocol, KafkaPublisherProtocol


@runtime_checkable
class OutboxEvent(Protocol):
    """An event as it was stored."""

    @property
    def id(self) -> UUID:
        """The write's id."""

    @property
    def aggregate_id(self) -> str:
        """The aggregate."""

    @property
    def aggregate_type(self) -> str:
        """Its kind."""

    @property
    def event_type(self) -> str:
        """What happened."""

    @property
    def event_data(self) -> dict[str, Any]:
        """The stored dict: the envelope, topic, headers."""

    @property
    def event_key(self) -> str | None:
        """The record's key."""

    @property
    def topic(self) -> str:
        """The topic."""

    @property
    def created_at(self) -> datetime:
        """When it was stored."""

    @property
    def published_at(self) -> datetime | None:
        """When it was published; None: not yet."""

    @property
    def retry_count(self) -> int:
        """Attempts that failed."""

    @property
    def last_error(self) -> str | None:
        """Why the last one failed."""


@runtime_checkable
class OutboxRepositoryProtocol(Protocol):
    """Where events are stored. OutboxManager calls add_event and nothing else."""

    async def add_event(
        self,
        aggregate_id: str,
        aggregate_type: str,
        event_type: str,
        event_data: dict[str, Any],
        topic: str,
        event_key: str | None = None,
        session: AsyncSession | None = None,
    ) -> UUID:
        """Stores an event, in the session's transaction if there is one. Returns the write's id."""

    async def get_unpublished_events(self, limit: int = 100) -> list[OutboxEvent]:
        """Events that are not published yet, oldest first."""

    async def mark_event_published(self, event_id: UUID) -> None:
        """For relays of a service."""

    async def mark_event_failed(self, event_id: UUID, error: str) -> None:
        """For relays of a service."""

    async def increment_retry_count(self, event_id: UUID, error: str) -> None:
        """For relays of a service."""

    async def get_event_by_id(self, event_id: UUID) -> OutboxEvent | None:
        """One event; None: there is none."""


@runtime_checkable
class EventTypeMapperProtocol(Protocol):
    """Finds the topic of an event type."""

    def get_topic_for_event(self, event_type: str) -> str:
        """Returns the topic. Raises ValueError for a type that it does not know."""


__all__ = [
    "AtomicRedisClientProtocol",
    "EventTypeMapperProtocol",
    "KafkaPublisherProtocol",
    "OutboxEvent",
    "OutboxRepositoryProtocol",
]
