"""Encoding of calls. Their bodies are encoded once and then travel, or are spilled, as they are."""

from __future__ import annotations

import enum
from collections.abc import Iterable

from outbox_client._gen.outbox.v1 import outbox_service_pb2 as pb

SERVICE = "/outbox.v1.OutboxService/"


class Kind(enum.IntEnum):
    """One of the calls that travel on a session. The value is the field number in SessionRequest.Call."""

    PREPARE = pb.SessionRequest.Call.PREPARE_FIELD_NUMBER
    COMMIT = pb.SessionRequest.Call.COMMIT_FIELD_NUMBER
    ABORT = pb.SessionRequest.Call.ABORT_FIELD_NUMBER
    PUBLISH = pb.SessionRequest.Call.PUBLISH_FIELD_NUMBER

    @property
    def word(self) -> str:
        """The call's name, in lower case."""
        return self.name.lower()

    @property
    def method(self) -> str:
        """The full name of its unary method."""
        return SERVICE + self.name.capitalize()


_CALL_ID = pb.SessionRequest.Call.CALL_ID_FIELD_NUMBER << 3
_IN_CALLS = pb.SessionRequest.Calls.CALLS_FIELD_NUMBER << 3 | 2
_IN_REQUEST = pb.SessionRequest.CALLS_FIELD_NUMBER << 3 | 2


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def encode_call(kind: Kind, call_id: int, body: bytes) -> bytes:
    """Encodes one entry of SessionRequest.Calls.calls around a call's own, encoded message."""
    inner = bytes((_CALL_ID,)) + _varint(call_id) + bytes((kind << 3 | 2,)) + _varint(len(body)) + body
    return bytes((_IN_CALLS,)) + _varint(len(inner)) + inner


def encode_calls(calls: Iterable[bytes]) -> bytes:
    """Encodes a SessionRequest of calls that encode_call returned."""
    joined = b"".join(calls)
    return bytes((_IN_REQUEST,)) + _varint(len(joined)) + joined
