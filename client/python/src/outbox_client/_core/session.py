"""A session outlives its streams: it queues calls, gives them to the current stream, and takes back what that left unanswered."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from typing import TYPE_CHECKING

import grpc

from outbox_client._core.backoff import Backoff
from outbox_client._core.calls import Call
from outbox_client._core.status import kind_of, refused, sessions_not_served
from outbox_client._core.stream import Stream
from outbox_client._core.wire import Kind
from outbox_client.errors import CallError, ClosedError, UnavailableError

if TYPE_CHECKING:
    from outbox_client._core.engine import Engine

FIRST_RECONNECT_DELAY = 0.05
STEADY_AFTER = 1.0  # how long a stream must live for the next attempt to come at once and with fresh back-off
UNARY_FOR = 60.0  # how long unary calls are made before a session is tried again, when sessions are not served


class NoSessionsError(CallError):
    """Sends a call to the unary path."""

    def __init__(self) -> None:
        super().__init__(grpc.StatusCode.UNIMPLEMENTED, "the platform does not serve sessions", local=True)


def closed_error() -> ClosedError:
    """Makes the error of calls after close."""
    return ClosedError(grpc.StatusCode.CANCELLED, "the client is closed", local=True)


def timeout_error(kind: Kind, timeout: float) -> UnavailableError:
    """Makes the error of a call that was not answered in time."""
    message = f"{kind.word}: no answer within {timeout * 1000:.0f} ms"
    return UnavailableError(grpc.StatusCode.DEADLINE_EXCEEDED, message, local=True)


class Session:
    """One session of an engine. Used in the engine's event loop only."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.queue: dict[int, Call] = {}  # calls that no stream has taken, oldest first
        self.current: Stream | None = None  # takes calls
        self.streams: set[Stream] = set()  # all that are open
        self.link = "connecting"
        self.unary = False  # sessions are not served
        self.closed = False
        self.last_error: CallError | None = None  # why the last attempt failed
        self._next_id = 0

    async def round_trip(self, kind: Kind, body: bytes, timeout: float, fail_fast: bool) -> bytes:
        """Sends one call and waits for its answer. fail_fast: do not wait for a session while the link is down."""
        loop = asyncio.get_running_loop()
        call = Call(kind, body, future=loop.create_future())
        assert call.future is not None
        self.enqueue(call, fail_fast)
        timer = loop.call_later(timeout, self._expire, call, timeout)
        try:
            return await call.future
        except asyncio.CancelledError:
            self._give_up(call)
            raise
        finally:
            timer.cancel()

    def enqueue(self, call: Call, fail_fast: bool = False) -> None:
        """Puts a call into the queue, or raises why not."""
        if self.closed:
            raise closed_error()
        if self.unary:
            raise NoSessionsError()
        if self.link == "down" and call.future is not None:
            last = self.last_error
            if fail_fast or (last is not None and refused(last)):
                raise self._down_error(call.kind)
        self._next_id += 1
        call.id = self._next_id
        self.queue[call.id] = call
        if self.current is not None:
            self.current.poke(linger=call.later is not None)

    def _down_error(self, kind: Kind) -> CallError:
        """Makes the failure of a call that was never sent."""
        last = self.last_error
        message = f"{kind.word}: no session with the platform"
        if last is None:
            return UnavailableError(grpc.StatusCode.UNAVAILABLE, message, local=True)
        message += f": {last}"
        if refused(last):
            made = kind_of(last.code, last.reason)(
                last.code, message, reason=last.reason, metadata=last.metadata, local=True, fatal=True
            )
        else:
            made = UnavailableError(grpc.StatusCode.UNAVAILABLE, message, local=True)
        made.__cause__ = last
        return made

    def _expire(self, call: Call, timeout: float) -> None:
        """Ends a call that was not answered in time."""
        if call.future is None or call.future.done():
            return
        error: CallError = timeout_error(call.kind, timeout)
        if call.id in self.queue and call.sends == 0 and self.link != "up":
            error = self._down_error(call.kind)  # it certainly had no effect
        self._give_up(call)
        call.future.set_exception(error)

    def _give_up(self, call: Call) -> None:
        """Forgets a call that its caller no longer waits for."""
        if self.queue.pop(call.id, None) is None and call.stream is not None:
            call.stream.abandon(call)

    async def run(self) -> None:
        """Keeps a stream open until it is cancelled."""
        delays = Backoff(FIRST_RECONNECT_DELAY, self.engine.config.max_reconnect_delay)
        loop = asyncio.get_running_loop()
        while not self.closed:
            try:
                stream = await Stream.connect(self)
            except CallError as error:
                await asyncio.sleep(self._failed(error, delays))
                continue
            opened = loop.time()
            self._opened(stream)
            await stream.until_ended_or_replaced()
            if loop.time() - opened >= STEADY_AFTER:
                delays.reset()
            else:
                await asyncio.sleep(next(delays))

    def _failed(self, error: CallError, delays: Backoff) -> float:
        """Notes that no stream could be opened, and returns how long to wait."""
        first, was_unary = self.link != "down" and not self.unary, self.unary
        self.last_error = error
        self.unary = sessions_not_served(error)
        log = self.engine.log
        if self.unary:
            for call in self._take_queue(lambda call: True):
                call.deliver(NoSessionsError())
        else:
            self.link = "down"
            if refused(error):
                for call in self._take_queue(lambda call: call.future is not None):
                    call.deliver(self._down_error(call.kind))
        self.engine.link_changed()
        if self.unary:
            if not was_unary:
                log.info(
                    "the platform does not serve sessions; making unary calls",
                    extra=self.engine.extra(error=str(error)),
                )
            return UNARY_FOR * random.uniform(0.5, 1.5)
        self.engine.stats.connect_failures += 1
        if first:
            log.warning(
                "no session with the platform; trying again: %s", error, extra=self.engine.extra(error=str(error))
            )
        return max(next(delays), min(error.retry_after, self.engine.config.max_reconnect_delay))

    def _take_queue(self, which: Callable[[Call], bool]) -> list[Call]:
        taken = [call for call in self.queue.values() if which(call)]
        for call in taken:
            del self.queue[call.id]
        return taken

    def _opened(self, stream: Stream) -> None:
        """Makes a stream the current one."""
        old, self.current = self.current, stream
        self.link, self.unary, self.last_error = "up", False, None
        if old is not None:
            old.leave()
        stream.poke()
        if self.engine.database_names() != stream.databases:
            stream.replace.set()  # one was registered between Hello and now
        self.engine.link_changed()
        self.engine.log.info("session open", extra=self.engine.extra(server=stream.server))

    def leave_current(self, stream: Stream) -> None:
        """Gives no more calls to a stream whose server is about to stop."""
        if self.current is stream:
            self.current, self.link = None, "connecting"
            self.engine.link_changed()

    def ended(self, stream: Stream, unanswered: list[Call], error: BaseException) -> None:
        """Takes back what a stream did not answer."""
        self.streams.discard(stream)
        if self.current is stream:
            self.current = None
            if self.link == "up":
                self.link = "connecting"
        for call in unanswered:
            call.stream = None
        if self.closed:
            for call in unanswered:
                call.deliver(closed_error())
            return
        back = {call.id: call for call in unanswered}
        self.engine.stats.resent += len(back)
        self.queue = dict(sorted({**back, **self.queue}.items()))
        if self.current is not None:
            self.current.poke()
        self.engine.link_changed()
        self.engine.log.info(
            "session ended: %s",
            error,
            extra=self.engine.extra(server=stream.server, unanswered=len(back), error=str(error)),
        )

    def renew(self) -> None:
        """Opens a new stream, because Hello would now say something else. The old one finishes."""
        if self.current is not None:
            self.current.replace.set()

    def close(self) -> None:
        """Fails what is queued, what is under way, and everything that comes later."""
        self.closed = True
        for stream in self.streams:
            stream.end(closed_error())
        for call in self._take_queue(lambda call: True):
            call.deliver(closed_error())
