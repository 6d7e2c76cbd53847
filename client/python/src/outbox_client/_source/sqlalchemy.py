"""Connections of upkeep through SQLAlchemy."""

from __future__ import annotations

import asyncio
import weakref
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from functools import lru_cache
from typing import Any, TypeVar

from sqlalchemy import Connection, Dialect, Engine
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from outbox_client._source.driver import Row, named, names

T = TypeVar("T")


@lru_cache(maxsize=64)
def _driver_sql(sql: str, paramstyle: str) -> str:
    if paramstyle == "numeric_dollar":
        return sql  # asyncpg's are PostgreSQL's own
    if paramstyle == "pyformat":
        return named(sql, "%(p{})s")
    raise TypeError(
        f"a driver with parameters in the style {paramstyle!r} is not supported: use asyncpg, psycopg or psycopg2"
    )


def statement(dialect: Dialect, sql: str, args: Sequence[Any]) -> tuple[str, Any]:
    """Turns a statement of the protocol into the driver's own, with its parameters: for exec_driver_sql, the cheapest way."""
    style = dialect.paramstyle
    return _driver_sql(sql, style), tuple(args) if style == "numeric_dollar" else names(args)


class AsyncConnector:
    """Connects as an AsyncEngine does, but with a pool for each event loop, so that no loop gets another one's connection."""

    def __init__(self, engine: AsyncEngine) -> None:
        self._engine = engine
        self._own: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, AsyncEngine] = weakref.WeakKeyDictionary()

    async def connect(self) -> _AsyncConnection:
        """See driver.Connector."""
        loop = asyncio.get_running_loop()
        own = self._own.get(loop)
        if own is None:
            e = self._engine.sync_engine
            own = self._own[loop] = AsyncEngine(Engine(e.pool.recreate(), e.dialect, e.url))
        c = await own.connect()
        return _AsyncConnection(await c.execution_options(isolation_level="AUTOCOMMIT"))

    async def close(self) -> None:
        """See driver.Connector."""
        own = self._own.pop(asyncio.get_running_loop(), None)
        if own is not None:
            await own.dispose()


class _AsyncConnection:
    def __init__(self, c: AsyncConnection) -> None:
        self._c = c

    async def fetch(self, sql: str, *args: Any) -> Sequence[Row]:
        return (await self._c.exec_driver_sql(*statement(self._c.dialect, sql, args))).all()

    async def execute(self, sql: str, *args: Any) -> int:
        return (await self._c.exec_driver_sql(*statement(self._c.dialect, sql, args))).rowcount

    @asynccontextmanager
    async def transaction(self) -> AsyncIterator[None]:
        await self._c.commit()  # ends what SQLAlchemy calls a transaction in autocommit mode
        await self._c.execution_options(isolation_level="READ COMMITTED")
        try:
            async with self._c.begin():
                yield
        finally:
            await self._c.execution_options(isolation_level="AUTOCOMMIT")

    async def close(self) -> None:
        try:
            await self._c.invalidate()
            await self._c.close()
        except Exception:
            pass  # it is gone


class SyncConnector:
    """Connects with an Engine, in threads of its own."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    async def connect(self) -> _SyncConnection:
        """See driver.Connector."""
        thread = ThreadPoolExecutor(1, thread_name_prefix="outbox-upkeep")
        made: list[Connection] = []

        def connect() -> Connection:
            made.append(self._engine.connect())
            return made[0].execution_options(isolation_level="AUTOCOMMIT")

        try:
            c = await asyncio.get_running_loop().run_in_executor(thread, connect)
        except BaseException:
            # It may be cancelled while the thread still connects: what it gets then is closed there.
            thread.submit(_close_all, made)
            thread.shutdown(wait=False)
            raise
        return _SyncConnection(c, thread)

    async def close(self) -> None:
        """See driver.Connector."""


class _SyncConnection:
    """A connection that is used in one thread."""

    def __init__(self, c: Connection, thread: ThreadPoolExecutor) -> None:
        self._c, self._thread = c, thread

    async def _run(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)

    async def fetch(self, sql: str, *args: Any) -> Sequence[Row]:
        return await self._run(lambda: self._c.exec_driver_sql(*statement(self._c.dialect, sql, args)).all())

    async def execute(self, sql: str, *args: Any) -> int:
        return await self._run(lambda: self._c.exec_driver_sql(*statement(self._c.dialect, sql, args)).rowcount)

    @asynccontextmanager
    async def transaction(self) -> AsyncIterator[None]:
        def begin() -> None:
            self._c.commit()  # ends what SQLAlchemy calls a transaction in autocommit mode
            self._c.execution_options(isolation_level="READ COMMITTED")
            self._c.begin()

        def end(commit: bool) -> None:
            if commit:
                self._c.commit()
            else:
                self._c.rollback()
            self._c.execution_options(isolation_level="AUTOCOMMIT")

        await self._run(begin)
        try:
            yield
        except BaseException:
            await self._run(lambda: end(False))
            raise
        await self._run(lambda: end(True))

    async def close(self) -> None:
        await self._run(lambda: _close(self._c))
        self._thread.shutdown(wait=False)


def _close_all(connections: list[Connection]) -> None:
    for c in connections:
        _close(c)


def _close(c: Connection) -> None:
    """Closes a connection for good."""
    try:
        c.invalidate()
        c.close()
    except Exception:
        pass  # it is gone
