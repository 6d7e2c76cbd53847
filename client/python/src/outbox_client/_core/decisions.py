"""Commits and Aborts in the background: sent until the platform has acknowledged them."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Callable
from typing import TYPE_CHECKING

import grpc

from outbox_client._core.backoff import Backoff
from outbox_client._core.calls import Answer, Call
from outbox_client._core.session import NoSessionsError, closed_error
from outbox_client._core.status import decision_is_final
from outbox_client._core.wire import Kind
from outbox_client.alarm import Alarm, AlarmKind
from outbox_client.errors import AlreadyDecidedError, CallError, ExhaustedError, UnknownTransactionError

if TYPE_CHECKING:
    from outbox_client._core.engine import Engine

Done = Callable[["CallError | None"], None]

UNARY_DECIDERS = 16  # decisions that are sent at a time as unary calls


class Decisions:
    """The decisions of an engine that are not acknowledged. Used in the engine's event loop only."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._pending = 0
        self._idle = asyncio.Event()
        self._idle.set()
        self._unary = asyncio.Semaphore(UNARY_DECIDERS)

    def later(self, kind: Kind, transaction_id: uuid.UUID, body: bytes, done: Done | None) -> None:
        """Sends a decision and returns at once. done is called once, with None or why it was refused or not sent."""
        engine = self._engine
        decision = _Decision(self, kind, transaction_id, body, done)
        if self._pending >= engine.config.max_pending_commits:
            engine.stats.dropped_commits += 1
            message = "too many decisions are not acknowledged; not sent"
            decision.call_done(ExhaustedError(grpc.StatusCode.RESOURCE_EXHAUSTED, message, local=True))
            return
        self._count(+1)
        decision.send()

    def _count(self, by: int) -> None:
        self._pending += by
        self._engine.stats.pending_commits += by
        if self._pending:
            self._idle.clear()
        else:
            self._idle.set()

    async def drained(self) -> None:
        """Returns when no decision is pending."""
        await self._idle.wait()

    async def send_unary(self, decision: _Decision) -> None:
        """Sends a decision as a unary call, a few at a time."""
        async with self._unary:
            answer: Answer
            try:
                answer = await self._engine.unary.call(
                    decision.kind, decision.body, self._engine.config.call_timeout, fail_fast=True
                )
            except CallError as e:
                e.local = False  # it was sent: a failure on the way is worth another try
                answer = e
            except asyncio.CancelledError:
                self.finish(decision, closed_error())
                raise
        decision.answered(answer)

    def finish(self, decision: _Decision, error: CallError | None) -> None:
        """Ends a decision."""
        engine, tx = self._engine, decision.transaction_id
        if error is None:
            engine.stats.acknowledged += 1
        elif decision.kind is Kind.COMMIT and isinstance(error, AlreadyDecidedError):
            engine.report(Alarm(AlarmKind.CONTRADICTION, tx, error))
        elif decision.kind is Kind.ABORT and isinstance(error, UnknownTransactionError):
            pass  # it never arrived: nothing to abort
        elif not error.local:
            engine.log.warning(
                "the platform refused a decision: %s",
                error,
                extra=engine.extra(decision=decision.kind.word, transaction_id=str(tx), error=str(error)),
            )
        decision.call_done(error)
        self._count(-1)


class _Decision:
    """One Commit or Abort."""

    def __init__(self, all_: Decisions, kind: Kind, transaction_id: uuid.UUID, body: bytes, done: Done | None) -> None:
        self._all, self.kind, self.transaction_id, self.body, self._done = all_, kind, transaction_id, body, done
        self._delays: Backoff | None = None

    def send(self) -> None:
        engine = self._all._engine
        if engine.closed:
            self._all.finish(self, closed_error())
            return
        session = engine.pick()
        if session is None:
            engine.spawn(self._all.send_unary(self))
            return
        session.enqueue(Call(self.kind, self.body, later=self.answered))

    def answered(self, answer: Answer) -> None:
        engine = self._all._engine
        if not isinstance(answer, CallError):
            self._all.finish(self, None)
        elif isinstance(answer, NoSessionsError):
            engine.spawn(self._all.send_unary(self))
        elif answer.local or decision_is_final(answer):
            self._all.finish(self, answer)
        else:
            if self._delays is None:
                self._delays = Backoff(limit=engine.config.call_timeout)
            engine.loop.call_later(max(next(self._delays), answer.retry_after), self.send)

    def call_done(self, error: CallError | None) -> None:
        if self._done is None:
            return
        try:
            self._done(error)
        except Exception:
            engine = self._all._engine
            engine.log.exception(
                "after a decision was acknowledged", extra=engine.extra(transaction_id=str(self.transaction_id))
            )
