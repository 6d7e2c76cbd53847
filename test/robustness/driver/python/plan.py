"""What a transaction does, drawn as ../plan.go draws it."""

from __future__ import annotations

import hashlib
import random
import uuid
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any

from outbox_client import Event, new_id

from journal import Noted

AGGREGATE_TYPE = "thing"

# The profiles: see ../config.go.
PLAIN, GIVE_UP, UNDO, FORGET, LATE = "plain", "give-up", "undo", "forget", "late"
SAVEPOINT, TWO_PHASE, DUPLICATE, SYNC, RACE = "savepoint", "two-phase", "duplicate", "sync", "race"
DIRECT, MISUSE, LONG, PROBE = "direct", "misuse", "long", "probe"

Query = Callable[..., Awaitable[Any]]
"""Runs a statement with its parameters in the transaction and returns its first value."""

LOCK = """
INSERT INTO aggregate (id, version) VALUES ($1, $2)
ON CONFLICT (id) DO UPDATE SET version = aggregate.version + $2 RETURNING version"""

# The truth: what a transaction did, written by that transaction.
TELL = """
INSERT INTO truth (tx, aggregate, version, events)
SELECT $1::uuid, t.* FROM unnest($2::text[], $3::bigint[], $4::int[]) t"""


@dataclass
class Change:
    """What a transaction does to one aggregate."""

    aggregate: str
    events: int
    locked: bool = False
    """By its row; else it is this worker's own."""
    version: int = 0
    """Of the last event."""


def truth(id: uuid.UUID, changes: Sequence[Change]) -> tuple[Any, ...]:
    """The parameters of TELL."""
    return id, [c.aggregate for c in changes], [c.version for c in changes], [c.events for c in changes]


class Plan:
    """Draws for one worker."""

    def __init__(self, process: str, worker: int, seed: int, aggregates: int, hot: int, topics: Sequence[str]) -> None:
        self.random = random.Random(f"{seed}/{worker}")
        self._process, self._worker = process, worker
        self._aggregates, self._hot, self._topics = aggregates, hot, topics
        self._made = 0
        # An aggregate that only this worker writes to, without a lock: order is that of its session.
        self._own = ""
        self._version = 0

    def changes(self, profile: str) -> list[Change]:
        """What a transaction does. Those that stay undecided for long keep to aggregates of their own, as a Publish does, which
        must not overtake what is spilled."""
        if profile in (RACE, TWO_PHASE, LONG, PROBE):
            return [Change(self._fresh(profile), self.random.randint(1, 3))]
        if profile in (DIRECT, MISUSE):
            return [Change(self._fresh(profile), self._count())]
        if self.random.randrange(7) == 0:
            self._own = self._own or self._fresh("own")
            return [Change(self._own, self._count())]
        n = self.random.randrange(20)
        names = {f"a-{self._draw()}" for _ in range(2 + n if n < 3 else 1)}
        return [Change(name, self._count(), locked=True) for name in sorted(names)]  # no two lock in opposite order

    def uncertain(self) -> None:
        """Leaves the worker's own aggregate: nothing but a lock would say in which order a transaction whose outcome is not known
        and the next one happened."""
        self._own, self._version = "", 0

    async def lock(self, query: Query, changes: Sequence[Change]) -> None:
        """Takes the aggregates' row locks and their versions."""
        for c in changes:
            if c.locked:
                c.version = await query(LOCK, c.aggregate, c.events)
            else:
                self.take(c)

    def take(self, c: Change) -> None:
        """Takes the versions of an aggregate that nobody else writes to."""
        if c.aggregate == self._own:
            self._version += c.events
            c.version = self._version
        else:
            c.version = c.events

    def events(self, changes: Sequence[Change], **more: Any) -> tuple[list[Event], list[Noted]]:
        """Makes the events, for the SDK and for the journal."""
        sent, noted = [], []
        for c in changes:
            key, shown = key_of(c.aggregate)
            for version in range(c.version - c.events + 1, c.version + 1):
                headers = self._headers(c.aggregate, version)
                event = Event(
                    topic=self.random.choice(self._topics),
                    aggregate_type=AGGREGATE_TYPE,
                    aggregate_id=c.aggregate,
                    event_type="thing.changed.v1",
                    payload=self._payload(),
                    key=key,
                    content_type="application/octet-stream",
                    headers=headers,
                    event_id=new_id(),
                    **more,
                )
                name = f"{AGGREGATE_TYPE}/{c.aggregate}"
                sent.append(event)
                noted.append(Noted(event.event_id, event.topic, name, version, c.locked, shown, event.payload, headers))
        return sent, noted

    def thinking(self, profile: str) -> float:
        """How long the transaction is held open: some milliseconds mostly, long sometimes."""
        return self.random.uniform(1, 6) if profile == LONG else min(6, 0.002 * self.random.lognormvariate(0, 1))

    def _count(self) -> int:
        """Mostly one event, sometimes many."""
        return min(50, int(1 / (1 - self.random.random()) ** 0.55))

    def _draw(self) -> int:
        """An aggregate; a few are hot."""
        if self.random.randrange(100) >= self._hot:
            return self.random.randrange(self._aggregates)
        return int(self._aggregates ** self.random.random()) - 1

    def _fresh(self, kind: str) -> str:
        self._made += 1
        if kind == "own":
            self._version = 0
        return f"{kind}-{self._process}-{self._worker}-{self._made}"

    def _payload(self) -> bytes:
        """Any bytes; small ones are the rule."""
        n = self.random.randrange(1000)
        if n < 20:
            size = 0
        elif n < 800:
            size = self.random.randrange(20, 320)
        elif n < 985:
            size = self.random.randrange(4000)
        elif n < 999:
            size = self.random.randrange(60_000)
        else:
            size = self.random.randrange(300_000, 600_000)
        return self.random.randbytes(size)

    def _headers(self, aggregate: str, version: int) -> list[tuple[str, bytes]]:
        """They name the event, and are extreme now and then."""
        headers = [("note", f"{aggregate}/{version}".encode())]
        n = self.random.randrange(60)
        if n == 0:  # as many as there may be
            headers += [("many", self.random.randbytes(1)) for _ in range(63)]
        elif n == 1:  # as large as there may be, nearly
            headers.append(("large", bytes(15 << 10)))
        elif n == 2:
            headers += [("\u00fcn\u00efcode", b"\x00\xff"), ("empty", b"")]
        return headers


def key_of(aggregate: str) -> tuple[bytes | None, bytes]:
    """The key of an aggregate's events as it is given, None when its id is the key, and as the record must have it. It is always
    the same, or they would be on several partitions."""
    digest = hashlib.sha256(aggregate.encode()).digest()
    kind = digest[0] % 8
    if kind == 0:
        given = f"key of {aggregate}".encode()
    elif kind == 1:
        given = b"\x00\xff\x80" + digest[:8]
    elif kind == 2:
        given = b""  # an empty key is a key
    else:
        return None, aggregate.encode()
    return given, given
