"""What the protocol needs of a database driver.

Statements are written with PostgreSQL's own placeholders, $1, $2, …; numbered and named turn them into what other drivers
take. Every parameter and result is cast in the statement to text, bigint, boolean, bytea or an array of text, which all
drivers handle the same way.
"""

from __future__ import annotations

import re
from collections.abc import Generator, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

Row = Sequence[Any]


class Connection(Protocol):
    """A connection of upkeep. Statements outside of transaction() are each in a transaction of their own."""

    async def fetch(self, sql: str, *args: Any) -> Sequence[Row]:
        """Runs a query."""

    async def execute(self, sql: str, *args: Any) -> int:
        """Runs a statement and returns the number of rows affected."""

    def transaction(self) -> AbstractAsyncContextManager[None]:
        """A READ COMMITTED transaction."""

    async def close(self) -> None:
        """Closes the connection. It does not raise."""


class Connector(Protocol):
    """Makes connections to the primary of a source database, in whatever event loop is running."""

    async def connect(self) -> Connection:
        """Opens a connection in autocommit mode, with the search_path of the service's transactions."""

    async def close(self) -> None:
        """Ends what the connector itself keeps in the running event loop."""


@dataclass(frozen=True)
class Fetch:
    """A step of a protocol: run a query on the caller's own connection. Its result is the rows."""

    sql: str
    args: Sequence[Any] = ()


@dataclass(frozen=True)
class Execute:
    """A step: run a statement there. Its result is the number of rows affected."""

    sql: str
    args: Sequence[Any] = ()


@dataclass(frozen=True)
class Prepare:
    """A step: prepare an encoded request on the platform. Its result is the token."""

    body: bytes
    fail_fast: bool


@dataclass(frozen=True)
class MustSpill:
    """A step: ask on another connection whether spilled requests wait. Its result is a bool."""

    database: str


Step = Fetch | Execute | Prepare | MustSpill
T = TypeVar("T")
Steps = Generator[Step, Any, T]
"""A protocol, written once as a generator and run by blocking and by asyncio drivers alike."""

_PLACEHOLDER = re.compile(r"\$(\d+)")


def named(sql: str, style: str) -> str:
    """Turns $1 into style with its number, for example ":p{}" or "%(p{})s"."""
    return _PLACEHOLDER.sub(lambda m: style.format(m.group(1)), sql)


def names(args: Sequence[Any]) -> dict[str, Any]:
    """The arguments by the names p1, p2, …."""
    return {f"p{i}": value for i, value in enumerate(args, 1)}
