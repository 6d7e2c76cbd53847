"""Connections to the platform."""

from __future__ import annotations

import asyncio
import json

import grpc

from outbox_client._core.trace import current_trace
from outbox_client.config import Config
from outbox_client.version import SDK

ONE_SERVER = "pick_first"
"""For a stream: some server, not always the first."""
ALL_SERVERS = "round_robin"
"""For unary calls: each in its turn."""

_KEEPALIVE_TIME_MS = 20_000  # silence after which a connection is tested; servers refuse less than 10 s
_KEEPALIVE_TIMEOUT_MS = 5_000
_MAX_RECEIVE_BYTES = 16 << 20


def make(config: Config, policy: str) -> grpc.aio.Channel:
    """Makes a connection object for the running event loop. Nothing is connected yet."""
    balancing = {policy: {"shuffleAddressList": True} if policy == ONE_SERVER else {}}
    options: list[tuple[str, object]] = [
        ("grpc.service_config", json.dumps({"loadBalancingConfig": [balancing]})),
        ("grpc.enable_retries", 0),  # retries are ours: they know RetryInfo
        ("grpc.use_local_subchannel_pool", 1),  # a connection of its own
        ("grpc.primary_user_agent", SDK),
        ("grpc.keepalive_time_ms", _KEEPALIVE_TIME_MS),
        ("grpc.keepalive_timeout_ms", _KEEPALIVE_TIMEOUT_MS),
        ("grpc.max_receive_message_length", _MAX_RECEIVE_BYTES),
    ]
    if config.plaintext:
        return grpc.aio.insecure_channel(config.address, options=options)
    tls = config.tls
    if tls is not None and tls.server_name:
        options.append(("grpc.ssl_target_name_override", tls.server_name))
    credentials = grpc.ssl_channel_credentials(
        tls.ca if tls else None, tls.key if tls else None, tls.cert if tls else None
    )
    return grpc.aio.secure_channel(config.address, credentials, options=options)


def metadata(config: Config) -> tuple[tuple[str, str], ...]:
    """Returns what goes with a stream or a unary call: the token, and the trace context."""
    token = config.bearer()
    bearer = (("authorization", f"Bearer {token}"),) if token else ()
    return (*bearer, *current_trace())


async def close(connection: grpc.aio.Channel | None) -> None:
    """Closes a connection whose end is of no interest, also when the task is being cancelled."""
    if connection is not None:
        closing = asyncio.ensure_future(connection.close())
        closing.add_done_callback(lambda done: done.cancelled() or done.exception())
        await asyncio.wait({closing}, timeout=1)


def as_is(body: bytes) -> bytes:
    """Serializes what is serialized already."""
    return body
