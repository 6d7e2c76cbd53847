"""What became of transactions, by the rules of docs/in-doubt.md. It never guesses: what cannot be said for certain is UNKNOWN."""

from __future__ import annotations

import datetime
import enum
import json
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby, islice

from outbox_client._gen.outbox.v1 import outbox_service_pb2 as pb
from outbox_client._source.driver import Connection
from outbox_client._source.marker import UINT64
from outbox_client._source.outcome import sqlstate
from outbox_client.transaction import DatabaseTransaction, Mode

# Judges many transactions in one snapshot: "has it ended?" and "is its marker there?" must not be asked at two moments. It must
# run outside of any transaction, on the primary. pg_xact_status is called only for xids that have ended in this snapshot: for
# one in the future it would fail, and the whole statement with it. Its answer decides nothing here; it only tells what a naive
# resolver would have said.
VERDICT = """
SELECT p.id::text,
       pg_is_in_recovery(),
       (SELECT system_identifier FROM pg_control_system()),
       CASE WHEN pg_is_in_recovery() THEN NULL ELSE substr(pg_walfile_name(pg_current_wal_insert_lsn()), 1, 8) END,
       (SELECT oid::bigint FROM pg_database WHERE datname = current_database()),
       'outbox_marker'::regclass::oid::bigint,
       row_security_active('outbox_marker'),
       EXISTS (SELECT 1 FROM outbox_marker m WHERE m.id = p.id),
       pg_visible_in_snapshot(p.xid, pg_current_snapshot()),
       CASE WHEN pg_visible_in_snapshot(p.xid, pg_current_snapshot()) THEN pg_xact_status(p.xid) END,
       pg_current_snapshot()::text
FROM   unnest($1::text[]::uuid[], $2::text[]::xid8[]) AS p(id, xid)"""

# The same for transactions without a marker (mode XID_FENCED): there may be no table.
FENCED = """
SELECT p.id::text,
       pg_is_in_recovery(),
       (SELECT system_identifier FROM pg_control_system()),
       CASE WHEN pg_is_in_recovery() THEN NULL ELSE substr(pg_walfile_name(pg_current_wal_insert_lsn()), 1, 8) END,
       (SELECT oid::bigint FROM pg_database WHERE datname = current_database()),
       0::bigint, false, false,
       pg_visible_in_snapshot(p.xid, pg_current_snapshot()),
       CASE WHEN pg_visible_in_snapshot(p.xid, pg_current_snapshot()) THEN pg_xact_status(p.xid) END,
       pg_current_snapshot()::text
FROM   unnest($1::text[]::uuid[], $2::text[]::xid8[]) AS p(id, xid)"""

# Asked alone, one call per xid: an xid in the future is an error.
STATUS = "SELECT pg_xact_status($1::text::xid8)"
_IN_THE_FUTURE = "22023"

MAX_VERDICTS = 1000  # transactions of one statement


class Outcome(enum.IntEnum):
    """What a source database says about one transaction. Only COMMITTED and ABORTED end it."""

    COMMITTED = pb.SessionRequest.CheckAnswer.OUTCOME_COMMITTED
    ABORTED = pb.SessionRequest.CheckAnswer.OUTCOME_ABORTED
    IN_PROGRESS = pb.SessionRequest.CheckAnswer.OUTCOME_IN_PROGRESS
    UNKNOWN = pb.SessionRequest.CheckAnswer.OUTCOME_UNKNOWN


@dataclass(frozen=True)
class CheckTransaction:
    """A transaction that the platform asks about."""

    id: uuid.UUID
    database: DatabaseTransaction
    """What Prepare said about it."""


@dataclass(frozen=True)
class Verdict:
    """What a source database says about one transaction."""

    id: uuid.UUID
    outcome: Outcome
    reason: str = ""
    """Why the outcome is unknown, or a note."""
    evidence: str = ""
    """What the answer rests on, a JSON object."""
    naive_wrong: bool = False
    """pg_xact_status alone would have said something else that is wrong."""
    failed_over_to: int = 0
    """The timeline that the server is on, when nothing but that keeps an unmarked transaction from being ABORTED; else 0."""


@dataclass(frozen=True)
class Sighting:
    """What the database says about one transaction in one snapshot."""

    standby: bool
    system_identifier: int
    timeline: int
    database_oid: int
    marker_oid: int
    row_security: bool
    marked: bool
    ended: bool
    status: str
    """pg_xact_status of an ended one; empty: forgotten."""
    snapshot: str


async def verdicts(c: Connection, transactions: Sequence[CheckTransaction]) -> list[Verdict]:
    """Judges transactions. The connection must run each statement outside of any transaction. Raises what looking at them raises."""
    out: list[Verdict] = []
    for batch in _batches(transactions):
        seen = await look(c, batch)
        for t in batch:
            s = seen.get(t.id)
            if s is None:
                out.append(Verdict(t.id, Outcome.UNKNOWN, "the database did not answer for it"))
            else:
                out.append(await judge(c, t, s))
    return out


def _batches(transactions: Sequence[CheckTransaction]) -> Iterator[list[CheckTransaction]]:
    """Divides transactions into those of one statement."""
    for _, group in groupby(transactions, _sql_of):
        while batch := list(islice(group, MAX_VERDICTS)):
            yield batch


def _sql_of(t: CheckTransaction) -> str:
    return FENCED if t.database.mode is Mode.XID_FENCED else VERDICT


async def look(c: Connection, transactions: Sequence[CheckTransaction]) -> dict[uuid.UUID, Sighting]:
    """Looks at transactions of one statement in one snapshot."""
    rows = await c.fetch(
        _sql_of(transactions[0]), [str(t.id) for t in transactions], [str(t.database.xid) for t in transactions]
    )
    return {
        uuid.UUID(r[0]): Sighting(
            standby=bool(r[1]),
            system_identifier=int(r[2]) & UINT64,
            timeline=int(r[3], 16) if r[3] else 0,
            database_oid=int(r[4]),
            marker_oid=int(r[5]),
            row_security=bool(r[6]),
            marked=bool(r[7]),
            ended=bool(r[8]),
            status=r[9] or "",
            snapshot=r[10],
        )
        for r in rows
    }


async def judge(c: Connection, t: CheckTransaction, s: Sighting) -> Verdict:
    """Applies the rules to one transaction, asking for its status where only that can tell more."""
    found = rule(t, s)
    if found is not None and found.failed_over_to and not s.ended:
        return await _runs_here(c, t, s, found)
    last = False
    while found is None:
        # It has not ended in that snapshot. Either it runs, or its xid was lost in a crash and is, so far, nobody's.
        try:
            status, future = await _status_of(c, t.database.xid)
        except Exception as e:
            return verdict(t, s, Outcome.UNKNOWN, f"asking for its status: {e}")
        if future and last:
            # Asked again and still in the future: no running transaction has it, and none with this marker ever will.
            return verdict(t, s, Outcome.ABORTED, "its xid was lost in a crash of the database")
        if not future and status == "in progress":
            return verdict(t, s, Outcome.IN_PROGRESS)
        if not future and not status:
            return verdict(t, s, Outcome.UNKNOWN, "pg_xact_status has forgotten it")
        if last:
            return verdict(t, s, Outcome.IN_PROGRESS, "it has ended just now")
        # In the future, or ended since: look once more, at everything.
        try:
            s = (await look(c, [t]))[t.id]
        except Exception as e:
            return verdict(t, s, Outcome.UNKNOWN, f"asking the database again: {e}")
        found = rule(t, s)
        last = True
    return found


async def _runs_here(c: Connection, t: CheckTransaction, s: Sighting, failed_over: Verdict) -> Verdict:
    """Looks whether a transaction that began before a failover runs on the new primary.

    It was prepared for two phases then, and may commit yet, so that nobody may confirm that it did not. Or a stranger has its xid,
    which only delays.
    """
    try:
        status, future = await _status_of(c, t.database.xid)
    except Exception as e:
        return verdict(t, s, Outcome.UNKNOWN, f"asking for its status: {e}")
    if future:  # its xid did not get here
        return failed_over
    return verdict(t, s, Outcome.IN_PROGRESS, "" if status == "in progress" else "it has ended just now")


def rule(t: CheckTransaction, s: Sighting) -> Verdict | None:
    """Decides what one snapshot can decide. None: only pg_xact_status can tell more."""
    if s.standby:
        return verdict(t, s, Outcome.UNKNOWN, "the database asked is a standby")
    if t.database.mode is Mode.XID_FENCED:
        return _rule_fenced(t, s)
    if t.database.mode is not Mode.MARKER:
        return verdict(t, s, Outcome.UNKNOWN, "only the client or an operator can decide it")
    if s.marked:
        # Nobody else can have written this id: proof, wherever it is found.
        return verdict(t, s, Outcome.COMMITTED)
    # From here on everything rests on not seeing the marker. That means something only in the right table, seen whole.
    why = _other_place(t.database, s)
    if why:
        return verdict(t, s, Outcome.UNKNOWN, why)
    if s.timeline != t.database.timeline:
        why = (
            f"the server is on timeline {s.timeline}, not {t.database.timeline}: "
            "after a failover an operator has to confirm that the old primary is fenced"
        )
        return replace(verdict(t, s, Outcome.UNKNOWN, why), failed_over_to=s.timeline)
    return verdict(t, s, Outcome.ABORTED) if s.ended else None


def _other_place(d: DatabaseTransaction, s: Sighting) -> str:
    """Says why this may not be the table that the marker was written to, or not all of it."""
    if s.system_identifier != d.system_identifier:
        return f"another database server: system identifier {s.system_identifier}, not {d.system_identifier}"
    if s.database_oid != d.database_oid:
        return f"another database of the server: oid {s.database_oid}, not {d.database_oid}"
    if s.marker_oid != d.marker_oid:
        return f"another marker table: oid {s.marker_oid}, not {d.marker_oid}; check the search_path"
    if s.row_security:
        return "row security is active on the marker table: rows may be hidden"
    return ""


def _rule_fenced(t: CheckTransaction, s: Sighting) -> Verdict:
    """The rule for transactions without a marker, whose xid was made durable before Prepare."""
    d = t.database
    if s.system_identifier != d.system_identifier or s.timeline != d.timeline:
        return verdict(t, s, Outcome.UNKNOWN, "another server or timeline: an xid proves nothing there")
    if not s.ended:
        return verdict(t, s, Outcome.IN_PROGRESS)
    if s.status == "committed":
        return verdict(t, s, Outcome.COMMITTED)
    if s.status == "aborted":
        return verdict(t, s, Outcome.ABORTED)
    return verdict(t, s, Outcome.UNKNOWN, "pg_xact_status has forgotten it")


async def _status_of(c: Connection, xid: int) -> tuple[str, bool]:
    """Asks for one xid. True: the database has not given it out (again) yet."""
    try:
        rows = await c.fetch(STATUS, str(xid))
    except Exception as e:
        if sqlstate(e) == _IN_THE_FUTURE:
            return "", True
        raise
    return rows[0][0] or "", False


def verdict(t: CheckTransaction, s: Sighting, outcome: Outcome, reason: str = "") -> Verdict:
    """Puts an answer together with what it rests on."""
    evidence: dict[str, object] = {
        "system_identifier": str(s.system_identifier),
        "timeline": s.timeline,
        "database_oid": s.database_oid,
        "marker_oid": s.marker_oid,
        "xid": str(t.database.xid),
        "marked": s.marked,
        "ended": s.ended,
        "snapshot": s.snapshot,
        "time": datetime.datetime.now(datetime.timezone.utc).isoformat(),
    }
    if s.status:
        evidence["xact_status"] = s.status
    naive_wrong = (outcome, s.status) in ((Outcome.ABORTED, "committed"), (Outcome.COMMITTED, "aborted"))
    return Verdict(t.id, outcome, reason, json.dumps(evidence), naive_wrong)
