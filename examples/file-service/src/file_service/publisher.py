"""Publishes the events of the service. It is written against OutboxManager and knows nothing of the platform."""

from __future__ import annotations

import json
import logging
from typing import Any, Protocol, runtime_checkable
from uuid import UUID

from opentelemetry import propagate
from outbox_client.compat.huleedu.manager import OutboxManager
from pydantic import BaseModel
from sqlalchemy.ext.asyncio import AsyncSession

from file_service.config import SERVICE
from file_service.events import (
    TOPICS,
    BatchFileAddedV1,
    BatchFileRemovedV1,
    EssayContentProvisionedV1,
    EssayValidationFailedV1,
    EventEnvelope,
)

logger = logging.getLogger(SERVICE)


@runtime_checkable
class NotifierProtocol(Protocol):
    """Tells the browsers of a user what happened."""

    async def publish(self, channel: str, message: str) -> int:
        """Sends a message to whoever listens. Returns how many do."""


class EventPublisher:
    """Puts events into the transaction of a session, and tells users about their batches afterwards."""

    def __init__(self, outbox: OutboxManager, notifier: NotifierProtocol) -> None:
        self._outbox, self._notifier = outbox, notifier

    async def essay_provisioned(
        self, event: EssayContentProvisionedV1, correlation_id: UUID, session: AsyncSession
    ) -> None:
        """An essay can be worked on."""
        await self._add("file_upload", event.file_upload_id, event, event.batch_id, correlation_id, session)

    async def validation_failed(
        self, event: EssayValidationFailedV1, correlation_id: UUID, session: AsyncSession
    ) -> None:
        """A file is no essay."""
        await self._add("file_upload", event.file_upload_id, event, event.batch_id, correlation_id, session)

    async def batch_changed(
        self, event: BatchFileAddedV1 | BatchFileRemovedV1, correlation_id: UUID, session: AsyncSession
    ) -> None:
        """A batch has one file more or less. Call notify after the commit."""
        await self._add("batch", event.batch_id, event, event.batch_id, correlation_id, session)

    async def notify(self, event: BatchFileAddedV1 | BatchFileRemovedV1) -> None:
        """Tells the user. That this may fail or come twice is in the nature of notifications; the event does not
        depend on it.
        """
        message = json.dumps({"event": type(event).__name__, "data": event.model_dump(mode="json")})
        try:
            await self._notifier.publish(f"user:{event.user_id}", message)
        except Exception as e:
            logger.warning("the user could not be notified", extra={"user_id": event.user_id, "error": str(e)})

    async def _add(
        self, kind: str, id: str, event: BaseModel, batch_id: str, correlation_id: UUID, session: AsyncSession
    ) -> None:
        topic = TOPICS[type(event)]
        metadata = {"partition_key": batch_id}
        propagate.inject(metadata)  # traceparent, if there is a trace
        envelope = EventEnvelope[Any](
            event_type=topic,
            source_service=SERVICE,
            correlation_id=correlation_id,
            data=event,
            metadata=metadata,
        )
        await self._outbox.publish_to_outbox(
            aggregate_type=kind, aggregate_id=id, event_type=topic, event_data=envelope, topic=topic, session=session
        )
