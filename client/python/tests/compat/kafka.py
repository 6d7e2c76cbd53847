"""A consumer as HuleEdu's services have one: it drops what it has seen, by the header event_id."""

from __future__ import annotations

import asyncio
from types import TracebackType

from aiokafka import AIOKafkaConsumer, ConsumerRecord  # type: ignore[import-untyped]
from aiokafka.admin import AIOKafkaAdminClient, NewTopic  # type: ignore[import-untyped]


async def create_topics(bootstrap: str, *topics: str) -> None:
    """Makes topics with three partitions."""
    admin = AIOKafkaAdminClient(bootstrap_servers=bootstrap)
    await admin.start()
    try:
        await admin.create_topics([NewTopic(topic, 3, 1) for topic in topics])
    finally:
        await admin.close()


class Consumer:
    """Reads topics from their beginning. Use it as a context manager."""

    def __init__(self, bootstrap: str, *topics: str) -> None:
        self._consumer = AIOKafkaConsumer(*topics, bootstrap_servers=bootstrap, auto_offset_reset="earliest")
        self.seen: dict[str, ConsumerRecord] = {}
        self.duplicates = 0

    async def __aenter__(self) -> Consumer:
        await self._consumer.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._consumer.stop()

    async def take(self, n: int, seconds: float = 30) -> list[ConsumerRecord]:
        """Returns everything that was seen once there are n events."""

        async def until() -> None:
            while len(self.seen) < n:
                record = await self._consumer.getone()
                event_id = headers(record)["event_id"]
                if event_id in self.seen:
                    self.duplicates += 1
                else:
                    self.seen[event_id] = record

        await asyncio.wait_for(until(), seconds)
        return list(self.seen.values())


def headers(record: ConsumerRecord) -> dict[str, str]:
    """The headers of a record, as text."""
    return {name: value.decode() for name, value in record.headers}
