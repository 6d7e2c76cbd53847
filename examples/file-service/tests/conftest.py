"""The platform as it runs in production, in separate processes: PostgreSQL, a Kafka broker, a server with a relay."""

from __future__ import annotations

import asyncio
import io
import json
import signal
import socket
import time
import uuid
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from confluent_kafka import Consumer, Message
from dishka import Scope, provide
from outbox_client.compat.huleedu import close, configure
from outbox_client.compat.huleedu.protocols import AtomicRedisClientProtocol, KafkaPublisherProtocol
from quart import Quart
from quart.datastructures import FileStorage
from sqlalchemy import text
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.pool import NullPool

from file_service import dev as dev_module
from file_service.app import create_app
from file_service.config import Settings
from file_service.di import CoreProvider, NoKafka, make_container
from file_service.events import TOPICS
from file_service.publisher import NotifierProtocol


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


@dataclass
class Stack:
    """The running platform."""

    dsn: str
    address: str
    kafka: str
    broker: dev_module.Process
    server: dev_module.Process

    def freeze_kafka(self) -> None:
        """From now on the broker answers nobody."""
        self.broker.process.send_signal(signal.SIGSTOP)

    def thaw_kafka(self) -> None:
        """It goes on."""
        self.broker.process.send_signal(signal.SIGCONT)


@pytest.fixture(scope="session")
def postgres(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A PostgreSQL: that of an `outbox dev`."""
    directory = Path("/tmp") / f"file-service-{uuid.uuid4().hex[:8]}"
    directory.mkdir(mode=0o755)
    with dev_module.dev(str(directory)) as running:
        yield running.said(r"^store +(\S+)")


@pytest.fixture(scope="session")
def stack(postgres: str) -> Iterator[Stack]:
    """The platform, for all tests."""
    name = f"store_{uuid.uuid4().hex[:8]}"
    asyncio.run(dev_module.create_database(postgres, name))
    store = f"{postgres.rpartition('/')[0]}/{name}"
    dev_module.run("migrate", "up", "--store-dsn", store, "--shards", "4")
    port = free_port()
    broker = dev_module.Process("bench-broker", "--port", str(port), ready="")
    with broker:
        wait_for_port(port)
        kafka = f"127.0.0.1:{port}"
        dev_module.create_topics(kafka)
        address = f"127.0.0.1:{free_port()}"
        server = dev_module.Process(
            *("server", "--with-relay", "--store-dsn", store, "--kafka-brokers", kafka),
            *("--server-grpc-listen", address, "--server-http-listen", "127.0.0.1:0"),
            ready="",
        )
        with server:
            wait_for_port(int(address.rpartition(":")[2]))
            dev_module.run("source", "apply", "-", "--address", address, stdin=dev_module.SOURCE)
            yield Stack(postgres, address, kafka, broker, server)
            broker.process.send_signal(signal.SIGCONT)


def wait_for_port(port: int) -> None:
    until = time.monotonic() + 30
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
            return
        except OSError:
            if time.monotonic() > until:
                raise


@dataclass
class FakeRedis:
    """Keeps what it was asked for: both what users are told, and wake-ups."""

    messages: list[tuple[str, Any]] = field(default_factory=list)
    pushed: list[tuple[str, ...]] = field(default_factory=list)
    error: Exception | None = None

    async def publish(self, channel: str, message: str) -> int:
        if self.error is not None:
            raise self.error
        self.messages.append((channel, json.loads(message)))
        return 1

    async def lpush(self, key: str, *values: str) -> int:
        if self.error is not None:
            raise self.error
        self.pushed.append((key, *values))
        return len(self.pushed)

    async def blpop(self, keys: list[str], timeout: float) -> tuple[str, str] | None:
        return None


class TestKafka(NoKafka):
    """Told apart from the service's own."""

    __test__ = False


class TestProvider(CoreProvider):
    """Inherits everything and replaces Kafka and Redis."""

    __test__ = False

    def __init__(self, settings: Settings, redis: FakeRedis) -> None:
        super().__init__(settings)
        self._redis = redis

    @provide(scope=Scope.APP)
    def provide_kafka(self) -> KafkaPublisherProtocol:
        return TestKafka()

    @provide(scope=Scope.APP)
    def provide_notifier(self) -> NotifierProtocol:
        return self._redis

    @provide(scope=Scope.APP)
    def provide_redis(self) -> AtomicRedisClientProtocol:
        return self._redis


@dataclass
class Service:
    """The service, running against the platform."""

    app: Quart
    redis: FakeRedis
    url: str
    consumer: DeduplicatingConsumer

    async def upload(self, batch: str, **files: str) -> list[dict[str, Any]]:
        """Uploads files and returns the answer's list."""
        response = await self.post(batch, **files)
        body = await response.get_json()
        assert response.status_code == 202, body
        return list(body["files"])

    async def post(self, batch: str, **files: str) -> Any:
        """Uploads files and returns the answer."""
        return await self.app.test_client().post(
            f"/batches/{batch}/files",
            files={name: FileStorage(io.BytesIO(content.encode()), filename=name) for name, content in files.items()},
            headers={"X-User-ID": "user-1"},
        )

    async def sql(self, statement: str) -> Any:
        """The first value of a query of the service's database; None of a statement."""
        engine = create_async_engine(self.url, poolclass=NullPool)
        async with engine.begin() as c:
            result = await c.execute(text(statement))
            value = result.scalar() if result.returns_rows else None
        await engine.dispose()
        return value


class DeduplicatingConsumer:
    """A service that consumes: it drops the event_ids that it has seen."""

    def __init__(self, kafka: str) -> None:
        self._consumer = Consumer(
            {
                "bootstrap.servers": kafka,
                "group.id": uuid.uuid4().hex,
                "auto.offset.reset": "earliest",
                "enable.metrics.push": False,
            }
        )
        self._consumer.subscribe(list(TOPICS.values()))
        self.processed: list[Message] = []
        self.dropped = 0
        self._seen: set[str] = set()

    def _of(self, batch: str) -> list[dict[str, Any]]:
        found = []
        for message in self.processed:
            body = json.loads(message.value() or b"")
            if body["data"]["batch_id"] == batch:
                found.append(
                    {"topic": message.topic(), "headers": headers(message), "key": message.key(), "body": body}
                )
        return found

    def _poll(self) -> None:
        message = self._consumer.poll(0.1)
        if message is None or message.error() is not None:
            return
        event_id = headers(message)["event_id"]
        if event_id in self._seen:
            self.dropped += 1
            return
        self._seen.add(event_id)
        self.processed.append(message)

    def _take(self, batch: str, n: int, seconds: float) -> list[dict[str, Any]]:
        until = time.monotonic() + seconds
        while len(self._of(batch)) < n:
            if time.monotonic() > until:
                raise TimeoutError(f"{len(self._of(batch))} of {n} events of {batch}")
            self._poll()
        return self._of(batch)

    async def take(self, batch: str, n: int, seconds: float = 30) -> list[dict[str, Any]]:
        """Returns the events of a batch once there are n."""
        return await asyncio.to_thread(self._take, batch, n, seconds)

    def close(self) -> None:
        self._consumer.close()


def headers(message: Message) -> dict[str, str]:
    pairs: Any = message.headers() or []
    return {name: value.decode() for name, value in pairs}


@pytest.fixture
def redis() -> FakeRedis:
    return FakeRedis()


@pytest_asyncio.fixture
async def service(stack: Stack, redis: FakeRedis, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Service]:
    """The service, on a database of its own."""
    name = f"files_{uuid.uuid4().hex[:8]}"
    await dev_module.create_database(stack.dsn, name)
    url = dev_module.url(stack.dsn, name)
    monkeypatch.setenv("OUTBOX_ADDRESS", stack.address)
    monkeypatch.setenv("ENVIRONMENT", "development")
    configure()
    settings = Settings(url)
    app = create_app(make_container(settings, TestProvider(settings, redis)))
    consumer = DeduplicatingConsumer(stack.kafka)
    async with app.test_app():
        yield Service(app, redis, url, consumer)
    await close()
    consumer.close()
