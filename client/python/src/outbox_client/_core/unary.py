"""Unary calls: for GetTransaction, and for everything while sessions are not served."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

import grpc

from outbox_client._core import channel
from outbox_client._core.session import closed_error, timeout_error
from outbox_client._core.status import error_of_rpc
from outbox_client._core.wire import SERVICE, Kind
from outbox_client._gen.outbox.v1 import outbox_service_pb2 as pb
from outbox_client.errors import UnavailableError

if TYPE_CHECKING:
    from outbox_client._core.engine import Engine

T = TypeVar("T")


class Unary:
    """The connection of the unary calls of an engine, made with the first call. Used in the engine's event loop only."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._connection: grpc.aio.Channel | None = None

    async def call(self, kind: Kind, body: bytes, timeout: float, fail_fast: bool) -> bytes:
        """Makes one of the calls that usually travel on a session. Raises CallError."""
        self._engine.stats.calls += 1
        self._engine.stats.messages += 1
        try:
            # All responses but Prepare's are empty, and read as one without a token.
            response = await self._invoke(kind.method, body, pb.PrepareResponse.FromString, timeout, fail_fast)
        except UnavailableError as e:
            if e.code is grpc.StatusCode.DEADLINE_EXCEEDED and not e.reason:
                raise timeout_error(kind, timeout) from e
            raise
        return response.token

    async def get_transaction(self, request: pb.GetTransactionRequest, timeout: float) -> pb.GetTransactionResponse:
        """Makes a GetTransaction. Raises CallError."""
        method = SERVICE + "GetTransaction"
        return await self._invoke(
            method, request.SerializeToString(), pb.GetTransactionResponse.FromString, timeout, fail_fast=False
        )

    async def _invoke(self, method: str, body: bytes, read: Callable[[bytes], T], timeout: float, fail_fast: bool) -> T:
        if self._engine.closed:
            raise closed_error()
        if self._connection is None:
            self._connection = channel.make(self._engine.config, channel.ALL_SERVERS)
        if fail_fast and self._connection.get_state() is grpc.ChannelConnectivity.TRANSIENT_FAILURE:
            raise UnavailableError(grpc.StatusCode.UNAVAILABLE, "no connection with the platform", local=True)
        call = self._connection.unary_unary(method, request_serializer=channel.as_is, response_deserializer=read)
        try:
            return await call(
                body, timeout=timeout, metadata=channel.metadata(self._engine.config), wait_for_ready=not fail_fast
            )
        except grpc.RpcError as e:
            raise error_of_rpc(e) from e

    async def close(self) -> None:
        """Closes the connection."""
        await channel.close(self._connection)
