"""The blocking client."""

from __future__ import annotations

import asyncio
import gc
import logging
import threading
import uuid
from collections.abc import Callable, Coroutine
from types import TracebackType
from typing import Any, TypeVar

from outbox_client._client import BaseClient
from outbox_client._core.decisions import Done
from outbox_client._core.engine import Engine
from outbox_client._core.session import closed_error
from outbox_client._core.wire import Kind
from outbox_client._source.database import Registration
from outbox_client.config import Config
from outbox_client.errors import ClosedError
from outbox_client.event import Event
from outbox_client.ids import new_id
from outbox_client.transaction import DatabaseTransaction, Transaction

T = TypeVar("T")


class _EngineThread:
    """An engine in an event loop in a thread of its own."""

    def __init__(self, config: Config, client: OutboxClient) -> None:
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name="outbox-client", daemon=True)
        self._thread.start()

        async def make() -> Engine:
            return Engine(config, client._stats, client.log)

        self.engine: Engine = self.call(make())

    def _run(self) -> None:
        asyncio.set_event_loop(self.loop)
        try:
            self.loop.run_forever()
        finally:
            self.loop.close()

    def call(self, work: Coroutine[Any, Any, T]) -> T:
        """Runs a coroutine there and waits for it."""
        return asyncio.run_coroutine_threadsafe(work, self.loop).result()

    def soon(self, what: Callable[..., object], *args: object) -> None:
        """Calls a function there and does not wait."""
        self.loop.call_soon_threadsafe(what, *args)

    def stop(self) -> None:
        """Closes the engine and ends the thread."""
        self.call(self.engine.close())
        self.soon(self.loop.stop)
        if threading.current_thread() is not self._thread:
            self._thread.join()


class OutboxClient(BaseClient):
    """Talks to the platform for one source, from threads.

    Its connections live in a thread of their own, which starts with the first call, once per process: make a client at import
    time and use it after a fork. A fork while it is connected closes its connections first; the parent and the child open new ones
    with their next call. Making one does no I/O. Safe for concurrent use.

    Every call has a deadline (Config.call_timeout) and is repeated within it while that may help. Calls raise a CallError.
    """

    def __init__(self, config: Config, *, logger: logging.Logger | None = None) -> None:
        """See BaseClient."""
        self._thread: _EngineThread | None = None
        self._starting = threading.Lock()  # guards _thread; held during a fork
        super().__init__(config, logger=logger)

    def _engines(self) -> list[Engine]:
        thread = self._thread
        return [thread.engine] if thread is not None else []

    def _running(self) -> _EngineThread:
        """Returns the engine's thread, started when there is none."""
        thread = self._thread
        if thread is not None:
            return thread
        with self._starting:
            if self._closed:
                raise closed_error()
            if self._thread is None:
                thread = _EngineThread(self.config, self)
                for registration in self._registrations.values():
                    thread.soon(thread.engine.register, registration)
                thread.soon(thread.engine.start)
                self._thread = thread
            return self._thread

    def _call(self, work: Callable[[Engine], Coroutine[Any, Any, T]]) -> T:
        while True:
            thread = self._running()
            try:
                return thread.call(work(thread.engine))
            except ClosedError:
                if self._closed:
                    raise
                # Closed for a fork by another thread. Every call is idempotent.

    def _tell_engines(self, registration: Registration) -> None:
        with self._starting:
            if self._thread is not None:
                self._thread.soon(self._thread.engine.register, registration)

    def _before_fork(self) -> None:
        self._starting.acquire()
        thread, self._thread = self._thread, None
        if thread is not None:
            thread.stop()
            del thread
            gc.collect()  # gRPC's own threads end with its last connection object

    def _forked_parent(self) -> None:
        self._starting.release()

    def _forked_child(self) -> None:
        self._starting = threading.Lock()

    def spilled(self, database: str) -> None:
        """Counts a spilled request and wakes the drainer."""
        self._stats.spilled += 1
        thread = self._running()
        thread.soon(thread.engine.wake_drainer, database)

    def must_spill(self, database: str) -> bool:
        """Tells whether spilled requests wait in a registered database; True when it does not answer in time."""
        return self._call(lambda engine: engine.must_spill(database))

    def prepare_encoded(self, body: bytes, fail_fast: bool) -> bytes:
        """Makes a Prepare of an encoded request, and returns the token."""
        return self._call(lambda engine: engine.do(Kind.PREPARE, body, self.config.prepare_timeout, fail_fast))

    # --- public ---

    def connect(self, timeout: float | None = None) -> None:
        """Opens the session and waits until it is up. Optional: calls do it by themselves.

        timeout: seconds; default Config.connect_timeout. Raises UnavailableError, which says why the last attempt failed.
        """
        self._call(lambda engine: engine.connect(timeout or self.config.connect_timeout))

    def flush(self, timeout: float | None = None) -> bool:
        """Waits until the Commits and Aborts that were sent later are acknowledged. False: the time was over first.

        Nothing is lost then: the platform finds the decisions out by asking. timeout: seconds; default Config.close_timeout.
        """
        if self._thread is None:
            return True
        return self._call(lambda engine: engine.flush(self.config.close_timeout if timeout is None else timeout))

    def close(self) -> None:
        """Ends upkeep, waits up to Config.close_timeout for Commits that are not acknowledged, and closes the connections."""
        with self._starting:
            self._closed = True
            thread, self._thread = self._thread, None
        if thread is not None:
            thread.stop()

    def __enter__(self) -> OutboxClient:
        self._running()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def publish(self, *events: Event, transaction_id: uuid.UUID | None = None, kept: bool = False) -> uuid.UUID:
        """Publishes events that belong to no database transaction. They are durable and decided when it returns.

        transaction_id is the idempotency key: repeating a call with the same id and the same events (with occurred_at set) is safe,
        for as long as the platform remembers it (15 minutes), or 7 days with kept: say so from the first call on if the events are
        kept somewhere and published again until that succeeds. Default: a new id. Returns it.
        """
        transaction_id = transaction_id or new_id()
        body = self._publish_body(transaction_id, events, kept)
        self._call(lambda engine: engine.do(Kind.PUBLISH, body, self.config.call_timeout))
        return transaction_id

    def prepare(self, transaction_id: uuid.UUID, database_transaction: DatabaseTransaction, *events: Event) -> bytes:
        """Stores events durably but invisibly, in an open database transaction whose marker is written. Returns the token.

        UnavailableError: it may or may not have been stored. COMMIT only after success. Limit: Config.prepare_timeout.
        """
        return self.prepare_encoded(self._prepare_body(transaction_id, database_transaction, events), False)

    def commit(self, transaction_id: uuid.UUID, token: bytes = b"") -> None:
        """Tells that the local transaction committed, and waits for the acknowledgement. Most callers want commit_later."""
        body = self._commit_body(transaction_id, token)
        self._call(lambda engine: engine.do(Kind.COMMIT, body, self.config.call_timeout))

    def abort(self, transaction_id: uuid.UUID, token: bytes = b"") -> None:
        """Tells that the local transaction did not commit, and waits for the acknowledgement. Never when the outcome is unknown."""
        body = self._abort_body(transaction_id, token)
        self._call(lambda engine: engine.do(Kind.ABORT, body, self.config.call_timeout))

    def get_transaction(self, transaction_id: uuid.UUID) -> Transaction:
        """Tells what the platform knows about a transaction. Raises UnknownTransactionError when it does not know it, or no longer."""
        return Transaction.from_proto(self._call(lambda engine: engine.get_transaction(transaction_id)).transaction)

    def commit_later(self, transaction_id: uuid.UUID, token: bytes = b"", *, done: Done | None = None) -> None:
        """See BaseClient. done is called in the client's own thread."""
        self._decide(Kind.COMMIT, transaction_id, self._commit_body(transaction_id, token), done)

    def abort_later(self, transaction_id: uuid.UUID, token: bytes = b"", *, done: Done | None = None) -> None:
        """See BaseClient. done is called in the client's own thread."""
        self._decide(Kind.ABORT, transaction_id, self._abort_body(transaction_id, token), done)

    def _decide(self, kind: Kind, transaction_id: uuid.UUID, body: bytes, done: Done | None) -> None:
        try:
            thread = self._running()
        except ClosedError as e:
            if done is not None:
                done(e)
            return
        thread.soon(thread.engine.decide_later, kind, transaction_id, body, done)
