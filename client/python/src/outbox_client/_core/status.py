"""Turns the statuses of gRPC into errors of this package."""

from __future__ import annotations

import grpc
from google.rpc import error_details_pb2, status_pb2

from outbox_client.errors import (
    DOMAIN,
    AlreadyDecidedError,
    CallError,
    DeniedError,
    ExhaustedError,
    FieldViolation,
    IdReusedError,
    InvalidError,
    Reason,
    UnavailableError,
    UnknownTransactionError,
)

CODES: dict[int, grpc.StatusCode] = {code.value[0]: code for code in grpc.StatusCode}

_BY_REASON: dict[str, type[CallError]] = {
    Reason.TRANSACTION_UNKNOWN: UnknownTransactionError,
    Reason.TRANSACTION_ALREADY_DECIDED: AlreadyDecidedError,
    Reason.TRANSACTION_ID_REUSED: IdReusedError,
}
_BY_CODE: dict[grpc.StatusCode, type[CallError]] = {
    grpc.StatusCode.INVALID_ARGUMENT: InvalidError,
    grpc.StatusCode.PERMISSION_DENIED: DeniedError,
    grpc.StatusCode.UNAUTHENTICATED: DeniedError,
    grpc.StatusCode.UNAVAILABLE: UnavailableError,
    grpc.StatusCode.DEADLINE_EXCEEDED: UnavailableError,
    grpc.StatusCode.RESOURCE_EXHAUSTED: ExhaustedError,
}

# What grpc.aio says when a stream ended before the first message was written: the server's own status is lost then.
_ENDED = "Internal error from Core"

PUSHBACK = "grpc-retry-pushback-ms"
DETAILS = "grpc-status-details-bin"


def kind_of(code: grpc.StatusCode, reason: str) -> type[CallError]:
    """Returns the class of an error."""
    return _BY_REASON.get(reason) or _BY_CODE.get(code, CallError)


def error_of_status(status: status_pb2.Status) -> CallError:
    """Reads the details of a status."""
    code = CODES.get(status.code, grpc.StatusCode.UNKNOWN)
    reason, metadata, fields, retry_after = "", {}, [], 0.0
    for detail in status.details:
        info, bad, retry = error_details_pb2.ErrorInfo(), error_details_pb2.BadRequest(), error_details_pb2.RetryInfo()
        if detail.Unpack(info) and info.domain == DOMAIN:
            reason, metadata = info.reason, dict(info.metadata)
        elif detail.Unpack(bad):
            fields = [FieldViolation(v.field, v.description) for v in bad.field_violations]
        elif detail.Unpack(retry):
            retry_after = max(0.0, retry.retry_delay.ToTimedelta().total_seconds())
    return kind_of(code, reason)(
        code, status.message, reason=reason, metadata=metadata, fields=fields, retry_after=retry_after
    )


def error_of_rpc(error: grpc.RpcError | BaseException) -> CallError:
    """Reads what a unary call or a stream failed with. The error becomes its cause."""
    if isinstance(error, CallError):
        return error
    found = CallError(grpc.StatusCode.UNKNOWN, str(error) or type(error).__name__)
    if isinstance(error, grpc.aio.AioRpcError):
        trailers = dict(error.trailing_metadata() or ())
        details = trailers.get(DETAILS)
        if isinstance(details, bytes):
            found = error_of_status(status_pb2.Status.FromString(details))
        else:
            code = error.code()
            if error.details() == _ENDED:
                code = grpc.StatusCode.UNAVAILABLE
            found = kind_of(code, "")(code, error.details() or "")
        pushback = str(trailers.get(PUSHBACK, ""))
        if pushback.isdigit():
            found.retry_after = max(found.retry_after, int(pushback) / 1000)
        elif pushback:
            found.fatal = True  # the platform says: do not repeat it
    found.__cause__ = error
    return found


def retryable(error: CallError) -> bool:
    """Tells whether repeating the call may help. Every call of the platform is idempotent."""
    if error.local or error.fatal:
        return False
    if error.code is grpc.StatusCode.UNAVAILABLE:
        return True
    if error.code is grpc.StatusCode.ABORTED:
        return error.reason == Reason.CONTENTION
    return error.code is grpc.StatusCode.RESOURCE_EXHAUSTED and error.retry_after > 0


def sessions_not_served(error: CallError) -> bool:
    """Tells whether sessions are refused, and not this caller, so that unary calls may still work."""
    return error.code is grpc.StatusCode.UNIMPLEMENTED or error.reason == Reason.METHOD_DENIED


def refused(error: CallError) -> bool:
    """Tells whether the platform opens no session for this caller until somebody changes something."""
    return error.code in (
        grpc.StatusCode.UNAUTHENTICATED,
        grpc.StatusCode.PERMISSION_DENIED,
        grpc.StatusCode.INVALID_ARGUMENT,
        grpc.StatusCode.FAILED_PRECONDITION,
    )


_FINAL = frozenset(
    {
        grpc.StatusCode.NOT_FOUND,
        grpc.StatusCode.FAILED_PRECONDITION,
        grpc.StatusCode.INVALID_ARGUMENT,
        grpc.StatusCode.PERMISSION_DENIED,
        grpc.StatusCode.UNAUTHENTICATED,
        grpc.StatusCode.ALREADY_EXISTS,
        grpc.StatusCode.UNIMPLEMENTED,
    }
)


def decision_is_final(error: CallError) -> bool:
    """Tells whether the platform's answer to a Commit or Abort will stay the same."""
    return error.code in _FINAL


def refused_for_good(error: CallError) -> bool:
    """Tells whether the platform will refuse a spilled request for ever.

    A source or an identity that is not accepted is no fault of the request: somebody will put that right.
    """
    if error.code is grpc.StatusCode.PERMISSION_DENIED:
        return error.reason == Reason.TOPIC_DENIED
    return error.code in (
        grpc.StatusCode.INVALID_ARGUMENT,
        grpc.StatusCode.ALREADY_EXISTS,
        grpc.StatusCode.FAILED_PRECONDITION,
    )
