"""What a HuleEdu service has: its envelope, its payload model, its own error class and its fakes."""

from __future__ import annotations

from datetime import datetime, timezone
from typing import Any, Generic, TypeVar
from uuid import UUID, uuid4

from pydantic import BaseModel, Field

T = TypeVar("T")


class EventEnvelope(BaseModel, Generic[T]):
    """The fields and their order are those of common_core.events.envelope."""

    event_id: UUID = Field(default_factory=uuid4)
    event_type: str
    event_timestamp: datetime = Field(default_factory=lambda: datetime.now(timezone.utc))
    source_service: str
    schema_version: int = 1
    correlation_id: UUID = Field(default_factory=uuid4)
    data_schema_uri: str | None = None
    data: T
    metadata: dict[str, Any] | None = Field(default_factory=dict)


class EssayProvisioned(BaseModel):
    """A payload."""

    entity_id: str
    text: str = ""


def envelope(**changes: Any) -> EventEnvelope[EssayProvisioned]:
    """An envelope with something in every field."""
    fields: dict[str, Any] = {
        "event_type": "huleedu.file.essay.content.provisioned.v1",
        "source_service": "file_service",
        "data": EssayProvisioned(entity_id="essay-1", text="å ä ö"),
        **changes,
    }
    return EventEnvelope[EssayProvisioned](**fields)


class Redis:
    """Keeps what it was asked for."""

    def __init__(self, error: Exception | None = None) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self._error = error

    async def lpush(self, key: str, *values: str) -> int:
        self.calls.append(("lpush", key, *values))
        if self._error is not None:
            raise self._error
        return len(self.calls)

    async def blpop(self, keys: list[str], timeout: float) -> tuple[str, str] | None:
        self.calls.append(("blpop", keys, timeout))
        return None


class Kafka:
    """A publisher that must not be used."""

    async def start(self) -> None:
        raise AssertionError("the layer used the service's Kafka publisher")

    async def stop(self) -> None:
        raise AssertionError("the layer used the service's Kafka publisher")

    async def publish(
        self, topic: str, envelope: Any, key: str | None = None, headers: dict[str, str] | None = None
    ) -> None:
        raise AssertionError("the layer used the service's Kafka publisher")
