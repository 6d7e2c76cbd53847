"""Assertions about what was published. They wait, because a Commit arrives shortly after COMMIT."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

from outbox_client.event import Event, header_pairs
from outbox_client.testing.platform import FakePlatform


def assert_published(
    platform: FakePlatform,
    topic: str | None = None,
    *,
    aggregate_id: str | None = None,
    event_types: Sequence[str] | None = None,
    payloads: Sequence[object] | None = None,
    headers: Mapping[str, str | bytes] | None = None,
    key: str | bytes | None = None,
    count: int | None = None,
    timeout: float = 5.0,
) -> list[Event]:
    """Waits (seconds) until the events of a topic or aggregate are as they should be, and returns them in order.

    event_types and payloads: exactly these, in this order; payloads are bytes, or anything that is compared with the parsed JSON.
    headers: each event has them, among others. key: each record's. count: so many; without any of the three at least one.
    It blocks: in a coroutine use `await asyncio.to_thread(assert_published, …)`.
    """
    wanted = next((len(w) for w in (event_types, payloads) if w is not None), count)

    def found() -> list[Event]:
        return platform.published(topic, aggregate_id)

    try:
        platform.wait(lambda: len(found()) >= (1 if wanted is None else max(1, wanted)), timeout=timeout)
    except TimeoutError:
        pass  # said better below
    events = found()
    what = f"events of {topic or 'any topic'}" + (f", aggregate {aggregate_id}" if aggregate_id else "")
    shown = [f"{e.event_type} {e.payload[:80]!r}" for e in events]
    if wanted is None:
        assert events, f"no {what}; stored: {[(t.state.value, len(t.events)) for t in platform.transactions()]}"
    else:
        assert len(events) == wanted, f"{len(events)} {what}, not {wanted}: {shown}"
    if event_types is not None:
        assert [e.event_type for e in events] == list(event_types), f"{what}: {shown}"
    if payloads is not None:
        for event, payload in zip(events, payloads, strict=True):
            value = event.payload if isinstance(payload, bytes) else json.loads(event.payload)
            assert value == payload, f"payload of {event.event_type}: {value!r}, not {payload!r}"
    for event in events:
        has = {name: _bytes(value) for name, value in header_pairs(event.headers)}
        for name, value in (headers or {}).items():
            assert has.get(name) == _bytes(value), (
                f"header {name} of {event.event_type}: {has.get(name)!r}, not {value!r}"
            )
        if key is not None:
            is_key = _bytes(event.aggregate_id if event.key is None else event.key)
            assert is_key == _bytes(key), f"key of {event.event_type}: {is_key!r}, not {key!r}"
    return events


def assert_not_published(platform: FakePlatform, topic: str | None = None, *, aggregate_id: str | None = None) -> None:
    """Fails when there is a published event of a topic or aggregate."""
    events = platform.published(topic, aggregate_id)
    assert not events, f"published: {[f'{e.event_type} {e.payload[:80]!r}' for e in events]}"


def _bytes(value: str | bytes) -> bytes:
    return value.encode() if isinstance(value, str) else value
