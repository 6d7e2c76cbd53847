"""A source database that is registered with a client."""

from __future__ import annotations

import asyncio
import contextlib
import random
import threading
import uuid
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import TYPE_CHECKING

from outbox_client._source.cleanup import Cleanup
from outbox_client._source.drain import Drain
from outbox_client._source.driver import Connection, Connector
from outbox_client._source.marker import MUST_SPILL, Identities
from outbox_client._source.verdict import CheckTransaction, Outcome, Verdict, verdicts
from outbox_client.transaction import Mode
from outbox_client.upkeep import Upkeep

if TYPE_CHECKING:
    from outbox_client._core.engine import Engine

MAX_CONNECTIONS = 4  # of upkeep, in one engine


class Registration:
    """What a client knows about a database, in all of its event loops. Safe for concurrent use."""

    def __init__(self, name: str, connector: Connector, upkeep: Upkeep) -> None:
        self.name, self.connector, self.upkeep = name, connector, upkeep
        self._identities = Identities()
        self._lock = threading.Lock()
        self._acknowledged: deque[uuid.UUID] = deque()  # markers to delete, oldest first

    def identities_of(self) -> Identities:
        """Returns the identities of the database that are known."""
        return self._identities

    def acknowledged(self, transaction_id: uuid.UUID) -> None:
        """Remembers a marker to delete."""
        with self._lock:
            if len(self._acknowledged) < self.upkeep.max_acknowledged:
                self._acknowledged.append(transaction_id)

    def due(self, before: uuid.UUID, limit: int) -> list[str]:
        """Takes markers off the list that are older than an id."""
        out: list[str] = []
        with self._lock:
            while self._acknowledged and len(out) < limit and self._acknowledged[0] < before:
                out.append(str(self._acknowledged.popleft()))
        return out


class Database:
    """A registered database in one engine: it answers questions, drains, cleans. Used in the engine's event loop only."""

    def __init__(self, engine: Engine, registration: Registration) -> None:
        self.engine, self.registration = engine, registration
        self.name, self.upkeep = registration.name, registration.upkeep
        self.wake = asyncio.Event()  # something was spilled
        self._idle: list[Connection] = []
        self._places = asyncio.Semaphore(MAX_CONNECTIONS)

    @contextlib.asynccontextmanager
    async def connection(self) -> AsyncIterator[Connection]:
        """Lends a connection of upkeep. One on which anything failed is not used again."""
        async with self._places:
            c = self._idle.pop() if self._idle else await self.registration.connector.connect()
            try:
                yield c
            except BaseException:
                await asyncio.shield(c.close())
                raise
            if self.engine.closed:
                await c.close()
            else:
                self._idle.append(c)

    async def check(self, transactions: Sequence[CheckTransaction]) -> list[Verdict]:
        """Answers the platform's question."""
        if self._idle:
            try:
                async with self.connection() as c:
                    return await verdicts(c, transactions)
            except Exception:
                # The connection may have been broken since it was last used. New ones tell whether the database is there.
                await self._close_idle()
        try:
            async with self.connection() as c:
                return await verdicts(c, transactions)
        except Exception as e:
            return [Verdict(t.id, Outcome.UNKNOWN, f"asking the database: {e}") for t in transactions]

    async def must_spill(self) -> bool:
        """Tells whether spilled requests wait."""
        async with self.connection() as c:
            return bool((await c.fetch(MUST_SPILL))[0][0])

    async def run(self) -> None:
        """Drains, cleans and tidies until it is cancelled."""
        if self.upkeep.mode is not Mode.MARKER:
            await asyncio.Event().wait()  # there is no table to look after
        drain, cleanup = Drain(self), Cleanup(self)
        loops = [
            asyncio.ensure_future(drain.run()),
            asyncio.ensure_future(
                self._every(self.upkeep.marker_retention / 60 + 1, "deleting markers", cleanup.clean_all)
            ),
            asyncio.ensure_future(
                self._every(self.upkeep.janitor_interval, "looking through old markers", cleanup.tidy_all)
            ),
        ]
        try:
            await asyncio.gather(*loops)
        finally:
            for task in loops:
                task.cancel()
            await asyncio.gather(*loops, return_exceptions=True)

    async def _every(self, interval: float, doing: str, step: Callable[[], Awaitable[object]]) -> None:
        """Runs a step again and again, with jitter, the first time after a part of the interval."""
        pause = random.uniform(0, interval)
        while True:
            await asyncio.sleep(pause)
            await self.attempt(doing, step)
            pause = random.uniform(0.9, 1.1) * interval

    async def attempt(self, doing: str, step: Callable[[], Awaitable[object]]) -> None:
        """Runs a step; a failure is logged and tried again later."""
        try:
            await step()
        except Exception as e:
            self.engine.log.warning("%s: %s", doing, e, extra=self.engine.extra(database=self.name, error=str(e)))

    @contextlib.asynccontextmanager
    async def locked(self, lock: int) -> AsyncIterator[Connection | None]:
        """Lends a connection in a transaction that holds one of our advisory locks; None: somebody else holds it.

        A lock of a transaction, not of a session, because poolers give sessions away. The same keys as the Go SDK's.
        """
        async with self.connection() as c, c.transaction():
            rows = await c.fetch(_TRY_LOCK, lock)
            yield c if rows[0][0] else None

    async def close(self) -> None:
        """Closes the connections."""
        await self._close_idle()
        await self.registration.connector.close()

    async def _close_idle(self) -> None:
        while self._idle:
            await self._idle.pop().close()


_TRY_LOCK = """
SELECT pg_try_advisory_xact_lock($1::bigint::int, ('outbox_marker'::regclass::oid::bigint - 2147483648)::int)"""
