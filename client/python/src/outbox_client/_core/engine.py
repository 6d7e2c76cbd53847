"""The engine: everything of a client that lives in one event loop of one process."""

from __future__ import annotations

import asyncio
import contextvars
import logging
import random
import uuid
from collections.abc import Awaitable, Callable, Coroutine
from typing import TYPE_CHECKING, Any, TypeVar

import grpc

from outbox_client._core.backoff import Backoff
from outbox_client._core.check import answer_question
from outbox_client._core.decisions import Decisions, Done
from outbox_client._core.limits import Limits
from outbox_client._core.session import NoSessionsError, Session, closed_error
from outbox_client._core.status import retryable
from outbox_client._core.unary import Unary
from outbox_client._core.wire import Kind
from outbox_client._gen.outbox.v1 import outbox_service_pb2 as pb
from outbox_client._source.database import Database, Registration
from outbox_client.alarm import Alarm
from outbox_client.errors import CallError, ExhaustedError, UnavailableError
from outbox_client.stats import Stats

if TYPE_CHECKING:
    from outbox_client._core.stream import Stream
    from outbox_client.config import Config

T = TypeVar("T")

MAX_CHECKS = 8  # questions worked on at a time; more are not answered, and the server asks again


class Engine:
    """Sessions, calls, decisions and upkeep in one event loop. Its methods are called in that loop only."""

    def __init__(self, config: Config, stats: Stats, log: logging.Logger) -> None:
        self.config, self.stats, self.log = config, stats, log
        self.loop = asyncio.get_running_loop()
        self.limits = Limits()
        self.closed = False
        self.link = "up" if config.unary else "connecting"
        self.changed = asyncio.Event()  # set and replaced when link changes
        self.unary = Unary(self)
        self.databases: dict[str, Database] = {}
        self._tasks: set[asyncio.Task[Any]] = set()
        self._upkeep: set[asyncio.Task[Any]] = set()
        self._decisions = Decisions(self)
        self._in_flight = asyncio.Semaphore(config.max_in_flight)
        self._checking = 0
        self._turn = random.randrange(16)
        self._sessions = [] if config.unary else [Session(self) for _ in range(config.sessions)]
        self._started = False

    def start(self) -> None:
        """Opens the sessions, once."""
        if self.closed:
            raise closed_error()
        if not self._started:
            self._started = True
            for session in self._sessions:
                self.spawn(session.run())

    def spawn(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        """Runs work in the background until it ends or the engine closes, in a context of its own."""
        task = contextvars.Context().run(self.loop.create_task, work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        self._upkeep.discard(task)
        if not task.cancelled() and task.exception() is not None:
            self.log.error("a background task failed", exc_info=task.exception(), extra=self.extra())

    def extra(self, **words: object) -> dict[str, object]:
        """Returns the structured part of a log record: the attribute "outbox" of it, a dict."""
        return extra(self.config, **words)

    # --- calls ---

    async def do(self, kind: Kind, body: bytes, timeout: float, fail_fast: bool = False) -> bytes:
        """Makes one call within its time and repeats it while that may help. Returns the token. Raises CallError."""
        self.start()
        deadline = self.loop.time() + timeout
        await self._enter(kind, timeout)
        try:
            return await self._retry(deadline, lambda left: self._once(kind, body, left, fail_fast))
        finally:
            self._in_flight.release()

    async def get_transaction(self, transaction_id: uuid.UUID) -> pb.GetTransactionResponse:
        """Asks what the platform knows about a transaction. Raises CallError."""
        request = pb.GetTransactionRequest(source=self.config.source, transaction_id=transaction_id.bytes)
        deadline = self.loop.time() + self.config.call_timeout
        return await self._retry(deadline, lambda left: self.unary.get_transaction(request, left))

    async def _retry(self, deadline: float, attempt: Callable[[float], Awaitable[T]]) -> T:
        delays = None
        while True:
            try:
                return await attempt(max(0.001, deadline - self.loop.time()))
            except CallError as e:
                if self.config.disable_retries or not retryable(e):
                    raise
                delays = delays or Backoff()
                pause = max(next(delays), e.retry_after)
                if self.loop.time() + pause >= deadline:
                    raise
                self.stats.retries += 1
            await asyncio.sleep(pause)

    async def _once(self, kind: Kind, body: bytes, timeout: float, fail_fast: bool) -> bytes:
        session = self.pick()
        if session is not None:
            try:
                return await session.round_trip(kind, body, timeout, fail_fast)
            except NoSessionsError:
                pass
        return await self.unary.call(kind, body, timeout, fail_fast)

    async def _enter(self, kind: Kind, timeout: float) -> None:
        """Waits for a place among the calls in flight."""
        message = f"{kind.word}: {self.config.max_in_flight} calls are in flight"
        full = ExhaustedError(grpc.StatusCode.RESOURCE_EXHAUSTED, message, local=True)
        if self._in_flight.locked() and self.config.fail_when_full:
            raise full
        if not self._in_flight.locked():
            await self._in_flight.acquire()  # does not wait
            return
        try:
            await asyncio.wait_for(self._in_flight.acquire(), timeout)
        except asyncio.TimeoutError:
            raise full from None

    def decide_later(self, kind: Kind, transaction_id: uuid.UUID, body: bytes, done: Done | None) -> None:
        """Sends a Commit or an Abort in the background."""
        if not self.closed:
            self.start()
        self._decisions.later(kind, transaction_id, body, done)

    # --- the link ---

    def pick(self) -> Session | None:
        """Returns the session for the next call: one that is up if there is any. None: make a unary call."""
        self._turn += 1
        n = len(self._sessions)
        second = None
        for i in range(n):
            session = self._sessions[(self._turn + i) % n]
            if session.unary:
                continue
            if session.link == "up":
                return session
            if second is None or session.link == "connecting":
                second = session
        return second

    def link_changed(self) -> None:
        """Recomputes the link: up when any session is, down when all are."""
        links = {"up" if s.unary else s.link for s in self._sessions}
        best = next(link for link in ("up", "connecting", "down") if link in links)
        if best != self.link:
            self.link = best
            self.changed.set()
            self.changed = asyncio.Event()

    async def connect(self, timeout: float) -> None:
        """Waits until a session is up. Raises UnavailableError that says why the last attempt failed."""
        self.start()
        deadline = self.loop.time() + timeout
        while self.link != "up":
            try:
                await asyncio.wait_for(self.changed.wait(), max(0.001, deadline - self.loop.time()))
            except asyncio.TimeoutError:
                last = next((s.last_error for s in self._sessions if s.last_error is not None), None)
                message = f"no session with {self.config.address} within {timeout:g} s" + (f": {last}" if last else "")
                raise UnavailableError(grpc.StatusCode.UNAVAILABLE, message, local=True) from last

    # --- databases ---

    def register(self, registration: Registration) -> None:
        """Answers questions about a database, and keeps its upkeep running."""
        database = Database(self, registration)
        self.databases[registration.name] = database
        task = self.spawn(self._keep_running(database))
        self._upkeep.add(task)
        for session in self._sessions:
            session.renew()  # Hello names the databases

    def database_names(self) -> list[str]:
        """Returns the names of the databases that can be asked about."""
        return sorted(self.databases)

    async def _keep_running(self, database: Database) -> None:
        delays = Backoff(limit=self.config.max_reconnect_delay)
        while True:
            try:
                await database.run()
            except Exception as e:
                self.log.warning(
                    "upkeep of a source database ended; starting it again: %s",
                    e,
                    exc_info=e,
                    extra=self.extra(database=database.name),
                )
            await asyncio.sleep(next(delays))

    async def must_spill(self, database: str) -> bool:
        """Tells whether spilled requests wait in a registered database; True, the safe answer, when it does not answer in time."""
        try:
            # The limit is also what frees us when all connections are taken.
            return await asyncio.wait_for(self.databases[database].must_spill(), self.config.prepare_timeout)
        except Exception:
            return True

    def wake_drainer(self, database: str) -> None:
        """Says that something was spilled."""
        self.databases[database].wake.set()

    def answer_check(self, stream: Stream, question: pb.SessionResponse.CheckQuestion) -> None:
        """Works on one question in the background."""
        database = self.databases.get(question.database or "default")
        if self._checking >= MAX_CHECKS or database is None:
            return
        self._checking += 1
        task = self.spawn(answer_question(self, database, stream, question))
        task.add_done_callback(self._checked)

    def _checked(self, _: object) -> None:
        self._checking -= 1

    def report(self, alarm: Alarm) -> None:
        """Logs an alarm, counts it, and passes it on."""
        report(self.config, self.stats, self.log, alarm)

    async def flush(self, timeout: float) -> bool:
        """Waits until every Commit and Abort is acknowledged. False: the time was over first."""
        try:
            await asyncio.wait_for(self._decisions.drained(), timeout)
        except asyncio.TimeoutError:
            return False
        return True

    async def close(self) -> None:
        """Ends upkeep, waits up to close_timeout for decisions that are not acknowledged, and closes all connections."""
        if self.closed:
            return
        self.closed = True
        await _cancel(self._upkeep)
        if self._started and self.link == "up":
            await self.flush(self.config.close_timeout)
        for session in self._sessions:
            session.close()
        ending = [task for session in self._sessions for stream in session.streams for task in stream.tasks]
        if ending:
            await asyncio.wait(ending, timeout=1)  # gRPC must not have anything to say to this loop any more
        await _cancel(self._tasks)
        for database in self.databases.values():
            await database.close()
        await self.unary.close()


async def _cancel(tasks: set[asyncio.Task[Any]]) -> None:
    """Cancels tasks and waits until they have ended."""
    while tasks:
        waiting = list(tasks)
        for task in waiting:
            task.cancel()
        await asyncio.wait(waiting, timeout=2)
        tasks.difference_update(waiting)


def extra(config: Config, **words: object) -> dict[str, object]:
    """Returns the structured part of a log record: the attribute "outbox" of it, a dict."""
    return {"outbox": {"source": config.source, **words}}


def report(config: Config, stats: Stats, log: logging.Logger, alarm: Alarm) -> None:
    """Logs an alarm, counts it, and passes it to Config.on_alarm."""
    stats.alarms += 1
    words = {"alarm": alarm.kind.value, "transaction_id": str(alarm.transaction_id), "database": alarm.database}
    message = "outbox alarm %s: transaction %s: %s"
    log.error(
        message,
        alarm.kind.value,
        alarm.transaction_id,
        alarm.error,
        extra=extra(config, **words, error=str(alarm.error)),
    )
    if config.on_alarm is not None:
        try:
            config.on_alarm(alarm)
        except Exception:
            log.exception("on_alarm", extra=extra(config))
