"""A circuit breaker: while the platform does not answer, callers do not wait for it one by one."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from outbox_client.errors import OutboxError


class CircuitOpenError(OutboxError):
    """The platform did not answer several times in a row, and is not asked again for a while."""

    def __init__(self, seconds: float) -> None:
        super().__init__(f"the platform did not answer; it is asked again in {max(0.0, seconds):.1f} s")


class CircuitBreaker:
    """Opens after failures in a row, lets one call through after a while, and closes when that succeeds.

    Safe for concurrent use by threads and event loops. It never blocks.
    """

    def __init__(
        self,
        failures: int = 5,
        seconds: float = 5.0,
        clock: Callable[[], float] = time.monotonic,
        on_change: Callable[[bool], None] | None = None,
    ) -> None:
        """failures in a row open it for so many seconds; on_change is told whether it is open."""
        self._most = failures
        self._seconds = seconds
        self._clock = clock
        self._on_change = on_change
        self._lock = threading.Lock()
        self._failures = 0
        self._open_until: float | None = None
        self._trying = False

    @property
    def is_open(self) -> bool:
        """Whether calls are held back now."""
        return self._open_until is not None

    def before(self) -> None:
        """Raises CircuitOpenError unless a call may be made now. After it, call success, failure or abandoned."""
        with self._lock:
            if self._open_until is None:
                return
            left = self._open_until - self._clock()
            if left > 0 or self._trying:
                raise CircuitOpenError(left)
            self._trying = True

    def success(self) -> None:
        """The platform answered, whatever it said."""
        with self._lock:
            changed = self._open_until is not None
            self._failures, self._open_until, self._trying = 0, None, False
        if changed and self._on_change:
            self._on_change(False)

    def failure(self) -> None:
        """The platform could not be reached or did not answer in time."""
        with self._lock:
            self._failures += 1
            self._trying = False
            changed = self._failures >= self._most and self._open_until is None
            if self._failures >= self._most:
                self._open_until = self._clock() + self._seconds
        if changed and self._on_change:
            self._on_change(True)

    def abandoned(self) -> None:
        """The call was cancelled before it had an answer."""
        with self._lock:
            self._trying = False
