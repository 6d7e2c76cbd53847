"""OutboxManager: what services call."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any
from uuid import UUID

from outbox_client.compat.huleedu.errors import NIL, raise_external_service_error

if TYPE_CHECKING:
    from outbox_client.compat.huleedu.protocols import AtomicRedisClientProtocol, OutboxRepositoryProtocol

logger = logging.getLogger("outbox_client.huleedu")

OPERATION = "publish_to_outbox"
REPOSITORY = "outbox_repository"


class OutboxManager:
    """Stores event envelopes through a repository. It knows nothing of the platform: that is the repository's."""

    def __init__(
        self,
        outbox_repository: OutboxRepositoryProtocol,
        redis_client: AtomicRedisClientProtocol | None = None,
        service_name: str = "unknown_service",
    ) -> None:
        """redis_client is told that something was added: nothing of the platform needs it, but services may."""
        self.outbox_repository = outbox_repository
        self.redis_client = redis_client
        self.service_name = service_name

    async def publish_to_outbox(
        self,
        aggregate_type: str,
        aggregate_id: str,
        event_type: str,
        event_data: Any,
        topic: str,
        message_key: str | None = None,
        headers: dict[str, str] | None = None,
        session: Any | None = None,
    ) -> None:
        """Stores an event envelope, in the session's transaction if one is given.

        event_data is a Pydantic envelope. The record's key is metadata["partition_key"] of the envelope, else
        message_key, else aggregate_id. Raises HuleEduError with code EXTERNAL_SERVICE_ERROR.
        """
        if not self.outbox_repository:
            raise_external_service_error(
                service=self.service_name,
                operation=OPERATION,
                external_service=REPOSITORY,
                message="Outbox repository not configured for transactional publishing",
                correlation_id=getattr(event_data, "correlation_id", NIL),
                aggregate_id=aggregate_id,
                event_type=event_type,
            )
        try:
            if not hasattr(event_data, "model_dump"):
                raise ValueError(f"OutboxManager expects Pydantic EventEnvelope, got {type(event_data)}")
            stored = event_data.model_dump(mode="json")
            stored["topic"] = topic
            if headers:
                stored["headers"] = headers
            write_id = await self.outbox_repository.add_event(
                aggregate_id=aggregate_id,
                aggregate_type=aggregate_type,
                event_type=event_type,
                event_data=stored,
                topic=topic,
                event_key=_event_key(event_data, message_key, aggregate_id),
                session=session,
            )
        except Exception as e:
            if hasattr(e, "error_detail"):
                raise
            raise_external_service_error(
                service=self.service_name,
                operation=OPERATION,
                external_service=REPOSITORY,
                message=f"Failed to store event in outbox: {type(e).__name__}",
                correlation_id=_correlation_id(event_data),
                aggregate_id=aggregate_id,
                event_type=event_type,
                error_type=type(e).__name__,
                error_details=str(e),
            )
        logger.debug("event added as %s", write_id, extra={"event_type": event_type, "topic": topic})
        if self.redis_client:
            await self._wake(self.redis_client)

    async def _wake(self, redis_client: AtomicRedisClientProtocol) -> None:
        """An event is stored by now: that nobody could be told of it is no failure."""
        try:
            await redis_client.lpush(f"outbox:wake:{self.service_name}", "wake")
        except Exception as e:
            logger.warning("the wake-up could not be sent", extra={"service": self.service_name, "error": str(e)})


def _event_key(envelope: Any, message_key: str | None, aggregate_id: str) -> Any:
    metadata = getattr(envelope, "metadata", None)
    if isinstance(metadata, dict) and "partition_key" in metadata:
        return metadata["partition_key"]
    return message_key or aggregate_id


def _correlation_id(event_data: Any) -> Any:
    if hasattr(event_data, "correlation_id"):
        return event_data.correlation_id
    if isinstance(event_data, dict):
        try:
            return UUID(str(event_data.get("correlation_id", NIL)))
        except ValueError:
            pass
    return NIL


_KEYS: tuple[tuple[tuple[str, ...], tuple[str, ...]], ...] = (
    (("assessment.result", "cj_assessment"), ("cj_assessment_job_id",)),
    (("batch.", "spellcheck", "nlp"), ("batch_id",)),
    (("student", "matching"), ("batch_id",)),
    (("essay.", "els."), ("entity_ref", "essay_id")),
)
"""Parts of event types, and the metadata by which their records are partitioned. The first row that fits counts."""


def resolve_partition_key(event_type: str, aggregate_id: str, metadata: dict[str, Any] | None = None) -> str:
    """Returns the key by which records of an event type stay in order: one of the metadata, else aggregate_id."""
    found = metadata or {}
    for parts, names in _KEYS:
        if any(part in event_type for part in parts):
            for name in names:
                if name in found:
                    return found[name]  # type: ignore[no-any-return]  # as the caller has it
            return aggregate_id
    return aggregate_id


__all__ = ["OutboxManager", "resolve_partition_key"]
