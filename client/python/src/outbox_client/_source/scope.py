"""What a block of a transaction publishes with."""

from __future__ import annotations

import uuid
from collections.abc import Sequence

from outbox_client._source.collected import Collected
from outbox_client.event import Event


class Scope:
    """Collects the events of a block. Used by one task or thread at a time."""

    def __init__(self, collected: Collected) -> None:
        self._collected = collected
        self._savepoints = 0

    def publish(self, *events: Event) -> list[uuid.UUID]:
        """Adds events to the transaction. Returns their ids.

        They are checked now (InvalidError; the transaction stays usable) and prepared just before COMMIT, all at once, in this order.
        """
        return self._collected.add(events)

    @property
    def pending(self) -> Sequence[Event]:
        """The events that are collected."""
        return self._collected.events()

    def _savepoint_name(self) -> str:
        self._savepoints += 1
        return f"outbox_{self._savepoints}"
