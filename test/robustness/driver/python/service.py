"""What the workers of this process share: connections, the SDK, the journal."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import asyncpg
import grpc
from outbox_client import Alarm, AsyncOutboxClient, CallError, Config, Upkeep
from outbox_client.sqlalchemy import Outbox
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from journal import ALARM, FAIL, INFO, OK, Journal

PATIENCE = 8.0  # seconds for one transaction, thinking included


@dataclass(frozen=True)
class Settings:
    """What the suite says: see Config in ../config.go."""

    Process: str
    Source: str
    DSN: str
    Servers: list[str]
    Seed: int
    Workers: int
    PerSecond: float
    Aggregates: int
    Hot: int
    Topics: list[str]
    Profiles: dict[str, int]
    Journals: str
    Control: str


class Service:
    """Is made inside the event loop."""

    client: AsyncOutboxClient
    outbox: Outbox[AsyncOutboxClient]
    pool: Any

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.journal = Journal(settings.Journals, settings.Process, settings.Source)
        self.stopping = asyncio.Event()
        self._open = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()
        self._under_way = 0
        self._later: set[asyncio.Task[None]] = set()
        self.engine: AsyncEngine = create_async_engine(
            "postgresql+asyncpg://", async_creator=self._connect, pool_size=settings.Workers + 2
        )

    async def start(self, client: type[AsyncOutboxClient]) -> None:
        """Opens everything."""
        config = Config(
            address="ipv4:" + ",".join(self.settings.Servers),
            source=self.settings.Source,
            instance=self.settings.Process,
            plaintext=True,
            on_alarm=self._alarm,
        )
        self.client = client(config)
        # Markers go soon after they are acknowledged, so that their clean-up is under test too.
        upkeep = Upkeep(marker_retention=1, drain_interval=0.2, janitor_interval=5)
        self.outbox = Outbox(self.client, self.engine, upkeep=upkeep)
        self.pool = await asyncpg.create_pool(
            self.settings.DSN, min_size=0, max_size=self.settings.Workers + 2, timeout=2, command_timeout=PATIENCE
        )
        try:
            await self.client.connect()
        except CallError as e:
            self.client.log.warning("connecting; calls will: %s", e)

    async def stop(self) -> None:
        """Closes everything."""
        await self.client.close()
        await self.engine.dispose()
        self.pool.terminate()

    async def _connect(self, **_: Any) -> Any:
        return await asyncpg.connect(self.settings.DSN, timeout=2, command_timeout=PATIENCE)

    def _alarm(self, alarm: Alarm) -> None:
        self.journal.write(INFO, ALARM, alarm.transaction_id, state=alarm.kind.value, note=alarm.error)

    # --- what is under way ---

    def go(self) -> None:
        """Lets workers begin transactions."""
        self._open.set()

    async def quiet(self) -> None:
        """Lets them begin none, and waits until nothing is under way."""
        self._open.clear()
        await self._idle.wait()

    async def enter(self) -> bool:
        """Waits until transactions may begin. False: none will any more."""
        while not self._open.is_set() and not self.stopping.is_set():
            waits = [asyncio.ensure_future(e.wait()) for e in (self._open, self.stopping)]
            try:
                await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for wait in waits:
                    wait.cancel()
        return not self.stopping.is_set()

    @contextmanager
    def under_way(self) -> Iterator[None]:
        """Counts a block in."""
        self._begin()
        try:
            yield
        finally:
            self._end()

    def later(self, seconds: float, do: Callable[[], Awaitable[None]]) -> None:
        """Does something after a while, as part of what is under way."""
        self._begin()

        async def wait() -> None:
            try:
                await asyncio.sleep(seconds)
                await do()
            finally:
                self._end()

        self.background(wait())

    def background(self, work: Coroutine[Any, Any, None]) -> None:
        """Runs something that nobody waits for."""
        task = asyncio.ensure_future(work)
        self._later.add(task)
        task.add_done_callback(self._later.discard)

    def _begin(self) -> None:
        self._under_way += 1
        self._idle.clear()

    def _end(self) -> None:
        self._under_way -= 1
        if self._under_way == 0:
            self._idle.set()


_REFUSED = (grpc.StatusCode.ALREADY_EXISTS, grpc.StatusCode.FAILED_PRECONDITION, grpc.StatusCode.INVALID_ARGUMENT)


def outcome(error: BaseException | None) -> str:
    """What a call's error says about its effect. Only what the platform says about the request itself is a refusal."""
    if error is None:
        return OK
    return FAIL if isinstance(error, CallError) and error.code in _REFUSED else INFO
