"""The six scenarios, end to end: the service, real PostgreSQL, the real platform, a broker, and a consumer that drops
duplicates.
"""

from __future__ import annotations

import asyncio
import re
import uuid

import pytest
from conftest import Service, Stack
from sqlalchemy import text
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.pool import NullPool

ESSAY = "An essay has some words."
PROVISIONED, FAILED = "huleedu.file.essay.content.provisioned.v1", "huleedu.file.essay.validation.failed.v1"
ADDED, REMOVED = "huleedu.file.batch.file.added.v1", "huleedu.file.batch.file.removed.v1"


@pytest.fixture
def batch() -> str:
    return f"batch-{uuid.uuid4().hex[:8]}"


async def test_event_storage(service: Service, batch: str) -> None:
    """An upload's row and its events are one thing: what is answered is durable, and marked in the service's own
    database.
    """
    (file,) = await service.upload(batch, **{"essä.txt": ESSAY})
    assert await service.sql("SELECT count(*) FROM file") == 1
    assert await service.sql("SELECT count(*) FROM outbox_marker") == 1, "two events, one transaction, one marker"
    provisioned, added = sorted(await service.consumer.take(batch, 2), key=lambda e: str(e["topic"]), reverse=True)
    assert (provisioned["topic"], added["topic"]) == (PROVISIONED, ADDED)
    assert added["body"]["data"] == {
        "batch_id": batch,
        "file_upload_id": file["id"],
        "filename": "essä.txt",
        "user_id": "user-1",
    }
    assert provisioned["key"] == added["key"] == batch.encode()


async def test_event_processing(service: Service, batch: str) -> None:
    """All four events arrive, with their headers, those of one batch in order; and users are told about their
    batches.
    """
    good, bad = await service.upload(batch, **{"good.txt": ESSAY, "bad.txt": "x"})
    assert (good["error"], bad["error"]) == (None, "CONTENT_TOO_SHORT")
    response = await service.app.test_client().delete(f"/batches/{batch}/files/{good['id']}")
    assert response.status_code == 200
    assert (await service.app.test_client().delete(f"/batches/{batch}/files/{good['id']}")).status_code == 404
    events = await service.consumer.take(batch, 4)
    assert sorted(e["topic"] for e in events) == sorted([PROVISIONED, FAILED, ADDED, REMOVED])
    for e in events:
        assert e["headers"]["event_id"] == e["body"]["event_id"]
        assert e["headers"]["event_type"] == e["topic"]
        assert e["headers"]["source_service"] == "file_service"
        assert e["headers"]["trace_id"] == e["body"]["correlation_id"]
        assert e["headers"]["occurred_at"] == e["body"]["event_timestamp"]
        assert (e["headers"]["schema_version"], e["headers"]["content_type"]) == ("1", "application/json")
    assert [m[1]["event"] for m in service.redis.messages] == ["BatchFileAddedV1", "BatchFileRemovedV1"]
    assert {m[0] for m in service.redis.messages} == {"user:user-1"}
    assert set(service.redis.pushed) == {("outbox:wake:file_service", "wake")}


async def test_kafka_unavailable(service: Service, stack: Stack, batch: str) -> None:
    """Uploads go on while the broker answers nobody; when it is back everything arrives, in order."""
    stack.freeze_kafka()
    try:
        for i in range(5):
            await service.upload(batch, **{f"{i}.txt": ESSAY})
        assert await service.sql("SELECT count(*) FROM file") == 5
        assert (await service.app.test_client().get("/readyz")).status_code == 200
    finally:
        stack.thaw_kafka()
    events = await service.consumer.take(batch, 10, 60)
    assert [e["body"]["data"]["filename"] for e in events if e["topic"] == ADDED] == [f"{i}.txt" for i in range(5)]


async def test_transaction_rollback(service: Service, batch: str) -> None:
    """An upload that fails leaves neither files nor events."""
    await service.sql(
        "CREATE FUNCTION full_disk() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RAISE EXCEPTION ''disk full''; END'"
    )
    await service.sql(
        "CREATE TRIGGER full_disk BEFORE INSERT ON file FOR EACH ROW WHEN (NEW.name = 'c.txt') EXECUTE FUNCTION full_disk()"
    )
    response = await service.post(batch, **{"a.txt": ESSAY, "b.txt": "x", "c.txt": ESSAY})
    assert response.status_code == 500
    assert await service.sql("SELECT count(*) FROM file") == 0
    assert await service.sql("SELECT count(*) FROM outbox_marker") == 0
    assert service.redis.messages == []
    await service.upload(batch, **{"d.txt": ESSAY})
    events = await service.consumer.take(batch, 2)
    assert {e["body"]["data"].get("filename") or e["body"]["data"]["original_file_name"] for e in events} == {"d.txt"}


async def test_metrics(service: Service, batch: str) -> None:
    """What the service added is counted, by type."""
    text_before = await (await service.app.test_client().get("/metrics")).get_data(as_text=True)
    await service.upload(batch, **{"good.txt": ESSAY, "bad.txt": ""})
    text_after = await (await service.app.test_client().get("/metrics")).get_data(as_text=True)

    def value(metrics: str, event_type: str) -> float:
        line = rf'^outbox_events_added_total{{event_type="{re.escape(event_type)}",service="file_service"}} (\S+)$'
        found = re.search(line, metrics, re.MULTILINE)
        return float(found.group(1)) if found else 0.0

    for event_type in (PROVISIONED, FAILED, ADDED):
        assert value(text_after, event_type) == value(text_before, event_type) + 1
    assert value(text_after, REMOVED) == value(text_before, REMOVED)


async def test_idempotency(service: Service, stack: Stack, batch: str) -> None:
    """A record that comes a second time, byte for byte as around a relay's crash, is processed once."""
    from confluent_kafka import Producer

    await service.upload(batch, **{"a.txt": ESSAY})
    await service.consumer.take(batch, 2)
    producer = Producer({"bootstrap.servers": stack.kafka, "enable.metrics.push": False})
    for message in service.consumer.processed[-2:]:
        pairs = message.headers()
        producer.produce(str(message.topic()), value=message.value(), key=message.key(), headers=pairs)
    assert producer.flush(30) == 0
    await service.upload(batch, **{"b.txt": ESSAY})
    events = await service.consumer.take(batch, 4)
    ids = [e["headers"]["event_id"] for e in events]
    assert len(set(ids)) == 4
    assert service.consumer.dropped >= 1


async def test_uploads_of_one_batch_at_the_same_time_keep_the_order_of_their_commits(
    service: Service, batch: str
) -> None:
    await asyncio.gather(*(service.upload(batch, **{f"{i}.txt": ESSAY}) for i in range(10)))
    events = await service.consumer.take(batch, 20)
    arrived = [e["body"]["data"]["file_upload_id"] for e in events if e["topic"] == ADDED]
    engine = create_async_engine(service.url, poolclass=NullPool)
    async with engine.connect() as c:
        committed = (await c.execute(text("SELECT id FROM file ORDER BY xmin::text::bigint"))).scalars().all()
    await engine.dispose()
    assert sorted(arrived) == sorted(committed)
    assert len(arrived) == 10
