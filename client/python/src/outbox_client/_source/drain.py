"""Publishes spilled requests, in order per aggregate."""

from __future__ import annotations

import asyncio
import random
import uuid
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import grpc
from google.protobuf.message import DecodeError

from outbox_client._core.limits import check
from outbox_client._core.status import refused_for_good
from outbox_client._core.wire import Kind
from outbox_client._gen.outbox.v1 import outbox_service_pb2 as pb
from outbox_client._source.driver import Connection
from outbox_client.alarm import Alarm, AlarmKind
from outbox_client.errors import AlreadyDecidedError, CallError, InvalidError, OutboxError

if TYPE_CHECKING:
    from outbox_client._source.database import Database

# The oldest spilled requests: so many of them as fit into a bound of bytes, and at least one.
OLDEST = """
SELECT id::text, spilled, created_at < now() - $3::bigint * interval '1 microsecond'
FROM  (SELECT id, seq, spilled, created_at, sum(octet_length(spilled)) OVER (ORDER BY seq) - octet_length(spilled) AS before
       FROM (SELECT id, seq, spilled, created_at FROM outbox_marker
             WHERE spilled IS NOT NULL AND refused IS NULL ORDER BY seq LIMIT $1::bigint) oldest) measured
WHERE before < $2::bigint
ORDER BY seq"""

DRAINED = "UPDATE outbox_marker SET spilled = NULL WHERE id = ANY ($1::text[]::uuid[])"
REFUSED = "UPDATE outbox_marker SET refused = $2::text WHERE id = $1::text::uuid"

LOCK = 0x6F620001  # "ob", 1: the same key as the Go SDK's
ROWS, BYTES, PARALLEL = 1000, 16 << 20, 256


class TooOldError(OutboxError):
    """Refuses a spilled request that may have been published before anybody can tell."""

    def __init__(self) -> None:
        super().__init__(
            "older than the time for which the platform remembers whether it had this request: it may have been published already"
        )


@dataclass(eq=False)
class Spilled:
    """One spilled request."""

    id: uuid.UUID
    body: bytes
    too_old: bool
    after: list[Spilled] = field(default_factory=list)
    """Earlier requests of the same aggregates."""
    done: asyncio.Event = field(default_factory=asyncio.Event)
    error: OutboxError | None = None
    """Why it was not published."""
    final: bool = False
    """It never will be."""
    stuck: bool = False
    """Not tried: the error is an earlier request's."""


class Drain:
    """Drains one database. One process at a time does it."""

    def __init__(self, database: Database) -> None:
        self._database, self._engine = database, database.engine

    async def run(self) -> None:
        """Drains when there may be something and the platform may be reached."""
        d = self._database
        while True:
            if self._engine.link != "down":
                await d.attempt("draining spilled requests", self.drain_all)
            d.wake.clear()
            woken = asyncio.ensure_future(d.wake.wait())
            changed = asyncio.ensure_future(self._engine.changed.wait())
            try:
                pause = random.uniform(0.9, 1.1) * d.upkeep.drain_interval
                await asyncio.wait((woken, changed), timeout=pause, return_when=asyncio.FIRST_COMPLETED)
            finally:
                woken.cancel()
                changed.cancel()

    async def drain_all(self) -> None:
        """Drains until nothing more can be."""
        if await self._database.must_spill():
            while await self.drain_once():
                pass

    async def drain_once(self) -> bool:
        """Publishes the oldest requests and clears those that the platform has taken. True: it makes sense to go on."""
        d = self._database
        async with d.locked(LOCK) as c:
            if c is None:
                return False
            rows = await self._read(c)
            if not rows:
                return False
            order(rows)
            places = asyncio.Semaphore(PARALLEL)
            await asyncio.gather(*(self._publish(r, places) for r in rows))
            await self._settle(c, rows)
        return self._account(rows)

    async def _read(self, c: Connection) -> list[Spilled]:
        age = int(self._database.upkeep.spill_retention * 1e6)
        return [Spilled(uuid.UUID(r[0]), bytes(r[1]), bool(r[2])) for r in await c.fetch(OLDEST, ROWS, BYTES, age)]

    async def _publish(self, row: Spilled, places: asyncio.Semaphore) -> None:
        """Publishes one request. Requests of different aggregates do not wait for each other."""
        try:
            for before in row.after:
                await before.done.wait()
                if before.error is not None and not before.final:
                    row.error, row.stuck = before.error, True
                    return
            if row.too_old:
                row.error, row.final = TooOldError(), True
                return
            async with places:
                try:
                    await self._engine.do(Kind.PUBLISH, self._request(row.body), self._engine.config.call_timeout)
                except CallError as e:
                    row.error, row.final = e, refused_for_good(e)
        finally:
            row.done.set()

    def _request(self, body: bytes) -> bytes:
        """Turns a spilled Prepare into a Publish."""
        try:
            p = pb.PrepareRequest.FromString(body)
        except DecodeError as e:
            message = "the spilled request cannot be read"
            raise InvalidError(grpc.StatusCode.INVALID_ARGUMENT, message, local=True) from e
        # It may have been spilled before any session had told the limits. Too large a message would end the session.
        check(p.events, self._engine.limits)
        publish = pb.PublishRequest(
            source=p.source, transaction_id=p.transaction_id, events=p.events, kept_by_caller=True
        )
        return publish.SerializeToString()

    async def _settle(self, c: Connection, rows: list[Spilled]) -> None:
        """Writes down what became of the requests."""
        for r in rows:
            if r.final:
                await c.execute(REFUSED, str(r.id), str(r.error))
        drained = [str(r.id) for r in rows if r.error is None]
        if drained:
            await c.execute(DRAINED, drained)

    def _account(self, rows: list[Spilled]) -> bool:
        """Counts, raises alarms, and raises the first failure that is not only another one's consequence."""
        d, stats = self._database, self._engine.stats
        first: Spilled | None = None
        finished = 0
        for r in rows:
            if r.error is None:
                stats.drained += 1
                d.registration.acknowledged(r.id)
            elif r.final:
                stats.refused += 1
                contradiction = isinstance(r.error, AlreadyDecidedError)
                kind = AlarmKind.CONTRADICTION if contradiction else AlarmKind.REFUSED
                self._engine.report(Alarm(kind, r.id, r.error, d.name))
            elif first is None and not r.stuck:
                first = r
            finished += r.error is None or r.final
        if first is not None:
            raise OutboxError(f"publishing the spilled request {first.id}: {first.error}") from first.error
        return finished == len(rows)


def order(rows: list[Spilled]) -> None:
    """Makes every request wait for the earlier ones of its aggregates."""
    last: dict[tuple[str, str], Spilled] = {}
    for r in rows:
        try:
            p = pb.PrepareRequest.FromString(r.body)
        except DecodeError:
            continue  # publishing will say so
        for e in p.events:
            aggregate = (e.aggregate_type, e.aggregate_id)
            before = last.get(aggregate)
            if before is not None and before is not r:
                r.after.append(before)
            last[aggregate] = r
