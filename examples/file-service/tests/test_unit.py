"""The publisher and the provider overriding, with nothing running."""

from __future__ import annotations

import json
from typing import Any
from unittest.mock import AsyncMock
from uuid import uuid4

import pytest
from conftest import FakeRedis, TestKafka, TestProvider
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from outbox_client.compat.huleedu import EventRelayWorker, OutboxRepositoryProtocol, PostgreSQLOutboxRepository
from outbox_client.compat.huleedu.manager import OutboxManager
from outbox_client.compat.huleedu.protocols import AtomicRedisClientProtocol, KafkaPublisherProtocol
from sqlalchemy.ext.asyncio import AsyncEngine

from file_service.config import Settings
from file_service.di import NoKafka, NoRedis, make_container
from file_service.events import (
    TOPICS,
    BatchFileAddedV1,
    BatchFileRemovedV1,
    EssayContentProvisionedV1,
    EssayValidationFailedV1,
)
from file_service.publisher import EventPublisher, NotifierProtocol

SETTINGS = Settings("postgresql+asyncpg://nobody@127.0.0.1:1/nothing")
ADDED = BatchFileAddedV1(batch_id="b", file_upload_id="f", filename="n.txt", user_id="u")
REMOVED = BatchFileRemovedV1(batch_id="b", file_upload_id="f", filename="n.txt", user_id="u")
PROVISIONED = EssayContentProvisionedV1(batch_id="b", file_upload_id="f", original_file_name="n.txt", size_bytes=7)
INVALID = EssayValidationFailedV1(
    batch_id="b", file_upload_id="f", original_file_name="n.txt", error_code="EMPTY_CONTENT", detail="empty"
)


def publisher(redis: FakeRedis | None = None) -> tuple[EventPublisher, AsyncMock]:
    repository = AsyncMock(spec=OutboxRepositoryProtocol)
    return EventPublisher(OutboxManager(repository, None, "file_service"), redis or FakeRedis()), repository


@pytest.mark.parametrize("event", [ADDED, REMOVED, PROVISIONED, INVALID], ids=lambda e: type(e).__name__)
async def test_each_event_goes_to_its_topic_in_the_callers_session(event: Any) -> None:
    made, repository = publisher()
    correlation_id, session = uuid4(), AsyncMock()
    if isinstance(event, EssayContentProvisionedV1):
        await made.essay_provisioned(event, correlation_id, session)
    elif isinstance(event, EssayValidationFailedV1):
        await made.validation_failed(event, correlation_id, session)
    else:
        await made.batch_changed(event, correlation_id, session)
    given = repository.add_event.call_args.kwargs
    batch_event = isinstance(event, (BatchFileAddedV1, BatchFileRemovedV1))
    assert given["topic"] == given["event_type"] == TOPICS[type(event)]
    assert (given["aggregate_type"], given["aggregate_id"]) == (("batch", "b") if batch_event else ("file_upload", "f"))
    assert given["event_key"] == "b", "the batch's events stay in order"
    assert given["session"] is session
    stored = given["event_data"]
    assert stored["data"] == event.model_dump(mode="json")
    assert stored["correlation_id"] == str(correlation_id)
    assert stored["source_service"] == "file_service"
    json.dumps(stored)


async def test_the_trace_goes_with_the_event() -> None:
    made, repository = publisher()
    tracer = TracerProvider().get_tracer("test")
    with tracer.start_as_current_span("upload") as span:
        await made.batch_changed(ADDED, uuid4(), AsyncMock())
    traceparent = repository.add_event.call_args.kwargs["event_data"]["metadata"]["traceparent"]
    assert trace.format_trace_id(span.get_span_context().trace_id) in traceparent


async def test_users_are_told_and_a_redis_that_is_away_is_no_failure() -> None:
    redis = FakeRedis()
    made, _ = publisher(redis)
    await made.notify(ADDED)
    assert redis.messages == [("user:u", {"event": "BatchFileAddedV1", "data": ADDED.model_dump()})]
    redis.error = ConnectionError("no redis")
    await made.notify(REMOVED)
    assert len(redis.messages) == 1


async def test_a_test_provider_inherits_and_replaces_kafka_and_redis() -> None:
    redis = FakeRedis()
    container = make_container(SETTINGS, TestProvider(SETTINGS, redis))
    assert isinstance(await container.get(KafkaPublisherProtocol), TestKafka)
    assert await container.get(AtomicRedisClientProtocol) is redis
    assert await container.get(NotifierProtocol) is redis
    worker = await container.get(EventRelayWorker)
    assert isinstance(worker.kafka_bus, TestKafka)
    assert worker.redis_client is redis
    assert (await container.get(OutboxManager)).redis_client is redis
    assert isinstance(await container.get(OutboxRepositoryProtocol), PostgreSQLOutboxRepository)
    assert isinstance(await container.get(AsyncEngine), AsyncEngine)
    await container.close()


async def test_without_a_redis_url_nobody_is_told() -> None:
    container = make_container(SETTINGS)
    assert isinstance(await container.get(NotifierProtocol), NoRedis)
    assert isinstance(await container.get(AtomicRedisClientProtocol), NoRedis)
    kafka = await container.get(KafkaPublisherProtocol)
    assert isinstance(kafka, NoKafka)
    with pytest.raises(RuntimeError, match="outbox"):
        await kafka.publish("t", None)
    none = NoRedis()
    assert (await none.publish("c", "m"), await none.lpush("k", "v"), await none.blpop(["k"], 0)) == (0, 0, None)
    await container.close()
