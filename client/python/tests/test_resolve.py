"""Verdicts, draining and cleaning up against a real PostgreSQL: what a service that was killed leaves behind."""

from __future__ import annotations

import asyncio
import datetime
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from typing import Any

import asyncpg
import grpc
import psycopg
import pytest
from conftest import SourceDatabase
from events import order

import outbox_client.asyncpg
from outbox_client import (
    AlarmKind,
    AsyncOutboxClient,
    DatabaseTransaction,
    Mode,
    Reason,
    State,
    Upkeep,
    new_id,
)
from outbox_client._core.engine import Engine
from outbox_client._source.attempt import Attempt, run_async
from outbox_client._source.cleanup import CLEAN_ROWS, Cleanup
from outbox_client._source.database import Database
from outbox_client._source.drain import Drain
from outbox_client._source.verdict import CheckTransaction, Outcome, Sighting, Verdict, judge, rule, verdicts
from outbox_client.ids import first_id
from outbox_client.testing import FakePlatform, Fault, fault_error

FAR = Upkeep(drain_interval=1000, janitor_interval=1000)


class World:
    """A client with a registered database, and its parts."""

    def __init__(
        self, client: AsyncOutboxClient, db: SourceDatabase, platform: FakePlatform, alarms: list[Any]
    ) -> None:
        self.client, self.db, self.platform, self.alarms = client, db, platform, alarms
        self.outbox = outbox_client.asyncpg.Outbox(client, lambda: asyncpg.connect(db.dsn), upkeep=FAR)

    @property
    def engine(self) -> Engine:
        return self.client._engine()

    @property
    def database(self) -> Database:
        return self.engine.databases["default"]

    async def publish(self, id: str = "1") -> uuid.UUID:
        """Does a whole transaction."""
        connection = await asyncpg.connect(self.db.dsn)
        async with self.outbox.transaction(connection) as tx:
            tx.publish(order(id))
        await connection.close()
        return self.platform.transactions()[-1].id

    async def open(self) -> tuple[Any, Any, Attempt]:
        """Does one up to COMMIT, which is the caller's. The connection, its transaction, the attempt."""
        connection = await asyncpg.connect(self.db.dsn)
        transaction = connection.transaction()
        await transaction.start()
        attempt = Attempt(self.client, "default", True)
        await run_async(attempt.prepare(self.client.protos([order()])), self.outbox._stepper(connection))
        return connection, transaction, attempt

    async def ask(self, *changed: DatabaseTransaction, id: uuid.UUID) -> list[Verdict]:
        async with self.database.connection() as c:
            return await verdicts(c, [CheckTransaction(id, d) for d in changed])

    def tied(self, id: uuid.UUID) -> DatabaseTransaction:
        stored = self.platform.transaction(id)
        assert stored is not None
        assert stored.database_transaction is not None
        return stored.database_transaction


@pytest.fixture
async def world(platform: FakePlatform, db: SourceDatabase) -> AsyncIterator[World]:
    alarms: list[Any] = []
    config = platform.config(on_alarm=alarms.append, prepare_timeout=0.5, call_timeout=1.0, close_timeout=0.2)
    async with AsyncOutboxClient(config) as client:
        await client.connect()
        world = World(client, db, platform, alarms)
        for task in list(world.engine._upkeep):
            task.cancel()  # the test itself sets upkeep off
        yield world


# --- verdicts ---


async def test_committed_aborted_in_progress(world: World) -> None:
    connection, transaction, attempt = await world.open()
    answer = await asyncio.to_thread(world.platform.ask, attempt.id)
    assert answer.outcome == Outcome.IN_PROGRESS.value
    await transaction.commit()
    answer = await asyncio.to_thread(world.platform.ask, attempt.id)
    assert answer.outcome == Outcome.COMMITTED.value
    assert '"xact_status": "committed"' in answer.evidence
    connection2, transaction2, attempt2 = await world.open()
    await transaction2.rollback()
    assert (await asyncio.to_thread(world.platform.ask, attempt2.id)).outcome == Outcome.ABORTED.value
    await connection.close()
    await connection2.close()


async def test_an_absent_marker_means_something_only_in_the_right_table(world: World) -> None:
    connection, transaction, attempt = await world.open()
    await transaction.rollback()
    await connection.close()
    d = world.tied(attempt.id)
    for changed, reason in (
        (replace(d, system_identifier=1), "another database server"),
        (replace(d, database_oid=1), "another database of the server"),
        (replace(d, marker_oid=1), "another marker table"),
        (replace(d, timeline=77), "failover"),
        (replace(d, mode=Mode.CLIENT_ONLY), "only the client or an operator"),
        (replace(d, mode=Mode.XID_FENCED, timeline=77), "an xid proves nothing"),
    ):
        [v] = await world.ask(changed, id=attempt.id)
        assert (v.outcome, reason in v.reason) == (Outcome.UNKNOWN, True), v
        assert bool(v.failed_over_to) == (reason == "failover")
    # A marker that is there counts wherever it is found.
    id = await world.publish()
    [v] = await world.ask(replace(world.tied(id), system_identifier=1, timeline=77), id=id)
    assert v.outcome is Outcome.COMMITTED


async def test_fenced_transactions(world: World) -> None:
    connection, transaction, attempt = await world.open()
    d = replace(world.tied(attempt.id), mode=Mode.XID_FENCED)
    assert [v.outcome for v in await world.ask(d, id=attempt.id)] == [Outcome.IN_PROGRESS]
    await transaction.rollback()
    assert [v.outcome for v in await world.ask(d, id=attempt.id)] == [Outcome.ABORTED]
    await connection.close()
    id = await world.publish()
    fenced = replace(world.tied(id), mode=Mode.XID_FENCED)
    assert [v.outcome for v in await world.ask(fenced, id=id)] == [Outcome.COMMITTED]


async def test_an_xid_that_was_lost_in_a_crash(world: World) -> None:
    """Its number has not been given out (again)."""
    id = await world.publish()
    lost = replace(world.tied(id), xid=2**40 + 5)
    [v] = await world.ask(lost, id=new_id())
    assert (v.outcome, v.reason) == (Outcome.ABORTED, "its xid was lost in a crash of the database")
    # An xid that another transaction has: committed there, but this id's marker is not here.
    [v] = await world.ask(world.tied(id), id=new_id())
    assert v.outcome is Outcome.ABORTED
    assert v.naive_wrong


async def test_row_security_hides_markers(world: World) -> None:
    id = await world.publish()
    role = f"limited_{world.db.name}"
    world.db.execute(f"CREATE ROLE {role} LOGIN PASSWORD 'x'; GRANT ALL ON outbox_marker TO {role}")
    world.db.execute("ALTER TABLE outbox_marker ENABLE ROW LEVEL SECURITY")
    c = outbox_client.asyncpg._Connection(
        await asyncpg.connect(f"postgres://{role}:x@{world.db.dsn.partition('@')[2]}")
    )
    [v] = await verdicts(c, [CheckTransaction(id, world.tied(id))])
    await c.close()
    assert (v.outcome, "row security" in v.reason) == (Outcome.UNKNOWN, True)


class Answers:
    """A database whose answers a test chooses: for what a real one does once in a lifetime."""

    def __init__(
        self, *, status: str | None = None, error: Exception | None = None, seen: Sequence[Any] | Exception = ()
    ) -> None:
        self.status, self.error, self.seen = status, error, seen

    async def fetch(self, sql: str, *args: Any) -> Sequence[Any]:
        if "unnest" not in sql:
            if self.error is not None:
                raise self.error
            return [(self.status,)]
        if isinstance(self.seen, Exception):
            raise self.seen
        return self.seen

    async def execute(self, sql: str, *args: Any) -> int:
        raise NotImplementedError

    def transaction(self) -> Any:
        raise NotImplementedError

    async def close(self) -> None:
        raise NotImplementedError


D = DatabaseTransaction(7, 1, 1, 1, 1)
SEEN = Sighting(False, 1, 1, 1, 1, False, False, False, "", "s")
ROW = (None, False, 1, "00000001", 1, 1, False, False, False, None, "s")


class FutureError(Exception):
    sqlstate = "22023"


@pytest.mark.parametrize(
    ("answers", "outcome", "reason"),
    [
        (Answers(status="in progress"), Outcome.IN_PROGRESS, ""),
        (Answers(status=None), Outcome.UNKNOWN, "forgotten"),
        (Answers(error=OSError("cut")), Outcome.UNKNOWN, "asking for its status: cut"),
        (Answers(status="committed", seen=OSError("cut")), Outcome.UNKNOWN, "asking the database again: cut"),
        (Answers(status="committed", seen=[ROW]), Outcome.IN_PROGRESS, "ended just now"),
        (Answers(error=FutureError(), seen=[ROW]), Outcome.ABORTED, "lost in a crash"),
        (Answers(status="committed", seen=[(*ROW[:7], True, *ROW[8:])]), Outcome.COMMITTED, ""),
    ],
)
async def test_what_has_not_ended_in_the_snapshot(answers: Answers, outcome: Outcome, reason: str) -> None:
    t = CheckTransaction(new_id(), D)
    if not isinstance(answers.seen, Exception):
        answers.seen = [(str(t.id), *row[1:]) for row in answers.seen]
    v = await judge(answers, t, SEEN)
    assert (v.outcome, reason in v.reason) == (outcome, True), v


@pytest.mark.parametrize(
    ("answers", "outcome", "reason"),
    [
        (Answers(error=FutureError()), Outcome.UNKNOWN, "fenced"),
        (Answers(status="in progress"), Outcome.IN_PROGRESS, ""),
        (Answers(status="committed"), Outcome.IN_PROGRESS, "ended just now"),
        (Answers(error=OSError("cut")), Outcome.UNKNOWN, "asking for its status: cut"),
    ],
)
async def test_what_has_not_ended_and_its_server_failed_over(answers: Answers, outcome: Outcome, reason: str) -> None:
    """It may have been prepared for two phases, and commit yet on the new primary."""
    v = await judge(answers, CheckTransaction(new_id(), D), replace(SEEN, timeline=2))
    assert (v.outcome, reason in v.reason) == (outcome, True), v
    assert v.failed_over_to == (2 if "fenced" in v.reason else 0)


async def test_marked_and_fenced_transactions_in_one_question(world: World) -> None:
    id = await world.publish()
    marked = world.tied(id)
    fenced = replace(marked, mode=Mode.XID_FENCED)
    outcomes = [v.outcome for v in await world.ask(marked, fenced, fenced, marked, id=id)]
    assert outcomes == [Outcome.COMMITTED] * 4


async def test_rules_of_one_snapshot() -> None:
    t = CheckTransaction(new_id(), D)
    standby = rule(t, replace(SEEN, standby=True))
    assert standby is not None
    assert standby.reason == "the database asked is a standby"
    fenced = CheckTransaction(t.id, replace(D, mode=Mode.XID_FENCED))
    forgotten = rule(fenced, replace(SEEN, ended=True))
    assert forgotten is not None
    assert (forgotten.outcome, forgotten.reason) == (Outcome.UNKNOWN, "pg_xact_status has forgotten it")
    [v] = await verdicts(Answers(seen=[]), [t])
    assert v.reason == "the database did not answer for it"


async def test_a_question_that_cannot_be_answered_is_none(
    world: World, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    id = await world.publish()

    async def broken(transactions: object) -> Any:
        raise ZeroDivisionError

    monkeypatch.setattr(world.database, "check", broken)
    with pytest.raises(TimeoutError):
        await asyncio.to_thread(world.platform.ask, id, "default", 0.3)
    assert "answering a check-back question" in caplog.text

    async def nothing(transactions: object) -> list[Verdict]:
        return []

    monkeypatch.setattr(world.database, "check", nothing)
    with pytest.raises(TimeoutError):
        await asyncio.to_thread(world.platform.ask, id, "default", 0.3)


# --- draining ---


async def spill(world: World, *ids: str) -> None:
    await asyncio.to_thread(world.platform.stop)
    for id in ids:
        connection = await asyncpg.connect(world.db.dsn)
        async with world.outbox.transaction(connection) as tx:
            tx.publish(order(id, f"n{len(ids)}"))
        await connection.close()
    world.platform.start()
    await world.client.connect(10)


async def test_order_is_kept_when_an_earlier_request_fails(world: World) -> None:
    """The first of an aggregate cannot be published for now: the second must not overtake it, and others go on."""
    waiting = True
    world.platform.fault = lambda call: (
        Fault(error=fault_error(grpc.StatusCode.INTERNAL))
        if waiting and call.name == "publish" and call.events[0].aggregate_id == "1"
        else None
    )
    for id in ("1", "1", "2"):
        world.db.spill(order(id))
    with pytest.raises(Exception, match="publishing the spilled request"):
        await Drain(world.database).drain_once()
    assert [e.aggregate_id for e in world.platform.published()] == ["2"]
    assert world.db.spilled() == 2
    waiting = False
    assert await Drain(world.database).drain_once()
    assert [e.aggregate_id for e in world.platform.published()] == ["2", "1", "1"]
    assert world.db.spilled() == 0
    assert not await Drain(world.database).drain_once()


async def test_what_is_refused_for_good_is_kept_and_stops_nobody(world: World) -> None:
    world.platform.fault = lambda call: (
        Fault(error=fault_error(grpc.StatusCode.PERMISSION_DENIED, Reason.TOPIC_DENIED))
        if call.name == "publish" and call.events[0].topic == "secret"
        else None
    )
    world.db.spill(order("1", topic="secret"))
    world.db.spill(order("1"))
    world.db.execute("INSERT INTO outbox_marker (id, spilled) VALUES (gen_random_uuid(), 'no request')")
    await Drain(world.database).drain_all()
    assert [e.topic for e in world.platform.published()] == ["orders"]
    assert sorted(r[0][:17] for r in world.db.rows("SELECT refused FROM outbox_marker WHERE refused IS NOT NULL")) == [
        "INVALID_ARGUMENT:",
        "PERMISSION_DENIED",
    ]
    assert [a.kind for a in world.alarms] == [AlarmKind.REFUSED] * 2
    assert world.client.stats().refused == 2
    # It no longer makes others spill.
    await world.publish("2")
    assert len(world.platform.calls("prepare")) == 1


async def test_a_source_that_is_not_accepted_is_no_fault_of_the_request(world: World) -> None:
    world.platform.fault = lambda call: (
        Fault(error=fault_error(grpc.StatusCode.PERMISSION_DENIED, Reason.SOURCE_DENIED))
        if call.name == "publish"
        else None
    )
    world.db.spill(order())
    with pytest.raises(Exception, match="SOURCE_DENIED"):
        await Drain(world.database).drain_once()
    assert world.db.spilled() == 1
    assert not world.alarms


async def test_a_spilled_request_that_is_too_old_is_refused(world: World) -> None:
    world.db.spill(order())
    world.db.execute("UPDATE outbox_marker SET created_at = now() - interval '8 days'")
    await Drain(world.database).drain_all()
    assert not world.platform.published()
    assert "may have been published already" in world.db.value("SELECT refused FROM outbox_marker")


async def test_a_spilled_twin_that_was_aborted_is_a_contradiction(world: World) -> None:
    world.platform.fault = lambda call: Fault(lose_answer=call.name == "prepare")
    id = await world.publish()
    world.platform.fault = None
    world.platform.decide(id, State.ABORTED)
    await Drain(world.database).drain_all()
    assert [a.kind for a in world.alarms] == [AlarmKind.CONTRADICTION]


async def test_one_drains_at_a_time_and_with_the_go_sdk(world: World) -> None:
    world.db.spill(order())
    lock = "SELECT pg_advisory_xact_lock(1868693505, ('outbox_marker'::regclass::oid::bigint - 2147483648)::int)"
    with psycopg.connect(world.db.dsn) as other:
        other.execute(lock)
        assert not await Drain(world.database).drain_once()
        assert not world.platform.published()
    assert await Drain(world.database).drain_once()


async def test_draining_begins_when_the_platform_is_back(world: World) -> None:
    world.engine.spawn(Drain(world.database).run())
    await spill(world, "1", "2", "2", "3")
    await asyncio.to_thread(world.platform.wait, lambda: len(world.platform.published()) == 4, "drained events")
    await asyncio.to_thread(world.platform.wait, lambda: world.db.spilled() == 0, "cleared rows")
    assert world.client.stats().drained == 4


async def test_a_drain_that_fails_is_tried_again(world: World, caplog: pytest.LogCaptureFixture) -> None:
    world.db.execute("ALTER TABLE outbox_marker RENAME TO elsewhere")
    await world.database.attempt("draining spilled requests", Drain(world.database).drain_all)
    assert "draining spilled requests" in caplog.text


async def test_a_marker_that_vanishes_before_the_spill(world: World) -> None:
    await asyncio.to_thread(world.platform.stop)
    world.db.execute(
        "CREATE FUNCTION gone() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NULL; END'; "
        "CREATE TRIGGER gone BEFORE UPDATE ON outbox_marker FOR EACH ROW EXECUTE FUNCTION gone()"
    )
    connection = await asyncpg.connect(world.db.dsn)
    with pytest.raises(Exception, match="the marker is not there"):
        async with world.outbox.transaction(connection) as tx:
            tx.publish(order())
    await connection.close()


async def test_an_attempt_ends_once(world: World) -> None:
    connection, transaction, attempt = await world.open()
    assert attempt.ready
    await transaction.commit()
    attempt.committed()
    attempt.committed()
    attempt.rolled_back()
    await asyncio.to_thread(world.platform.wait, lambda: world.platform.published(), "the commit")
    assert not world.platform.calls("abort")
    await connection.close()


# --- cleaning up ---


def age(world: World, *ids: uuid.UUID) -> list[uuid.UUID]:
    """Makes markers two hours old; their ids too."""
    old = []
    for i, id in enumerate(ids):
        aged = uuid.UUID(int=first_id(time.time() - 7200).int | 1 << 63 | i + 1)
        world.db.execute(
            "UPDATE outbox_marker SET id = %s, created_at = now() - interval '2 hours' WHERE id = %s", aged, id
        )
        old.append(aged)
    return old


async def test_acknowledged_markers_go_after_their_retention(world: World) -> None:
    id = await world.publish()
    await asyncio.to_thread(world.platform.wait, lambda: world.client.stats().acknowledged == 1, "the acknowledgement")
    cleanup = Cleanup(world.database)
    await cleanup.clean_all()
    assert world.db.markers() == 1
    [aged] = age(world, id)
    registration = world.database.registration
    registration._acknowledged.clear()
    registration.acknowledged(aged)
    assert await cleanup.clean_once() == 1
    assert world.db.markers() == 0
    assert world.client.stats().markers_deleted == 1
    for _ in range(CLEAN_ROWS + 1):
        registration.acknowledged(aged)
    await cleanup.clean_all()
    assert not registration._acknowledged


async def test_remembered_markers_are_bounded(platform: FakePlatform, db: SourceDatabase) -> None:
    client = AsyncOutboxClient(platform.config())
    outbox_client.asyncpg.Outbox(client, lambda: asyncpg.connect(db.dsn), upkeep=replace(FAR, max_acknowledged=1))
    registration = client.registration("default")
    assert registration is not None
    registration.acknowledged(new_id())
    registration.acknowledged(new_id())
    assert len(registration._acknowledged) == 1


async def test_the_janitor(world: World) -> None:
    """Old markers of a process that was killed: committed, forgotten in due time, lost, aborted, undecided, not answered for."""
    for _ in range(6):
        await world.publish()
    assert await Cleanup(world.database).tidy_once(uuid.UUID(int=0)) is None  # they are young
    assert world.db.markers() == 6
    ids = [t.id for t in world.platform.transactions()]
    committed, forgotten, lost, aborted, undecided, unanswered = age(world, *ids)
    ledger = world.platform.ledger
    tied = world.tied(ids[0]).to_proto()
    world.platform.clear()
    for id, state in (
        (committed, State.COMMITTED),
        (aborted, State.ABORTED),
        (undecided, State.PREPARED),
        (unanswered, State.PREPARED),
    ):
        ledger.store(id.bytes, tied, world.client.protos([order()]), state)
    world.platform.fault = lambda call: (
        Fault(error=fault_error(grpc.StatusCode.INTERNAL)) if call.name == "get" and call.id == unanswered else None
    )
    cleanup = Cleanup(world.database)

    def left() -> set[uuid.UUID]:
        return {r[0] for r in world.db.rows("SELECT id FROM outbox_marker")}

    assert await cleanup.tidy_once(uuid.UUID(int=0)) is None
    assert left() == {forgotten, lost, aborted, undecided, unanswered}
    kinds = sorted((a.kind.value, str(a.transaction_id)) for a in world.alarms)
    assert kinds == sorted([("contradiction", str(aborted)), ("lost", str(forgotten)), ("lost", str(lost))])
    await asyncio.to_thread(world.platform.wait, lambda: world.platform.transaction(undecided).state is State.COMMITTED)  # type: ignore[union-attr]
    # Past the platform's retention a marker of an unknown transaction is no loss.
    world.platform.horizon = datetime.datetime.now(datetime.timezone.utc)
    await cleanup.tidy_all()
    assert left() == {aborted, unanswered}


async def test_the_janitor_rests_while_the_platform_is_away(world: World) -> None:
    age(world, await world.publish())
    await asyncio.to_thread(world.platform.stop)
    await asyncio.to_thread(world.platform.wait, lambda: world.client.link == "down", "the link to be down")
    await Cleanup(world.database).tidy_all()
    assert world.db.markers() == 1
    assert not world.alarms


async def test_the_janitor_goes_on_where_it_was(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("outbox_client._source.cleanup.JANITOR_ROWS", 1)
    for _ in range(2):
        await world.publish()
    world.platform.horizon = datetime.datetime.now(datetime.timezone.utc)
    first, second = age(world, *[t.id for t in world.platform.transactions()])
    cleanup = Cleanup(world.database)
    assert await cleanup.tidy_once(uuid.UUID(int=0)) == first
    assert await cleanup.tidy_once(first) == second
    assert await cleanup.tidy_once(second) is None
    assert world.db.markers() == 0


async def test_one_janitor_at_a_time_and_with_the_go_sdk(world: World) -> None:
    lock = "SELECT pg_advisory_xact_lock(1868693506, ('outbox_marker'::regclass::oid::bigint - 2147483648)::int)"
    age(world, await world.publish())
    with psycopg.connect(world.db.dsn) as other:
        other.execute(lock)
        assert await Cleanup(world.database).tidy_once(uuid.UUID(int=0)) is None
        assert world.db.markers() == 1


async def test_upkeep_runs_by_itself(platform: FakePlatform, db: SourceDatabase) -> None:
    upkeep = Upkeep(marker_retention=0.05, janitor_interval=0.05, drain_interval=0.05)
    async with AsyncOutboxClient(platform.config()) as client:
        outbox = outbox_client.asyncpg.Outbox(client, lambda: asyncpg.connect(db.dsn), upkeep=upkeep)
        connection = await asyncpg.connect(db.dsn)
        async with outbox.transaction(connection) as tx:
            tx.publish(order())
        await connection.close()
        await asyncio.to_thread(platform.wait, lambda: db.markers() == 0, "the marker to be deleted")


async def test_upkeep_that_ends_is_started_again(
    world: World, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    times = 0

    class Broken:
        name = "broken"

        async def run(self) -> None:
            nonlocal times
            times += 1
            raise ZeroDivisionError

    task = world.engine.spawn(world.engine._keep_running(Broken()))  # type: ignore[arg-type]
    await asyncio.to_thread(world.platform.wait, lambda: times >= 2, "a second start")
    task.cancel()
    assert "upkeep of a source database ended" in caplog.text
