"""Alarms: what needs a person."""

from __future__ import annotations

import enum
import uuid
from dataclasses import dataclass


class AlarmKind(str, enum.Enum):
    """Tells alarms apart."""

    CONTRADICTION = "contradiction"
    """The local transaction committed, and the platform holds it for aborted."""
    REFUSED = "refused"
    """The platform refused a spilled request for good; its row is kept with the reason."""
    LOST = "lost"
    """The platform does not know a transaction that it should know."""
    BUG = "bug"
    """A fault of the SDK itself. The local transaction is not affected; the platform finds its outcome out by asking."""


@dataclass(frozen=True)
class Alarm:
    """Something that needs a person: see docs/in-doubt.md for what to do."""

    kind: AlarmKind
    transaction_id: uuid.UUID
    """The transaction concerned."""
    error: BaseException
    """What happened."""
    database: str = ""
    """The source database concerned; empty when it is not known."""
