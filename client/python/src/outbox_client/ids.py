"""Ids of transactions and events: UUIDv7."""

import datetime
import os
import threading
import time
import uuid

_lock = threading.Lock()
_last = 0


def _forget_last() -> None:
    global _lock, _last
    _lock, _last = threading.Lock(), 0


os.register_at_fork(after_in_child=_forget_last)


def new_id() -> uuid.UUID:
    """Returns a new UUIDv7, for a transaction or an event.

    Ids of one process sort by the time at which they were made. Safe for concurrent use, also after a fork.
    """
    global _last
    with _lock:
        now = time.time_ns()
        # 48 bits of milliseconds, then 12 bits of a fraction that also counts up within one tick of the clock.
        stamp = (now // 1_000_000 << 12) | (now % 1_000_000) * 4096 // 1_000_000
        _last = stamp = max(stamp, _last + 1)
    high = (stamp >> 12) << 16 | 0x7000 | stamp & 0xFFF
    low = int.from_bytes(os.urandom(8), "big") & (1 << 62) - 1 | 1 << 63
    return uuid.UUID(int=high << 64 | low)


def id_time(value: uuid.UUID) -> datetime.datetime | None:
    """Returns when a UUIDv7 was made, by its maker's clock, to the millisecond; None for any other UUID.

    It is good for retention, never for order.
    """
    if value.version != 7:
        return None
    return datetime.datetime.fromtimestamp((value.int >> 80) / 1000, datetime.timezone.utc)


def first_id(at: float) -> uuid.UUID:
    """Returns the smallest UUIDv7 of a time in seconds since 1970."""
    return uuid.UUID(int=int(at * 1000) << 80 | 0x7 << 76)
