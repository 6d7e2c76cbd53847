"""PostgreSQLOutboxRepository: where events enter the platform."""

from __future__ import annotations

import logging
import sys
import threading
from typing import TYPE_CHECKING, Any, NoReturn
from uuid import UUID

from outbox_client.compat.huleedu.binding import bound_session
from outbox_client.compat.huleedu.monitoring import OutboxMetrics, outbox_unjoined_writes_total
from outbox_client.compat.huleedu.platform import platform_of
from outbox_client.compat.huleedu.record import make_event
from outbox_client.ids import new_id

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession

    from outbox_client.compat.huleedu.protocols import OutboxEvent

logger = logging.getLogger("outbox_client.huleedu")


class PostgreSQLOutboxRepository:
    """Adds events to the transactions of a service, or publishes them at once when there is no session.

    It keeps nothing in event_outbox and needs no relay. Safe for concurrent use, in any event loop.
    """

    def __init__(self, engine: AsyncEngine, service_name: str = "unknown", enable_metrics: bool = True) -> None:
        """No I/O. The platform is looked for when the first event is added."""
        self.metrics = OutboxMetrics(service_name) if enable_metrics else None
        self.service_name = service_name
        self._engine = engine

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
        """Adds an event and returns the id of this write.

        With a session, or within bind(session): published if and only if the transaction that the session is in
        commits. Without: durable and decided when it returns. Raises InvalidError for what the platform would refuse,
        UnavailableError and others of outbox_client.
        """
        platform = platform_of(self.service_name)
        write_id = new_id()

        def event(unique_id: bool) -> Any:
            return make_event(
                write_id=write_id,
                aggregate_id=aggregate_id,
                aggregate_type=aggregate_type,
                event_type=event_type,
                event_data=event_data,
                topic=topic,
                event_key=event_key,
                unique_id=unique_id,
            )

        session = session if session is not None else bound_session()
        if session is not None:
            platform.join(self._engine, session, event(False), event(True))
        else:
            tell_unjoined(self.service_name)
            await platform.publish(self._engine, event(False))
        if self.metrics:
            self.metrics.increment_events_added(event_type)
        return write_id

    async def get_unpublished_events(self, limit: int = 100) -> list[OutboxEvent]:
        """Not here: what waits is the platform's."""
        _elsewhere("outbox shard list, outbox aggregate blocked")

    async def mark_event_published(self, event_id: UUID) -> None:
        """Not here: the platform publishes."""
        _elsewhere("nothing; the platform publishes")

    async def mark_event_failed(self, event_id: UUID, error: str) -> None:
        """Not here: the platform publishes."""
        _elsewhere("outbox deadletter list")

    async def increment_retry_count(self, event_id: UUID, error: str) -> None:
        """Not here: the platform publishes."""
        _elsewhere("nothing; the platform publishes")

    async def get_event_by_id(self, event_id: UUID) -> OutboxEvent | None:
        """Not here: what was added is the platform's."""
        _elsewhere("outbox_client.testing in tests, outbox transaction get in operation")


def _elsewhere(instead: str) -> NoReturn:
    raise NotImplementedError(f"events are with the outbox platform, not in a table of the service. Instead: {instead}")


_told: set[str] = set()
_telling = threading.Lock()


def tell_unjoined(service_name: str) -> None:
    """Counts a write without a session, and warns once for each place that does it."""
    name, where = call_site()
    outbox_unjoined_writes_total.labels(service=service_name, call_site=name).inc()
    with _telling:
        if where in _told:
            return
        _told.add(where)
    logger.warning(
        "an event was added without session=: it is tied to no transaction. Pass the session, or use bind(session)",
        extra={"call_site": where, "service": service_name},
    )


def call_site() -> tuple[str, str]:
    """Returns the nearest caller outside of this package, as module:function and as file:line."""
    frame = sys._getframe(1)
    while frame is not None:
        module = frame.f_globals.get("__name__", "")
        if not module.startswith("outbox_client."):
            return f"{module}:{frame.f_code.co_name}", f"{frame.f_code.co_filename}:{frame.f_lineno}"
        if frame.f_back is None:
            break
        frame = frame.f_back
    return "unknown", "unknown"


__all__ = ["PostgreSQLOutboxRepository"]
