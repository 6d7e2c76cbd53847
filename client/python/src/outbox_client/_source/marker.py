"""The marker statement."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass

from outbox_client._source.driver import Fetch, Steps
from outbox_client._source.outcome import sqlstate
from outbox_client.errors import AsyncCommitError, FenceError, SavepointError
from outbox_client.transaction import DatabaseTransaction, Mode

# Asks for the first spilled request in order, because that is what the partial index answers. EXISTS would scan the whole
# table: without statistics PostgreSQL takes almost every marker for a spilled one.
_SPILLS_WAIT = (
    "(SELECT seq FROM outbox_marker WHERE spilled IS NOT NULL AND refused IS NULL ORDER BY seq LIMIT 1) IS NOT NULL"
)

# Writes the marker and reads, in the same round trip, what ties it to its transaction. A plain INSERT: a conflict must kill
# the transaction. created_at is the time of the statement: markers are kept for a time that has to run from about Prepare, not
# from the BEGIN of a transaction that may take hours.
MARK = f"""
INSERT INTO outbox_marker (id, created_at) VALUES ($1::text::uuid, clock_timestamp())
RETURNING pg_current_xact_id()::text::bigint,
          extract(epoch from pg_postmaster_start_time())::text,
          current_database()::text,
          substr(pg_walfile_name(pg_current_wal_insert_lsn()), 1, 8),
          'outbox_marker'::regclass::oid::bigint,
          current_setting('synchronous_commit'),
          current_setting('transaction_isolation'),
          xmin::text::bigint = (pg_current_xact_id()::text::bigint & 4294967295),
          {_SPILLS_WAIT}"""

# Makes the transaction's id durable, without a table (mode XID_FENCED): a message that is flushed carries the id into the WAL, so
# that after a crash or on a replica it is not given out again. What each part needs of the one before keeps them in order: the
# id; a message that gives the present subtransaction, if this is one, an id too; the message that is flushed; and the ids that
# this session holds, of which there is a second one inside a savepoint only.
FENCE = """
SELECT x.xid::text::bigint,
       extract(epoch from pg_postmaster_start_time())::text,
       current_database()::text,
       substr(pg_walfile_name(pg_current_wal_insert_lsn()), 1, 8),
       current_setting('synchronous_commit'),
       (SELECT count(*) FROM pg_locks l
        WHERE l.pid = pg_backend_pid() AND l.locktype = 'transactionid' AND l.mode = 'ExclusiveLock' AND l.granted AND f.at IS NOT NULL) = 1
FROM   (SELECT pg_current_xact_id() AS xid OFFSET 0) x,
       LATERAL (SELECT pg_logical_emit_message(x.xid IS NOT NULL, 'outbox', '') AS at OFFSET 0) s,
       LATERAL (SELECT pg_logical_emit_message(false, 'outbox', '', s.at IS NOT NULL) AS at OFFSET 0) f"""
_NO_SUCH_FUNCTION = "42883"

# What tells a database from all others. It is not cheap: PostgreSQL reads pg_control from its disk.
IDENTITY = """
SELECT (SELECT system_identifier FROM pg_control_system()), (SELECT oid::bigint FROM pg_database WHERE datname = current_database())"""

MUST_SPILL = f"SELECT {_SPILLS_WAIT}"

SPILL = "UPDATE outbox_marker SET spilled = $2::bytea WHERE id = $1::text::uuid"

UINT64 = (1 << 64) - 1


class Identities:
    """Remembers the identity of the last incarnation of a database (a run of its server). Safe for concurrent use."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._last: tuple[tuple[str, str], tuple[int, int]] | None = None

    def of(self, incarnation: tuple[str, str]) -> Steps[tuple[int, int]]:
        """Returns system identifier and oid, asking for them when it is another incarnation than the last time."""
        with self._lock:
            last = self._last
        if last is not None and last[0] == incarnation:
            return last[1]
        rows = yield Fetch(IDENTITY)
        found = (int(rows[0][0]) & UINT64, int(rows[0][1]))
        with self._lock:
            self._last = (incarnation, found)
        return found


@dataclass(frozen=True)
class Mark:
    """What the marker statement returned."""

    transaction: DatabaseTransaction
    isolation: str
    must_spill: bool
    """As the statement's own snapshot saw it."""

    @property
    def fresh(self) -> bool:
        """Whether that snapshot was the statement's own, and not the transaction's."""
        return self.isolation in ("read committed", "read uncommitted")


def write_mark(transaction_id: str, database: str, identities: Callable[[], Identities]) -> Steps[Mark]:
    """Writes the marker. Raises AsyncCommitError or SavepointError when events cannot be prepared safely."""
    rows = yield Fetch(MARK, (transaction_id,))
    xid, started, name, timeline, marker_oid, sync, isolation, top_level, must_spill = rows[0]
    system, oid = yield from identities().of((started, name))
    _refuse_unsafe(sync, top_level)
    tx = DatabaseTransaction(int(xid), system, int(timeline, 16), oid, int(marker_oid), database)
    return Mark(tx, isolation, bool(must_spill))


def raise_fence(database: str, identities: Callable[[], Identities]) -> Steps[Mark]:
    """Makes the transaction's id durable. Raises FenceError, AsyncCommitError or SavepointError when that is not possible or safe."""
    try:
        rows = yield Fetch(FENCE)
    except Exception as e:
        if sqlstate(e) == _NO_SUCH_FUNCTION:  # none of that name with a flush argument
            raise FenceError() from e
        raise
    xid, started, name, timeline, sync, top_level = rows[0]
    system, oid = yield from identities().of((started, name))
    _refuse_unsafe(sync, top_level)
    tx = DatabaseTransaction(int(xid), system, int(timeline, 16), oid, 0, database, Mode.XID_FENCED)
    return Mark(tx, "read committed", must_spill=False)  # nothing can be spilled


def _refuse_unsafe(synchronous_commit: str, top_level: bool) -> None:
    if synchronous_commit == "off":
        raise AsyncCommitError()
    if not top_level:
        raise SavepointError()
