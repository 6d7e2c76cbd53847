"""What reaches Kafka: the record of a stored dict.

`outbox import` makes the same of rows of the old table; cmd/outbox/testdata/huleedu_vectors.json holds both to it.
"""

from __future__ import annotations

import datetime
import hashlib
import json
from typing import Any
from uuid import UUID

from outbox_client.event import Event

_MOST = 255
_KEPT = _MOST - 1 - 2 * hashlib.sha256().digest_size


def platform_name(name: str) -> str:
    """Fits a name into what the platform allows, 1 to 255 bytes. A long one ends with a hash of itself, so that names
    stay apart.
    """
    if not name:
        return "-"
    raw = name.encode()
    if len(raw) <= _MOST:
        return name
    return raw[:_KEPT].decode(errors="ignore") + "#" + hashlib.sha256(raw).hexdigest()


def make_event(
    *,
    write_id: UUID,
    aggregate_id: str,
    aggregate_type: str,
    event_type: str,
    event_data: dict[str, Any],
    topic: str,
    event_key: str | None,
    unique_id: bool = False,
) -> Event:
    """Makes the event of a stored dict. Raises ValueError or TypeError if it cannot be written as JSON.

    The event's id is the envelope's event_id, or the write's id if there is none, or if unique_id asks for one that
    no other event has. Consumers see the header event_id, which is the envelope's in any case.
    """
    envelope = dict(event_data)
    is_envelope = "event_id" in envelope
    headers: dict[str, str] = {}
    # What the manager put beside the envelope. In a dict that is no envelope these are taken for the manager's only
    # if they look it.
    if is_envelope or envelope.get("topic") == topic:
        given = envelope.get("headers")
        if isinstance(given, dict) and "topic" in envelope:
            headers = {str(name): _text(value) for name, value in given.items()}
            del envelope["headers"]
        envelope.pop("topic", None)
    event_id = _uuid(envelope.get("event_id"))
    for name, value in (
        ("event_id", envelope.get("event_id") or write_id),
        ("trace_id", envelope.get("correlation_id")),
        ("schema_version", envelope.get("schema_version") or 1),
        ("occurred_at", envelope.get("event_timestamp")),
        ("content_type", "application/json"),
        ("source_service", envelope.get("source_service")),
        ("event_type", envelope.get("event_type") or event_type),
    ):
        if name not in headers and value is not None:
            headers[name] = _text(value)
    return Event(
        topic=topic,
        aggregate_type=platform_name(aggregate_type),
        aggregate_id=platform_name(aggregate_id),
        event_type=platform_name(event_type),
        payload=json.dumps(envelope, allow_nan=False).encode("ascii"),
        key=event_key,
        content_type="application/json",
        headers=headers,
        event_id=write_id if unique_id or event_id is None else event_id,
        occurred_at=_time(envelope.get("event_timestamp")),
    )


def _text(value: Any) -> str:
    return (
        value if isinstance(value, str) else json.dumps(value) if isinstance(value, (dict, list, bool)) else str(value)
    )


def _uuid(value: Any) -> UUID | None:
    try:
        return UUID(value) if isinstance(value, str) else None
    except ValueError:
        return None


def _time(value: Any) -> datetime.datetime | None:
    """A time zone is required, and Kafka's time begins in 1970; what is not such a time is left to the platform."""
    if not isinstance(value, str):
        return None
    try:
        found = datetime.datetime.fromisoformat(value[:-1] + "+00:00" if value.endswith("Z") else value)
    except ValueError:
        return None
    return found if found.tzinfo is not None and found.timestamp() >= 1 else None
