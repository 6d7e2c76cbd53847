"""psycopg 3: events that share the fate of a connection's transaction (the extra "psycopg").

    outbox = Outbox(client, dsn)                              # or AsyncOutbox(client, dsn)

    with pool.connection() as connection, outbox.transaction(connection) as tx:
        connection.execute("UPDATE orders SET state = 'paid' WHERE id = %s", [id])
        tx.publish(Event(...))

The block's end writes the marker, sends one Prepare, and commits; an exception rolls back. After COMMIT nothing of ours is awaited or
raised. Take the aggregate's row lock in the block, as the UPDATE does here: the order of these locks is the order in which the events
of the aggregate are published.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from typing import Any

import psycopg
from psycopg.pq import TransactionStatus

from outbox_client._source import driver
from outbox_client._source.attempt import Attempt, run, run_async
from outbox_client._source.collected import Collected
from outbox_client._source.outcome import certainly_rolled_back
from outbox_client._source.scope import Scope
from outbox_client.aio import AsyncOutboxClient
from outbox_client.client import OutboxClient
from outbox_client.config import DEFAULT_DATABASE
from outbox_client.errors import NoTransactionError, OutcomeUnknownError
from outbox_client.upkeep import Upkeep


class Transaction(Scope):
    """What outbox.transaction(connection) yields."""

    def __init__(self, connection: psycopg.Connection[Any], collected: Collected) -> None:
        super().__init__(collected)
        self._connection = connection

    @contextmanager
    def savepoint(self) -> Iterator[None]:
        """Runs a block in a savepoint. An exception rolls it back, with the events that it published, and is passed on.

        Events published in a block of connection.transaction() are not dropped with it: use this one.
        """
        mark = self._collected.mark()
        try:
            with self._connection.transaction():
                yield
        except BaseException:
            self._collected.back_to(mark)
            raise


class AsyncTransaction(Scope):
    """What outbox.transaction(connection) of an AsyncOutbox yields."""

    def __init__(self, connection: psycopg.AsyncConnection[Any], collected: Collected) -> None:
        super().__init__(collected)
        self._connection = connection

    @asynccontextmanager
    async def savepoint(self) -> AsyncIterator[None]:
        """See Transaction.savepoint."""
        mark = self._collected.mark()
        try:
            async with self._connection.transaction():
                yield
        except BaseException:
            self._collected.back_to(mark)
            raise


class Outbox:
    """Publishes events of psycopg's transactions. Make one per database, anywhere; it does no I/O. Safe for concurrent use."""

    def __init__(
        self,
        client: OutboxClient,
        conninfo: str | None = None,
        *,
        database: str = DEFAULT_DATABASE,
        spill: bool = True,
        upkeep: Upkeep | None = None,
        **connect: Any,
    ) -> None:
        """Makes one.

        conninfo, connect: how psycopg connects to the primary, with the search_path of the service's transactions. It registers the
        database with the client, which then answers the platform's questions, publishes spilled requests and deletes old markers,
        over at most four connections of its own. None: it is registered elsewhere, or not at all (then nothing is spilled).
        spill: whether the request may be stored in the database while the platform is away. False: the transaction fails instead.
        """
        self.client, self.database, self.spill = client, database, spill
        if conninfo is not None:
            client.register_database(Connector(conninfo, connect), name=database, upkeep=upkeep)

    @contextmanager
    def transaction(self, connection: psycopg.Connection[Any]) -> Iterator[Transaction]:
        """Runs a block in a transaction of a connection and publishes what it collected.

        The connection's isolation_level is used; REPEATABLE READ and SERIALIZABLE need a registered database. Retry loops around it are
        fine: each attempt gets an id of its own. Raises, rolled back: InvalidError, DeniedError, UnavailableError,
        TransactionError, the database's errors; and OutcomeUnknownError when COMMIT was sent and not answered.
        """
        _refuse_nested(connection.info.transaction_status)
        collected = Collected.none(self.client)
        attempt: Attempt | None = None
        commit_sent = False
        try:
            with connection.transaction():
                yield Transaction(connection, collected)
                if collected.protos:
                    attempt = Attempt(self.client, self.database, self.spill)
                    run(attempt.prepare(collected.protos), self._stepper(connection))
                commit_sent = True
        except BaseException as e:
            _failed(attempt, commit_sent, e)
            raise
        if attempt is not None:
            attempt.committed()

    def _stepper(self, connection: psycopg.Connection[Any]) -> Callable[[driver.Step], Any]:
        """Does the steps of the protocol on the caller's connection."""

        def step(wanted: driver.Step) -> Any:
            if isinstance(wanted, driver.Fetch):
                with connection.cursor(row_factory=psycopg.rows.tuple_row) as cursor:
                    return cursor.execute(*statement(wanted.sql, wanted.args)).fetchall()
            if isinstance(wanted, driver.Execute):
                return connection.execute(*statement(wanted.sql, wanted.args)).rowcount
            if isinstance(wanted, driver.MustSpill):
                return self.client.must_spill(wanted.database)
            return self.client.prepare_encoded(wanted.body, wanted.fail_fast)

        return step


class AsyncOutbox:
    """The same for psycopg.AsyncConnection and AsyncOutboxClient."""

    def __init__(
        self,
        client: AsyncOutboxClient,
        conninfo: str | None = None,
        *,
        database: str = DEFAULT_DATABASE,
        spill: bool = True,
        upkeep: Upkeep | None = None,
        **connect: Any,
    ) -> None:
        """See Outbox."""
        self.client, self.database, self.spill = client, database, spill
        if conninfo is not None:
            client.register_database(Connector(conninfo, connect), name=database, upkeep=upkeep)

    @asynccontextmanager
    async def transaction(self, connection: psycopg.AsyncConnection[Any]) -> AsyncIterator[AsyncTransaction]:
        """See Outbox.transaction."""
        _refuse_nested(connection.info.transaction_status)
        collected = Collected.none(self.client)
        attempt: Attempt | None = None
        commit_sent = False
        try:
            async with connection.transaction():
                yield AsyncTransaction(connection, collected)
                if collected.protos:
                    attempt = Attempt(self.client, self.database, self.spill)
                    await run_async(attempt.prepare(collected.protos), self._stepper(connection))
                commit_sent = True
        except BaseException as e:
            _failed(attempt, commit_sent, e)
            raise
        if attempt is not None:
            attempt.committed()

    def _stepper(self, connection: psycopg.AsyncConnection[Any]) -> Callable[[driver.Step], Awaitable[Any]]:
        async def step(wanted: driver.Step) -> Any:
            if isinstance(wanted, driver.Fetch):
                async with connection.cursor(row_factory=psycopg.rows.tuple_row) as cursor:
                    await cursor.execute(*statement(wanted.sql, wanted.args))
                    return await cursor.fetchall()
            if isinstance(wanted, driver.Execute):
                return (await connection.execute(*statement(wanted.sql, wanted.args))).rowcount
            if isinstance(wanted, driver.MustSpill):
                return await self.client.must_spill(wanted.database)
            return await self.client.prepare_encoded(wanted.body, wanted.fail_fast)

        return step


def _refuse_nested(status: TransactionStatus) -> None:
    if status != TransactionStatus.IDLE:
        raise NoTransactionError(
            "the connection is in a transaction already, which may be rolled back without our knowledge"
        )


def _failed(attempt: Attempt | None, commit_sent: bool, error: BaseException) -> None:
    """Tells the platform of a roll-back, or raises OutcomeUnknownError."""
    if commit_sent and not certainly_rolled_back(error):
        raise OutcomeUnknownError(attempt.id if attempt else None, error) from error
    # Before COMMIT was sent the transaction cannot commit any more, whatever becomes of the connection.
    if attempt is not None:
        attempt.rolled_back()


def statement(sql: str, args: Sequence[Any]) -> tuple[bytes, dict[str, Any]]:
    """Turns a statement of the protocol into psycopg's, with its parameters."""
    return driver.named(sql, "%(p{})s").encode(), driver.names(args)


class Connector:
    """Connects with psycopg.AsyncConnection, also for services that do not use asyncio."""

    def __init__(self, conninfo: str, settings: dict[str, Any]) -> None:
        self._conninfo, self._settings = conninfo, settings

    async def connect(self) -> _Connection:
        """See driver.Connector."""
        settings = {**self._settings, "autocommit": True, "row_factory": psycopg.rows.tuple_row}
        return _Connection(await psycopg.AsyncConnection.connect(self._conninfo, **settings))

    async def close(self) -> None:
        """See driver.Connector."""


class _Connection:
    def __init__(self, c: psycopg.AsyncConnection[Any]) -> None:
        self._c = c

    async def fetch(self, sql: str, *args: Any) -> Sequence[driver.Row]:
        return await (await self._c.execute(*statement(sql, args))).fetchall()

    async def execute(self, sql: str, *args: Any) -> int:
        return (await self._c.execute(*statement(sql, args))).rowcount

    @asynccontextmanager
    async def transaction(self) -> AsyncIterator[None]:
        await self._c.set_isolation_level(psycopg.IsolationLevel.READ_COMMITTED)
        async with self._c.transaction():
            yield

    async def close(self) -> None:
        await self._c.close()
