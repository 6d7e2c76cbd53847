"""The memory of the fake platform: transactions, their states, and the rules of both."""

from __future__ import annotations

import datetime
import threading
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, replace

import grpc

from outbox_client._gen.outbox.v1 import event_pb2, transaction_pb2
from outbox_client._gen.outbox.v1 import outbox_service_pb2 as pb
from outbox_client.errors import CallError, Reason
from outbox_client.event import Event, event_from_proto
from outbox_client.transaction import DatabaseTransaction, State


@dataclass(frozen=True)
class StoredTransaction:
    """A transaction as it is stored."""

    id: uuid.UUID
    state: State
    database_transaction: DatabaseTransaction | None
    """None: it came by Publish."""
    events: tuple[Event, ...]
    digest: bytes
    """Of its content: tells whether an id is used again for something else."""
    prepared_at: datetime.datetime


class Ledger:
    """All transactions, in the order in which they were prepared. Safe for concurrent use."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._by_id: dict[bytes, StoredTransaction] = {}
        self.horizon = datetime.datetime(1970, 1, 1, tzinfo=datetime.timezone.utc)

    def store(
        self,
        id: bytes,
        database: transaction_pb2.DatabaseTransaction | None,
        events: Sequence[event_pb2.Event],
        state: State,
    ) -> None:
        """Stores events, or finds them stored. Raises CallError as the platform would."""
        digest = pb.PublishRequest(events=events).SerializeToString(deterministic=True)
        with self._lock:
            found = self._by_id.get(id)
            if found is None:
                tied = DatabaseTransaction.from_proto(database) if database is not None else None
                now = datetime.datetime.now(datetime.timezone.utc)
                decoded = tuple(event_from_proto(e) for e in events)
                self._by_id[id] = StoredTransaction(uuid.UUID(bytes=id), state, tied, decoded, digest, now)
            elif found.digest != digest:
                raise refusal(grpc.StatusCode.ALREADY_EXISTS, Reason.TRANSACTION_ID_REUSED, id)
            elif state is State.COMMITTED:
                self._decide(id, found, state)

    def decide(self, id: bytes, state: State) -> None:
        """Decides a transaction. Raises CallError as the platform would."""
        with self._lock:
            found = self._by_id.get(id)
            if found is None:
                raise refusal(grpc.StatusCode.NOT_FOUND, Reason.TRANSACTION_UNKNOWN, id)
            self._decide(id, found, state)

    def _decide(self, id: bytes, found: StoredTransaction, state: State) -> None:
        if found.state is State.PREPARED:
            self._by_id[id] = replace(found, state=state)
        elif found.state is not state:
            code = grpc.StatusCode.FAILED_PRECONDITION
            raise refusal(code, Reason.TRANSACTION_ALREADY_DECIDED, id, state=found.state.value)

    def get(self, id: bytes) -> pb.GetTransactionResponse:
        """Answers GetTransaction."""
        with self._lock:
            found = self._by_id.get(id)
        if found is None:
            horizon = self.horizon.isoformat().replace("+00:00", "Z")
            raise refusal(grpc.StatusCode.NOT_FOUND, Reason.TRANSACTION_UNKNOWN, id, retention_horizon=horizon)
        tx = transaction_pb2.Transaction(transaction_id=id, state=f"STATE_{found.state.value}")
        tx.prepare_time.FromDatetime(found.prepared_at)
        if found.database_transaction is not None:
            tx.database_transaction.CopyFrom(found.database_transaction.to_proto())
        places = {State.PREPARED: "PLACE_IN_DOUBT", State.COMMITTED: "PLACE_PUBLISHED", State.ABORTED: "PLACE_DROPPED"}
        if found.state is not State.PREPARED:
            tx.decide_time.FromDatetime(found.prepared_at)
            tx.decided_by = "client"
        for e in found.events:
            tx.events.add(
                event_id=e.event_id.bytes,
                topic=e.topic,
                aggregate_type=e.aggregate_type,
                aggregate_id=e.aggregate_id,
                place=places[found.state],
                explanation="undecided" if found.state is State.PREPARED else "",
            )
        return pb.GetTransactionResponse(transaction=tx)

    def all(self) -> list[StoredTransaction]:
        """Returns everything, as prepared."""
        with self._lock:
            return list(self._by_id.values())

    def find(self, id: uuid.UUID) -> StoredTransaction | None:
        """Returns one."""
        with self._lock:
            return self._by_id.get(id.bytes)

    def forget(self, id: uuid.UUID) -> None:
        """Loses one, as a store that lost its memory would."""
        with self._lock:
            self._by_id.pop(id.bytes, None)

    def clear(self) -> None:
        """Loses all."""
        with self._lock:
            self._by_id.clear()


def refusal(code: grpc.StatusCode, reason: str, id: bytes, **metadata: str) -> CallError:
    """Makes a refusal that concerns a transaction."""
    name = str(uuid.UUID(bytes=id)) if len(id) == 16 else id.hex()
    return CallError(code, f"fake: {reason}", reason=reason, metadata={"transaction_id": name, **metadata})
