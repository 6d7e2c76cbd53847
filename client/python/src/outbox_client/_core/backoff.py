"""Pauses between attempts."""

from __future__ import annotations

import random


class Backoff:
    """Doubling pauses in seconds with jitter of a half, up to a limit."""

    def __init__(self, first: float = 0.02, limit: float = 1.0) -> None:
        self._first, self._limit = min(first, limit), limit
        self._next = self._first

    def reset(self) -> None:
        """Begins anew."""
        self._next = self._first

    def __next__(self) -> float:
        pause = self._next * random.uniform(0.5, 1.5)
        self._next = min(self._next * 2, self._limit)
        return pause
