"""What the blocking and the asyncio client have in common: everything that does not wait."""

from __future__ import annotations

import logging
import os
import threading
import time
import uuid
import weakref
from abc import ABC, abstractmethod
from collections.abc import Sequence

import grpc

from outbox_client._core.decisions import Done
from outbox_client._core.engine import Engine, report
from outbox_client._core.limits import Limits, check
from outbox_client._core.trace import current_trace
from outbox_client._gen.outbox.v1 import event_pb2
from outbox_client._gen.outbox.v1 import outbox_service_pb2 as pb
from outbox_client._source.database import Registration
from outbox_client._source.driver import Connector
from outbox_client.alarm import Alarm
from outbox_client.config import DEFAULT_DATABASE, Config, ConfigError
from outbox_client.errors import InvalidError, Reason
from outbox_client.event import Event, event_to_proto
from outbox_client.stats import Stats
from outbox_client.transaction import DatabaseTransaction
from outbox_client.upkeep import Upkeep


class BaseClient(ABC):
    """The part of a client that does not wait. Safe for concurrent use."""

    def __init__(self, config: Config, *, logger: logging.Logger | None = None) -> None:
        """Makes a client. No I/O: it connects with the first call.

        logger: gets what an operator should know; the attribute "outbox" of each record is a dict. Default: "outbox_client".
        """
        self.config = config
        self.log = logger or logging.getLogger("outbox_client")
        self._stats = Stats()
        self._registrations: dict[str, Registration] = {}
        self._lock = threading.Lock()
        self._closed = False
        _clients.add(self)

    # --- for the modules of the drivers ---

    def protos(self, events: Sequence[Event]) -> list[event_pb2.Event]:
        """Converts events, with the current trace context, and checks them. Raises InvalidError."""
        now, trace = time.time(), current_trace()
        out = []
        for i, event in enumerate(events):
            try:
                out.append(event_to_proto(event, now, trace))
            except (TypeError, ValueError, AttributeError) as e:
                raise InvalidError(
                    grpc.StatusCode.INVALID_ARGUMENT, f"events[{i}]: {e}", reason=Reason.FIELD_INVALID, local=True
                ) from e
        self.check_protos(out)
        return out

    def check_protos(self, events: Sequence[event_pb2.Event]) -> None:
        """Raises InvalidError for what the platform would refuse."""
        check(events, self.limits)

    def registration(self, database: str) -> Registration | None:
        """Returns what is known about a registered database."""
        with self._lock:
            return self._registrations.get(database)

    def report(self, alarm: Alarm) -> None:
        """Logs an alarm, counts it, and passes it to Config.on_alarm."""
        report(self.config, self._stats, self.log, alarm)

    @abstractmethod
    def spilled(self, database: str) -> None:
        """Counts a spilled request and wakes the drainer."""

    @abstractmethod
    def _engines(self) -> list[Engine]:
        """Returns the engines of this process that are open."""

    @abstractmethod
    def _tell_engines(self, registration: Registration) -> None:
        """Registers a database with engines that are open."""

    @abstractmethod
    def _before_fork(self) -> None:
        """Gets ready for a fork."""

    @abstractmethod
    def _forked_parent(self) -> None:
        """Goes on in the parent."""

    @abstractmethod
    def _forked_child(self) -> None:
        """Begins anew in the child."""

    # --- public ---

    @property
    def limits(self) -> Limits:
        """The limits in force: those that the last session told, until then the platform's defaults."""
        engines = self._engines()
        return engines[-1].limits if engines else Limits()

    @property
    def link(self) -> str:
        """Whether the platform can be reached: "connecting", "up" or "down"."""
        engines = self._engines()
        return engines[-1].link if engines else "connecting"

    def stats(self) -> Stats:
        """Returns the counters."""
        return self._stats

    def check_events(self, *events: Event) -> None:
        """Raises InvalidError, naming every field, for what the platform would refuse by its rules and limits."""
        self.protos(events)

    def register_database(
        self, connector: Connector, *, name: str = DEFAULT_DATABASE, upkeep: Upkeep | None = None
    ) -> None:
        """Lets the client answer the platform's questions about a source database and keep it tidy, in every process and loop.

        The Outbox classes of outbox_client.sqlalchemy and its neighbours do it. It does no I/O: questions are answered from the
        first call or connect on. Raises ConfigError when the name is registered already.
        """
        registration = Registration(name, connector, upkeep or Upkeep())
        with self._lock:
            if name in self._registrations:
                raise ConfigError(f"database {name!r} is registered already")
            self._registrations[name] = registration
        self._tell_engines(registration)

    @abstractmethod
    def commit_later(self, transaction_id: uuid.UUID, token: bytes = b"", *, done: Done | None = None) -> None:
        """Tells the platform that the local transaction has committed, and returns at once.

        It is repeated until it is acknowledged; done, when given, is then called once with None or with the platform's refusal, and
        must not block. Beyond Config.max_pending_commits, and after close, nothing is sent, and done gets the reason: the
        platform finds the decision out by asking. token is what prepare returned.
        """

    @abstractmethod
    def abort_later(self, transaction_id: uuid.UUID, token: bytes = b"", *, done: Done | None = None) -> None:
        """Tells the platform that the local transaction did not commit, like commit_later.

        Never call it when the outcome is unknown.
        """

    # --- encoding ---

    def _prepare_body(self, transaction_id: uuid.UUID, db: DatabaseTransaction, events: Sequence[Event]) -> bytes:
        request = pb.PrepareRequest(
            source=self.config.source,
            transaction_id=transaction_id.bytes,
            database_transaction=db.to_proto(),
            events=self.protos(events),
        )
        return request.SerializeToString()

    def _publish_body(self, transaction_id: uuid.UUID, events: Sequence[Event], kept: bool) -> bytes:
        request = pb.PublishRequest(
            source=self.config.source,
            transaction_id=transaction_id.bytes,
            events=self.protos(events),
            kept_by_caller=kept,
        )
        return request.SerializeToString()

    def _commit_body(self, transaction_id: uuid.UUID, token: bytes) -> bytes:
        request = pb.CommitRequest(source=self.config.source, transaction_id=transaction_id.bytes, token=token)
        return request.SerializeToString()

    def _abort_body(self, transaction_id: uuid.UUID, token: bytes) -> bytes:
        request = pb.AbortRequest(source=self.config.source, transaction_id=transaction_id.bytes, token=token)
        return request.SerializeToString()


_clients: weakref.WeakSet[BaseClient] = weakref.WeakSet()


def _before_fork() -> None:
    for client in list(_clients):
        client._before_fork()


def _after_fork_in_parent() -> None:
    for client in list(_clients):
        client._forked_parent()


def _after_fork_in_child() -> None:
    for client in list(_clients):
        client._lock = threading.Lock()
        client._forked_child()


os.register_at_fork(before=_before_fork, after_in_parent=_after_fork_in_parent, after_in_child=_after_fork_in_child)
