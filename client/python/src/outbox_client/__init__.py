"""Publish events to Kafka if and only if a database transaction commits: the Python SDK of the outbox platform.

Most services use it through outbox_client.sqlalchemy, outbox_client.asyncpg, outbox_client.psycopg or outbox_client.django. This
package holds what they share: the clients, the event and the typed errors. It imports no database.
"""

from outbox_client.aio import AsyncOutboxClient
from outbox_client.alarm import Alarm, AlarmKind
from outbox_client.client import OutboxClient
from outbox_client.config import TLS, Config, ConfigError
from outbox_client.errors import (
    AlreadyDecidedError,
    AsyncCommitError,
    CallError,
    ClosedError,
    DeniedError,
    ExhaustedError,
    FenceError,
    FieldViolation,
    ForkError,
    IdReusedError,
    InvalidError,
    MustSpillError,
    NoTransactionError,
    OutboxError,
    OutcomeUnknownError,
    Reason,
    SavepointError,
    TransactionError,
    UnavailableError,
    UnknownTransactionError,
)
from outbox_client.event import Event
from outbox_client.ids import id_time, new_id
from outbox_client.marker import MARKER_DDL
from outbox_client.stats import Stats
from outbox_client.transaction import DatabaseTransaction, EventStatus, Mode, State, Transaction
from outbox_client.upkeep import Upkeep
from outbox_client.version import VERSION

__version__ = VERSION

__all__ = [
    "MARKER_DDL",
    "TLS",
    "Alarm",
    "AlarmKind",
    "AlreadyDecidedError",
    "AsyncCommitError",
    "AsyncOutboxClient",
    "CallError",
    "ClosedError",
    "Config",
    "ConfigError",
    "DatabaseTransaction",
    "DeniedError",
    "Event",
    "EventStatus",
    "ExhaustedError",
    "FenceError",
    "FieldViolation",
    "ForkError",
    "IdReusedError",
    "InvalidError",
    "Mode",
    "MustSpillError",
    "NoTransactionError",
    "OutboxClient",
    "OutboxError",
    "OutcomeUnknownError",
    "Reason",
    "SavepointError",
    "State",
    "Stats",
    "Transaction",
    "TransactionError",
    "UnavailableError",
    "UnknownTransactionError",
    "Upkeep",
    "id_time",
    "new_id",
]
