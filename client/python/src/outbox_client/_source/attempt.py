"""One attempt of a database transaction that has events."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from outbox_client._gen.outbox.v1 import event_pb2
from outbox_client._gen.outbox.v1 import outbox_service_pb2 as pb
from outbox_client._source.driver import Execute, MustSpill, Prepare, Steps
from outbox_client._source.marker import SPILL, Identities, Mark, raise_fence, write_mark
from outbox_client.alarm import Alarm, AlarmKind
from outbox_client.errors import MustSpillError, TransactionError, UnavailableError
from outbox_client.ids import new_id
from outbox_client.transaction import Mode

if TYPE_CHECKING:
    from outbox_client._client import BaseClient


class Attempt:
    """One attempt. Every attempt of a retry loop needs its own, because each has an id of its own. Used by one task or thread."""

    def __init__(self, client: BaseClient, database: str, spill: bool) -> None:
        registration = client.registration(database)
        self.id: uuid.UUID = new_id()
        self._client, self._database, self._registration = client, database, registration
        self._mode = registration.upkeep.mode if registration is not None else Mode.MARKER
        # Without a registered database nobody would publish it, and without a table there is nowhere to put it.
        self._spill = spill and registration is not None and self._mode is Mode.MARKER
        self._token = b""
        self._sent = False  # Prepare may have arrived
        self._spilled = False
        self._ready = False  # prepared or spilled: COMMIT may follow
        self._ended = False

    @property
    def ready(self) -> bool:
        """Whether COMMIT may follow."""
        return self._ready

    def prepare(self, events: Sequence[event_pb2.Event]) -> Steps[None]:
        """Writes the marker and prepares the events, or spills them. COMMIT must not follow an error."""
        identities = self._registration.identities_of if self._registration else Identities
        if self._mode is Mode.XID_FENCED:
            mark = yield from raise_fence(self._database, identities)
        else:
            mark = yield from write_mark(str(self.id), self._database, identities)
        body = self._encode(mark, events)
        must_spill = yield from self._must_spill(mark)
        if must_spill and not self._spill:
            raise MustSpillError()
        if must_spill:
            yield from self._store(body, None)
            return
        self._sent = True
        try:
            self._token = yield Prepare(body, fail_fast=self._spill)
        except UnavailableError as e:
            if not self._spill:
                raise
            yield from self._store(body, e)
            return
        self._ready = True

    def _encode(self, mark: Mark, events: Sequence[event_pb2.Event]) -> bytes:
        self._client.check_protos(events)
        request = pb.PrepareRequest(
            source=self._client.config.source,
            transaction_id=self.id.bytes,
            database_transaction=mark.transaction.to_proto(),
            events=events,
        )
        return request.SerializeToString()

    def _must_spill(self, mark: Mark) -> Steps[bool]:
        """Tells whether spilled requests wait, which later ones must not overtake.

        Under REPEATABLE READ and SERIALIZABLE the marker's own statement has looked at an old snapshot, so another connection
        is asked. When it does not answer, spilling is the safe answer.
        """
        if mark.fresh:
            return mark.must_spill
        if self._registration is None:
            raise TransactionError(
                f"a transaction that is {mark.isolation} needs its database registered with the client"
            )
        return bool((yield MustSpill(self._registration.name)))

    def _store(self, body: bytes, why: UnavailableError | None) -> Steps[None]:
        """Spills the request into the marker of its own transaction."""
        n = yield Execute(SPILL, (str(self.id), body))
        if n != 1:
            raise TransactionError(f"spilling: the marker is not there ({n} rows)") from why
        self._ready = self._spilled = True

    def committed(self) -> None:
        """Is told that COMMIT succeeded. It neither raises nor waits."""

        def tell() -> None:
            if self._ended or not self._ready:
                return
            self._ended = True
            if self._spilled:
                self._client.spilled(self._database)
            else:
                self._client.commit_later(self.id, self._token, done=self._acknowledged)

        self._quietly(tell)

    def _acknowledged(self, error: BaseException | None) -> None:
        if error is None and self._registration is not None and self._mode is Mode.MARKER:
            self._registration.acknowledged(self.id)

    def rolled_back(self) -> None:
        """Is told that the transaction is rolled back for certain. It neither raises nor waits."""

        def tell() -> None:
            if self._ended or not self._sent:
                return
            self._ended = True
            self._client.abort_later(self.id, self._token)

        self._quietly(tell)

    def _quietly(self, tell: Callable[[], None]) -> None:
        """Runs what is ours after the transaction has ended: no concern of the application any more."""
        try:
            tell()
        except Exception as e:
            self._client.report(Alarm(AlarmKind.BUG, self.id, e, self._database))


def run(steps: Steps[Any], step: Callable[[Any], Any]) -> Any:
    """Runs a protocol with a function that does one step and blocks."""
    try:
        wanted = next(steps)
        while True:
            try:
                result = step(wanted)
            except BaseException as e:
                wanted = steps.throw(e)
            else:
                wanted = steps.send(result)
    except StopIteration as end:
        return end.value


async def run_async(steps: Steps[Any], step: Callable[[Any], Any]) -> Any:
    """Runs a protocol with a coroutine function that does one step."""
    try:
        wanted = next(steps)
        while True:
            try:
                result = await step(wanted)
            except BaseException as e:
                wanted = steps.throw(e)
            else:
                wanted = steps.send(result)
    except StopIteration as end:
        return end.value
