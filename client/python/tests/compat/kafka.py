"""A consumer as HuleEdu's services have one: it drops what it has seen, by the header event_id."""

from __future__ import annotations

import asyncio
import time
import uuid
from types import TracebackType
from typing import Any

from confluent_kafka import Consumer as KafkaConsumer
from confluent_kafka import Message
from confluent_kafka.admin import AdminClient, NewTopic  # type: ignore[attr-defined]

QUIET: dict[str, Any] = {"enable.metrics.push": False}


def create_topics(bootstrap: str, *topics: str) -> None:
    """Makes topics with three partitions."""
    admin = AdminClient({"bootstrap.servers": bootstrap, **QUIET})
    for done in admin.create_topics([NewTopic(topic, 3, 1) for topic in topics]).values():
        done.result(30)


class Consumer:
    """Reads topics from their beginning. Use it as a context manager."""

    def __init__(self, bootstrap: str, *topics: str) -> None:
        self._consumer = KafkaConsumer(
            {"bootstrap.servers": bootstrap, "group.id": uuid.uuid4().hex, "auto.offset.reset": "earliest", **QUIET}
        )
        self._consumer.subscribe(list(topics))
        self.seen: dict[str, Message] = {}
        self.duplicates = 0

    def __enter__(self) -> Consumer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._consumer.close()

    async def take(self, n: int, seconds: float = 30) -> list[Message]:
        """Returns everything that was seen once there are n events."""
        return await asyncio.to_thread(self._take, n, seconds)

    def _take(self, n: int, seconds: float) -> list[Message]:
        until = time.monotonic() + seconds
        while len(self.seen) < n:
            if time.monotonic() > until:
                raise TimeoutError(f"{len(self.seen)} of {n} events after {seconds:g} s")
            message = self._consumer.poll(0.1)
            if message is None:
                continue
            if message.error() is not None:
                raise RuntimeError(message.error())
            event_id = headers(message)["event_id"]
            if event_id in self.seen:
                self.duplicates += 1
            else:
                self.seen[event_id] = message
        return list(self.seen.values())


def headers(message: Message) -> dict[str, str]:
    """The headers of a record, as text."""
    pairs: Any = message.headers() or []
    return {name: value.decode() for name, value in pairs}


def body(message: Message) -> bytes:
    """The value of a record that has one."""
    value = message.value()
    assert isinstance(value, bytes)
    return value
