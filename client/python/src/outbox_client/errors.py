"""What calls fail with."""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import grpc

DOMAIN = "outbox.v1"


class Reason:
    """Why a call failed, in one word that never changes: see outbox.v1.ErrorReason. The platform may send others."""

    FIELD_INVALID = "FIELD_INVALID"
    EVENT_TOO_LARGE = "EVENT_TOO_LARGE"
    SOURCE_DENIED = "SOURCE_DENIED"
    TOPIC_DENIED = "TOPIC_DENIED"
    TRANSACTION_ID_REUSED = "TRANSACTION_ID_REUSED"
    TRANSACTION_UNKNOWN = "TRANSACTION_UNKNOWN"
    TRANSACTION_ALREADY_DECIDED = "TRANSACTION_ALREADY_DECIDED"
    QUOTA_EXCEEDED = "QUOTA_EXCEEDED"
    BACKLOG_FULL = "BACKLOG_FULL"
    STORE_UNAVAILABLE = "STORE_UNAVAILABLE"
    CONTENTION = "CONTENTION"
    IDENTITY_UNKNOWN = "IDENTITY_UNKNOWN"
    METHOD_DENIED = "METHOD_DENIED"
    INTERNAL = "INTERNAL"


@dataclass(frozen=True)
class FieldViolation:
    """One field that breaks a rule."""

    field: str
    """Its path, for example "events[0].topic"."""
    description: str
    """What is wrong with it."""


class OutboxError(Exception):
    """Base of everything that this package raises."""


class CallError(OutboxError):
    """A call of the platform failed. The subclasses say what to do about it."""

    def __init__(
        self,
        code: grpc.StatusCode,
        message: str,
        *,
        reason: str = "",
        metadata: Mapping[str, str] | None = None,
        fields: Sequence[FieldViolation] = (),
        retry_after: float = 0.0,
        local: bool = False,
        fatal: bool = False,
    ) -> None:
        name = code.name
        super().__init__(f"{name} ({reason}): {message}" if reason else f"{name}: {message}")
        self.code = code
        """The gRPC code."""
        self.reason = reason
        """One of Reason. Empty when the error comes from the way to the platform and not from it."""
        self.message = message
        """For people. Its text may change."""
        self.metadata: Mapping[str, str] = dict(metadata or {})
        """The reason's parameters, for example the topic."""
        self.fields = tuple(fields)
        """The fields that break a rule; only of InvalidError."""
        self.retry_after = retry_after
        """Seconds that the platform asks to wait before the call is repeated. 0: it does not say."""
        self.local = local
        """Made by this client; the platform was not asked."""
        self.fatal = fatal
        """The session was refused: no repetition within this call helps."""


class InvalidError(CallError):
    """The request itself is wrong. Repeating it fails again. Nothing took effect."""


class DeniedError(CallError):
    """The caller may not do this: unknown source or identity, topic or method not allowed. Nothing took effect."""


class UnavailableError(CallError):
    """The platform could not be reached or did not answer in time. Whether it took effect is unknown; repeating is safe."""


class ExhaustedError(CallError):
    """A quota is used up or a queue full. Nothing took effect; repeat it later."""


class UnknownTransactionError(CallError):
    """The platform does not know the transaction, or no longer."""


class AlreadyDecidedError(CallError):
    """The platform holds the opposite decision: the source and it disagree about history."""


class IdReusedError(CallError):
    """The transaction id was used with other content."""


class ClosedError(CallError):
    """The client is closed."""


class ForkError(OutboxError):
    """The process was forked while gRPC was in use by this client: gRPC does not work in the child.

    Fork before the first call (a client that was only made is fine), or start a new program instead.
    """

    def __init__(self) -> None:
        super().__init__(
            "this process was forked while the client was connected; gRPC does not work in it: fork before the first call"
        )


class TransactionError(OutboxError):
    """Events cannot be prepared in this database transaction. Nothing was prepared; it has to be rolled back."""


class SavepointError(TransactionError):
    """Events were about to be prepared inside a savepoint. If that were rolled back later, the transaction would commit without them."""

    def __init__(self) -> None:
        super().__init__("the transaction is inside a savepoint; prepare events at its top level")


class AsyncCommitError(TransactionError):
    """synchronous_commit is off: a crash could lose the transaction after its events were published."""

    def __init__(self) -> None:
        super().__init__(
            "synchronous_commit is off; a crash could lose the transaction after its events were published"
        )


class FenceError(TransactionError):
    """Mode XID_FENCED needs PostgreSQL 17: older ones cannot make a transaction's id durable without a table."""

    def __init__(self) -> None:
        super().__init__("mode XID_FENCED needs PostgreSQL 17 or newer")


class MustSpillError(TransactionError):
    """Requests of earlier transactions wait in the database; this one would overtake them, and may not spill. Try again later."""

    def __init__(self) -> None:
        super().__init__("earlier requests wait in the database, and this transaction may not spill behind them")


class NoTransactionError(TransactionError):
    """There is no transaction, or not one that the SDK ends, so the events could not share its fate."""


class OutcomeUnknownError(OutboxError):
    """COMMIT was sent and its outcome is not known, because the connection broke or the database did not answer.

    The transaction may be committed, and its events published. Do not simply run it again: find out first, for example by the
    keys it would have written. What COMMIT raised is the cause (__cause__).
    """

    def __init__(self, transaction_id: uuid.UUID | None, cause: BaseException) -> None:
        super().__init__(f"the outcome of COMMIT is unknown: {cause}")
        self.transaction_id = transaction_id
        """The id under which the events were prepared; None: there were none."""
