"""Transactions the way services do them: an AsyncSession whose events the SDK prepares when it commits.

The id of the transaction, its Prepare and its Commit are the SDK's own business, inside commit(). Watchers of SQLAlchemy's events see
them go by: the marker, which carries the id, is written; everything is prepared and COMMIT follows; COMMIT has succeeded. There the
truth is told, the journal written, and the process killed.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Callable
from contextvars import ContextVar
from functools import partial
from typing import Any

from outbox_client import AsyncCommitError, AsyncOutboxClient, Event, NoTransactionError, SavepointError
from sqlalchemy import Connection, event
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession
from sqlalchemy.orm import Session

import fault
from journal import COMMIT, FAIL, INFO, INVOKE, LOCAL, OK, PREPARE, ROLLBACK, Noted
from journal import MISUSE as MISUSE_STEP
from plan import FORGET, GIVE_UP, LATE, MISUSE, SAVEPOINT, TELL, UNDO, Change, Query, truth
from service import outcome
from worker import Worker


class RolledBackError(Exception):
    """The service wants its transaction to be rolled back."""


class Way:
    """How far a transaction has come."""

    def __init__(self, worker: Worker, profile: str) -> None:
        self.worker, self.profile = worker, profile
        self.changes: list[Change] = []
        self.noted: list[Noted] = []
        self.id: uuid.UUID | None = None  # once its marker is written
        self.step = ""  # under way

    def note(self, kind: str, step: str, **more: Any) -> None:
        """Writes an entry about it."""
        self.step = step if kind == INVOKE else ""
        self.worker.note(kind, step, self.profile, self.id, **more)

    def failed(self, error: BaseException) -> None:
        """Notes what an error says."""
        self.worker.plan.uncertain()
        if self.step == PREPARE:
            self.note(outcome(error), PREPARE, note=error)
        elif self.step == LOCAL:
            self.note(INFO, LOCAL, note=error)


_way: ContextVar[Way] = ContextVar("way")


class Teller(AsyncOutboxClient):
    """Tells the platform of some COMMITs late, and of some never."""

    def commit_later(self, transaction_id: uuid.UUID, token: bytes = b"", **more: Any) -> None:
        """See AsyncOutboxClient."""
        way = _way.get()
        tell = partial(super().commit_later, transaction_id, token, **more)
        if way.profile == LATE:
            way.worker.service.later(way.worker.random.uniform(0, 4), partial(_late, way, tell))
        elif way.profile != FORGET:
            way.note(INVOKE, COMMIT)
            tell()


async def _late(way: Way, tell: Callable[[], None]) -> None:
    way.note(INVOKE, COMMIT)
    tell()


def watch(engine: AsyncEngine) -> None:
    """Begins to watch all sessions, after the SDK has begun to."""
    event.listen(engine.sync_engine, "after_cursor_execute", _statement)
    event.listen(Session, "before_commit", _before_commit)  # after the SDK's own, which prepares
    event.listen(Session, "after_commit", _after_commit, insert=True)  # before the SDK's own, which tells the platform


def _statement(connection: Connection, cursor: Any, sql: str, parameters: Any, context: Any, many: bool) -> None:
    if "INSERT INTO outbox_marker" not in sql:
        return
    way = _way.get()
    way.id = uuid.UUID(parameters[0])
    connection.exec_driver_sql(TELL, truth(way.id, way.changes))
    way.note(INVOKE, PREPARE, events=way.noted)
    fault.point("driver.K1")
    fault.during("driver.K2")


def _before_commit(session: Session) -> None:
    way = _way.get()
    if session.in_nested_transaction():
        return
    if way.step != PREPARE:
        raise RuntimeError("the SDK has written no marker")
    way.note(OK, PREPARE)
    if way.profile == UNDO:
        raise RolledBackError
    fault.point("driver.K3")
    way.note(INVOKE, LOCAL)
    fault.during("driver.K4")


def _after_commit(session: Session) -> None:
    if not session.in_nested_transaction():
        _way.get().note(OK, LOCAL)
        fault.point("driver.K5")


def _query(session: AsyncSession) -> Query:
    async def query(sql: str, *args: Any) -> Any:
        result = await (await session.connection()).exec_driver_sql(sql, args)
        return result.scalar() if result.returns_rows else None

    return query


async def transact(worker: Worker, profile: str) -> None:
    """Does one transaction."""
    way = Way(worker, profile)
    _way.set(way)
    outbox = worker.service.outbox
    try:
        async with AsyncSession(worker.service.engine) as session:
            if worker.random.randrange(2):
                async with outbox.transaction(session) as tx:
                    await _fill(way, session, tx.publish)
            else:
                await _fill(way, session, partial(outbox.collect, session))
                await session.commit()
    except RolledBackError:
        worker.plan.uncertain()
        if way.id is not None:
            way.note(OK, ROLLBACK)
        return
    except BaseException as e:
        way.failed(e)
        raise
    fault.point("driver.K6")


async def _fill(way: Way, session: AsyncSession, publish: Callable[..., Any]) -> None:
    """Does what the transaction is there for, and gives its events to the SDK."""
    plan = way.worker.plan
    way.changes = plan.changes(way.profile)
    await plan.lock(_query(session), way.changes)
    sent, way.noted = plan.events(way.changes)
    if way.profile == SAVEPOINT:
        await _savepoints(way, session, publish, sent)
    else:
        publish(*sent)
    await asyncio.sleep(plan.thinking(way.profile))
    if way.profile == GIVE_UP:
        raise RolledBackError


async def _savepoints(way: Way, session: AsyncSession, publish: Callable[..., Any], sent: list[Event]) -> None:
    """Publishes in savepoints: what is rolled back takes its events along, and those of savepoints in it."""
    publish(*sent[:1])
    nobody, _ = way.worker.plan.events(way.changes)
    outer = await session.begin_nested()
    publish(*nobody[:1])
    async with session.begin_nested():
        await _query(session)(TELL, uuid.uuid4(), ["undone"], [0], [0])
        publish(*nobody[1:])
    await outer.rollback()
    async with session.begin_nested():
        publish(*sent[1:])


async def misuse(worker: Worker) -> None:
    """Does what the SDK must refuse. A database that is away proves nothing."""
    what, wanted = worker.random.choice(
        (
            ("synchronous_commit=off", AsyncCommitError),
            ("savepoint", SavepointError),
            ("transaction in a savepoint", NoTransactionError),
        )
    )
    way = Way(worker, MISUSE)
    _way.set(way)
    outbox = worker.service.outbox
    try:
        async with AsyncSession(worker.service.engine) as session:
            query = _query(session)
            if wanted is AsyncCommitError:
                await query("SET LOCAL synchronous_commit = off")
            elif wanted is SavepointError:  # one that the SDK knows nothing of
                await query("SAVEPOINT inner_one")
            else:
                await session.begin_nested()
                async with outbox.transaction(session):
                    pass
            await _fill(way, session, partial(outbox.collect, session))
            await session.commit()
    except wanted:
        worker.note(OK, MISUSE_STEP, MISUSE, None, note=what)
    except BaseException as e:
        way.failed(e)
        raise
    else:
        worker.note(FAIL, MISUSE_STEP, MISUSE, None, note=f"{what} was not refused")
