"""Django: events that share the fate of an atomic block (the extra "django").

    # settings.py
    INSTALLED_APPS = [..., "outbox_client.django"]          # brings the migration of the marker table
    OUTBOX = {"address": "outbox:7070", "source": "shop"}   # Config's names; what is left out comes from OUTBOX_… variables

    from outbox_client import django as outbox

    with outbox.atomic():                       # or @outbox.atomic(); the outermost block
        order.save()
        outbox.publish(Event(...))

The block's end writes the marker, sends one Prepare, and commits; an exception rolls back, and so does set_rollback. Events published in
an inner transaction.atomic() that is rolled back are dropped with it. After COMMIT nothing of ours is awaited or raised. For
ATOMIC_REQUESTS see AtomicRequestsMiddleware.

In a TestCase, whose transaction never commits, the events are published when the block ends well: point OUTBOX at a
outbox_client.testing.FakePlatform and look there.
"""

from __future__ import annotations

import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from outbox_client._source import driver
from outbox_client._source.attempt import Attempt, run
from outbox_client._source.outcome import certainly_rolled_back
from outbox_client.client import OutboxClient
from outbox_client.config import Config
from outbox_client.errors import NoTransactionError, OutcomeUnknownError
from outbox_client.event import Event
from outbox_client.upkeep import Upkeep

_lock = threading.Lock()
_client: OutboxClient | None = None


def client() -> OutboxClient:
    """Returns the client of this process, made from settings.OUTBOX with the first call.

    settings.OUTBOX may also have "databases" (aliases; default ["default"]), "spill" (default True) and "upkeep" (an Upkeep).
    Servers answer the platform's questions from the first call on: call client().connect() in gunicorn's post_worker_init to begin at once.
    """
    global _client
    with _lock:
        if _client is None:
            _client = _make()
        return _client


def close() -> None:
    """Closes the client of this process. The next use makes another one."""
    global _client
    with _lock:
        closing, _client = _client, None
    if closing is not None:
        closing.close()


def _settings() -> dict[str, Any]:
    from django.conf import settings

    return dict(getattr(settings, "OUTBOX", {}))


def _make() -> OutboxClient:
    from django.db import connections

    from outbox_client.psycopg import Connector

    settings = _settings()
    aliases = settings.pop("databases", ["default"])
    upkeep = settings.pop("upkeep", None)
    for name in ("spill", "atomic_requests"):
        settings.pop(name, None)
    made = OutboxClient(Config.from_env(**settings))
    for alias in aliases:
        params = {
            k: v
            for k, v in connections[alias].get_connection_params().items()
            if k not in ("context", "cursor_factory")
        }
        made.register_database(Connector("", params), name=alias, upkeep=upkeep or Upkeep())
    return made


class _Published:
    """An event that waits for its block to commit. Django keeps it among the on_commit callbacks, which know about savepoints."""

    def __init__(self, proto: Any) -> None:
        self.proto = proto

    def __call__(self) -> None:
        """The block has committed: the event was prepared before."""


@contextmanager
def atomic(using: str | None = None) -> Iterator[None]:
    """Runs a block in a database transaction and publishes what it published. Also a decorator.

    It is the outermost block: inside another one Django raises RuntimeError. Raises, rolled back: DeniedError, UnavailableError,
    TransactionError, the database's errors; and OutcomeUnknownError when COMMIT was sent and not answered.
    """
    from django.db import transaction

    connection = transaction.get_connection(using)
    attempt: Attempt | None = None
    commit_sent = False
    try:
        with transaction.atomic(using=using, durable=True):
            connection.outbox_client = True
            try:
                yield
                if not connection.needs_rollback:
                    attempt = _prepare(connection)
                commit_sent = not connection.needs_rollback
            finally:
                connection.outbox_client = False
    except BaseException as e:
        if commit_sent and not certainly_rolled_back(e):
            raise OutcomeUnknownError(attempt.id if attempt else None, e) from e
        # Before COMMIT was sent the transaction cannot commit any more, whatever becomes of the connection.
        if attempt is not None:
            attempt.rolled_back()
        raise
    if attempt is not None:
        attempt.committed()


def publish(*events: Event, using: str | None = None) -> list[uuid.UUID]:
    """Adds events to the outbox.atomic() block that the database connection is in. Returns their ids.

    They are checked now (InvalidError; the block stays usable) and prepared just before COMMIT, all at once, in this order. Raises
    NoTransactionError outside of such a block.
    """
    from django.db import transaction

    connection = transaction.get_connection(using)
    if not getattr(connection, "outbox_client", False):
        raise NoTransactionError("not in a block of outbox_client.django.atomic() or AtomicRequestsMiddleware")
    for proto in client().protos(events):
        connection.on_commit(_Published(proto), robust=True)
    return [event.event_id for event in events]


def _prepare(connection: Any) -> Attempt | None:
    """Prepares the events of the block that were not rolled back."""
    protos = [func.proto for _, func, *_ in connection.run_on_commit if isinstance(func, _Published)]
    if not protos:
        return None
    own = client()
    if any(getattr(block, "_from_testcase", False) for block in connection.atomic_blocks):
        from outbox_client.event import event_from_proto

        own.publish(*(event_from_proto(p) for p in protos))
        connection.run_on_commit = [entry for entry in connection.run_on_commit if not isinstance(entry[1], _Published)]
        return None
    attempt = Attempt(own, connection.alias, _settings().get("spill", True))
    try:
        run(attempt.prepare(protos), _stepper(own, connection))
    except BaseException:
        attempt.rolled_back()
        raise
    return attempt


def _stepper(own: OutboxClient, connection: Any) -> Callable[[driver.Step], Any]:
    """Does the steps of the protocol on Django's connection."""

    def step(wanted: driver.Step) -> Any:
        if isinstance(wanted, driver.MustSpill):
            return own.must_spill(wanted.database)
        if isinstance(wanted, driver.Prepare):
            return own.prepare_encoded(wanted.body, wanted.fail_fast)
        with connection.cursor() as cursor:
            cursor.execute(driver.named(wanted.sql, "%(p{})s"), driver.names(wanted.args))
            return cursor.fetchall() if isinstance(wanted, driver.Fetch) else cursor.rowcount

    return step
