"""Events collected in a transaction, with savepoints: what is rolled back takes its events along."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from dataclasses import dataclass

from outbox_client._client import BaseClient
from outbox_client._gen.outbox.v1 import event_pb2
from outbox_client.event import Event, event_from_proto


@dataclass(frozen=True)
class Collected:
    """The events of one transaction or savepoint, in order. Used by one task or thread at a time."""

    client: BaseClient
    protos: list[event_pb2.Event]

    @classmethod
    def none(cls, client: BaseClient) -> Collected:
        """Begins without events."""
        return cls(client, [])

    def add(self, events: Sequence[Event]) -> list[uuid.UUID]:
        """Adds events: checks them and takes their time and trace context now. Returns their ids. Raises InvalidError."""
        if not events:
            return []
        self.protos.extend(self.client.protos(events))
        return [event.event_id for event in events]

    def mark(self) -> int:
        """Returns a place to go back to."""
        return len(self.protos)

    def back_to(self, mark: int) -> None:
        """Drops the events that were added since."""
        del self.protos[mark:]

    def events(self) -> list[Event]:
        """Returns the events as they will be prepared."""
        return [event_from_proto(p) for p in self.protos]
