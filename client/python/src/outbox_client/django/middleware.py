"""Every request in a transaction whose events are published if and only if it commits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from outbox_client.django import atomic


class AtomicRequestsMiddleware:
    """What Django's ATOMIC_REQUESTS does, with outbox.atomic(): a view that raises rolls back, one that returns commits.

    Put it last in MIDDLEWARE, and leave ATOMIC_REQUESTS off. settings.OUTBOX["atomic_requests"] names the database (default
    "default"). Views marked with transaction.non_atomic_requests are left alone. process_exception of other middleware is not called
    for views that run in it. Synchronous views only.
    """

    def __init__(self, get_response: Callable[[Any], Any]) -> None:
        """Is called by Django."""
        from outbox_client.django import _settings

        self._get_response = get_response
        self._using: str = _settings().get("atomic_requests", "default")

    def __call__(self, request: Any) -> Any:
        """Passes the request on."""
        return self._get_response(request)

    def process_view(
        self, request: Any, view: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Runs the view in the block."""
        if self._using in getattr(view, "_non_atomic_requests", ()):
            return None
        with atomic(self._using):
            return view(request, *args, **kwargs)
