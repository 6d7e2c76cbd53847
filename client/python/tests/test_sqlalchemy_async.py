"""AsyncSession against a real PostgreSQL: commit, roll-back, savepoints, retries, errors in COMMIT, spilling."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
from conftest import SourceDatabase
from events import order
from sqlalchemy import event, text
from sqlalchemy.exc import DBAPIError, IntegrityError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, AsyncSession, create_async_engine

from outbox_client import (
    AsyncCommitError,
    AsyncOutboxClient,
    DeniedError,
    InvalidError,
    MustSpillError,
    NoTransactionError,
    OutcomeUnknownError,
    Reason,
    SavepointError,
    TransactionError,
    UnavailableError,
    Upkeep,
)
from outbox_client.sqlalchemy import Outbox
from outbox_client.testing import Call, FakePlatform, Fault, fault_error
from outbox_client.transaction import State

UPSERT = "INSERT INTO orders (id, n) VALUES (:id, 1) ON CONFLICT (id) DO UPDATE SET n = orders.n + 1"


async def place(session: AsyncSession | AsyncConnection, id: str = "1") -> None:
    await session.execute(text(UPSERT), {"id": id})


@pytest.fixture
async def engine(db: SourceDatabase) -> AsyncIterator[AsyncEngine]:
    engine = create_async_engine(db.asyncpg_url)
    yield engine
    await engine.dispose()


@pytest.fixture
async def client(platform: FakePlatform) -> AsyncIterator[AsyncOutboxClient]:
    async with AsyncOutboxClient(platform.config(prepare_timeout=0.5, call_timeout=1.0)) as client:
        await client.connect()
        yield client


@pytest.fixture
def outbox(client: AsyncOutboxClient, engine: AsyncEngine) -> Outbox[AsyncOutboxClient]:
    return Outbox(client, engine, upkeep=Upkeep(drain_interval=0.1))


@pytest.fixture
async def session(engine: AsyncEngine) -> AsyncIterator[AsyncSession]:
    async with AsyncSession(engine) as session:
        yield session


async def until(platform: FakePlatform, condition: Any, what: str) -> None:
    await asyncio.to_thread(platform.wait, condition, what)


async def committed(platform: FakePlatform, *ids: str) -> None:
    """Waits until exactly the events of these orders are published, in this order."""
    await until(platform, lambda: [e.aggregate_id for e in platform.published()] == list(ids), f"orders {ids}")


async def test_commit_publishes(
    outbox: Outbox[AsyncOutboxClient], session: AsyncSession, platform: FakePlatform, db: SourceDatabase
) -> None:
    async with outbox.transaction(session) as tx:
        await place(session)
        ids = tx.publish(order("1"), order("1", "paid"))
        assert not platform.transactions()
    await committed(platform, "1", "1")
    [stored] = platform.transactions()
    assert [e.event_id for e in stored.events] == ids
    assert stored.database_transaction is not None
    assert stored.database_transaction.system_identifier == db.value(
        "SELECT system_identifier FROM pg_control_system()"
    )
    assert stored.database_transaction.marker_oid == db.value("SELECT 'outbox_marker'::regclass::oid")
    assert db.markers() == 1
    assert len(platform.calls("prepare")) == 1


async def test_prepare_comes_before_commit_and_commit_after(
    outbox: Outbox[AsyncOutboxClient], session: AsyncSession, platform: FakePlatform, db: SourceDatabase
) -> None:
    seen = []
    platform.fault = lambda call: seen.append((call.name, db.orders()))
    async with outbox.transaction(session) as tx:
        await place(session)
        tx.publish(order())
    await committed(platform, "1")
    assert [s for s in seen if s[0] in ("prepare", "commit")] == [("prepare", []), ("commit", ["1"])]


async def test_exception_rolls_back(
    outbox: Outbox[AsyncOutboxClient], session: AsyncSession, platform: FakePlatform, db: SourceDatabase
) -> None:
    with pytest.raises(ZeroDivisionError):
        async with outbox.transaction(session) as tx:
            await place(session)
            tx.publish(order())
            _ = 1 / 0
    assert not platform.calls("prepare")
    assert db.orders() == []
    # The session is usable, and nothing is left in it.
    async with outbox.transaction(session):
        await place(session, "2")
    assert not platform.calls("prepare")
    assert db.orders() == ["2"]


async def test_hooks_commit(outbox: Outbox[AsyncOutboxClient], session: AsyncSession, platform: FakePlatform) -> None:
    ids = outbox.collect(session, order("1"))
    assert [e.event_id for e in outbox.pending(session)] == ids
    await place(session)
    outbox.collect(session, order("2"))
    await session.commit()
    assert outbox.pending(session) == []
    await committed(platform, "1", "2")
    await session.commit()
    assert len(platform.calls("prepare")) == 1


async def test_hooks_in_begin_block(
    outbox: Outbox[AsyncOutboxClient], session: AsyncSession, platform: FakePlatform, db: SourceDatabase
) -> None:
    async with session.begin():
        await place(session)
        outbox.collect(session, order())
    await committed(platform, "1")
    with pytest.raises(ZeroDivisionError):
        async with session.begin():
            await place(session, "2")
            outbox.collect(session, order("2"))
            _ = 1 / 0
    async with session.begin():
        await place(session, "3")
    assert db.orders() == ["1", "3"]
    await committed(platform, "1")


@pytest.mark.parametrize("end", ["rollback", "close", "invalidate"])
async def test_hooks_without_commit(
    outbox: Outbox[AsyncOutboxClient], session: AsyncSession, platform: FakePlatform, db: SourceDatabase, end: str
) -> None:
    await place(session)
    outbox.collect(session, order())
    await getattr(session, end)()
    assert outbox.pending(session) == []
    await place(session, "2")
    await session.commit()
    assert not platform.calls("prepare")
    assert db.orders() == ["2"]


async def test_a_rolled_back_savepoint_takes_its_events_along(
    outbox: Outbox[AsyncOutboxClient], session: AsyncSession, platform: FakePlatform
) -> None:
    async with outbox.transaction(session) as tx:
        await place(session)
        tx.publish(order("1"))
        inner = await session.begin_nested()
        tx.publish(order("2"))
        async with session.begin_nested():
            tx.publish(order("3"))
        await inner.rollback()
        async with session.begin_nested():
            tx.publish(order("4"))
            deeper = await session.begin_nested()
            tx.publish(order("5"))
            await deeper.rollback()
            tx.publish(order("6"))
    await committed(platform, "1", "4", "6")


async def test_a_savepoint_before_the_first_event(
    outbox: Outbox[AsyncOutboxClient], session: AsyncSession, platform: FakePlatform
) -> None:
    await place(session)
    savepoint = await session.begin_nested()
    outbox.collect(session, order("1"))
    await savepoint.rollback()
    outbox.collect(session, order("2"))
    savepoint = await session.begin_nested()
    outbox.collect(session, order("3"))
    await savepoint.commit()
    await session.commit()
    await committed(platform, "2", "3")


async def test_a_failing_statement_in_a_savepoint(
    outbox: Outbox[AsyncOutboxClient], session: AsyncSession, platform: FakePlatform, db: SourceDatabase
) -> None:
    async with outbox.transaction(session) as tx:
        await place(session)
        tx.publish(order("1"))
        with pytest.raises(IntegrityError):
            async with session.begin_nested():
                tx.publish(order("2"))
                await session.execute(text("INSERT INTO orders (id) VALUES ('1')"))
        tx.publish(order("3"))
    await committed(platform, "1", "3")


async def test_only_savepoint_events_rolled_back_prepares_nothing(
    outbox: Outbox[AsyncOutboxClient], session: AsyncSession, platform: FakePlatform, db: SourceDatabase
) -> None:
    async with outbox.transaction(session) as tx:
        await place(session)
        savepoint = await session.begin_nested()
        tx.publish(order("2"))
        await savepoint.rollback()
    assert db.markers() == 0
    assert not platform.calls("prepare")


async def test_a_retry_loop_has_a_new_id_for_each_attempt(
    outbox: Outbox[AsyncOutboxClient], engine: AsyncEngine, platform: FakePlatform, db: SourceDatabase
) -> None:
    await asyncio.to_thread(db.execute, "INSERT INTO orders (id) VALUES ('1')")
    attempts = 0
    waiting = 0
    met = asyncio.Event()

    async def once(first: bool) -> None:
        nonlocal attempts, waiting
        attempts += 1
        async with AsyncSession(engine) as session:
            await session.connection(execution_options={"isolation_level": "REPEATABLE READ"})
            async with outbox.transaction(session) as tx:
                await session.execute(text("SELECT n FROM orders WHERE id = '1'"))
                if first:
                    waiting += 1
                    if waiting == 2:
                        met.set()
                    await met.wait()
                await place(session)
                tx.publish(order())

    async def loop() -> None:
        first = True
        while True:
            try:
                return await once(first)
            except DBAPIError as e:
                assert "serialize" in str(e)
                first = False

    await asyncio.gather(loop(), loop())
    assert attempts == 3
    await committed(platform, "1", "1")
    assert len({tx.id for tx in platform.transactions()}) == 2
    assert db.value("SELECT n FROM orders") == 2


async def test_certain_error_in_commit_aborts(
    outbox: Outbox[AsyncOutboxClient], session: AsyncSession, platform: FakePlatform, db: SourceDatabase
) -> None:
    with pytest.raises(IntegrityError):
        async with outbox.transaction(session) as tx:
            await session.execute(text("INSERT INTO late VALUES ('a'), ('a')"))
            tx.publish(order())
    await until(platform, lambda: [t.state for t in platform.transactions()] == [State.ABORTED], "the abort")
    # And with plain hooks.
    await session.execute(text("INSERT INTO late VALUES ('a'), ('a')"))
    outbox.collect(session, order())
    with pytest.raises(IntegrityError):
        await session.commit()
    await session.rollback()
    await until(platform, lambda: [t.state for t in platform.transactions()] == [State.ABORTED] * 2, "the abort")


async def test_unknown_outcome_sends_neither(
    outbox: Outbox[AsyncOutboxClient],
    session: AsyncSession,
    platform: FakePlatform,
    db: SourceDatabase,
    engine: AsyncEngine,
) -> None:
    """The connection breaks as COMMIT is sent."""

    @event.listens_for(engine.sync_engine, "commit")
    def cut(connection: Any) -> None:
        db.terminate_others()

    with pytest.raises(OutcomeUnknownError) as caught:
        async with outbox.transaction(session) as tx:
            await place(session)
            tx.publish(order())
    event.remove(engine.sync_engine, "commit", cut)
    assert caught.value.transaction_id == platform.transactions()[0].id
    assert isinstance(caught.value.__cause__, DBAPIError)
    # The platform finds it out by asking.
    answer = await asyncio.to_thread(platform.ask, caught.value.transaction_id)
    assert answer.outcome == 2, answer  # ABORTED: it never got there
    assert not platform.calls("commit")
    assert not platform.calls("abort")
    # With plain hooks the application gets the driver's own error.
    event.listen(engine.sync_engine, "commit", cut)
    await place(session)
    outbox.collect(session, order())
    with pytest.raises(DBAPIError):
        await session.commit()
    event.remove(engine.sync_engine, "commit", cut)
    await session.close()
    await asyncio.to_thread(platform.ask, platform.transactions()[1].id)
    assert not platform.calls("abort")


async def test_refused_events_roll_back(
    outbox: Outbox[AsyncOutboxClient], session: AsyncSession, platform: FakePlatform, db: SourceDatabase
) -> None:
    platform.fault = lambda call: (
        Fault(error=fault_error(grpc.StatusCode.PERMISSION_DENIED, Reason.TOPIC_DENIED, topic="orders"))
        if call.name == "prepare"
        else None
    )
    with pytest.raises(DeniedError) as caught:
        async with outbox.transaction(session) as tx:
            await place(session)
            tx.publish(order())
    assert caught.value.reason == Reason.TOPIC_DENIED
    assert db.orders() == []
    assert db.markers() == 0


async def test_invalid_event_leaves_the_session_usable(
    outbox: Outbox[AsyncOutboxClient], session: AsyncSession, platform: FakePlatform, db: SourceDatabase
) -> None:
    async with outbox.transaction(session) as tx:
        await place(session)
        with pytest.raises(InvalidError):
            tx.publish(order("1", topic="__internal"))
        tx.publish(order("2"))
    await committed(platform, "2")


async def test_a_transaction_that_could_not_be_prepared_must_not_commit(
    outbox: Outbox[AsyncOutboxClient], session: AsyncSession, platform: FakePlatform, db: SourceDatabase
) -> None:
    platform.fault = lambda call: (
        Fault(error=fault_error(grpc.StatusCode.PERMISSION_DENIED, Reason.SOURCE_DENIED))
        if call.name == "prepare"
        else None
    )
    await place(session)
    outbox.collect(session, order())
    with pytest.raises(DeniedError):
        await session.commit()
    platform.fault = None
    with pytest.raises(TransactionError):
        await session.commit()
    await session.rollback()
    assert db.orders() == []


async def test_synchronous_commit_off_is_refused(
    outbox: Outbox[AsyncOutboxClient], session: AsyncSession, platform: FakePlatform, db: SourceDatabase
) -> None:
    with pytest.raises(AsyncCommitError):
        async with outbox.transaction(session) as tx:
            await session.execute(text("SET LOCAL synchronous_commit = off"))
            tx.publish(order())
    assert not platform.calls("prepare")


async def test_sessions_in_a_foreign_transaction_are_refused(
    outbox: Outbox[AsyncOutboxClient], engine: AsyncEngine, platform: FakePlatform, db: SourceDatabase
) -> None:
    async with engine.connect() as connection, connection.begin() as outer:
        async with AsyncSession(connection, join_transaction_mode="create_savepoint") as session:
            await place(session)
            outbox.collect(session, order())
            with pytest.raises((NoTransactionError, SavepointError)):
                await session.commit()
        async with AsyncSession(connection, join_transaction_mode="rollback_only") as session:
            await place(session)
            outbox.collect(session, order())
            with pytest.raises(NoTransactionError):
                await session.commit()
        await outer.rollback()
    async with AsyncSession(engine) as session:
        await place(session)
        await session.begin_nested()
        with pytest.raises(NoTransactionError):
            async with outbox.transaction(session):
                pass
    assert not platform.calls("prepare")


async def test_marker_in_a_savepoint_that_we_cannot_see_is_refused(
    outbox: Outbox[AsyncOutboxClient], session: AsyncSession, platform: FakePlatform, db: SourceDatabase
) -> None:
    with pytest.raises(SavepointError):
        async with outbox.transaction(session) as tx:
            await place(session)
            await session.execute(text("SAVEPOINT hidden"))
            tx.publish(order())
    assert not platform.calls("prepare")


async def test_missing_marker_table(
    outbox: Outbox[AsyncOutboxClient], session: AsyncSession, platform: FakePlatform, db: SourceDatabase
) -> None:
    db.execute("DROP TABLE outbox_marker")
    with pytest.raises(DBAPIError, match="outbox_marker"):
        async with outbox.transaction(session) as tx:
            await place(session)
            tx.publish(order())
    assert db.orders() == []


# --- the platform is away ---


async def test_spill_and_drain(
    outbox: Outbox[AsyncOutboxClient],
    session: AsyncSession,
    platform: FakePlatform,
    db: SourceDatabase,
    client: AsyncOutboxClient,
) -> None:
    await asyncio.to_thread(platform.stop)
    for id in ("1", "2"):
        async with outbox.transaction(session) as tx:
            await place(session, id)
            tx.publish(order(id))
    assert db.spilled() == 2
    assert client.stats().spilled == 2
    platform.start()
    await committed(platform, "1", "2")
    await until(platform, lambda: db.spilled() == 0, "cleared rows")
    assert client.stats().drained == 2
    async with outbox.transaction(session) as tx:
        tx.publish(order("3"))
    await committed(platform, "1", "2", "3")
    assert [c.name for c in platform.calls() if c.events] == ["publish", "publish", "prepare"]


async def test_later_transactions_spill_behind_spilled_ones(
    outbox: Outbox[AsyncOutboxClient],
    session: AsyncSession,
    platform: FakePlatform,
    db: SourceDatabase,
    client: AsyncOutboxClient,
) -> None:
    """The platform answers Prepare again, but the first request still waits in the database."""
    away = True
    platform.fault = lambda call: (
        Fault(silent=True) if (call.name == "prepare" and away) or call.name == "publish" else None
    )
    async with outbox.transaction(session) as tx:
        await place(session)
        tx.publish(order("1", "a"))
    away = False
    async with outbox.transaction(session) as tx:
        await place(session)
        tx.publish(order("1", "b"))
    assert db.spilled() == 2
    platform.fault = None
    await committed(platform, "1", "1")
    assert [e.event_type for e in platform.published()] == ["order.a.v1", "order.b.v1"]


@pytest.mark.parametrize("isolation", ["REPEATABLE READ", "SERIALIZABLE"])
async def test_must_spill_is_asked_with_a_fresh_snapshot(
    outbox: Outbox[AsyncOutboxClient], engine: AsyncEngine, platform: FakePlatform, db: SourceDatabase, isolation: str
) -> None:
    platform.fault = lambda call: Fault(silent=True) if call.name == "publish" else None
    async with AsyncSession(engine) as session:
        await session.connection(execution_options={"isolation_level": isolation})
        await session.execute(text("SELECT 1"))  # takes the snapshot
        db.spill(order("other"))
        async with outbox.transaction(session) as tx:
            await place(session)
            tx.publish(order())
    assert db.spilled() == 2
    assert not platform.calls("prepare")


async def test_lost_answer_spills_and_the_twin_is_published_once(
    outbox: Outbox[AsyncOutboxClient], session: AsyncSession, platform: FakePlatform, db: SourceDatabase
) -> None:
    platform.fault = lambda call: Fault(lose_answer=call.name == "prepare")
    async with outbox.transaction(session) as tx:
        await place(session)
        tx.publish(order())
    await committed(platform, "1")
    assert len(platform.transactions()) == 1
    await until(platform, lambda: db.spilled() == 0, "cleared rows")


async def test_spill_not_allowed(
    client: AsyncOutboxClient,
    engine: AsyncEngine,
    session: AsyncSession,
    platform: FakePlatform,
    db: SourceDatabase,
    outbox: Outbox[AsyncOutboxClient],
) -> None:
    strict = Outbox(client, spill=False)
    platform.fault = lambda call: Fault(silent=call.name in ("prepare", "publish"))
    with pytest.raises(UnavailableError):
        async with strict.transaction(session) as tx:
            await place(session)
            tx.publish(order())
    await until(platform, lambda: platform.calls("abort"), "the abort: Prepare may have arrived")
    assert db.orders() == []
    db.spill(order("other"))
    with pytest.raises(MustSpillError):
        async with strict.transaction(session) as tx:
            tx.publish(order())


async def test_without_a_registered_database_nothing_spills(
    client: AsyncOutboxClient, engine: AsyncEngine, session: AsyncSession, platform: FakePlatform, db: SourceDatabase
) -> None:
    plain = Outbox(client)
    async with plain.transaction(session) as tx:
        await place(session)
        tx.publish(order())
    await committed(platform, "1")
    await session.connection(execution_options={"isolation_level": "REPEATABLE READ"})
    with pytest.raises(TransactionError, match="registered"):
        async with plain.transaction(session) as tx:
            tx.publish(order())
    await asyncio.to_thread(platform.stop)
    with pytest.raises(UnavailableError):
        async with plain.transaction(session) as tx:
            tx.publish(order())


async def test_a_failing_statement_between_prepare_and_commit(
    outbox: Outbox[AsyncOutboxClient], session: AsyncSession, platform: FakePlatform, db: SourceDatabase
) -> None:
    """PostgreSQL answers COMMIT with ROLLBACK then, and no driver says so: nothing may be told to the platform."""

    @event.listens_for(session.sync_session, "before_commit")
    def spoil(s: Any) -> None:
        try:
            s.execute(text("SELECT 1 / 0"))
        except DBAPIError:
            pass

    async with outbox.transaction(session) as tx:
        await place(session)
        tx.publish(order())
    assert db.orders() == []
    [stored] = platform.transactions()
    assert (await asyncio.to_thread(platform.ask, stored.id)).outcome == 2
    assert not platform.calls("commit")


async def test_abort_when_another_hook_refuses(
    outbox: Outbox[AsyncOutboxClient], session: AsyncSession, platform: FakePlatform, db: SourceDatabase
) -> None:
    @event.listens_for(session.sync_session, "before_commit")
    def refuse(s: Any) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        async with outbox.transaction(session) as tx:
            await place(session)
            tx.publish(order())
    await until(platform, lambda: [t.state for t in platform.transactions()] == [State.ABORTED], "the abort")
    assert db.orders() == []


async def test_two_outboxes_in_one_transaction(
    outbox: Outbox[AsyncOutboxClient], session: AsyncSession, client: AsyncOutboxClient, platform: FakePlatform
) -> None:
    outbox.collect(session, order("1"))
    Outbox(client).collect(session, order("2"))
    other = AsyncOutboxClient(platform.config("other"))
    with pytest.raises(NoTransactionError):
        Outbox(other).collect(session, order("3"))
    await session.commit()
    await committed(platform, "1", "2")


async def test_a_fault_of_ours_after_commit_stays_with_us(
    outbox: Outbox[AsyncOutboxClient],
    session: AsyncSession,
    platform: FakePlatform,
    client: AsyncOutboxClient,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def broken(*args: Any, **kwargs: Any) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(client, "commit_later", broken)
    async with outbox.transaction(session) as tx:
        await place(session)
        tx.publish(order())
    assert client.stats().alarms == 1


async def test_check_back(
    outbox: Outbox[AsyncOutboxClient],
    engine: AsyncEngine,
    session: AsyncSession,
    platform: FakePlatform,
    db: SourceDatabase,
) -> None:
    platform.fault = lambda call: Fault(silent=call.name in ("commit", "abort"))
    async with outbox.transaction(session) as tx:
        await place(session)
        tx.publish(order())
    [stored] = platform.transactions()
    answer = await asyncio.to_thread(platform.ask, stored.id)
    assert answer.outcome == 1
    assert '"marked": true' in answer.evidence
    # Again, after the idle connections of upkeep were cut.
    await engine.dispose()
    db.terminate_others()
    assert (await asyncio.to_thread(platform.ask, stored.id)).outcome == 1


def test_engines_and_clients_must_match(db: SourceDatabase, platform: FakePlatform) -> None:
    with pytest.raises(TypeError):
        Outbox(AsyncOutboxClient(platform.config()), create_async_engine(db.asyncpg_url).sync_engine)


def test_call_is_exported() -> None:
    assert Call("prepare").name == "prepare"
