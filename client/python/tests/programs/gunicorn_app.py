"""A WSGI application whose module makes the client, and has used it before gunicorn forks its workers."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from typing import Any

from events import order

from outbox_client import Config, OutboxClient

client = OutboxClient(Config.from_env())
client.publish(order("master"))


def application(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
    """Publishes one event and says which process did."""
    client.publish(order(environ["PATH_INFO"].strip("/")))
    start_response("200 OK", [("Content-Type", "text/plain")])
    return [str(os.getpid()).encode()]
