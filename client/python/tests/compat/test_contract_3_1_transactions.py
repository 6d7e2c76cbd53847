"""Section 3.1 of the contract: transactions, on a real PostgreSQL."""

from __future__ import annotations

import asyncio
import logging
import time
from uuid import uuid4

import pytest
from prometheus_client import REGISTRY
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession

from outbox_client.compat.huleedu import PostgreSQLOutboxRepository, bind
from outbox_client.testing import FakePlatform

from .test_contract_3_repository import add


@pytest.fixture
def repository(engine: AsyncEngine, platform: FakePlatform) -> PostgreSQLOutboxRepository:
    return PostgreSQLOutboxRepository(engine, "file_service")


async def insert(session: AsyncSession, name: str) -> None:
    await session.execute(text("INSERT INTO users VALUES (:name)"), {"name": name})


async def users(engine: AsyncEngine) -> list[str]:
    async with engine.connect() as c:
        return list((await c.execute(text("SELECT name FROM users ORDER BY name"))).scalars())


async def published(platform: FakePlatform, n: int) -> list[str]:
    """The keys of what is published, once there are n."""
    await asyncio.to_thread(platform.wait, lambda: len(platform.published()) >= n, f"{n} events")
    return [str(e.headers) if e.key is None else bytes(e.key).decode() for e in platform.published()]  # type: ignore[arg-type]


async def nothing_more(platform: FakePlatform, repository: PostgreSQLOutboxRepository) -> None:
    """Nothing is published that should not: what is added now is the first that arrives."""
    before = len(platform.published())
    await add(repository, event_key="after")
    assert (await published(platform, before + 1))[before:] == ["after"]


async def test_3_1_without_session_the_write_is_durable_and_decided_when_the_awaitable_returns(
    repository: PostgreSQLOutboxRepository, platform: FakePlatform
) -> None:
    await add(repository, event_key="k")
    assert [e.key for e in platform.published()] == [b"k"]


async def test_3_1_without_session_failure_means_nothing_is_stored(
    repository: PostgreSQLOutboxRepository, platform: FakePlatform, engine: AsyncEngine
) -> None:
    with pytest.raises(Exception, match="topic"):
        await add(repository, topic="not a topic")
    assert platform.transactions() == []
    async with engine.connect() as c:
        assert (await c.execute(text("SELECT count(*) FROM outbox_marker"))).scalar() == 0


async def test_3_1_commit_publishes_once(
    repository: PostgreSQLOutboxRepository, platform: FakePlatform, engine: AsyncEngine
) -> None:
    async with AsyncSession(engine) as session, session.begin():
        await insert(session, "anna")
        await add(repository, event_key="k", session=session)
    assert await published(platform, 1) == ["k"]
    assert await users(engine) == ["anna"]
    await nothing_more(platform, repository)


async def test_3_1_autobegin(
    repository: PostgreSQLOutboxRepository, platform: FakePlatform, engine: AsyncEngine
) -> None:
    async with AsyncSession(engine) as session:
        await add(repository, event_key="first statement", session=session)
        await insert(session, "anna")
        await session.commit()
        await insert(session, "bo")
        await add(repository, event_key="second transaction", session=session)
        await session.commit()
    assert await published(platform, 2) == ["first statement", "second transaction"]
    assert await users(engine) == ["anna", "bo"]


async def test_3_1_the_layer_does_not_end_the_transaction_or_begin_a_second_one(
    repository: PostgreSQLOutboxRepository, platform: FakePlatform, engine: AsyncEngine
) -> None:
    async with AsyncSession(engine) as session:
        await insert(session, "anna")
        before = (await session.execute(text("SELECT pg_current_xact_id()::text"))).scalar()
        await add(repository, session=session)
        assert session.in_transaction()
        assert not session.in_nested_transaction()
        assert (await session.execute(text("SELECT pg_current_xact_id()::text"))).scalar() == before
        assert await users(engine) == []
        await session.rollback()


async def test_3_1_rollback(
    repository: PostgreSQLOutboxRepository, platform: FakePlatform, engine: AsyncEngine
) -> None:
    async with AsyncSession(engine) as session:
        await insert(session, "anna")
        await add(repository, session=session)
        await session.rollback()
    await nothing_more(platform, repository)
    assert await users(engine) == []


async def test_3_1_an_exception_that_leaves_the_begin_block_neither_the_user_row_nor_the_event_exist(
    repository: PostgreSQLOutboxRepository, platform: FakePlatform, engine: AsyncEngine
) -> None:
    with pytest.raises(RuntimeError):
        async with AsyncSession(engine) as session, session.begin():
            await insert(session, "anna")
            await add(repository, session=session)
            raise RuntimeError("business")
    await nothing_more(platform, repository)
    assert await users(engine) == []


async def test_3_1_close_without_commit(
    repository: PostgreSQLOutboxRepository, platform: FakePlatform, engine: AsyncEngine
) -> None:
    session = AsyncSession(engine)
    await insert(session, "anna")
    await add(repository, session=session)
    await session.close()
    await nothing_more(platform, repository)
    assert await users(engine) == []


async def test_3_1_a_lost_connection(
    repository: PostgreSQLOutboxRepository, platform: FakePlatform, engine: AsyncEngine
) -> None:
    async with AsyncSession(engine) as session:
        await insert(session, "anna")
        await add(repository, session=session)
        pid = (await session.execute(text("SELECT pg_backend_pid()"))).scalar()
        async with engine.begin() as c:
            await c.execute(text("SELECT pg_terminate_backend(:pid)"), {"pid": pid})
        with pytest.raises(DBAPIError):
            await session.commit()
        await session.rollback()
    await nothing_more(platform, repository)
    assert await users(engine) == []


async def test_3_1_several_publishes_in_one_session_keep_the_order_of_the_calls(
    repository: PostgreSQLOutboxRepository, platform: FakePlatform, engine: AsyncEngine
) -> None:
    keys = [f"{i}" for i in range(30)]
    async with AsyncSession(engine) as session, session.begin():
        for i, key in enumerate(keys):
            await add(repository, aggregate_id=f"a-{i % 3}", event_key=key, session=session)
    assert await published(platform, len(keys)) == keys


async def test_3_1_one_envelope_added_twice_in_one_session_is_published_twice(
    repository: PostgreSQLOutboxRepository, platform: FakePlatform, engine: AsyncEngine
) -> None:
    data = {"event_id": str(uuid4()), "event_type": "t"}
    async with AsyncSession(engine) as session, session.begin():
        await add(repository, topic="one", event_data=data, session=session)
        await add(repository, topic="two", event_data=data, session=session)
    await published(platform, 2)
    events = platform.published()
    assert [e.topic for e in events] == ["one", "two"]
    assert [dict(e.headers)["event_id"] for e in events] == [data["event_id"].encode()] * 2


async def test_3_1_before_commit_the_event_is_not_visible_to_anybody_else(
    repository: PostgreSQLOutboxRepository, platform: FakePlatform, engine: AsyncEngine
) -> None:
    async with AsyncSession(engine) as session, session.begin():
        await add(repository, session=session)
        assert platform.published() == []
        async with engine.connect() as c:
            assert (await c.execute(text("SELECT count(*) FROM outbox_marker"))).scalar() == 0
    await published(platform, 1)


async def test_3_1_a_savepoint_that_is_rolled_back_takes_its_events_with_it(
    repository: PostgreSQLOutboxRepository, platform: FakePlatform, engine: AsyncEngine
) -> None:
    async with AsyncSession(engine) as session, session.begin():
        await add(repository, event_key="outer", session=session)
        with pytest.raises(RuntimeError):
            async with session.begin_nested():
                await add(repository, event_key="inner", session=session)
                raise RuntimeError("inner")
    assert await published(platform, 1) == ["outer"]
    await nothing_more(platform, repository)


async def test_3_1_only_the_marker_table_is_needed_beside_the_services_own(
    repository: PostgreSQLOutboxRepository, platform: FakePlatform, engine: AsyncEngine
) -> None:
    async with engine.connect() as c:
        tables = await c.execute(text("SELECT tablename FROM pg_tables WHERE schemaname = 'public' ORDER BY 1"))
        assert list(tables.scalars()) == ["outbox_marker", "users"]
    async with AsyncSession(engine) as session, session.begin():
        await add(repository, session=session)
    await published(platform, 1)


async def test_3_1_without_the_marker_table_the_commit_fails_and_names_it(
    repository: PostgreSQLOutboxRepository, platform: FakePlatform, engine: AsyncEngine
) -> None:
    async with engine.begin() as c:
        await c.execute(text("DROP TABLE outbox_marker"))
    with pytest.raises(DBAPIError, match="outbox_marker"):
        async with AsyncSession(engine) as session, session.begin():
            await insert(session, "anna")
            await add(repository, session=session)
    assert await users(engine) == []
    assert platform.transactions() == []


async def test_3_1_a_failure_in_add_event_leaves_the_session_usable_for_the_callers_rollback(
    repository: PostgreSQLOutboxRepository, platform: FakePlatform, engine: AsyncEngine
) -> None:
    async with AsyncSession(engine) as session:
        await insert(session, "anna")
        with pytest.raises(Exception, match="topic"):
            await add(repository, topic="not a topic", session=session)
        assert (await session.execute(text("SELECT count(*) FROM users"))).scalar() == 1
        await session.rollback()
        await insert(session, "bo")
        await session.commit()
    assert await users(engine) == ["bo"]
    assert platform.transactions() == []


async def test_3_1_the_platform_being_away_fails_no_transaction(
    repository: PostgreSQLOutboxRepository, platform: FakePlatform, engine: AsyncEngine
) -> None:
    """Not in the contract: what the old library could not lose either, because it wrote to the service's own table."""
    platform.stop()
    for i in range(3):
        async with AsyncSession(engine) as session, session.begin():
            await insert(session, f"user {i}")
            await add(repository, event_key=f"{i}", session=session)
    assert len(await users(engine)) == 3
    platform.start()
    assert await published(platform, 3) == ["0", "1", "2"]


# What the layer adds: unjoined writes.


async def test_without_session_it_warns_once_per_call_site_and_counts(
    repository: PostgreSQLOutboxRepository, platform: FakePlatform, caplog: pytest.LogCaptureFixture
) -> None:
    labels = {"service": "file_service", "call_site": f"{__name__}:one_place"}
    before = REGISTRY.get_sample_value("outbox_unjoined_writes_total", labels) or 0

    async def one_place() -> None:
        await repository.add_event("a", "essay", "t", {}, "topic")

    async def another_place() -> None:
        await repository.add_event("a", "essay", "t", {}, "topic")

    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            await one_place()
        await another_place()
    told = [r for r in caplog.records if "session=" in r.message]
    assert len(told) == 2
    assert all(__file__ in r.call_site for r in told)  # type: ignore[attr-defined]
    assert REGISTRY.get_sample_value("outbox_unjoined_writes_total", labels) == before + 3


async def test_bind_makes_call_sites_atomic_without_touching_them(
    repository: PostgreSQLOutboxRepository,
    platform: FakePlatform,
    engine: AsyncEngine,
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def call_site(key: str) -> None:
        await add(repository, event_key=key)

    async with AsyncSession(engine) as session:
        async with session.begin():
            with bind(session):
                await call_site("committed")
                await asyncio.create_task(call_site("in a task"))
        assert await published(platform, 2) == ["committed", "in a task"]
        with pytest.raises(RuntimeError):
            async with session.begin(), bind(session):
                await call_site("rolled back")
                raise RuntimeError
    assert not [r for r in caplog.records if "session=" in r.message]
    await nothing_more(platform, repository)
    assert [r for r in caplog.records if "session=" in r.message], "outside of the block it is unjoined again"


async def test_a_session_that_is_passed_goes_before_one_that_is_bound(
    repository: PostgreSQLOutboxRepository, platform: FakePlatform, engine: AsyncEngine
) -> None:
    async with AsyncSession(engine) as bound, AsyncSession(engine) as passed:
        async with passed.begin():
            with bind(bound):
                await add(repository, event_key="passed", session=passed)
        await bound.rollback()
    assert await published(platform, 1) == ["passed"]


async def test_while_the_platform_is_away_unjoined_writes_wait_in_the_services_database_in_order(
    repository: PostgreSQLOutboxRepository, platform: FakePlatform, engine: AsyncEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OUTBOX_CLIENT_CALL_TIMEOUT", "500ms")
    await add(repository, event_key="before")
    platform.stop()
    for i in range(5):
        await add(repository, event_key=f"{i}")
    async with engine.connect() as c:
        assert (await c.execute(text("SELECT count(*) FROM outbox_marker WHERE spilled IS NOT NULL"))).scalar() == 5
    platform.start()
    await add(repository, event_key="after")
    assert await published(platform, 7) == ["before", "0", "1", "2", "3", "4", "after"]

    async def direct_again() -> None:
        """Once nothing waits any more, the way is the short one again."""
        while not platform.calls("publish") or platform.calls("publish")[-1].events[0].key != b"direct":
            await add(repository, event_key="direct")

    await asyncio.wait_for(direct_again(), 10)


async def test_a_write_whose_answer_is_lost_is_published_once(
    repository: PostgreSQLOutboxRepository, platform: FakePlatform, engine: AsyncEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The platform has it and nobody knows: what waits in the service's database is the same request."""
    from outbox_client.testing import Fault

    monkeypatch.setenv("OUTBOX_CLIENT_CALL_TIMEOUT", "300ms")
    platform.fault = lambda call: Fault(lose_answer=True) if call.name == "publish" else None
    await add(repository, event_key="lost")
    platform.fault = None

    await add(repository, event_key="after")
    assert await published(platform, 2) == ["lost", "after"]
    calls = [call for call in platform.calls("publish") if call.events[0].key == b"lost"]
    assert len({call.id for call in calls}) == 1
    # From the first one on, because it may be the last for long, and the platform may have it.
    assert len(calls) > 1
    assert all(call.kept for call in calls)
    async with engine.connect() as c:
        assert (await c.execute(text("SELECT count(*) FROM outbox_marker WHERE refused IS NOT NULL"))).scalar() == 0


async def test_the_circuit_breaker_keeps_callers_from_waiting(
    engine: AsyncEngine, platform: FakePlatform, monkeypatch: pytest.MonkeyPatch
) -> None:
    from outbox_client import UnavailableError
    from outbox_client.compat.huleedu.breaker import CircuitOpenError
    from outbox_client.compat.huleedu.platform import platform_of
    from outbox_client.testing import Fault

    monkeypatch.setenv("OUTBOX_FALLBACK", "fail")
    monkeypatch.setenv("OUTBOX_BREAKER_FAILURES", "2")
    monkeypatch.setenv("OUTBOX_BREAKER_SECONDS", "30")
    monkeypatch.setenv("OUTBOX_CLIENT_CALL_TIMEOUT", "200ms")
    repository = PostgreSQLOutboxRepository(engine, "file_service")
    platform.fault = lambda call: Fault(silent=True) if call.name == "publish" else None
    for _ in range(2):
        with pytest.raises(UnavailableError):
            await add(repository)
    asked = len(platform.calls("publish"))
    assert not any(call.kept for call in platform.calls("publish")), "nothing is stored that could be sent again"
    gauge = {"service": "file_service"}
    assert REGISTRY.get_sample_value("outbox_breaker_open", gauge) == 1
    with pytest.raises(CircuitOpenError):
        await add(repository)
    assert len(platform.calls("publish")) == asked
    platform.fault = None

    breaker = platform_of("file_service").breaker
    now = time.monotonic()
    monkeypatch.setattr(breaker, "_clock", lambda: now + 60)  # its time is over
    await add(repository)
    assert not breaker.is_open
    assert REGISTRY.get_sample_value("outbox_breaker_open", gauge) == 0


@pytest.mark.parametrize("answer", ["denied", "invalid"])
async def test_an_answer_of_the_platform_does_not_open_the_breaker(
    repository: PostgreSQLOutboxRepository, platform: FakePlatform, answer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import grpc

    from outbox_client import CallError, DeniedError, InvalidError
    from outbox_client.compat.huleedu.platform import platform_of
    from outbox_client.testing import Fault

    errors: dict[str, CallError] = {
        "denied": DeniedError(grpc.StatusCode.PERMISSION_DENIED, "no", reason="TOPIC_DENIED"),
        "invalid": InvalidError(grpc.StatusCode.INVALID_ARGUMENT, "no", reason="FIELD_INVALID"),
    }
    monkeypatch.setenv("OUTBOX_BREAKER_FAILURES", "1")
    platform.fault = lambda call: Fault(error=errors[answer]) if call.name == "publish" else None
    for _ in range(3):
        with pytest.raises(type(errors[answer])):
            await add(repository)
    assert not platform_of("file_service").breaker.is_open


def test_the_breaker_lets_one_call_through_at_a_time() -> None:
    from outbox_client.compat.huleedu.breaker import CircuitBreaker, CircuitOpenError

    now = 0.0
    changes: list[bool] = []
    breaker = CircuitBreaker(2, 10, clock=lambda: now, on_change=changes.append)
    breaker.before()
    breaker.failure()
    breaker.before()
    breaker.success()
    assert not breaker.is_open
    for _ in range(2):
        breaker.before()
        breaker.failure()
    assert breaker.is_open
    with pytest.raises(CircuitOpenError, match=r"10\.0 s"):
        breaker.before()
    now = 10.0
    breaker.before()
    with pytest.raises(CircuitOpenError):
        breaker.before()
    breaker.abandoned()
    breaker.before()
    breaker.failure()
    with pytest.raises(CircuitOpenError):
        breaker.before()
    now = 20.0
    breaker.before()
    breaker.success()
    breaker.before()
    assert changes == [True, False]


async def test_stop_waits_for_acknowledgements(
    repository: PostgreSQLOutboxRepository, platform: FakePlatform, engine: AsyncEngine
) -> None:
    from outbox_client.compat.huleedu import EventRelayWorker, OutboxSettings
    from outbox_client.testing import Fault

    platform.fault = lambda call: Fault(after=0.2) if call.name == "commit" else None
    worker = EventRelayWorker(repository, None, OutboxSettings(), "file_service")  # type: ignore[arg-type]
    await worker.start()
    async with AsyncSession(engine) as session, session.begin():
        await add(repository, session=session)
    await worker.stop()
    assert len(platform.published()) == 1
