"""One open session of the fake platform."""

from __future__ import annotations

import functools
import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

import grpc

from outbox_client._gen.outbox.v1 import outbox_service_pb2 as pb
from outbox_client.errors import CallError
from outbox_client.testing.status import status_of

if TYPE_CHECKING:
    from outbox_client.testing.platform import FakePlatform, Fault

_END = None  # ends the stream


class FakeSession:
    """A session: a thread reads, and the server's own thread sends what is put into a queue."""

    def __init__(
        self, platform: FakePlatform, hello: pb.SessionRequest.Hello, requests: Any, context: grpc.ServicerContext
    ) -> None:
        self.hello = hello
        self._platform, self._requests, self._context = platform, requests, context
        self._out: queue.SimpleQueue[pb.SessionResponse | None] = queue.SimpleQueue()
        self._waiting: dict[int, queue.SimpleQueue[pb.SessionRequest.CheckAnswers]] = {}
        self._asked = 0
        self._lock = threading.Lock()
        self._broken = False

    def serve(self) -> Iterator[pb.SessionResponse]:
        """Sends until the client goes or the session is broken off."""
        limits = self._platform.limits
        yield pb.SessionResponse(
            welcome=pb.SessionResponse.Welcome(
                server="fake",
                limits=pb.Limits(
                    max_events_per_transaction=limits.events_per_transaction,
                    max_transaction_bytes=limits.transaction_bytes,
                    max_event_bytes=limits.event_bytes,
                    max_headers=limits.headers,
                    max_header_bytes=limits.header_bytes,
                    max_open_calls=limits.open_calls,
                ),
            )
        )
        threading.Thread(target=self._receive, name="fake-session", daemon=True).start()
        while True:
            message = self._out.get()
            if message is _END:
                break
            yield message
        if self._broken:
            self._context.abort(grpc.StatusCode.UNAVAILABLE, "broken off")

    def end(self) -> None:
        """Breaks the session off."""
        self._broken = True
        self._out.put(_END)

    def _receive(self) -> None:
        try:
            for message in self._requests:
                which = message.WhichOneof("request")
                if which == "calls":
                    self._calls(message.calls.calls)
                elif which == "check_answers":
                    waiting = self._waiting.pop(message.check_answers.question_id, None)
                    if waiting is not None:
                        waiting.put(message.check_answers)
        except Exception:
            pass  # the client has gone
        self._out.put(_END)

    def _calls(self, calls: Iterable[pb.SessionRequest.Call]) -> None:
        """Answers calls in their order; those that a fault delays when their time has come."""
        for c in calls:
            name = c.WhichOneof("call") or ""
            message = getattr(c, name)
            fault = self._platform.arrived_on_session(name, message)
            work = functools.partial(getattr(self._platform, name), message)
            answer = functools.partial(self._answer, c.call_id, fault, work)
            if fault.after:
                threading.Thread(target=answer, daemon=True).start()
            else:
                answer()

    def _answer(self, call_id: int, fault: Fault, work: Callable[[], Any]) -> None:
        result = pb.SessionResponse.Result(call_id=call_id)
        try:
            answered, value = self._platform.do(fault, work)
        except CallError as e:
            answered, value = True, None
            result.status.CopyFrom(status_of(e))
        if isinstance(value, pb.PrepareResponse):
            result.token = value.token
        if answered:
            self._out.put(pb.SessionResponse(results=pb.SessionResponse.Results(results=[result])))

    def drain(self, grace: float) -> None:
        """Sends a drain notice; grace: seconds."""
        notice = pb.SessionResponse.DrainNotice(grace_ms=int(grace * 1000))
        self._out.put(pb.SessionResponse(drain_notice=notice))

    def ask(
        self, database: str, question: pb.SessionResponse.CheckTransaction, timeout: float
    ) -> pb.SessionRequest.CheckAnswer:
        """Asks about one transaction and waits for the answer. Raises TimeoutError."""
        waiting: queue.SimpleQueue[pb.SessionRequest.CheckAnswers] = queue.SimpleQueue()
        with self._lock:
            self._asked += 1
            number = self._asked
            self._waiting[number] = waiting
        asked = pb.SessionResponse.CheckQuestion(question_id=number, database=database, transactions=[question])
        self._out.put(pb.SessionResponse(check_question=asked))
        try:
            return waiting.get(timeout=timeout).answers[0]
        except queue.Empty:
            raise TimeoutError("no answer to a check-back question") from None
