"""Errors as the platform sends them."""

from __future__ import annotations

import datetime

from google.rpc import error_details_pb2, status_pb2

from outbox_client.errors import DOMAIN, CallError


def status_of(error: CallError) -> status_pb2.Status:
    """Writes an error as the platform sends it."""
    status = status_pb2.Status(code=error.code.value[0], message=error.message)
    if error.reason:
        info = error_details_pb2.ErrorInfo(reason=error.reason, domain=DOMAIN, metadata=dict(error.metadata))
        status.details.add().Pack(info)
    if error.fields:
        bad = error_details_pb2.BadRequest()
        for f in error.fields:
            bad.field_violations.add(field=f.field, description=f.description)
        status.details.add().Pack(bad)
    if error.retry_after:
        retry = error_details_pb2.RetryInfo()
        retry.retry_delay.FromTimedelta(datetime.timedelta(seconds=error.retry_after))
        status.details.add().Pack(retry)
    return status
