"""The events of the service: the envelope that all of HuleEdu shares, and the payloads."""

from __future__ import annotations

from datetime import datetime, timezone
from typing import Any, Generic, TypeVar
from uuid import UUID, uuid4

from pydantic import BaseModel, Field

T = TypeVar("T")


class EventEnvelope(BaseModel, Generic[T]):
    """What travels on Kafka. Consumers drop an event_id that they have seen."""

    event_id: UUID = Field(default_factory=uuid4)
    event_type: str
    event_timestamp: datetime = Field(default_factory=lambda: datetime.now(timezone.utc))
    source_service: str
    schema_version: int = 1
    correlation_id: UUID = Field(default_factory=uuid4)
    data_schema_uri: str | None = None
    data: T
    metadata: dict[str, Any] = Field(default_factory=dict)


class EssayContentProvisionedV1(BaseModel):
    """An essay was uploaded and can be worked on."""

    batch_id: str
    file_upload_id: str
    original_file_name: str
    size_bytes: int


class EssayValidationFailedV1(BaseModel):
    """A file was uploaded that is no essay."""

    batch_id: str
    file_upload_id: str
    original_file_name: str
    error_code: str
    detail: str


class BatchFileAddedV1(BaseModel):
    """A batch has one file more."""

    batch_id: str
    file_upload_id: str
    filename: str
    user_id: str


class BatchFileRemovedV1(BaseModel):
    """A batch has one file less."""

    batch_id: str
    file_upload_id: str
    filename: str
    user_id: str


TOPICS: dict[type[BaseModel], str] = {
    EssayContentProvisionedV1: "huleedu.file.essay.content.provisioned.v1",
    EssayValidationFailedV1: "huleedu.file.essay.validation.failed.v1",
    BatchFileAddedV1: "huleedu.file.batch.file.added.v1",
    BatchFileRemovedV1: "huleedu.file.batch.file.removed.v1",
}
"""Every event type has a topic of its own, and is named like it."""
