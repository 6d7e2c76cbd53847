"""Section 4 of the contract: what reaches Kafka, through the real platform."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import pytest
import pytest_asyncio
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession

from outbox_client.compat.huleedu import PostgreSQLOutboxRepository
from outbox_client.compat.huleedu.manager import OutboxManager
from outbox_client.compat.huleedu.record import make_event

from .devplatform import REPOSITORY, DevPlatform
from .envelope import EssayProvisioned, EventEnvelope, envelope
from .kafka import Consumer, body, create_topics, headers

VECTORS: list[dict[str, Any]] = json.loads(
    Path(REPOSITORY, "cmd/outbox/testdata/huleedu_vectors.json").read_text(encoding="utf-8")
)


@dataclass
class Service:
    """A service on the real platform."""

    engine: AsyncEngine
    repository: PostgreSQLOutboxRepository
    manager: OutboxManager
    topic: str
    consumer: Consumer

    async def publish(self, event: Any = None, **changes: Any) -> None:
        given: dict[str, Any] = {
            "aggregate_type": "essay",
            "aggregate_id": "essay-1",
            "event_type": "argument.type",
            "event_data": event if event is not None else envelope(),
            "topic": self.topic,
            **changes,
        }
        await self.manager.publish_to_outbox(**given)


@pytest_asyncio.fixture
async def service(dev: DevPlatform, engine: AsyncEngine, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Service]:
    name = f"s{uuid4().hex[:12]}"
    topic = f"topic.{name}"
    dev.register(name, topic)
    create_topics(dev.kafka, topic)
    monkeypatch.setenv("OUTBOX_ADDRESS", dev.address)
    monkeypatch.setenv("OUTBOX_SOURCE", name)
    repository = PostgreSQLOutboxRepository(engine, "file_service")
    with Consumer(dev.kafka, topic) as consumer:
        yield Service(engine, repository, OutboxManager(repository, service_name="file_service"), topic, consumer)


async def test_4_1_topic_and_key(service: Service) -> None:
    await service.publish(message_key="nyckel-åäö")
    (record,) = await service.consumer.take(1)
    assert (record.topic(), record.key()) == (service.topic, "nyckel-åäö".encode())


async def test_4_1_without_event_key_the_key_is_the_aggregates_id(service: Service) -> None:
    """The contract wants no key here; the platform has no records without one. OutboxManager always gives a key."""
    await service.repository.add_event("essay-7", "essay", "t", {"a": 1}, service.topic)
    (record,) = await service.consumer.take(1)
    assert record.key() == b"essay-7"


async def test_4_2_value_is_the_json_of_the_envelope_as_the_caller_made_it(service: Service) -> None:
    event = envelope(metadata={"partition_key": "p", "traceparent": "00-1-2-01", "tracestate": "a=b"})
    async with AsyncSession(service.engine) as session, session.begin():
        await service.publish(event, headers={"x": "y"}, session=session)
    (record,) = await service.consumer.take(1)
    assert body(record) == json.dumps(event.model_dump(mode="json")).encode()
    assert list(json.loads(body(record))) == [
        *("event_id", "event_type", "event_timestamp", "source_service", "schema_version"),
        *("correlation_id", "data_schema_uri", "data", "metadata"),
    ]
    assert b"\\u00e5" in body(record), "ensure_ascii"


async def test_4_2_consumers_parse_in_two_steps(service: Service) -> None:
    event = envelope()
    await service.publish(event)
    (record,) = await service.consumer.take(1)
    parsed = EventEnvelope[Any].model_validate_json(body(record))
    assert (parsed.event_id, parsed.event_timestamp) == (event.event_id, event.event_timestamp)
    assert (parsed.correlation_id, parsed.schema_version) == (event.correlation_id, event.schema_version)
    assert (parsed.data_schema_uri, parsed.metadata) == (event.data_schema_uri, event.metadata)
    assert isinstance(parsed.data, dict)
    assert EssayProvisioned.model_validate(parsed.data) == event.data


@pytest.mark.parametrize("joined", [True, False])
async def test_4_3_the_seven_headers_filled_from_the_envelope(service: Service, joined: bool) -> None:
    event = envelope()
    if joined:
        async with AsyncSession(service.engine) as session, session.begin():
            await service.publish(event, session=session)
    else:
        await service.publish(event)
    (record,) = await service.consumer.take(1)
    found = headers(record)
    found.pop("outbox-epoch")
    value = json.loads(body(record))
    assert found == {
        "event_id": str(event.event_id),
        "trace_id": str(event.correlation_id),
        "schema_version": "1",
        "occurred_at": value["event_timestamp"],
        "content_type": "application/json",
        "source_service": "file_service",
        "event_type": event.event_type,
    }


async def test_4_3_those_given_by_the_caller_win(service: Service) -> None:
    event = envelope()
    await service.publish(event, headers={"trace_id": "mine", "schema_version": "9", "x": "ö"})
    (record,) = await service.consumer.take(1)
    found = headers(record)
    assert (found["trace_id"], found["schema_version"], found["x"]) == ("mine", "9", "ö")
    assert found["event_id"] == str(event.event_id)
    assert len(record.headers() or []) == 7 + 1 + 1, "no name twice"


async def test_4_3_event_id_and_event_type_are_always_both_there(service: Service) -> None:
    await service.publish()
    for data in ({"a": 1}, {"event_id": str(uuid4())}, {"event_type": "x"}, {"event_id": None, "event_type": None}):
        await service.repository.add_event("a", "essay", "argument.type", data, service.topic)
    for record in await service.consumer.take(5):
        assert {"event_id", "event_type"} <= set(headers(record))


async def test_4_4_if_event_data_is_no_envelope_the_value_is_the_dict_as_given(service: Service) -> None:
    write_id = await service.repository.add_event("a", "essay", "argument.type", {"test": "data"}, service.topic)
    (record,) = await service.consumer.take(1)
    assert body(record) == b'{"test": "data"}'
    found = headers(record)
    assert (found["event_id"], found["event_type"]) == (str(write_id), "argument.type")


async def test_4_5_trace_context_in_metadata_survives_in_the_body(service: Service) -> None:
    traceparent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    await service.publish(envelope(metadata={"traceparent": traceparent, "tracestate": "a=1"}))
    (record,) = await service.consumer.take(1)
    assert json.loads(body(record))["metadata"] == {"traceparent": traceparent, "tracestate": "a=1"}


async def test_4_6_order_per_topic_and_key_in_the_order_of_commit_and_calls(service: Service) -> None:
    expected: dict[str, list[str]] = {}
    n = 0
    for _ in range(5):
        async with AsyncSession(service.engine) as session, session.begin():
            for key in ("a", "b", "c") * 2:
                n += 1
                event = envelope(data=EssayProvisioned(entity_id=f"{n}"))
                expected.setdefault(key, []).append(f"{n}")
                await service.publish(event, aggregate_id=key, session=session)
    found: dict[str, list[str]] = {}
    for record in await service.consumer.take(n):
        found.setdefault((record.key() or b"").decode(), []).append(json.loads(body(record))["data"]["entity_id"])
    assert found == expected


@pytest.mark.parametrize("vector", VECTORS, ids=[v["name"] for v in VECTORS])
def test_4_the_same_record_as_outbox_import_makes_of_the_same_row(vector: dict[str, Any]) -> None:
    event = make_event(
        write_id=UUID(vector["row_id"]),
        aggregate_id=vector["aggregate_id"],
        aggregate_type=vector["aggregate_type"],
        event_type=vector["event_type"],
        event_data=vector["event_data"],
        topic=vector["topic"],
        event_key=vector["event_key"],
    )
    assert event.payload.decode() == vector["value"]
    assert dict(event.headers) == vector["headers"]
    assert str(event.event_id) == vector["event_id"]
    assert event.aggregate_type == vector["platform_aggregate_type"]
    assert event.aggregate_id == vector["platform_aggregate_id"]
    assert event.key == vector["event_key"]
