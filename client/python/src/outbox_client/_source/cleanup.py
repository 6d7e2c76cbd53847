"""Deletes markers that are needed no more."""

from __future__ import annotations

import asyncio
import datetime
import time
import uuid
from typing import TYPE_CHECKING

from outbox_client._core.wire import Kind
from outbox_client._gen.outbox.v1 import outbox_service_pb2 as pb
from outbox_client._gen.outbox.v1 import transaction_pb2
from outbox_client._source.driver import Connection
from outbox_client.alarm import Alarm, AlarmKind
from outbox_client.errors import CallError, OutboxError, UnknownTransactionError
from outbox_client.ids import first_id, id_time

if TYPE_CHECKING:
    from outbox_client._source.database import Database

# Deletes markers that are old enough by the database's clock and carry no spilled request.
DELETE = """
DELETE FROM outbox_marker
WHERE id = ANY ($1::text[]::uuid[]) AND spilled IS NULL AND created_at <= now() - $2::bigint * interval '1 microsecond'"""

# Reads old markers by id. The bound on the id keeps it from reading the young ones.
OLD = """
SELECT id::text FROM outbox_marker
WHERE id > $1::text::uuid AND id < $2::text::uuid AND spilled IS NULL AND created_at <= now() - $3::bigint * interval '1 microsecond'
ORDER BY id LIMIT $4::bigint"""

LOCK = 0x6F620002  # "ob", 2: the same key as the Go SDK's
CLEAN_ROWS, JANITOR_ROWS, JANITOR_PARALLEL = 1000, 500, 16

# How much older than the retention a marker must be for the janitor: the process that wrote it deletes it for less.
JANITOR_GRACE = 300.0


class Cleanup:
    """Cleans up in one database."""

    def __init__(self, database: Database) -> None:
        self._database, self._engine = database, database.engine

    async def clean_all(self) -> None:
        """Deletes all markers whose Commit was acknowledged and whose retention is over. The janitor finds what a failure leaves."""
        while await self.clean_once() == CLEAN_ROWS:
            pass

    async def clean_once(self) -> int:
        """Deletes a batch of them, and returns how many it took off the list."""
        retention = self._database.upkeep.marker_retention
        ids = self._database.registration.due(first_id(time.time() - retention), CLEAN_ROWS)
        if ids:
            async with self._database.connection() as c:
                self._engine.stats.markers_deleted += await c.execute(DELETE, ids, int(retention * 1e6))
        return len(ids)

    async def tidy_all(self) -> None:
        """Looks through old markers."""
        after: uuid.UUID | None = uuid.UUID(int=0)
        while after is not None and self._engine.link != "down":
            after = await self.tidy_once(after)

    async def tidy_once(self, after: uuid.UUID) -> uuid.UUID | None:
        """Asks the platform about a batch of old markers behind an id and deletes those it has decided, or has forgotten in due time.

        One process at a time does it. Returns where to go on; None: nowhere.
        """
        age = self._database.upkeep.marker_retention + JANITOR_GRACE
        async with self._database.locked(LOCK) as c:
            if c is None:
                return None
            ids = await self._old(c, after, age)
            done = [str(i) for i in await self._ask(ids)]
            self._engine.stats.markers_deleted += await c.execute(DELETE, done, int(age * 1e6))
        return ids[-1] if len(ids) == JANITOR_ROWS else None

    async def _old(self, c: Connection, after: uuid.UUID, age: float) -> list[uuid.UUID]:
        rows = await c.fetch(OLD, str(after), str(first_id(time.time() - age)), int(age * 1e6), JANITOR_ROWS)
        return [uuid.UUID(r[0]) for r in rows]

    async def _ask(self, ids: list[uuid.UUID]) -> list[uuid.UUID]:
        """Returns the markers that may go. Those asked about in vain stay."""
        places = asyncio.Semaphore(JANITOR_PARALLEL)
        failures: list[CallError] = []

        async def gone(transaction_id: uuid.UUID) -> bool:
            async with places:
                try:
                    return await self._finished(transaction_id)
                except CallError as e:
                    failures.append(e)
                    return False

        answers = await asyncio.gather(*(gone(i) for i in ids))
        if failures:
            self._engine.log.warning(
                "asking about old markers: %s", failures[0], extra=self._engine.extra(database=self._database.name)
            )
        return [i for i, yes in zip(ids, answers, strict=True) if yes]

    async def _finished(self, transaction_id: uuid.UUID) -> bool:
        """Tells whether the marker of an old committed transaction is needed no more."""
        try:
            state = (await self._engine.get_transaction(transaction_id)).transaction.state
        except UnknownTransactionError as e:
            return self._forgotten(transaction_id, e)
        if state == transaction_pb2.Transaction.STATE_COMMITTED:
            return True
        if state == transaction_pb2.Transaction.STATE_ABORTED:
            why = OutboxError("the marker is there, and the platform holds the transaction for aborted")
            self._alarm(AlarmKind.CONTRADICTION, transaction_id, why)
            return False
        commit = pb.CommitRequest(source=self._engine.config.source, transaction_id=transaction_id.bytes)
        self._engine.decide_later(
            Kind.COMMIT, transaction_id, commit.SerializeToString(), None
        )  # the marker is proof enough
        return False

    def _forgotten(self, transaction_id: uuid.UUID, error: UnknownTransactionError) -> bool:
        """Tells whether the platform does not know a transaction because it is past retention. A younger one was lost."""
        horizon = parse_time(error.metadata.get("retention_horizon", ""))
        made = id_time(transaction_id)
        if horizon is not None and made is not None and made < horizon:
            return True
        why = OutboxError(f"the platform does not know a committed transaction that it should know: {error}")
        self._alarm(AlarmKind.LOST, transaction_id, why)
        return False

    def _alarm(self, kind: AlarmKind, transaction_id: uuid.UUID, error: OutboxError) -> None:
        self._engine.report(Alarm(kind, transaction_id, error, self._database.name))


def parse_time(text: str) -> datetime.datetime | None:
    """Reads an RFC 3339 time in UTC with any number of decimals; None: it is not one."""
    whole, _, fraction = text.removesuffix("Z").partition(".")
    try:
        at = datetime.datetime.fromisoformat(whole).replace(tzinfo=datetime.timezone.utc)
    except ValueError:
        return None
    digits = fraction[:6]
    return at.replace(microsecond=int(digits.ljust(6, "0"))) if digits.isdigit() else at
