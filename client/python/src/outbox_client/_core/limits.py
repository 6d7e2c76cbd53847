"""Rules for events. They repeat what the API says, so that a mistake is found before anything is sent or spilled."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import grpc

from outbox_client._gen.outbox.v1 import event_pb2
from outbox_client._gen.outbox.v1 import outbox_service_pb2 as pb
from outbox_client.errors import FieldViolation, InvalidError, Reason

MAX_NAME, MAX_TOPIC, MAX_KEY, MAX_HEADERS, MAX_HEADER_BYTES = 255, 249, 4096, 64, 16 << 10
RESERVED_HEADER = "outbox-epoch"
_MAX_VIOLATIONS = 16  # a thousand broken events need not all be told
_LAST_SECOND = (2**63 - 1) // 1_000_000_000
_TOPIC = re.compile(r"[a-zA-Z0-9._-]{1,249}")


@dataclass(frozen=True)
class Limits:
    """The limits of the platform. Until a session has told them, the platform's defaults hold. Sizes are bytes."""

    events_per_transaction: int = 1000
    transaction_bytes: int = 4 << 20
    """Payloads, keys, headers and names of one transaction together."""
    event_bytes: int = (1 << 20) - (64 << 10)
    """The same of one event. A topic may allow less."""
    headers: int = MAX_HEADERS
    header_bytes: int = MAX_HEADER_BYTES
    open_calls: int = 1024
    """Calls of one session that are not yet answered."""

    @classmethod
    def told(cls, told: pb.Limits) -> Limits:
        """Reads the limits of a Welcome. What it leaves out keeps its default."""
        default = cls()
        return cls(
            told.max_events_per_transaction or default.events_per_transaction,
            told.max_transaction_bytes or default.transaction_bytes,
            told.max_event_bytes or default.event_bytes,
            told.max_headers or default.headers,
            told.max_header_bytes or default.header_bytes,
            told.max_open_calls or default.open_calls,
        )


def check(events: Sequence[event_pb2.Event], limits: Limits) -> None:
    """Raises InvalidError, naming every field, for what the platform would refuse."""
    v = _Violations(limits)
    v.events(events)
    v.raise_any()


class _Violations:
    """The fields that break a rule."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.fields: list[FieldViolation] = []
        self.too_big = False

    def add(self, event: int | None, field: str, description: str) -> None:
        if len(self.fields) < _MAX_VIOLATIONS:
            name = field if event is None else f"events[{event}].{field}".rstrip(".")
            self.fields.append(FieldViolation(name, description))

    def large(self, event: int | None, field: str, size: int, limit: int) -> None:
        if size > limit:
            self.too_big = True
            self.add(event, field, f"has {size} bytes, more than {limit}")

    def raise_any(self) -> None:
        if not self.fields:
            return
        first = self.fields[0]
        raise InvalidError(
            grpc.StatusCode.INVALID_ARGUMENT,
            f"{first.field} {first.description}",
            reason=Reason.EVENT_TOO_LARGE if self.too_big else Reason.FIELD_INVALID,
            fields=self.fields,
            local=True,
        )

    def events(self, events: Sequence[event_pb2.Event]) -> None:
        if not events:
            self.add(None, "events", "is empty")
        if len(events) > self.limits.events_per_transaction:
            self.add(None, "events", f"has {len(events)} entries, more than {self.limits.events_per_transaction}")
            return
        seen: set[bytes] = set()
        total = 0
        for i, e in enumerate(events):
            total += self.event(i, e)
            if e.event_id in seen:
                self.add(i, "event_id", "is used twice in this transaction")
            seen.add(e.event_id)
        self.large(None, "events", total, self.limits.transaction_bytes)

    def event(self, i: int, e: event_pb2.Event) -> int:
        """Checks one event and returns its size."""
        problem = topic_problem(e.topic)
        if problem:
            self.add(i, "topic", problem)
        size = len(e.topic) + len(e.key) + len(e.payload)
        size += self.text(i, "aggregate_type", e.aggregate_type, 1)
        size += self.text(i, "aggregate_id", e.aggregate_id, 1)
        size += self.text(i, "event_type", e.event_type, 1)
        size += self.text(i, "content_type", e.content_type, 0)
        self.large(i, "key", len(e.key), MAX_KEY)
        size += self.headers(i, e)
        # Kafka counts milliseconds from 1970, and the platform keeps nanoseconds in 63 bits.
        at = e.occurred_at
        if not (0, 0) < (at.seconds, at.nanos) < (_LAST_SECOND, 0):
            self.add(i, "occurred_at", "is not a time after 1970-01-01 and before 2262")
        self.large(i, "", size, self.limits.event_bytes)
        return size

    def headers(self, i: int, e: event_pb2.Event) -> int:
        limit = min(self.limits.headers, MAX_HEADERS)
        if len(e.headers) > limit:
            self.add(i, "headers", f"has {len(e.headers)} entries, more than {limit}")
            return 0
        size = 0
        for h in e.headers:
            size += self.text(i, "headers.name", h.name, 1) + len(h.value)
            if h.name == RESERVED_HEADER:
                self.add(i, "headers.name", f'"{RESERVED_HEADER}" belongs to the platform')
        self.large(i, "headers", size, min(self.limits.header_bytes, MAX_HEADER_BYTES))
        return size

    def text(self, i: int, field: str, s: str, least: int) -> int:
        """Checks a text and returns its size."""
        size = len(s.encode())
        if size < least:
            self.add(i, field, "is empty")
        elif size > MAX_NAME:
            self.add(i, field, f"has {size} bytes, more than {MAX_NAME}")
        elif "\0" in s:
            self.add(i, field, "contains NUL")
        return size


def topic_problem(s: str) -> str:
    """Says what is wrong with a topic's name; empty: nothing."""
    if not s:
        return "is empty"
    if len(s.encode()) > MAX_TOPIC:
        return f"has {len(s.encode())} bytes, more than {MAX_TOPIC}"
    if s in (".", ".."):
        return 'must not be "." or ".."'
    if s.startswith("__"):
        return 'must not start with "__"'
    if not _TOPIC.fullmatch(s):
        bad = next(c for c in s if not _TOPIC.fullmatch(c))
        return f"contains {bad!r}, which topic names do not allow"
    return ""
