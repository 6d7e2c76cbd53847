"""The event: one fact to publish."""

from __future__ import annotations

import datetime
import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from outbox_client._gen.outbox.v1 import event_pb2
from outbox_client.ids import new_id

Headers = Mapping[str, str | bytes] | Sequence[tuple[str, str | bytes]]
"""Headers of a record: a mapping, or pairs where names repeat. Text becomes UTF-8."""

TRACE_HEADERS = ("traceparent", "tracestate")


@dataclass(frozen=True)
class Event:
    """One fact to publish. Once prepared it never changes: payload, key and headers reach Kafka byte for byte.

    Text is UTF-8 without NUL. Sizes are bytes.
    """

    topic: str
    """The Kafka topic, 1 to 249 of a-z, A-Z, 0-9, ".", "_" and "-". The source must be allowed to use it."""
    aggregate_type: str
    """The kind of aggregate, for example "order". With aggregate_id it names the unit of order. 1 to 255 bytes."""
    aggregate_id: str
    """The aggregate, for example its order number. 1 to 255 bytes."""
    event_type: str
    """What happened, for example "order.placed.v1". 1 to 255 bytes."""
    payload: bytes = b""
    """The record's value. It is never parsed and may be empty."""
    key: bytes | str | None = None
    """The record's key, at most 4096 bytes. None: aggregate_id. Empty: an empty key."""
    content_type: str = ""
    """The media type of the payload, for example "application/json". At most 255 bytes; empty: not stated."""
    headers: Headers = field(default_factory=dict)
    """The record's headers, in order. At most 64, names and values together 16 KiB. They win over what the platform adds."""
    event_id: uuid.UUID = field(default_factory=new_id)
    """What consumers de-duplicate by. Default: a new one. It must be unique within its transaction."""
    occurred_at: datetime.datetime | None = None
    """Becomes the record's timestamp. It must have a time zone. None: the time at which the event is handed over."""


def header_pairs(headers: Headers) -> Iterable[tuple[str, str | bytes]]:
    """Returns headers as pairs, in order."""
    return headers.items() if isinstance(headers, Mapping) else headers


def event_to_proto(event: Event, now: float, trace: Sequence[tuple[str, str]] = ()) -> event_pb2.Event:
    """Converts an event and fills in what it leaves out: its time, and the trace context unless it brings its own.

    now: seconds since 1970. Raises ValueError or TypeError for values that protobuf cannot carry.
    """
    p = event_pb2.Event(
        event_id=event.event_id.bytes,
        topic=event.topic,
        aggregate_type=event.aggregate_type,
        aggregate_id=event.aggregate_id,
        event_type=event.event_type,
        payload=event.payload,
        content_type=event.content_type,
    )
    if event.key is not None:
        p.key = event.key.encode() if isinstance(event.key, str) else event.key
    traced = False
    size = 0
    for name, value in header_pairs(event.headers):
        raw = value.encode() if isinstance(value, str) else value
        p.headers.add(name=name, value=raw)
        traced = traced or name.lower() in TRACE_HEADERS
        size += len(name.encode()) + len(raw)
    # A trace context never makes an event too large.
    size += sum(len(name) + len(value) for name, value in trace)
    if not traced and len(p.headers) + len(trace) <= 64 and size <= 16 << 10:
        for name, value in trace:
            p.headers.add(name=name, value=value.encode())
    if event.occurred_at is None:
        # The SDK says when, not the platform: a spilled event keeps its time and its content.
        p.occurred_at.FromNanoseconds(int(now * 1e9))
    else:
        if event.occurred_at.tzinfo is None:
            raise ValueError("occurred_at has no time zone")
        p.occurred_at.FromDatetime(event.occurred_at)
    return p


def event_from_proto(p: event_pb2.Event) -> Event:
    """Converts the other way."""
    return Event(
        topic=p.topic,
        aggregate_type=p.aggregate_type,
        aggregate_id=p.aggregate_id,
        event_type=p.event_type,
        payload=p.payload,
        key=p.key if p.HasField("key") else None,
        content_type=p.content_type,
        headers=[(h.name, h.value) for h in p.headers],
        event_id=uuid.UUID(bytes=p.event_id),
        occurred_at=p.occurred_at.ToDatetime(tzinfo=datetime.timezone.utc),
    )
