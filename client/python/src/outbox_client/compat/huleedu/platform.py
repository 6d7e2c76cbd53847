"""The way to the platform: found in the environment when the first event is added, and shared by all repositories of
a service.
"""

from __future__ import annotations

import logging
import os
import threading
import weakref
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from typing import TYPE_CHECKING, TypeVar
from uuid import UUID

from outbox_client import AsyncOutboxClient, Config, ConfigError, Event, UnavailableError, new_id
from outbox_client._gen.outbox.v1 import outbox_service_pb2 as pb
from outbox_client.compat.huleedu.breaker import CircuitBreaker, CircuitOpenError
from outbox_client.compat.huleedu.monitoring import outbox_breaker_open
from outbox_client.errors import CallError

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession

    from outbox_client.sqlalchemy import Outbox

logger = logging.getLogger("outbox_client.huleedu")

Number = TypeVar("Number", int, float)

PREFIX = "OUTBOX_"
"""Of the environment variables. See docs/migrating-from-a-library.md for all of them."""

SPILL = """
INSERT INTO outbox_marker (id, created_at, spilled)
VALUES (CAST(CAST(:id AS text) AS uuid), clock_timestamp(), CAST(:body AS bytea))"""
SPILLED = "SELECT EXISTS (SELECT FROM outbox_marker WHERE spilled IS NOT NULL AND refused IS NULL)"


class UnsupportedDatabaseError(RuntimeError):
    """The session's database cannot hold a marker: only PostgreSQL can."""


@dataclass(frozen=True)
class Settings:
    """What configures the layer beside the client itself."""

    config: Config
    database: str = "default"
    breaker_failures: int = 5
    breaker_seconds: float = 5.0
    fallback: bool = True

    @classmethod
    def from_env(cls, service_name: str) -> Settings:
        """Reads OUTBOX_…; the source is the service's name if OUTBOX_SOURCE is not set. Raises ConfigError, which
        names what is missing.
        """
        env = os.environ
        source = env.get(PREFIX + "SOURCE") or (service_name if service_name != "unknown" else "")
        required = {PREFIX + "ADDRESS": env.get(PREFIX + "ADDRESS"), PREFIX + "SOURCE": source}
        missing = [name for name, value in required.items() if not value]
        if missing:
            raise ConfigError(f"the outbox platform is not configured: set {' and '.join(missing)}")
        return cls(
            config=Config.from_env(source=source),
            database=env.get(PREFIX + "DATABASE") or "default",
            breaker_failures=_number(PREFIX + "BREAKER_FAILURES", 5, int),
            breaker_seconds=_number(PREFIX + "BREAKER_SECONDS", 5.0, float),
            fallback=_switch(PREFIX + "FALLBACK", True),
        )


def _number(name: str, default: Number, kind: type[Number]) -> Number:
    text = os.environ.get(name)
    if not text:
        return default
    try:
        value = kind(text)
    except ValueError:
        value = kind(0)
    if value <= 0:
        raise ConfigError(f"{name} is {text!r}, not a number above 0")
    return value


def _switch(name: str, default: bool) -> bool:
    text = os.environ.get(name)
    if not text:
        return default
    try:
        return {"database": True, "fail": False}[text]
    except KeyError:
        raise ConfigError(f"{name} is {text!r}, not database or fail") from None


class Platform:
    """One client, its circuit breaker, and what joins it to the sessions of each engine.

    Safe for use in several event loops and after a fork, because the client is.
    """

    def __init__(self, client: AsyncOutboxClient, settings: Settings, service_name: str) -> None:
        self.client = client
        self._settings = settings
        gauge = outbox_breaker_open.labels(service=service_name)
        self.breaker = CircuitBreaker(
            settings.breaker_failures, settings.breaker_seconds, on_change=lambda is_open: gauge.set(int(is_open))
        )
        self._outboxes: weakref.WeakKeyDictionary[AsyncEngine, Outbox[AsyncOutboxClient]] = weakref.WeakKeyDictionary()
        self._lock = threading.Lock()
        # Events wait in the service's database: what is added without a session goes there too, or it would overtake
        # them.
        self._behind = False

    def outbox(self, engine: AsyncEngine) -> Outbox[AsyncOutboxClient]:
        """What joins the platform to the sessions of an engine, and answers its questions from there."""
        from outbox_client.sqlalchemy import Outbox

        with self._lock:
            found = self._outboxes.get(engine)
            if found is None:
                found = Outbox(self.client, engine, database=self._settings.database)
                self._outboxes[engine] = found
            return found

    def join(self, engine: AsyncEngine, session: AsyncSession, event: Event, again: Event) -> None:
        """Adds an event to the transaction that the session is in. again is the same event with an id of its own, for
        when the transaction has one with its id already. No I/O; raises InvalidError for what the platform would
        refuse.
        """
        dialect = session.get_bind().dialect.name
        if dialect != "postgresql":
            raise UnsupportedDatabaseError(
                f"an event cannot join a transaction of {dialect}: the outbox platform needs PostgreSQL for that"
            )
        outbox = self.outbox(engine)
        taken = any(pending.event_id == event.event_id for pending in outbox.pending(session))
        outbox.collect(session, again if taken else event)

    async def publish(self, engine: AsyncEngine, event: Event) -> None:
        """Publishes without a transaction of the caller: durable and decided when it returns.

        While the platform cannot be reached, the event is stored in the service's own database instead, from where it
        is published later. Raises UnavailableError or CircuitOpenError if that cannot be either.
        """
        if self._behind:
            await self._store(engine, event)
            return
        transaction_id = new_id()
        if event.occurred_at is None:
            event = replace(event, occurred_at=datetime.now(timezone.utc))  # sent again it has to be the same
        try:
            self.breaker.before()
            if self.client.link == "down":
                raise_down(self.client)
            kept = self._may_store(engine)  # and published again, perhaps long after an answer was lost
            await self.client.publish(event, transaction_id=transaction_id, kept=kept)
        except CircuitOpenError as e:
            await self._store_instead(engine, transaction_id, event, e)
        except UnavailableError as e:
            self.breaker.failure()
            await self._store_instead(engine, transaction_id, event, e)
        except CallError:
            self.breaker.success()
            raise
        except BaseException:
            self.breaker.abandoned()
            raise
        else:
            self.breaker.success()

    def _may_store(self, engine: AsyncEngine) -> bool:
        return self._settings.fallback and engine.dialect.name == "postgresql"

    async def _store_instead(self, engine: AsyncEngine, transaction_id: UUID, event: Event, why: Exception) -> None:
        if not self._may_store(engine):
            raise why
        try:
            await self._spill(engine, transaction_id, event)
        except Exception as e:
            logger.error("the event could not be stored in the service's database either", extra={"error": str(e)})
            raise why from e
        logger.warning(
            "the platform cannot be reached: the event waits in the service's database", extra={"error": str(why)}
        )

    async def _spill(self, engine: AsyncEngine, transaction_id: UUID, event: Event) -> None:
        """Stores the very request that was not answered, under its own id: the platform may have it, and finds it when
        it is published again.
        """
        from sqlalchemy import text
        from sqlalchemy.ext.asyncio import AsyncSession

        self.outbox(engine)  # it publishes what waits
        source, events = self.client.config.source, self.client.protos([event])
        request = pb.PrepareRequest(source=source, transaction_id=transaction_id.bytes, events=events)
        values = {"id": str(transaction_id), "body": request.SerializeToString()}
        async with AsyncSession(engine) as session, session.begin():
            await session.execute(text(SPILL), values)
        self._behind = True
        self.client.spilled(self._settings.database)

    async def _store(self, engine: AsyncEngine, event: Event) -> None:
        """Adds the event in a transaction of its own, which the platform's being away does not fail."""
        from sqlalchemy import text
        from sqlalchemy.ext.asyncio import AsyncSession

        async with AsyncSession(engine) as session:
            async with session.begin():
                self.outbox(engine).collect(session, event)
            self._behind = bool((await session.execute(text(SPILLED))).scalar())

    async def flush(self, timeout: float) -> None:
        """Waits until the platform has acknowledged the Commits that are under way. What is not, it finds out by
        itself.
        """
        await self.client.flush(timeout)


def raise_down(client: AsyncOutboxClient) -> None:
    """Raises what a call would raise after it had waited for a platform that is known to be away."""
    import grpc

    raise UnavailableError(
        grpc.StatusCode.UNAVAILABLE, f"the platform cannot be reached (link {client.link})", local=True
    )


_lock = threading.Lock()
_platforms: dict[str, Platform] = {}
_given: tuple[AsyncOutboxClient | None, Settings | None] = (None, None)


def configure(client: AsyncOutboxClient | None = None, settings: Settings | None = None) -> None:
    """Says what repositories use from now on, instead of the environment: a client, settings, or both. Without
    arguments: the environment again. A client that was made before is closed by whoever made it, or by close().
    """
    global _given
    with _lock:
        _given = (client, settings)
        _platforms.clear()


def platform_of(service_name: str) -> Platform:
    """Returns the platform of a service. It is made at the first call. Raises ConfigError if it is not configured."""
    with _lock:
        found = _platforms.get(service_name)
        if found is None:
            client, settings = _given
            if settings is None:
                settings = Settings.from_env(service_name) if client is None else Settings(client.config)
            found = Platform(client or AsyncOutboxClient(settings.config), settings, service_name)
            _platforms[service_name] = found
        return found


def opened(service_name: str) -> Platform | None:
    """Returns the platform of a service if an event was added already."""
    return _platforms.get(service_name)


async def close() -> None:
    """Closes all clients that this module made, at the end of a process. The next write opens new ones."""
    with _lock:
        platforms = list(_platforms.values())
        _platforms.clear()
        given = _given[0]
    for platform in platforms:
        if platform.client is not given:
            await platform.client.close()
