"""An outbox platform in memory: a real gRPC server with the real API and rules, whose faults a test chooses."""

from __future__ import annotations

import datetime
import threading
import time
import uuid
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import grpc

from outbox_client._core.limits import Limits, check
from outbox_client._core.status import DETAILS
from outbox_client._core.wire import SERVICE
from outbox_client._gen.outbox.v1 import event_pb2
from outbox_client._gen.outbox.v1 import outbox_service_pb2 as pb
from outbox_client.config import Config
from outbox_client.errors import CallError, DeniedError, InvalidError, Reason
from outbox_client.event import Event, event_from_proto
from outbox_client.testing.ledger import Ledger, StoredTransaction
from outbox_client.testing.sessions import FakeSession
from outbox_client.testing.status import status_of
from outbox_client.transaction import State


@dataclass(frozen=True)
class Call:
    """One call that arrived."""

    name: str
    """prepare, commit, abort, publish, get or session."""
    id: uuid.UUID | None = None
    """The transaction's id; None for sessions."""
    unary: bool = False
    """It did not come on a session."""
    events: tuple[Event, ...] = ()
    """Of a Prepare or a Publish."""
    kept: bool = False
    """Of a Publish: its caller keeps it, so the platform remembers it for longer."""


@dataclass(frozen=True)
class Fault:
    """What happens to a call. The default: nothing special."""

    error: CallError | None = None
    """Is answered, and nothing done."""
    silent: bool = False
    """Nothing is done or answered."""
    lose_answer: bool = False
    """It is done and not answered."""
    after: float = 0.0
    """Delays doing and answering, in seconds."""


def fault_error(code: grpc.StatusCode, reason: str = "", retry_after: float = 0.0, **metadata: str) -> CallError:
    """Makes an error as the platform sends it, for Fault.error."""
    return CallError(code, f"fake: {reason or code.name}", reason=reason, metadata=metadata, retry_after=retry_after)


class FakePlatform:
    """The platform. Use it as a context manager, or start and stop it. Safe for concurrent use."""

    def __init__(
        self,
        *,
        sources: Iterable[str] | None = None,
        topics: Iterable[str] | None = None,
        tls: tuple[bytes, bytes] | None = None,
    ) -> None:
        """Makes one.

        sources: the names that are registered; None: any. topics: those that are allowed; None: any. tls: key and certificate (PEM).
        """
        self._tls = tls
        self.ledger = Ledger()
        self.limits = Limits()
        """The limits in force, told to the next sessions."""
        self.fault: Callable[[Call], Fault | None] | None = None
        """Chooses what happens to each call. None: nothing special."""
        self.tokens: list[str] = []
        """The authorization headers that arrived."""
        self._sources = None if sources is None else frozenset(sources)
        self._topics = None if topics is None else frozenset(topics)
        self._calls: list[Call] = []
        self._changed = threading.Condition()
        self.sessions: set[FakeSession] = set()
        """The open sessions."""
        self._server: grpc.Server | None = None
        self._port = 0

    # --- its life ---

    def start(self) -> FakePlatform:
        """Serves, on a free port the first time and on the same one again after stop."""
        pool = ThreadPoolExecutor(64, thread_name_prefix="fake-platform")
        server = grpc.server(pool, options=[("grpc.so_reuseport", 0), ("grpc.max_receive_message_length", 16 << 20)])
        server.add_generic_rpc_handlers((self._handlers(),))
        address = f"127.0.0.1:{self._port}"
        if self._tls is None:
            self._port = server.add_insecure_port(address)
        else:
            self._port = server.add_secure_port(address, grpc.ssl_server_credentials([self._tls]))
        server.start()
        self._server = server
        return self

    def stop(self) -> None:
        """Breaks all connections off and refuses new ones. What is stored stays."""
        server, self._server = self._server, None
        if server is not None:
            self.break_sessions()
            server.stop(None).wait()

    def __enter__(self) -> FakePlatform:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    @property
    def address(self) -> str:
        """Its address, which stays the same."""
        return f"127.0.0.1:{self._port}"

    def config(self, source: str = "test", **settings: Any) -> Config:
        """Returns the configuration of a client of it."""
        return Config(address=self.address, source=source, plaintext=True, **settings)

    def clear(self) -> None:
        """Forgets everything that arrived and any fault."""
        self.ledger.clear()
        self.fault = None
        with self._changed:
            self._calls.clear()

    # --- what a test looks at ---

    def calls(self, name: str = "") -> list[Call]:
        """Returns the calls that arrived with that name; all when it is empty."""
        with self._changed:
            return [c for c in self._calls if name in ("", c.name)]

    def transactions(self) -> list[StoredTransaction]:
        """Returns everything that is stored, as prepared."""
        return self.ledger.all()

    def transaction(self, id: uuid.UUID) -> StoredTransaction | None:
        """Returns what is stored under an id."""
        return self.ledger.find(id)

    def published(self, topic: str | None = None, aggregate_id: str | None = None) -> list[Event]:
        """Returns the committed events, in the order in which they are published."""
        return [
            e
            for tx in self.ledger.all()
            if tx.state is State.COMMITTED
            for e in tx.events
            if topic in (None, e.topic) and aggregate_id in (None, e.aggregate_id)
        ]

    def wait(self, condition: Callable[[], object], what: str = "something", timeout: float = 10.0) -> None:
        """Waits (seconds) until a condition holds; it is asked again whenever something has happened. Raises TimeoutError.

        It blocks: in a coroutine use asyncio.to_thread.
        """
        deadline = time.monotonic() + timeout
        with self._changed:
            while not condition():
                if time.monotonic() > deadline:
                    raise TimeoutError(f"waited {timeout:g} s for: {what}")
                self._changed.wait(0.005)  # the condition may be about the client

    # --- what a test does to it ---

    def decide(self, id: uuid.UUID, state: State) -> None:
        """Gives a transaction a state, as the resolver or an operator would."""
        self.ledger.decide(id.bytes, state)

    def break_sessions(self) -> None:
        """Breaks all sessions off."""
        for session in list(self.sessions):
            session.end()

    def drain(self, grace: float = 1.0) -> None:
        """Sends a drain notice to every session; grace: seconds."""
        for session in list(self.sessions):
            session.drain(grace)

    def databases(self) -> list[str]:
        """Returns the databases that open sessions say they can answer for."""
        return sorted({name for s in list(self.sessions) for name in s.hello.databases})

    def ask(self, id: uuid.UUID, database: str = "default", timeout: float = 10.0) -> pb.SessionRequest.CheckAnswer:
        """Asks a session that answers for the database what became of a stored transaction. Blocks; raises TimeoutError."""
        self.wait(lambda: database in self.databases(), f"a session that answers for {database}", timeout)
        tx = self.ledger.find(id)
        if tx is None or tx.database_transaction is None:
            raise LookupError(f"no prepared transaction {id}")
        session = next(s for s in list(self.sessions) if database in s.hello.databases)
        question = pb.SessionResponse.CheckTransaction(
            transaction_id=id.bytes, database_transaction=tx.database_transaction.to_proto()
        )
        return session.ask(database, question, timeout)

    # --- serving ---

    def _handlers(self) -> grpc.GenericRpcHandler:
        def unary(
            name: str, request: Any, response: Any, work: Callable[[Any], Any]
        ) -> grpc.RpcMethodHandler[Any, Any]:
            def handle(message: Any, context: grpc.ServicerContext) -> Any:
                self._authorize(context)
                call = _call(name, message, True)
                try:
                    done, value = self.do(self.arrived(call), lambda: work(message))
                except CallError as e:
                    abort(context, e)
                if not done:
                    gone = threading.Event()
                    context.add_callback(gone.set)
                    gone.wait()
                return value if isinstance(value, response) else response()

            return grpc.unary_unary_rpc_method_handler(handle, request.FromString, response.SerializeToString)

        methods: dict[str, grpc.RpcMethodHandler[Any, Any]] = {
            "Prepare": unary("prepare", pb.PrepareRequest, pb.PrepareResponse, self.prepare),
            "Commit": unary("commit", pb.CommitRequest, pb.CommitResponse, self.commit),
            "Abort": unary("abort", pb.AbortRequest, pb.AbortResponse, self.abort),
            "Publish": unary("publish", pb.PublishRequest, pb.PublishResponse, self.publish),
            "GetTransaction": unary("get", pb.GetTransactionRequest, pb.GetTransactionResponse, self.get),
            "Session": grpc.stream_stream_rpc_method_handler(
                self._session, pb.SessionRequest.FromString, pb.SessionResponse.SerializeToString
            ),
        }
        return grpc.method_handlers_generic_handler(SERVICE.strip("/"), methods)

    def _session(self, requests: Any, context: grpc.ServicerContext) -> Any:
        self._authorize(context)
        fault = self.arrived(Call("session"))
        if fault.error is not None:
            abort(context, fault.error)
        if fault.silent:
            gone = threading.Event()
            context.add_callback(gone.set)
            gone.wait()
        first = next(requests, None)
        if first is None:
            return
        hello = first.hello
        try:
            self.check_source(hello.source)
        except CallError as e:
            abort(context, e)
        session = FakeSession(self, hello, requests, context)
        with self._changed:
            self.sessions.add(session)
            self._changed.notify_all()
        try:
            yield from session.serve()
        finally:
            with self._changed:
                self.sessions.discard(session)
                self._changed.notify_all()

    def arrived(self, call: Call) -> Fault:
        """Records a call and returns its fault."""
        with self._changed:
            self._calls.append(call)
            self._changed.notify_all()
        return (self.fault(call) if self.fault is not None else None) or Fault()

    def arrived_on_session(self, name: str, message: Any) -> Fault:
        """Records a call of a session and returns its fault."""
        return self.arrived(_call(name, message, False))

    def do(self, fault: Fault, work: Callable[[], Any]) -> tuple[bool, Any]:
        """Does a call's work under its fault. False: it must not be answered. Raises CallError."""
        if fault.after:
            threading.Event().wait(fault.after)
        if fault.silent:
            return False, None
        if fault.error is not None:
            raise fault.error
        value = work()
        with self._changed:
            self._changed.notify_all()
        return not fault.lose_answer, value

    def prepare(self, m: pb.PrepareRequest) -> pb.PrepareResponse:
        """Does a Prepare."""
        self._check(m.source, m.transaction_id, m.events)
        if not m.HasField("database_transaction"):
            raise InvalidError(
                grpc.StatusCode.INVALID_ARGUMENT, "database_transaction is missing", reason=Reason.FIELD_INVALID
            )
        self.ledger.store(m.transaction_id, m.database_transaction, m.events, State.PREPARED)
        return pb.PrepareResponse(token=b"token")

    def publish(self, m: pb.PublishRequest) -> None:
        """Does a Publish."""
        self._check(m.source, m.transaction_id, m.events)
        self.ledger.store(m.transaction_id, None, m.events, State.COMMITTED)

    def commit(self, m: pb.CommitRequest) -> None:
        """Does a Commit."""
        self._check(m.source, m.transaction_id)
        self.ledger.decide(m.transaction_id, State.COMMITTED)

    def abort(self, m: pb.AbortRequest) -> None:
        """Does an Abort."""
        self._check(m.source, m.transaction_id)
        self.ledger.decide(m.transaction_id, State.ABORTED)

    def get(self, m: pb.GetTransactionRequest) -> pb.GetTransactionResponse:
        """Does a GetTransaction."""
        self._check(m.source, m.transaction_id)
        return self.ledger.get(m.transaction_id)

    def check_source(self, source: str) -> None:
        """Refuses a source that is not registered."""
        if not source:
            raise InvalidError(grpc.StatusCode.INVALID_ARGUMENT, "source is empty", reason=Reason.FIELD_INVALID)
        if self._sources is not None and source not in self._sources:
            code = grpc.StatusCode.PERMISSION_DENIED
            raise DeniedError(
                code, "fake: the source is not registered", reason=Reason.SOURCE_DENIED, metadata={"source": source}
            )

    def _check(self, source: str, id: bytes, events: Iterable[event_pb2.Event] | None = None) -> None:
        """Refuses what the platform would refuse."""
        self.check_source(source)
        if len(id) != 16:
            raise InvalidError(
                grpc.StatusCode.INVALID_ARGUMENT, "transaction_id has not 16 bytes", reason=Reason.FIELD_INVALID
            )
        if events is None:
            return
        events = list(events)
        check(events, self.limits)
        for e in events:
            if self._topics is not None and e.topic not in self._topics:
                code = grpc.StatusCode.PERMISSION_DENIED
                raise DeniedError(code, "fake: topic", reason=Reason.TOPIC_DENIED, metadata={"topic": e.topic})

    def _authorize(self, context: grpc.ServicerContext) -> None:
        for key, value in context.invocation_metadata():
            if key == "authorization":
                self.tokens.append(str(value))

    @property
    def horizon(self) -> datetime.datetime:
        """The time from which on transactions would be known: told for unknown ones."""
        return self.ledger.horizon

    @horizon.setter
    def horizon(self, at: datetime.datetime) -> None:
        self.ledger.horizon = at


def _id(id: bytes) -> uuid.UUID | None:
    return uuid.UUID(bytes=id) if len(id) == 16 else None


def _call(name: str, message: Any, unary: bool) -> Call:
    kept = bool(getattr(message, "kept_by_caller", False))
    return Call(name, _id(message.transaction_id), unary, _events(message), kept)


def _events(message: Any) -> tuple[Event, ...]:
    return tuple(event_from_proto(e) for e in getattr(message, "events", ()) if len(e.event_id) == 16)


def abort(context: grpc.ServicerContext, error: CallError) -> Any:
    """Ends a call with an error."""
    context.set_trailing_metadata(((DETAILS, status_of(error).SerializeToString()),))
    context.abort(error.code, error.message)
