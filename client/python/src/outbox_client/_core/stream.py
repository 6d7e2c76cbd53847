"""One gRPC stream of a session, from Hello to its end."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import TYPE_CHECKING

import grpc

from outbox_client._core import channel
from outbox_client._core.calls import Answer, Call
from outbox_client._core.limits import Limits
from outbox_client._core.status import error_of_rpc, error_of_status
from outbox_client._core.wire import SERVICE, encode_call, encode_calls
from outbox_client._gen.outbox.v1 import outbox_service_pb2 as pb
from outbox_client.errors import CallError, OutboxError, UnavailableError
from outbox_client.version import SDK

if TYPE_CHECKING:
    from outbox_client._core.session import Session

MAX_MESSAGE_BYTES = 512 << 10  # of the calls in one message; a larger call travels alone
MAX_MESSAGE_CALLS = 1024
COMMIT_LINGER = 0.002  # seconds; a message costs more than a call


class StreamEndedError(OutboxError):
    """Why a stream ended."""


class Stream:
    """A stream on a connection of its own: a new stream may so be balanced to another server than the old one.

    Used in the engine's event loop only.
    """

    def __init__(
        self, session: Session, connection: grpc.aio.Channel, rpc: grpc.aio.StreamStreamCall[bytes, pb.SessionResponse]
    ) -> None:
        self._session, self._connection, self._rpc = session, connection, rpc
        self._engine = session.engine
        self._loop = asyncio.get_running_loop()
        self._open: dict[int, Call | None] = {}  # sent, not answered; None: nobody waits for it any more
        self._answers: list[bytes] = []  # check answers to send, before calls
        self._wake = asyncio.Event()  # something to send, or less open
        self._why: BaseException | None = None
        self._last_received = self._loop.time()
        self._leaving = False
        self._grace: asyncio.TimerHandle | None = None
        self._linger: asyncio.TimerHandle | None = None
        self._ended = asyncio.Event()
        self.replace = asyncio.Event()  # another stream should take this one's place
        self.server = ""
        self.tasks: list[asyncio.Task[None]] = []
        self.databases: list[str] = []
        self._limits = Limits()

    @classmethod
    async def connect(cls, session: Session) -> Stream:
        """Opens a stream: connection, Hello, Welcome. Raises CallError."""
        engine = session.engine
        timeout = engine.config.connect_timeout
        connection = None
        try:
            connection = channel.make(engine.config, channel.ONE_SERVER)
            metadata = channel.metadata(engine.config)
            rpc = connection.stream_stream(
                SERVICE + "Session",
                request_serializer=channel.as_is,
                response_deserializer=pb.SessionResponse.FromString,
            )(metadata=metadata)
            stream = cls(session, connection, rpc)
            stream.databases = engine.database_names()
            await asyncio.wait_for(stream._greet(), timeout)
        except asyncio.TimeoutError:
            await channel.close(connection)
            raise UnavailableError(grpc.StatusCode.UNAVAILABLE, f"no session within {timeout:g} s") from None
        except asyncio.CancelledError:
            await channel.close(connection)
            raise
        except Exception as e:
            await channel.close(connection)
            raise error_of_rpc(e) from e
        engine.stats.sessions += 1
        stream.tasks = [engine.spawn(stream._send_loop()), engine.spawn(stream._receive_loop())]
        session.streams.add(stream)
        return stream

    async def _greet(self) -> None:
        config = self._engine.config
        hello = pb.SessionRequest.Hello(
            source=config.source, instance=config.instance_name(), sdk=SDK, databases=self.databases
        )
        await self._rpc.write(pb.SessionRequest(hello=hello).SerializeToString())
        first = await self._rpc.read()
        if not isinstance(first, pb.SessionResponse):
            await self._rpc.wait_for_connection()  # raises what it ended with
            raise UnavailableError(grpc.StatusCode.UNAVAILABLE, "the session ended before Welcome")
        if first.WhichOneof("response") != "welcome":
            raise UnavailableError(grpc.StatusCode.UNAVAILABLE, "the session did not begin with Welcome")
        self.server = first.welcome.server
        self._limits = self._engine.limits = Limits.told(first.welcome.limits)

    def poke(self, linger: bool = False) -> None:
        """Wakes the sender. linger: for a Commit, which nobody waits for: it rides with the next call, or goes out a moment later."""
        if not linger:
            self._wake.set()
        elif self._linger is None:
            self._linger = self._loop.call_later(COMMIT_LINGER, self._lingered)

    def _lingered(self) -> None:
        self._linger = None
        self._wake.set()

    def end(self, why: BaseException) -> None:
        """Breaks the stream off."""
        if self._why is None:
            self._why = why
            self._rpc.cancel()
            self._wake.set()

    def leave(self, grace: float = 0) -> None:
        """Lets the stream finish: it takes no more calls, and ends when its last one is answered or when grace (seconds) is over."""
        if self._leaving:
            return
        self._leaving = True
        why = StreamEndedError("moved to another session")
        self._grace = self._loop.call_later(grace or self._engine.config.call_timeout, self.end, why)
        self._end_if_idle()

    def _end_if_idle(self) -> None:
        if self._leaving and not self._open and not self._answers:
            self.end(StreamEndedError("moved to another session"))

    def abandon(self, call: Call) -> None:
        """Notes that nobody waits for a call any more. Its answer is still due and still counts."""
        self._open[call.id] = None
        silent = self._loop.time() - self._last_received
        if self._last_received < call.sent_at and silent >= self._engine.config.prepare_timeout:
            self.end(StreamEndedError("the platform does not answer"))

    async def until_ended_or_replaced(self) -> None:
        """Returns when the stream ended or another one should take its place."""
        ended = asyncio.ensure_future(self._ended.wait())
        replaced = asyncio.ensure_future(self.replace.wait())
        limit = 3 * self._engine.config.call_timeout
        try:
            while not ended.done() and not replaced.done():
                await asyncio.wait(
                    (ended, replaced), timeout=self._engine.config.call_timeout, return_when=asyncio.FIRST_COMPLETED
                )
                # An answer that never came: the caller of a call has given up long ago, a Commit has nobody else.
                before = self._loop.time() - limit
                if any(call is not None and call.sent_at < before for call in self._open.values()):
                    self.end(StreamEndedError("the platform does not answer"))
        finally:
            ended.cancel()
            replaced.cancel()

    async def _send_loop(self) -> None:
        """Sends what waits, all of it in one message. It never waits for more."""
        try:
            while self._why is None:
                message = self._next_message()
                if message is None:
                    self._wake.clear()
                    await self._wake.wait()
                    continue
                await self._rpc.write(message)
        except (grpc.RpcError, asyncio.InvalidStateError):
            pass  # the receiver learns why
        except asyncio.CancelledError:
            # grpc ends a write this way when the stream ends. Our own cancellation is passed on.
            if self._why is None and not self._rpc.done():
                raise

    def _next_message(self) -> bytes | None:
        if self._answers:
            message = self._answers.pop(0)
            self._loop.call_soon(self._end_if_idle)
            return message
        queue = self._session.queue
        if self._session.current is not self or self._leaving or not queue:
            return None
        size = 0
        batch: list[bytes] = []
        now = self._loop.time()
        most = min(MAX_MESSAGE_BYTES, self._limits.transaction_bytes)
        while queue and len(self._open) < self._limits.open_calls and len(batch) < MAX_MESSAGE_CALLS:
            call = next(iter(queue.values()))
            if batch and size + len(call.body) > most:
                break
            del queue[call.id]
            size += len(call.body)
            call.stream, call.sent_at, call.sends = self, now, call.sends + 1
            self._open[call.id] = call
            batch.append(encode_call(call.kind, call.id, call.body))
        if not batch:
            return None
        self._engine.stats.messages += 1
        self._engine.stats.calls += len(batch)
        return encode_calls(batch)

    async def _receive_loop(self) -> None:
        """Takes what the server sends, until the stream ends."""
        why: BaseException
        try:
            await self._receive()
            why = StreamEndedError("the platform ended the session")
        except asyncio.CancelledError as e:
            why = e
        except Exception as e:
            why = error_of_rpc(e)
        cancelled = self._why is None and isinstance(why, asyncio.CancelledError)
        self.end(why)
        await channel.close(self._connection)
        self._finish(self._why or why)
        if cancelled:
            raise why

    def _finish(self, why: BaseException) -> None:
        for timer in (self._grace, self._linger):
            if timer is not None:
                timer.cancel()
        unanswered = [call for call in self._open.values() if call is not None]
        self._open.clear()
        self._session.ended(self, unanswered, why)
        self._ended.set()

    async def _receive(self) -> None:
        while True:
            message = await self._rpc.read()
            if not isinstance(message, pb.SessionResponse):
                await self._rpc.wait_for_connection()
                code = await self._rpc.code()
                if code is not grpc.StatusCode.OK:
                    raise CallError(code, await self._rpc.details() or "")
                return
            self._last_received = self._loop.time()
            which = message.WhichOneof("response")
            if which == "results":
                self._settle(message.results.results)
            elif which == "check_question":
                self._engine.answer_check(self, message.check_question)
            elif which == "drain_notice":
                self._engine.stats.drains += 1
                self._session.leave_current(self)
                self.leave(message.drain_notice.grace_ms / 1000)
                self.replace.set()

    def _settle(self, results: Iterable[pb.SessionResponse.Result]) -> None:
        """Ends the calls that were answered."""
        for result in results:
            call = self._open.pop(result.call_id, None)
            if call is None:
                continue  # its caller has gone
            call.stream = None
            answer: Answer = result.token
            if result.HasField("status") and result.status.code != 0:
                answer = error_of_status(result.status)
            call.deliver(answer)
        if self._session.queue:
            self.poke()  # the limit of open calls may have held it back
        self._end_if_idle()

    def answer(self, message: pb.SessionRequest) -> None:
        """Queues check answers. When the stream is gone, the server asks another one."""
        if self._why is None:
            self._answers.append(message.SerializeToString())
            self.poke()
