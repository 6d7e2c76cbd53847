"""SQLAlchemy 2: events that share the fate of a Session's or an AsyncSession's transaction (the extra "sqlalchemy").

    outbox = Outbox(client, engine)

    async with outbox.transaction(session) as tx:      # commits or rolls back
        session.add(order)
        tx.publish(Event(...))

    outbox.collect(session, Event(...))                # or: whoever commits the session publishes
    await session.commit()

The events are collected. When the session commits, it is flushed, the marker is written, one Prepare is sent, and then COMMIT. After
COMMIT nothing of ours is awaited or raised. Take the aggregate's row lock in the transaction, as an UPDATE of its row does: the order
of these locks is the order in which the events of the aggregate are published.

What session.commit() may raise beside the database's own errors, before COMMIT, so that the transaction has to be rolled back:
InvalidError and DeniedError (the platform refuses the events), UnavailableError (it is away and spilling is not allowed),
MustSpillError, SavepointError, AsyncCommitError.
"""

from __future__ import annotations

import uuid
import weakref
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import (
    AbstractAsyncContextManager,
    AbstractContextManager,
    asynccontextmanager,
    contextmanager,
    suppress,
)
from typing import Any, Generic, TypeVar, overload

from sqlalchemy import (
    BigInteger,
    Column,
    Connection,
    DateTime,
    Engine,
    Identity,
    Index,
    LargeBinary,
    MetaData,
    Table,
    Text,
    Uuid,
    event,
    func,
    text,
)
from sqlalchemy.engine import ExceptionContext
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession
from sqlalchemy.orm import Session, SessionTransaction
from sqlalchemy.util import await_only

from outbox_client._source import driver
from outbox_client._source.attempt import Attempt, run
from outbox_client._source.collected import Collected
from outbox_client._source.outcome import certainly_rolled_back
from outbox_client._source.sqlalchemy import AsyncConnector, SyncConnector, statement
from outbox_client.aio import AsyncOutboxClient
from outbox_client.client import OutboxClient
from outbox_client.config import DEFAULT_DATABASE
from outbox_client.errors import NoTransactionError, OutcomeUnknownError, TransactionError
from outbox_client.event import Event
from outbox_client.upkeep import Upkeep

ClientT = TypeVar("ClientT", OutboxClient, AsyncOutboxClient)

_KEY = "outbox_client"  # of Session.info


class Outbox(Generic[ClientT]):
    """Publishes events of SQLAlchemy sessions. Make one per database, anywhere; it does no I/O. Safe for concurrent use."""

    client: ClientT

    def __init__(
        self,
        client: ClientT,
        engine: Engine | AsyncEngine | None = None,
        *,
        database: str = DEFAULT_DATABASE,
        spill: bool = True,
        upkeep: Upkeep | None = None,
    ) -> None:
        """Makes one.

        client: an AsyncOutboxClient for AsyncSession and AsyncEngine, an OutboxClient for Session and Engine.
        engine: registers the database with the client, which then answers the platform's questions, publishes spilled requests and
        deletes old markers. Upkeep uses connections of its own, at most four, made as the engine makes them. None: it is registered
        elsewhere, or not at all (then nothing is spilled).
        spill: whether the request may be stored in the database while the platform is away. False: the transaction fails instead.
        """
        self.client, self.database, self.spill = client, database, spill
        _listen()
        if engine is None:
            return
        if isinstance(engine, AsyncEngine) != isinstance(client, AsyncOutboxClient):
            raise TypeError("an AsyncEngine goes with an AsyncOutboxClient, an Engine with an OutboxClient")
        connector: driver.Connector = (
            AsyncConnector(engine) if isinstance(engine, AsyncEngine) else SyncConnector(engine)
        )
        client.register_database(connector, name=database, upkeep=upkeep)
        _listen_to(engine.sync_engine if isinstance(engine, AsyncEngine) else engine)

    def collect(self, session: Session | AsyncSession, *events: Event) -> list[uuid.UUID]:
        """Adds events to the transaction that the session is in, or that this begins. Returns their ids.

        They are checked now (InvalidError; the session stays usable) and prepared when the session commits, all at once, in this
        order. No I/O. Not a coroutine, also for an AsyncSession. In a savepoint they share its fate too.
        """
        return self._pending(session).collected.add(events)

    def pending(self, session: Session | AsyncSession) -> list[Event]:
        """Returns the events that the session's transaction has collected."""
        found = _sync(session).info.get(_KEY)
        return found.collected.events() if isinstance(found, _Pending) else []

    def _pending(self, session: Session | AsyncSession) -> _Pending:
        session = _sync(session)
        if not session.in_transaction():
            session.begin()
        found = session.info.get(_KEY)
        if not isinstance(found, _Pending):
            bind = session.get_bind()
            _listen_to(bind.engine)
            found = session.info[_KEY] = _Pending(self)
        elif found.outbox is not self:
            same = found.outbox.client is self.client and found.outbox.database == self.database
            if not same:
                raise NoTransactionError("the transaction has events of another client or database")
        return found

    @overload
    def transaction(
        self: Outbox[AsyncOutboxClient], session: AsyncSession
    ) -> AbstractAsyncContextManager[SessionEvents]: ...
    @overload
    def transaction(self: Outbox[OutboxClient], session: Session) -> AbstractContextManager[SessionEvents]: ...
    def transaction(self, session: Any) -> Any:
        """Runs a block in the session's transaction: commits at its end, rolls back when it raises.

        A transaction that the session has begun already, by itself, is taken over. Yields a SessionEvents to publish with.
        Raises OutcomeUnknownError when COMMIT was sent and not answered.
        """
        if isinstance(session, AsyncSession):
            return _transaction_async(self, session)
        return _transaction(self, session)


class SessionEvents:
    """What outbox.transaction(session) yields."""

    def __init__(self, outbox: Outbox[Any], session: Session | AsyncSession) -> None:
        self._outbox, self._session = outbox, session

    def publish(self, *events: Event) -> list[uuid.UUID]:
        """Adds events to the transaction; see Outbox.collect."""
        return self._outbox.collect(self._session, *events)


class _Pending:
    """The events of a session's transaction, and what became of them. It hangs in Session.info as long as the transaction."""

    def __init__(self, outbox: Outbox[Any]) -> None:
        self.outbox = outbox
        self.collected = Collected.none(outbox.client)
        self.savepoints: list[tuple[SessionTransaction, int]] = []
        self.attempt: Attempt | None = None
        self.commit_sent = False
        self.suspect = False  # something failed between Prepare and COMMIT
        self.rolled_back = False  # COMMIT was answered by a roll-back


def _sync(session: Session | AsyncSession) -> Session:
    return session.sync_session if isinstance(session, AsyncSession) else session


@asynccontextmanager
async def _transaction_async(outbox: Outbox[Any], session: AsyncSession) -> AsyncIterator[SessionEvents]:
    _refuse_savepoint(session.sync_session)
    if not session.in_transaction():
        await session.begin()
    try:
        yield SessionEvents(outbox, session)
    except BaseException:
        await session.rollback()
        raise
    pending = session.sync_session.info.get(_KEY)
    try:
        await session.commit()
    except BaseException as e:
        unknown = _unknown(pending, e)
        with suppress(Exception):  # what ended the block is said already
            await session.rollback()
        if unknown is None:
            raise
        raise unknown from e


@contextmanager
def _transaction(outbox: Outbox[Any], session: Session) -> Iterator[SessionEvents]:
    _refuse_savepoint(session)
    if not session.in_transaction():
        session.begin()
    try:
        yield SessionEvents(outbox, session)
    except BaseException:
        session.rollback()
        raise
    pending = session.info.get(_KEY)
    try:
        session.commit()
    except BaseException as e:
        unknown = _unknown(pending, e)
        with suppress(Exception):  # what ended the block is said already
            session.rollback()
        if unknown is None:
            raise
        raise unknown from e


def _refuse_savepoint(session: Session) -> None:
    if session.in_nested_transaction():
        raise NoTransactionError(
            "the session is in a savepoint; begin the transaction with outbox.transaction(session)"
        )


def _unknown(pending: object, error: BaseException) -> OutcomeUnknownError | None:
    """Tells whether an error of commit() leaves the outcome unknown."""
    if not isinstance(pending, _Pending) or not pending.commit_sent or certainly_rolled_back(error):
        return None
    return OutcomeUnknownError(pending.attempt.id if pending.attempt else None, error)


# --- the session's events, in the order in which they come ---

_attempts: weakref.WeakKeyDictionary[Connection, _Pending] = weakref.WeakKeyDictionary()  # prepared, COMMIT to follow
_savepoints: weakref.WeakKeyDictionary[Connection, list[str]] = (
    weakref.WeakKeyDictionary()
)  # of the database, oldest first
_engines: weakref.WeakSet[Engine] = weakref.WeakSet()  # that we listen to
_listening = False


def _listen() -> None:
    """Listens to all sessions, once. What has no events costs one look into Session.info."""
    global _listening
    if _listening:
        return
    _listening = True
    event.listen(Session, "after_transaction_create", _after_transaction_create)
    event.listen(Session, "before_commit", _before_commit)
    event.listen(Session, "after_commit", _after_commit)
    event.listen(Session, "after_rollback", _after_rollback)
    event.listen(Session, "after_soft_rollback", _after_soft_rollback)
    event.listen(Session, "after_transaction_end", _after_transaction_end)


def _after_transaction_create(session: Session, transaction: SessionTransaction) -> None:
    pending = session.info.get(_KEY)
    if pending is not None and transaction.nested:
        pending.savepoints.append((transaction, pending.collected.mark()))


def _after_soft_rollback(session: Session, transaction: SessionTransaction) -> None:
    """A savepoint was rolled back: its events with it, and those of savepoints inside it."""
    pending = session.info.get(_KEY)
    if pending is None or not transaction.nested:
        return
    for i, (savepoint, mark) in enumerate(pending.savepoints):
        if savepoint is transaction:
            pending.collected.back_to(mark)
            del pending.savepoints[i + 1 :]
            return
    # The savepoint is older than the first event of the transaction.
    pending.collected.back_to(0)


def _before_commit(session: Session) -> None:
    """Flushes, writes the marker, prepares. The session's own COMMIT follows."""
    pending = session.info.get(_KEY)
    if pending is None or not pending.collected.protos or session.in_nested_transaction():
        return
    if pending.attempt is not None:
        raise TransactionError("the transaction could not be prepared and has to be rolled back")
    session.flush()
    connection = session.connection()
    if isinstance(session.get_bind(), Connection):
        raise NoTransactionError(
            "the session is bound to a connection, whose transaction it may not end; bind it to an engine"
        )
    outbox = pending.outbox
    pending.attempt = attempt = Attempt(outbox.client, outbox.database, outbox.spill)
    _release_savepoints(connection)
    run(attempt.prepare(pending.collected.protos), _stepper(connection, outbox.client))
    _attempts[connection] = pending


def _stepper(connection: Connection, client: OutboxClient | AsyncOutboxClient) -> Callable[[driver.Step], Any]:
    """Does the steps of the protocol on the session's connection. In an AsyncSession it runs in SQLAlchemy's greenlet."""

    def step(wanted: driver.Step) -> Any:
        if isinstance(wanted, driver.Fetch):
            return connection.exec_driver_sql(*statement(connection.dialect, wanted.sql, wanted.args)).all()
        if isinstance(wanted, driver.Execute):
            return connection.exec_driver_sql(*statement(connection.dialect, wanted.sql, wanted.args)).rowcount
        if isinstance(wanted, driver.MustSpill):
            if isinstance(client, OutboxClient):
                return client.must_spill(wanted.database)
            return await_only(client.must_spill(wanted.database))
        if isinstance(client, OutboxClient):
            return client.prepare_encoded(wanted.body, wanted.fail_fast)
        return await_only(client.prepare_encoded(wanted.body, wanted.fail_fast))

    return step


def _listen_to(engine: Engine) -> None:
    if engine not in _engines:
        _engines.add(engine)
        event.listen(engine, "release_savepoint", _savepoint_released)
        event.listen(engine, "rollback_savepoint", _savepoint_rolled_back)
        event.listen(engine, "commit", _commit_is_sent)
        event.listen(engine, "rollback", _rolled_back)
        event.listen(engine, "handle_error", _failed)


# SQLAlchemy rolls back to a savepoint and leaves it in the database: what follows is still inside it, but nobody can roll back
# to it any more. It is released before the marker is written, which belongs to the top level.


def _savepoint_rolled_back(connection: Connection, name: str, context: object) -> None:
    _savepoints[connection] = [*_older(connection, name), name]


def _savepoint_released(connection: Connection, name: str, context: object) -> None:
    _savepoints[connection] = _older(connection, name)


def _older(connection: Connection, name: str) -> list[str]:
    """Returns those that were set before another one. SQLAlchemy counts them: sa_savepoint_1, …"""

    def number(name: str) -> int:
        return int(name.rpartition("_")[2])

    return [n for n in _savepoints.get(connection, []) if number(n) < number(name)]


def _release_savepoints(connection: Connection) -> None:
    """Releases the oldest savepoint, and with it all others."""
    names = _savepoints.pop(connection, [])
    if names:
        connection.dialect.do_release_savepoint(connection, names[0])


def _rolled_back(connection: Connection) -> None:
    _savepoints.pop(connection, None)


def _commit_is_sent(connection: Connection) -> None:
    _savepoints.pop(connection, None)
    pending = _attempts.get(connection)
    if pending is not None:
        pending.commit_sent = True


def _failed(context: ExceptionContext) -> None:
    pending = _attempts.get(context.connection) if context.connection is not None else None
    if pending is None:
        return
    if not pending.commit_sent:
        pending.suspect = (
            True  # PostgreSQL answers the COMMIT of a failed transaction with a roll-back, and drivers say nothing
        )
    elif certainly_rolled_back(context.original_exception):
        pending.rolled_back = True


def _after_commit(session: Session) -> None:
    """COMMIT succeeded. Nothing here may raise into the application."""
    pending = session.info.get(_KEY)
    if pending is None or session.in_nested_transaction():
        return
    session.info.pop(_KEY, None)
    # Without a COMMIT of our own connection the transaction goes on outside of this session: the platform finds its end out.
    if pending.attempt is not None and pending.commit_sent and not pending.suspect:
        pending.attempt.committed()


def _after_rollback(session: Session) -> None:
    """The transaction, or a savepoint of it, is rolled back."""
    pending = session.info.get(_KEY)
    if pending is not None and not session.in_nested_transaction():
        _dropped(session, pending)


def _after_transaction_end(session: Session, transaction: SessionTransaction) -> None:
    """The transaction has ended in whatever way: also by close."""
    pending = session.info.get(_KEY)
    if pending is None:
        return
    if transaction.parent is None:
        _dropped(session, pending)


def _dropped(session: Session, pending: _Pending) -> None:
    session.info.pop(_KEY, None)
    # After a COMMIT that failed the outcome is unknown, and nothing is sent, unless PostgreSQL itself said that it rolled back.
    if pending.attempt is not None and (not pending.commit_sent or pending.rolled_back):
        pending.attempt.rolled_back()


def marker_table(metadata: MetaData) -> Table:
    """Declares the marker table, for metadata.create_all() and for Alembic's autogenerate. The same as outbox_client.MARKER_DDL."""
    return Table(
        "outbox_marker",
        metadata,
        Column("id", Uuid, primary_key=True),
        Column("seq", BigInteger, Identity(always=True)),
        Column("created_at", DateTime(timezone=True), nullable=False, server_default=func.now()),
        Column("spilled", LargeBinary),
        Column("refused", Text),
        Index("outbox_marker_spilled", "seq", postgresql_where=text("spilled IS NOT NULL AND refused IS NULL")),
    )
