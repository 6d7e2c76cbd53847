"""Transactions as the platform knows them, and what ties them to a database transaction."""

from __future__ import annotations

import datetime
import enum
import uuid
from dataclasses import dataclass

from outbox_client._gen.outbox.v1 import transaction_pb2
from outbox_client.config import DEFAULT_DATABASE


class Mode(enum.IntEnum):
    """How the decision of a transaction can be found out."""

    MARKER = transaction_pb2.DATABASE_MODE_MARKER
    """The marker row decides. The default."""
    XID_FENCED = transaction_pb2.DATABASE_MODE_XID_FENCED
    """The transaction id decides; it was made durable before Prepare (PostgreSQL 17 and newer)."""
    CLIENT_ONLY = transaction_pb2.DATABASE_MODE_CLIENT_ONLY
    """Nobody can be asked."""


@dataclass(frozen=True)
class DatabaseTransaction:
    """Ties prepared events to the database transaction that decides about them. The SDK reads it in the marker statement."""

    xid: int
    """pg_current_xact_id(), the top-level transaction id."""
    system_identifier: int = 0
    """pg_control_system().system_identifier."""
    timeline: int = 0
    """The timeline the server wrote to."""
    database_oid: int = 0
    """The oid of the database."""
    marker_oid: int = 0
    """The oid of the marker table as the search_path found it."""
    database: str = DEFAULT_DATABASE
    """The name of the source database."""
    mode: Mode = Mode.MARKER
    """How to find out the decision."""

    def to_proto(self) -> transaction_pb2.DatabaseTransaction:
        """Converts it for the API."""
        return transaction_pb2.DatabaseTransaction(
            database=self.database,
            xid=self.xid,
            system_identifier=self.system_identifier,
            timeline=self.timeline,
            database_oid=self.database_oid,
            marker_oid=self.marker_oid,
            mode=self.mode.value,
        )

    @classmethod
    def from_proto(cls, p: transaction_pb2.DatabaseTransaction) -> DatabaseTransaction:
        """Converts it from the API. A mode that is not known here can be decided by nobody here."""
        mode = Mode.MARKER if p.mode == 0 else _MODES.get(p.mode, Mode.CLIENT_ONLY)
        return cls(
            p.xid, p.system_identifier, p.timeline, p.database_oid, p.marker_oid, p.database or DEFAULT_DATABASE, mode
        )


_MODES: dict[int, Mode] = {m.value: m for m in Mode}


class State(str, enum.Enum):
    """What the platform knows about a transaction's outcome."""

    PREPARED = "PREPARED"
    """Stored, invisible, undecided. A state that this SDK does not know is treated as undecided too."""
    COMMITTED = "COMMITTED"
    """Its events are or will be published. Final."""
    ABORTED = "ABORTED"
    """Its events will never be published. Final."""


@dataclass(frozen=True)
class EventStatus:
    """Where one event is now."""

    event_id: uuid.UUID
    topic: str
    aggregate_type: str
    aggregate_id: str
    shard: int
    """The shard whose holder publishes it."""
    place: str
    """IN_DOUBT, QUEUED, WAITING, BLOCKED, PUBLISHED, DEAD_LETTER or DROPPED."""
    explanation: str
    """Why it is not out yet, in words. Empty when it is."""


@dataclass(frozen=True)
class Transaction:
    """What the platform knows about one transaction."""

    id: uuid.UUID
    state: State
    prepared_at: datetime.datetime | None
    """When the platform stored it."""
    decided_at: datetime.datetime | None
    """When the decision was stored. None while PREPARED."""
    decided_by: str
    """"client", "check-back", "direct" or "operator". Empty while PREPARED."""
    evidence: str
    """What the decision rests on, a JSON object; empty when it came from the client's own Commit or Abort."""
    events: tuple[EventStatus, ...]
    """Where each event is now."""

    @classmethod
    def from_proto(cls, p: transaction_pb2.Transaction) -> Transaction:
        """Converts it from the API."""
        states = {
            transaction_pb2.Transaction.STATE_COMMITTED: State.COMMITTED,
            transaction_pb2.Transaction.STATE_ABORTED: State.ABORTED,
        }
        utc = datetime.timezone.utc
        return cls(
            id=uuid.UUID(bytes=p.transaction_id),
            state=states.get(p.state, State.PREPARED),
            prepared_at=p.prepare_time.ToDatetime(tzinfo=utc) if p.HasField("prepare_time") else None,
            decided_at=p.decide_time.ToDatetime(tzinfo=utc) if p.HasField("decide_time") else None,
            decided_by=p.decided_by,
            evidence=p.evidence,
            events=tuple(
                EventStatus(
                    uuid.UUID(bytes=e.event_id),
                    e.topic,
                    e.aggregate_type,
                    e.aggregate_id,
                    e.shard,
                    _place(e.place),
                    e.explanation,
                )
                for e in p.events
            ),
        )


def _place(place: int) -> str:
    known = transaction_pb2.EventStatus.Place.DESCRIPTOR.values_by_number.get(place)
    return known.name.removeprefix("PLACE_") if known else str(place)
