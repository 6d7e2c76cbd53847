"""Every way of doing a transaction against a real PostgreSQL: commit, roll-back, savepoint, retry loop, error in COMMIT, spill.

Each driver is dressed as a Way, so that all of them are held to the same rules.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any, Protocol

import asyncpg
import grpc
import psycopg
import pytest
from conftest import SourceDatabase
from events import order
from sqlalchemy import create_engine, text
from sqlalchemy import event as sqlalchemy_event
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session

import outbox_client.asyncpg
import outbox_client.psycopg
import outbox_client.sqlalchemy
from outbox_client import (
    AsyncCommitError,
    AsyncOutboxClient,
    DeniedError,
    FenceError,
    Mode,
    NoTransactionError,
    OutboxClient,
    OutcomeUnknownError,
    Reason,
    SavepointError,
    UnavailableError,
    Upkeep,
)
from outbox_client._source.attempt import Attempt
from outbox_client._source.scope import Scope
from outbox_client.testing import FakePlatform, Fault, fault_error
from outbox_client.transaction import State

UPKEEP = Upkeep(drain_interval=0.1)
Publish = Callable[..., Any]


class Tx(Protocol):
    """A transaction that is open."""

    async def execute(self, sql: str) -> None: ...
    def publish(self, *events: Any) -> Any: ...
    def savepoint(self) -> AbstractAsyncContextManager[None]: ...


class Way(Protocol):
    """A driver."""

    def transaction(self, isolation: str = "read committed") -> AbstractAsyncContextManager[Tx]: ...
    async def close(self) -> None: ...


class Asyncpg:
    """asyncpg."""

    def __init__(self, platform: FakePlatform, db: SourceDatabase, **settings: Any) -> None:
        self.dsn = db.dsn
        self.client = AsyncOutboxClient(config(platform))
        self.outbox = outbox_client.asyncpg.Outbox(
            self.client, lambda: asyncpg.connect(db.dsn), **{"upkeep": UPKEEP, **settings}
        )

    @asynccontextmanager
    async def transaction(self, isolation: str = "read committed") -> AsyncIterator[Tx]:
        connection = await asyncpg.connect(self.dsn)
        try:
            async with self.outbox.transaction(connection, isolation=isolation.replace(" ", "_")) as tx:
                tx.execute = connection.execute  # type: ignore[attr-defined]
                yield tx  # type: ignore[misc]
        finally:
            connection.terminate()

    async def close(self) -> None:
        await self.client.close()


class AsyncPsycopg:
    """psycopg's AsyncConnection."""

    def __init__(self, platform: FakePlatform, db: SourceDatabase, **settings: Any) -> None:
        self.dsn = db.dsn
        self.client = AsyncOutboxClient(config(platform))
        self.outbox = outbox_client.psycopg.AsyncOutbox(self.client, db.dsn, **{"upkeep": UPKEEP, **settings})

    @asynccontextmanager
    async def transaction(self, isolation: str = "read committed") -> AsyncIterator[Tx]:
        connection = await psycopg.AsyncConnection.connect(self.dsn)
        await connection.set_isolation_level(psycopg.IsolationLevel[isolation.upper().replace(" ", "_")])
        try:
            async with self.outbox.transaction(connection) as tx:
                tx.execute = connection.execute  # type: ignore[attr-defined]
                yield tx  # type: ignore[misc]
        finally:
            await connection.close()

    async def close(self) -> None:
        await self.client.close()


class Blocking:
    """A driver that blocks, used from a coroutine: the tests are not about concurrency within one transaction."""

    client: OutboxClient

    async def close(self) -> None:
        await asyncio.to_thread(self.client.close)


class BlockingTx:
    def __init__(self, execute: Callable[[str], Any], publish: Publish, savepoint: Callable[[], Any]) -> None:
        self._execute, self.publish, self._savepoint = execute, publish, savepoint

    async def execute(self, sql: str) -> None:
        self._execute(sql)

    @asynccontextmanager
    async def savepoint(self) -> AsyncIterator[None]:
        with self._savepoint():
            yield


class Psycopg(Blocking):
    """psycopg's Connection."""

    def __init__(self, platform: FakePlatform, db: SourceDatabase, **settings: Any) -> None:
        self.dsn = db.dsn
        self.client = OutboxClient(config(platform))
        self.outbox = outbox_client.psycopg.Outbox(self.client, db.dsn, **{"upkeep": UPKEEP, **settings})

    @asynccontextmanager
    async def transaction(self, isolation: str = "read committed") -> AsyncIterator[Tx]:
        with psycopg.connect(self.dsn) as connection:
            connection.isolation_level = psycopg.IsolationLevel[isolation.upper().replace(" ", "_")]
            with self.outbox.transaction(connection) as tx:
                yield BlockingTx(connection.execute, tx.publish, tx.savepoint)


class SQLAlchemy(Blocking):
    """SQLAlchemy's Session."""

    def __init__(self, platform: FakePlatform, db: SourceDatabase, **settings: Any) -> None:
        self.engine = create_engine(db.psycopg_url)
        self.client = OutboxClient(config(platform))
        self.outbox = outbox_client.sqlalchemy.Outbox(self.client, self.engine, **{"upkeep": UPKEEP, **settings})

    @asynccontextmanager
    async def transaction(self, isolation: str = "read committed") -> AsyncIterator[Tx]:
        with Session(self.engine) as session:
            session.connection(execution_options={"isolation_level": isolation.upper()})
            with self.outbox.transaction(session) as tx:
                yield BlockingTx(lambda sql: session.execute(text(sql)), tx.publish, session.begin_nested)

    async def close(self) -> None:
        await super().close()
        self.engine.dispose()


def config(platform: FakePlatform) -> Any:
    return platform.config(prepare_timeout=0.5, call_timeout=1.0, close_timeout=0.2)


@pytest.fixture(params=[Asyncpg, AsyncPsycopg, Psycopg, SQLAlchemy], ids=lambda way: way.__name__)
async def way(request: pytest.FixtureRequest, platform: FakePlatform, db: SourceDatabase) -> AsyncIterator[Way]:
    made = request.param(platform, db)
    yield made
    await made.close()


def upsert(id: str = "1") -> str:
    return f"INSERT INTO orders (id, n) VALUES ('{id}', 1) ON CONFLICT (id) DO UPDATE SET n = orders.n + 1"


async def until(platform: FakePlatform, condition: Callable[[], Any], what: str) -> None:
    await asyncio.to_thread(platform.wait, condition, what)


async def committed(platform: FakePlatform, *ids: str) -> None:
    await until(platform, lambda: [e.aggregate_id for e in platform.published()] == list(ids), f"orders {ids}")


async def test_commit(way: Way, platform: FakePlatform, db: SourceDatabase) -> None:
    async with way.transaction() as tx:
        await tx.execute(upsert())
        ids = tx.publish(order("1"), order("2"))
        assert not platform.calls("prepare")
        if isinstance(tx, Scope):
            assert [e.event_id for e in tx.pending] == ids
    await committed(platform, "1", "2")
    assert len(platform.calls("prepare")) == 1
    assert db.orders() == ["1"]
    assert db.markers() == 1


async def test_no_events_is_an_ordinary_transaction(way: Way, platform: FakePlatform, db: SourceDatabase) -> None:
    async with way.transaction() as tx:
        await tx.execute(upsert())
        assert tx.publish() == []
    assert db.orders() == ["1"]
    with pytest.raises(Exception, match="duplicate key"):
        async with way.transaction() as tx:
            await tx.execute("INSERT INTO late VALUES ('a'), ('a')")
    assert db.markers() == 0


async def test_rollback(way: Way, platform: FakePlatform, db: SourceDatabase) -> None:
    with pytest.raises(ZeroDivisionError):
        async with way.transaction() as tx:
            await tx.execute(upsert())
            tx.publish(order())
            raise ZeroDivisionError
    assert db.orders() == []
    assert not platform.calls("prepare")


async def test_savepoint(way: Way, platform: FakePlatform, db: SourceDatabase) -> None:
    async with way.transaction() as tx:
        await tx.execute(upsert("1"))
        tx.publish(order("1"))
        with pytest.raises(ZeroDivisionError):
            async with tx.savepoint():
                await tx.execute(upsert("2"))
                tx.publish(order("2"))
                raise ZeroDivisionError
        async with tx.savepoint():
            await tx.execute(upsert("3"))
            tx.publish(order("3"))
    await committed(platform, "1", "3")
    assert db.orders() == ["1", "3"]


async def test_prepare_in_a_savepoint_is_refused(way: Way, platform: FakePlatform, db: SourceDatabase) -> None:
    with pytest.raises(SavepointError):
        async with way.transaction() as tx:
            await tx.execute(upsert("1"))
            await tx.execute("SAVEPOINT mine")
            tx.publish(order("1"))
    assert db.orders() == []
    assert not platform.calls("prepare")


async def test_asynchronous_commit_is_refused(way: Way, platform: FakePlatform, db: SourceDatabase) -> None:
    with pytest.raises(AsyncCommitError):
        async with way.transaction() as tx:
            await tx.execute("SET LOCAL synchronous_commit = off")
            tx.publish(order("1"))
    assert not platform.calls("prepare")


async def test_retry_loop(way: Way, platform: FakePlatform, db: SourceDatabase) -> None:
    """Another transaction gets in between, each time but the last: SQLSTATE 40001 in the block."""
    db.execute("INSERT INTO orders (id) VALUES ('1')")
    attempts = 0
    while True:
        attempts += 1
        try:
            async with way.transaction("repeatable read") as tx:
                await tx.execute("SELECT n FROM orders")
                if attempts < 3:
                    await asyncio.to_thread(db.execute, upsert())
                tx.publish(order())
                await tx.execute(upsert())
            break
        except Exception as e:
            assert "could not serialize" in str(e), e
    assert attempts == 3
    await committed(platform, "1")
    assert db.value("SELECT n FROM orders") == 3


async def test_retry_after_an_error_in_commit_has_a_new_id(
    way: Way, platform: FakePlatform, db: SourceDatabase
) -> None:
    for values in ("('a'), ('a')", "('a')"):
        try:
            async with way.transaction() as tx:
                await tx.execute(f"INSERT INTO late VALUES {values}")
                tx.publish(order())
        except Exception as e:
            assert "duplicate key" in str(e), e
    await until(
        platform,
        lambda: [t.state for t in platform.transactions()] == [State.ABORTED, State.COMMITTED],
        "both decisions",
    )


async def test_unknown_outcome(way: Way, platform: FakePlatform, db: SourceDatabase) -> None:
    """The connection breaks between Prepare and COMMIT: the SDK cannot know that COMMIT did not arrive."""

    def cut(call: Any) -> Fault | None:
        if call.name == "prepare":
            db.terminate_others()
        return None

    platform.fault = cut
    with pytest.raises(OutcomeUnknownError) as caught:
        async with way.transaction() as tx:
            await tx.execute(upsert())
            tx.publish(order())
    [stored] = platform.transactions()
    assert caught.value.transaction_id == stored.id
    assert caught.value.__cause__ is not None
    answer = await asyncio.to_thread(platform.ask, stored.id)
    assert answer.outcome == 2, answer
    assert not platform.calls("commit")
    assert not platform.calls("abort")


async def test_refused(way: Way, platform: FakePlatform, db: SourceDatabase) -> None:
    refusal = fault_error(grpc.StatusCode.PERMISSION_DENIED, Reason.TOPIC_DENIED)
    platform.fault = lambda call: Fault(error=refusal) if call.name == "prepare" else None
    with pytest.raises(DeniedError):
        async with way.transaction() as tx:
            await tx.execute(upsert())
            tx.publish(order())
    assert db.orders() == []
    assert db.markers() == 0


async def test_spill(way: Way, platform: FakePlatform, db: SourceDatabase) -> None:
    await asyncio.to_thread(platform.stop)
    for id in ("1", "2"):
        async with way.transaction() as tx:
            await tx.execute(upsert(id))
            tx.publish(order(id))
    assert db.spilled() == 2
    platform.start()
    await committed(platform, "1", "2")
    await until(platform, lambda: db.spilled() == 0, "cleared rows")
    assert all(call.kept for call in platform.calls("publish")), "the platform is told that what is spilled is kept"


async def test_must_spill_under_repeatable_read(way: Way, platform: FakePlatform, db: SourceDatabase) -> None:
    platform.fault = lambda call: Fault(silent=call.name == "publish")
    async with way.transaction("repeatable read") as tx:
        await tx.execute(upsert())
        db.spill(order("other"))
        tx.publish(order())
    assert db.spilled() == 2
    assert not platform.calls("prepare")


@pytest.mark.parametrize("make", [Asyncpg, AsyncPsycopg, Psycopg, SQLAlchemy])
async def test_spill_not_allowed(make: Any, platform: FakePlatform, db: SourceDatabase) -> None:
    way = make(platform, db, spill=False)
    platform.fault = lambda call: Fault(lose_answer=call.name == "prepare")
    with pytest.raises(UnavailableError):
        async with way.transaction() as tx:
            await tx.execute(upsert())
            tx.publish(order())
    await until(platform, lambda: [t.state for t in platform.transactions()] == [State.ABORTED], "the abort")
    assert db.orders() == []
    await way.close()


async def test_a_transaction_that_is_open_already_is_refused(platform: FakePlatform, db: SourceDatabase) -> None:
    async with AsyncOutboxClient(config(platform)) as client:
        connection = await asyncpg.connect(db.dsn)
        async with connection.transaction():
            with pytest.raises(NoTransactionError):
                async with outbox_client.asyncpg.Outbox(client).transaction(connection):
                    pass
        await connection.close()
        async with await psycopg.AsyncConnection.connect(db.dsn) as c:
            await c.execute("SELECT 1")
            with pytest.raises(NoTransactionError):
                async with outbox_client.psycopg.AsyncOutbox(client).transaction(c):
                    pass
    with OutboxClient(config(platform)) as blocking, psycopg.connect(db.dsn) as b:
        b.execute("SELECT 1")
        with pytest.raises(NoTransactionError), outbox_client.psycopg.Outbox(blocking).transaction(b):
            pass


async def test_a_block_that_raises_on_a_broken_connection(way: Way, platform: FakePlatform, db: SourceDatabase) -> None:
    with pytest.raises((ZeroDivisionError, DBAPIError, psycopg.Error)):
        async with way.transaction() as tx:
            tx.publish(order())
            db.terminate_others()
            raise ZeroDivisionError
    assert not platform.calls("prepare")


@pytest.mark.parametrize("make", [Asyncpg, AsyncPsycopg, Psycopg, SQLAlchemy])
async def test_without_a_marker_table(make: Any, platform: FakePlatform, db: SourceDatabase) -> None:
    """Mode XID_FENCED: the transaction's own id decides, made durable before Prepare."""
    db.execute("DROP TABLE outbox_marker")
    way = make(platform, db, upkeep=Upkeep(mode=Mode.XID_FENCED))
    async with way.transaction("repeatable read") as tx:
        await tx.execute(upsert())
        tx.publish(order("1"))
    await committed(platform, "1")
    platform.fault = lambda call: Fault(silent=call.name == "commit")
    async with way.transaction() as tx:
        await tx.execute(upsert("2"))
        tx.publish(order("2"))
    assert (await asyncio.to_thread(platform.ask, platform.transactions()[1].id)).outcome == 1
    for statement, error in (
        ("SET LOCAL synchronous_commit = off", AsyncCommitError),
        ("SAVEPOINT mine", SavepointError),
    ):
        with pytest.raises(error):
            async with way.transaction() as tx:
                await tx.execute(statement)
                tx.publish(order("3"))
    platform.fault = lambda call: Fault(silent=call.name == "prepare")
    with pytest.raises(UnavailableError):
        async with way.transaction() as tx:
            await tx.execute(upsert("4"))
            tx.publish(order("4"))
    assert db.orders() == ["1", "2"]
    await way.close()


async def test_what_a_server_says_that_cannot_raise_the_fence(platform: FakePlatform, db: SourceDatabase) -> None:
    """PostgreSQL 16 and older know no flush argument. The connection breaking is another matter."""
    client = AsyncOutboxClient(config(platform))
    outbox_client.asyncpg.Outbox(client, lambda: asyncpg.connect(db.dsn), upkeep=Upkeep(mode=Mode.XID_FENCED))
    for answer, error in ((asyncpg.UndefinedFunctionError("no function"), FenceError), (OSError("cut"), OSError)):
        steps = Attempt(client, "default", True).prepare([])
        next(steps)
        with pytest.raises(error):
            steps.throw(answer)


async def test_hooks_of_a_blocking_session(platform: FakePlatform, db: SourceDatabase) -> None:
    way = SQLAlchemy(platform, db)
    with Session(way.engine) as session:
        session.execute(text(upsert("1")))
        way.outbox.collect(session, order("1"))
        session.commit()
        session.execute(text(upsert("2")))
        way.outbox.collect(session, order("2"))
        session.rollback()
        session.execute(text(upsert("3")))
        way.outbox.collect(session, order("3"))
        session.commit()
        with way.outbox.transaction(session) as tx:
            tx.publish(order("4"))
    await committed(platform, "1", "3", "4")
    assert len(platform.calls("prepare")) == 3
    await way.close()


async def test_a_blocking_commit_that_cannot_be_rolled_back(platform: FakePlatform, db: SourceDatabase) -> None:
    """A refused event whose connection is gone when it should be rolled back."""
    way = SQLAlchemy(platform, db)
    refusal = fault_error(grpc.StatusCode.PERMISSION_DENIED, Reason.TOPIC_DENIED)

    def fault(call: Any) -> Fault | None:
        if call.name == "prepare":
            db.terminate_others()
            return Fault(error=refusal)
        return None

    platform.fault = fault
    with pytest.raises((DeniedError, DBAPIError)):
        async with way.transaction() as tx:
            await tx.execute(upsert())
            tx.publish(order())
    assert db.orders() == []
    assert sqlalchemy_event
    await way.close()
