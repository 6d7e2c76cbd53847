"""Calls on their way."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING

from outbox_client._core.wire import Kind
from outbox_client.errors import CallError

if TYPE_CHECKING:
    from outbox_client._core.stream import Stream

Answer = bytes | CallError
"""The end of a call: the token (empty but for Prepare), or what it failed with."""


class Call:
    """One call. It is in exactly one place: in a session's queue, among a stream's open calls, or nowhere."""

    __slots__ = ("body", "future", "id", "kind", "later", "sends", "sent_at", "stream")

    def __init__(
        self,
        kind: Kind,
        body: bytes,
        *,
        future: asyncio.Future[bytes] | None = None,
        later: Callable[[Answer], None] | None = None,
    ) -> None:
        self.kind, self.body = kind, body
        self.future, self.later = future, later  # exactly one of them
        self.id = 0
        self.stream: Stream | None = None
        self.sends = 0
        self.sent_at = 0.0

    def deliver(self, answer: Answer) -> None:
        """Ends the call. Its caller may have gone."""
        if self.later is not None:
            self.later(answer)
        elif self.future is not None and not self.future.done():
            if isinstance(answer, CallError):
                self.future.set_exception(answer)
            else:
                self.future.set_result(answer)
