"""Events of the tests."""

from __future__ import annotations

import json
from typing import Any

from outbox_client import Event


def order(id: str = "1", what: str = "placed", **settings: Any) -> Event:
    """An event of an order."""
    payload = json.dumps({"id": id, "what": what}).encode()
    return Event(
        **{
            "topic": "orders",
            "aggregate_type": "order",
            "aggregate_id": id,
            "event_type": f"order.{what}.v1",
            "payload": payload,
            **settings,
        }
    )
