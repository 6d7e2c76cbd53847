"""The client for asyncio."""

from __future__ import annotations

import asyncio
import logging
import uuid
from types import TracebackType

from outbox_client._client import BaseClient
from outbox_client._core.decisions import Done
from outbox_client._core.engine import Engine
from outbox_client._core.session import closed_error
from outbox_client._core.wire import Kind
from outbox_client._source.database import Registration
from outbox_client.config import Config
from outbox_client.errors import ForkError
from outbox_client.event import Event
from outbox_client.ids import new_id
from outbox_client.transaction import DatabaseTransaction, Transaction


class AsyncOutboxClient(BaseClient):
    """Talks to the platform for one source, from coroutines.

    It is not tied to one event loop: each loop that uses it gets connections of its own, with its first call, which end with
    close in that loop or with the loop. Making one does no I/O. Safe for concurrent use.

    Every call has a deadline (Config.call_timeout) and is repeated within it while that may help. Calls raise a CallError.
    """

    def __init__(self, config: Config, *, logger: logging.Logger | None = None) -> None:
        """See BaseClient."""
        self._open: dict[asyncio.AbstractEventLoop, Engine] = {}
        self._broken = False  # forked while connected
        super().__init__(config, logger=logger)

    def _engines(self) -> list[Engine]:
        with self._lock:
            for loop in [loop for loop, engine in self._open.items() if loop.is_closed() or engine.closed]:
                del self._open[loop]
            return list(self._open.values())

    def _engine(self) -> Engine:
        """Returns the running loop's engine, made when there is none."""
        if self._broken:
            raise ForkError()
        loop = asyncio.get_running_loop()
        engine = self._open.get(loop)
        if engine is not None and not engine.closed:
            return engine
        if self._closed:
            raise closed_error()
        self._engines()  # forgets those of closed loops
        engine = Engine(self.config, self._stats, self.log)
        with self._lock:
            self._open[loop] = engine
            registrations = list(self._registrations.values())
        for registration in registrations:
            engine.register(registration)
        engine.start()
        return engine

    def _tell_engines(self, registration: Registration) -> None:
        try:
            here = asyncio.get_running_loop()
        except RuntimeError:
            here = None
        for engine in self._engines():
            if engine.loop is here:
                engine.register(registration)
            else:
                engine.loop.call_soon_threadsafe(engine.register, registration)

    def _before_fork(self) -> None:
        pass

    def _forked_parent(self) -> None:
        pass

    def _forked_child(self) -> None:
        self._broken = self._broken or bool(self._open)
        self._open = {}

    def spilled(self, database: str) -> None:
        """Counts a spilled request and wakes the drainer."""
        self._stats.spilled += 1
        self._engine().wake_drainer(database)

    async def must_spill(self, database: str) -> bool:
        """Tells whether spilled requests wait in a registered database; True when it does not answer in time."""
        return await self._engine().must_spill(database)

    async def prepare_encoded(self, body: bytes, fail_fast: bool) -> bytes:
        """Makes a Prepare of an encoded request, and returns the token."""
        return await self._engine().do(Kind.PREPARE, body, self.config.prepare_timeout, fail_fast)

    # --- public ---

    async def connect(self, timeout: float | None = None) -> None:
        """Opens the session and waits until it is up. Optional: calls do it by themselves.

        timeout: seconds; default Config.connect_timeout. Raises UnavailableError, which says why the last attempt failed.
        """
        await self._engine().connect(timeout or self.config.connect_timeout)

    async def flush(self, timeout: float | None = None) -> bool:
        """Waits until the Commits and Aborts that were sent later from this event loop are acknowledged. False: the time was over first.

        Nothing is lost then: the platform finds the decisions out by asking. timeout: seconds; default Config.close_timeout.
        """
        engine = self._open.get(asyncio.get_running_loop())
        return engine is None or await engine.flush(self.config.close_timeout if timeout is None else timeout)

    async def close(self) -> None:
        """Ends upkeep, waits up to Config.close_timeout for Commits that are not acknowledged, and closes the connections of this loop."""
        self._closed = True
        engine = self._open.pop(asyncio.get_running_loop(), None)
        if engine is not None:
            await engine.close()

    async def __aenter__(self) -> AsyncOutboxClient:
        self._engine()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def publish(self, *events: Event, transaction_id: uuid.UUID | None = None, kept: bool = False) -> uuid.UUID:
        """Publishes events that belong to no database transaction. They are durable and decided when it returns.

        transaction_id is the idempotency key: repeating a call with the same id and the same events (with occurred_at set) is safe,
        for as long as the platform remembers it (15 minutes), or 7 days with kept: say so from the first call on if the events are
        kept somewhere and published again until that succeeds. Default: a new id. Returns it.
        """
        transaction_id = transaction_id or new_id()
        await self._engine().do(
            Kind.PUBLISH, self._publish_body(transaction_id, events, kept), self.config.call_timeout
        )
        return transaction_id

    async def prepare(
        self, transaction_id: uuid.UUID, database_transaction: DatabaseTransaction, *events: Event
    ) -> bytes:
        """Stores events durably but invisibly, in an open database transaction whose marker is written. Returns the token.

        UnavailableError: it may or may not have been stored. COMMIT only after success. Limit: Config.prepare_timeout.
        """
        return await self.prepare_encoded(self._prepare_body(transaction_id, database_transaction, events), False)

    async def commit(self, transaction_id: uuid.UUID, token: bytes = b"") -> None:
        """Tells that the local transaction committed, and waits for the acknowledgement. Most callers want commit_later."""
        await self._engine().do(Kind.COMMIT, self._commit_body(transaction_id, token), self.config.call_timeout)

    async def abort(self, transaction_id: uuid.UUID, token: bytes = b"") -> None:
        """Tells that the local transaction did not commit, and waits for the acknowledgement. Never when the outcome is unknown."""
        await self._engine().do(Kind.ABORT, self._abort_body(transaction_id, token), self.config.call_timeout)

    async def get_transaction(self, transaction_id: uuid.UUID) -> Transaction:
        """Tells what the platform knows about a transaction. Raises UnknownTransactionError when it does not know it, or no longer."""
        return Transaction.from_proto((await self._engine().get_transaction(transaction_id)).transaction)

    def commit_later(self, transaction_id: uuid.UUID, token: bytes = b"", *, done: Done | None = None) -> None:
        """See BaseClient. To be called in the event loop's thread."""
        self._decide(Kind.COMMIT, transaction_id, self._commit_body(transaction_id, token), done)

    def abort_later(self, transaction_id: uuid.UUID, token: bytes = b"", *, done: Done | None = None) -> None:
        """See BaseClient. To be called in the event loop's thread."""
        self._decide(Kind.ABORT, transaction_id, self._abort_body(transaction_id, token), done)

    def _decide(self, kind: Kind, transaction_id: uuid.UUID, body: bytes, done: Done | None) -> None:
        if self._closed and asyncio.get_running_loop() not in self._open:
            if done is not None:
                done(closed_error())
            return
        self._engine().decide_later(kind, transaction_id, body, done)
