"""asyncpg: events that share the fate of a connection's transaction (the extra "asyncpg").

    outbox = Outbox(client, lambda: asyncpg.connect(dsn))

    async with pool.acquire() as connection, outbox.transaction(connection) as tx:
        await connection.execute("UPDATE orders SET state = 'paid' WHERE id = $1", id)
        tx.publish(Event(...))

The block's end writes the marker, sends one Prepare, and commits; an exception rolls back. After COMMIT nothing of ours is awaited or
raised. Take the aggregate's row lock in the block, as the UPDATE does here: the order of these locks is the order in which the events
of the aggregate are published.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

import asyncpg

from outbox_client._source import driver
from outbox_client._source.attempt import Attempt, run_async
from outbox_client._source.collected import Collected
from outbox_client._source.outcome import certainly_rolled_back
from outbox_client._source.scope import Scope
from outbox_client.aio import AsyncOutboxClient
from outbox_client.config import DEFAULT_DATABASE
from outbox_client.errors import NoTransactionError, OutcomeUnknownError
from outbox_client.upkeep import Upkeep

Connect = Callable[[], Awaitable["asyncpg.Connection[Any]"]]


class Transaction(Scope):
    """What outbox.transaction(connection) yields."""

    def __init__(self, connection: Any, collected: Collected) -> None:
        super().__init__(collected)
        self._connection = connection

    @asynccontextmanager
    async def savepoint(self) -> AsyncIterator[None]:
        """Runs a block in a savepoint. An exception rolls it back, with the events that it published, and is passed on.

        Use it and not connection.transaction(): that leaves its savepoint in the database when it is rolled back, and events are
        refused in savepoints (SavepointError).
        """
        mark, name = self._collected.mark(), self._savepoint_name()
        await self._connection.execute(f"SAVEPOINT {name}")
        try:
            yield
        except BaseException:
            self._collected.back_to(mark)
            await self._connection.execute(f"ROLLBACK TO SAVEPOINT {name}; RELEASE SAVEPOINT {name}")
            raise
        await self._connection.execute(f"RELEASE SAVEPOINT {name}")


class Outbox:
    """Publishes events of asyncpg's transactions. Make one per database, anywhere; it does no I/O. Safe for concurrent use."""

    def __init__(
        self,
        client: AsyncOutboxClient,
        connect: Connect | None = None,
        *,
        database: str = DEFAULT_DATABASE,
        spill: bool = True,
        upkeep: Upkeep | None = None,
    ) -> None:
        """Makes one.

        connect: opens a connection to the primary, with the search_path of the service's transactions. It registers the database with
        the client, which then answers the platform's questions, publishes spilled requests and deletes old markers, over at most four
        connections of its own. None: it is registered elsewhere, or not at all (then nothing is spilled).
        spill: whether the request may be stored in the database while the platform is away. False: the transaction fails instead.
        """
        self.client, self.database, self.spill = client, database, spill
        if connect is not None:
            client.register_database(_Connector(connect), name=database, upkeep=upkeep)

    @asynccontextmanager
    async def transaction(self, connection: Any, **options: Any) -> AsyncIterator[Transaction]:
        """Runs a block in a transaction of an asyncpg.Connection (also one of a pool) and publishes what it collected.

        options: those of asyncpg's Connection.transaction: isolation, readonly, deferrable. REPEATABLE READ and SERIALIZABLE need a
        registered database. Retry loops around it are fine: each attempt gets an id of its own. Raises, rolled back: InvalidError,
        DeniedError, UnavailableError, TransactionError, the database's errors; and OutcomeUnknownError when COMMIT was sent and not
        answered.
        """
        if connection.is_in_transaction():
            raise NoTransactionError(
                "the connection is in a transaction already, which may be rolled back without our knowledge"
            )
        collected = Collected.none(self.client)
        transaction = connection.transaction(**options)
        await transaction.start()
        attempt = None
        try:
            yield Transaction(connection, collected)
            if collected.protos:
                attempt = Attempt(self.client, self.database, self.spill)
                await run_async(attempt.prepare(collected.protos), self._stepper(connection))
        except BaseException:
            await _roll_back(transaction, attempt)
            raise
        try:
            await transaction.commit()
        except BaseException as e:
            if certainly_rolled_back(e):
                if attempt is not None:
                    attempt.rolled_back()
                raise
            raise OutcomeUnknownError(attempt.id if attempt else None, e) from e
        if attempt is not None:
            attempt.committed()

    def _stepper(self, connection: Any) -> Callable[[driver.Step], Awaitable[Any]]:
        """Does the steps of the protocol on the caller's connection."""

        async def step(wanted: driver.Step) -> Any:
            if isinstance(wanted, driver.Fetch):
                return await connection.fetch(wanted.sql, *wanted.args)
            if isinstance(wanted, driver.Execute):
                return _affected(await connection.execute(wanted.sql, *wanted.args))
            if isinstance(wanted, driver.MustSpill):
                return await self.client.must_spill(wanted.database)
            return await self.client.prepare_encoded(wanted.body, wanted.fail_fast)

        return step


async def _roll_back(transaction: Any, attempt: Attempt | None) -> None:
    """Rolls back. COMMIT was not sent, so the transaction cannot commit any more, whatever becomes of the connection."""
    try:
        await transaction.rollback()
    except Exception:
        pass  # the connection is gone; what ends the block is said already
    finally:
        if attempt is not None:
            attempt.rolled_back()


def _affected(tag: str) -> int:
    """Reads the number of rows of a command tag such as "UPDATE 1"."""
    last = tag.rpartition(" ")[2]
    return int(last) if last.isdigit() else 0


class _Connector:
    def __init__(self, connect: Connect) -> None:
        self._connect = connect

    async def connect(self) -> _Connection:
        return _Connection(await self._connect())

    async def close(self) -> None:
        pass


class _Connection:
    def __init__(self, c: Any) -> None:
        self._c = c

    async def fetch(self, sql: str, *args: Any) -> Sequence[driver.Row]:
        rows: Sequence[driver.Row] = await self._c.fetch(sql, *args)
        return rows

    async def execute(self, sql: str, *args: Any) -> int:
        return _affected(await self._c.execute(sql, *args))

    @asynccontextmanager
    async def transaction(self) -> AsyncIterator[None]:
        async with self._c.transaction(isolation="read_committed"):
            yield

    async def close(self) -> None:
        self._c.terminate()
