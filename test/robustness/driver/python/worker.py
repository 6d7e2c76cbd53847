"""A worker: it does one transaction after the other."""

from __future__ import annotations

import uuid
from typing import Any

from plan import Plan
from service import Service


class Worker:
    """What the ways of doing a transaction need."""

    def __init__(self, service: Service, number: int) -> None:
        self.service, self.number = service, number
        s = service.settings
        self.plan = Plan(s.Process, number, s.Seed, s.Aggregates, s.Hot, s.Topics)
        self.random = self.plan.random

    def note(self, kind: str, step: str, profile: str, tx: uuid.UUID | None, **more: Any) -> None:
        """Writes an entry about a transaction."""
        self.service.journal.write(kind, step, tx, worker=self.number, profile=profile, **more)
