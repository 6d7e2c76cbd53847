"""Transactions the way of a service without SQLAlchemy: the marker by plain SQL, the SDK's calls one by one."""

from __future__ import annotations

import asyncio
import datetime
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from outbox_client import AlreadyDecidedError, CallError, DatabaseTransaction, Event, OutboxError, new_id

import fault
from journal import ABORT, AGAIN, COMMIT, FAIL, GET, INFO, INVOKE, LOCAL, OK, OTHER, PREPARE, PUBLISH, ROLLBACK
from plan import DIRECT, DUPLICATE, PROBE, RACE, SYNC, TELL, TWO_PHASE, truth
from service import PATIENCE, outcome
from worker import Worker

MARK = """
INSERT INTO outbox_marker (id) VALUES ($1) RETURNING pg_current_xact_id()::text::bigint,
       (SELECT system_identifier FROM pg_control_system()), substr(pg_walfile_name(pg_current_wal_insert_lsn()), 1, 8),
       (SELECT oid::bigint FROM pg_database WHERE datname = current_database()), 'outbox_marker'::regclass::oid::bigint,
       EXISTS (SELECT FROM outbox_marker WHERE spilled IS NOT NULL AND refused IS NULL)"""


class WaitingError(OutboxError):
    """Spilled requests wait, and this service cannot spill."""


async def transact(worker: Worker, profile: str) -> None:
    """Does one transaction."""
    try:
        async with worker.service.pool.acquire(timeout=2) as c:
            await _Hand(worker, profile, c).transact()
    except BaseException:
        worker.plan.uncertain()
        raise


class _Hand:
    """One transaction on one connection."""

    def __init__(self, worker: Worker, profile: str, connection: Any) -> None:
        self._worker, self._profile, self._c = worker, profile, connection
        self._client = worker.service.client
        self.id = new_id()

    def note(self, kind: str, step: str, **more: Any) -> None:
        self._worker.note(kind, step, self._profile, self.id, **more)

    async def transact(self) -> None:
        db, events, token = await self.prepare()
        if self._profile == DUPLICATE:
            await self._duplicate(db, events)
        elif self._profile == SYNC:
            await self._ask()
        elif self._profile == TWO_PHASE:
            await self._two_phase(token)
            return
        await self._commit_locally()
        told = asyncio.ensure_future(self._call(COMMIT, partial(self._client.commit, self.id, token)))
        try:
            if self._profile == RACE:
                await self._call(ABORT, partial(self._client.abort, self.id))
            elif self._profile == SYNC:
                await self._ask()
        finally:
            await told
        if self._profile != DUPLICATE:
            await self._ask()

    async def prepare(self) -> tuple[DatabaseTransaction, list[Event], bytes]:
        """Begins, tells the truth, and prepares. Rolls back when that fails."""
        plan = self._worker.plan
        changes = plan.changes(self._profile)
        await self._c.execute("BEGIN")
        try:
            await plan.lock(self._c.fetchval, changes)
            db = await self._mark()
            await self._c.execute(TELL, *truth(self.id, changes))
            await asyncio.sleep(plan.thinking(self._profile))
            # What is prepared twice must say when it happened, or it is something else each time.
            events, noted = plan.events(changes, occurred_at=datetime.datetime.now(datetime.timezone.utc))
            self.note(INVOKE, PREPARE, events=noted)
            try:
                token = await self._client.prepare(self.id, db, *events)
            except BaseException as e:
                self.note(outcome(e), PREPARE, note=e)
                raise
            self.note(OK, PREPARE)
        except BaseException:
            with suppress(Exception):
                await asyncio.wait_for(self._c.execute("ROLLBACK"), 2)
                self.note(OK, ROLLBACK)
            raise
        return db, events, token

    async def _mark(self) -> DatabaseTransaction:
        """Writes the marker and reads what ties it to its transaction."""
        xid, system, timeline, database, table, wait = await self._c.fetchrow(MARK, self.id)
        if wait:
            raise WaitingError("earlier requests wait in the database")
        return DatabaseTransaction(xid, system & (1 << 64) - 1, int(timeline, 16), database, table)

    async def _commit_locally(self) -> None:
        self.note(INVOKE, LOCAL)
        fault.during("driver.K4")
        try:
            answer = await self._c.execute("COMMIT")
            if answer != "COMMIT":
                raise OutboxError(f"COMMIT was answered by {answer}")
        except BaseException as e:
            self.note(INFO, LOCAL, note=e)
            raise
        self.note(OK, LOCAL)
        fault.point("driver.K5")

    async def _call(self, step: str, call: Any) -> None:
        """Tells of a decision. A contradiction is an answer, everything else that fails is not."""
        self.note(INVOKE, step)
        try:
            await call()
        except AlreadyDecidedError as e:
            self.note(FAIL, step, note=e)
        except CallError as e:
            self.note(INFO, step, note=e)
        else:
            self.note(OK, step)

    async def _ask(self) -> None:
        """Asks for the state."""
        self.note(INVOKE, GET)
        try:
            known = await self._client.get_transaction(self.id)
        except CallError as e:
            self.note(INFO, GET, note=e)
        else:
            self.note(OK, GET, state=known.state.value)

    async def _duplicate(self, db: DatabaseTransaction, events: list[Event]) -> None:
        """Prepares once more what is prepared, and then something else under the same id."""
        other = [replace(events[0], payload=b"other" + events[0].payload), *events[1:]]
        for step, content in ((AGAIN, events), (OTHER, other)):
            self.note(INVOKE, step)
            try:
                await self._client.prepare(self.id, db, *content)
            except CallError as e:
                self.note(outcome(e), step, note=e)
            else:
                self.note(OK, step)

    async def _two_phase(self, token: bytes) -> None:
        """Ends the transaction in two phases, the second a while later."""
        gid = f"rb-{self.id}"
        self.note(INVOKE, LOCAL)
        try:
            answer = await self._c.execute(f"PREPARE TRANSACTION '{gid}'")
            if answer != "PREPARE TRANSACTION":
                raise OutboxError(f"PREPARE TRANSACTION was answered by {answer}")
        except BaseException as e:
            self.note(INFO, LOCAL, note=e)
            raise
        random = self._worker.random
        end = "ROLLBACK PREPARED" if random.randrange(5) == 0 else "COMMIT PREPARED"
        self._worker.service.later(random.uniform(0, 4), partial(self._second_phase, end, gid, token))

    async def _second_phase(self, end: str, gid: str, token: bytes) -> None:
        try:
            await asyncio.wait_for(self._worker.service.pool.execute(f"{end} '{gid}'"), PATIENCE)
        except Exception as e:
            self.note(INFO, LOCAL, note=e)  # whoever finds it ends it
            return
        if end == "ROLLBACK PREPARED":
            self.note(OK, ROLLBACK)
            return
        self.note(OK, LOCAL)
        await self._call(COMMIT, partial(self._client.commit, self.id, token))


async def publish(worker: Worker) -> None:
    """Publishes without a transaction, sometimes twice."""
    [change] = worker.plan.changes(DIRECT)
    worker.plan.take(change)
    id = new_id()
    events, noted = worker.plan.events([change], occurred_at=datetime.datetime.now(datetime.timezone.utc))
    for step in (PUBLISH, AGAIN) if worker.random.randrange(3) == 0 else (PUBLISH,):
        worker.note(INVOKE, step, DIRECT, id, events=noted if step == PUBLISH else ())
        try:
            await worker.service.client.publish(*events, transaction_id=id)
        except CallError as e:
            worker.note(outcome(e), step, DIRECT, id, note=e)
        else:
            worker.note(OK, step, DIRECT, id)


async def probe(worker: Worker, xid_file: Path) -> None:
    """Prepares a transaction and leaves it open until its database dies."""
    c = await worker.service.pool.acquire(timeout=2)
    try:
        await _Hand(worker, PROBE, c).prepare()
        xid = await c.fetchval("SELECT pg_current_xact_id()::text")
        xid_file.write_text(xid)
    except BaseException:
        await worker.service.pool.release(c, timeout=2)
        raise

    async def leave() -> None:
        with suppress(Exception):
            await c.execute("SELECT pg_sleep(30)", timeout=40)
        await worker.service.pool.release(c, timeout=2)

    worker.service.background(leave())
