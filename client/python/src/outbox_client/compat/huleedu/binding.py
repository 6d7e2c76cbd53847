"""bind: lets call sites that pass no session join a transaction without touching them."""

from __future__ import annotations

from contextlib import AbstractAsyncContextManager, AbstractContextManager
from contextvars import ContextVar
from types import TracebackType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncSession

_bound: ContextVar[AsyncSession | None] = ContextVar("outbox_bound_session", default=None)


class bind(AbstractContextManager["AsyncSession"], AbstractAsyncContextManager["AsyncSession"]):  # noqa: N801  # used like a function
    """Within the block, what is added without a session belongs to the transaction of this one.

    ``with bind(session): …`` and ``async with bind(session): …`` do the same. It holds for the current task and tasks
    started within. A session that a call site passes goes before it.
    """

    def __init__(self, session: AsyncSession) -> None:
        self._session = session

    def __enter__(self) -> AsyncSession:
        self._token = _bound.set(self._session)
        return self._session

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _bound.reset(self._token)

    async def __aenter__(self) -> AsyncSession:
        return self.__enter__()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.__exit__(kind, error, trace)


def bound_session() -> AsyncSession | None:
    """Returns the session that is bound here, or None."""
    return _bound.get()
