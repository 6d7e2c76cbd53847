"""The errors of publish_to_outbox: HuleEdu's own where they are there, else some of the same shape."""

from __future__ import annotations

import datetime
import enum
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NoReturn
from uuid import UUID

logger = logging.getLogger("outbox_client.huleedu")

NIL = UUID(int=0)


class ErrorCode(str, enum.Enum):
    """The one code that publish_to_outbox fails with."""

    EXTERNAL_SERVICE_ERROR = "EXTERNAL_SERVICE_ERROR"


@dataclass(frozen=True)
class ErrorDetail:
    """What is known about a failure. The same names as in HuleEdu's common_core."""

    error_code: ErrorCode
    message: str
    correlation_id: UUID
    service: str
    operation: str
    details: dict[str, Any] = field(default_factory=dict)
    timestamp: datetime.datetime = field(default_factory=lambda: datetime.datetime.now(datetime.timezone.utc))

    def model_dump(self) -> dict[str, Any]:
        """Returns everything as a dict."""
        return {
            "error_code": self.error_code.value,
            "message": self.message,
            "correlation_id": self.correlation_id,
            "timestamp": self.timestamp,
            "service": self.service,
            "operation": self.operation,
            "details": dict(self.details),
        }


class HuleEduError(Exception):
    """Raised where huleedu_service_libs is not installed. Everything about it is in error_detail."""

    def __init__(self, error_detail: ErrorDetail) -> None:
        super().__init__(error_detail.message)
        self.error_detail = error_detail

    @property
    def correlation_id(self) -> str:
        """The correlation id, as text."""
        return str(self.error_detail.correlation_id)

    @property
    def error_code(self) -> str:
        """The code, as text."""
        return self.error_detail.error_code.value

    @property
    def service(self) -> str:
        """The service that failed."""
        return self.error_detail.service

    @property
    def operation(self) -> str:
        """What it was doing."""
        return self.error_detail.operation

    def to_dict(self) -> dict[str, Any]:
        """Returns the error for serialisation."""
        return {"error": str(self), "error_detail": self.error_detail.model_dump()}

    def __str__(self) -> str:
        return f"[{self.error_code}] {self.error_detail.message}"


ErrorFactory = Callable[..., NoReturn]
"""Raises. Called with the keywords of raise_external_service_error."""


def own_error(
    service: str, operation: str, external_service: str, message: str, correlation_id: UUID, **details: Any
) -> NoReturn:
    """The factory that is used without huleedu_service_libs."""
    raise HuleEduError(
        ErrorDetail(
            error_code=ErrorCode.EXTERNAL_SERVICE_ERROR,
            message=message,
            correlation_id=correlation_id,
            service=service,
            operation=operation,
            details={"external_service": external_service, **details},
        )
    )


_factory: ErrorFactory | None = None


def set_error_factory(factory: ErrorFactory | None) -> None:
    """Says who makes errors from now on. None: huleedu_service_libs if it is installed, else this module."""
    global _factory
    _factory = factory


def _found() -> ErrorFactory:
    """Looks for HuleEdu's factory, each time: tests install and remove it."""
    try:
        from huleedu_service_libs.error_handling import raise_external_service_error as theirs  # type: ignore[import-not-found]
    except ImportError:
        pass
    else:
        return theirs  # type: ignore[no-any-return]  # not installed where this is checked
    return own_error


def raise_external_service_error(
    *, service: str, operation: str, external_service: str, message: str, correlation_id: UUID, **details: Any
) -> NoReturn:
    """Raises a HuleEduError with code EXTERNAL_SERVICE_ERROR."""
    factory = _factory or _found()
    factory(
        service=service,
        operation=operation,
        external_service=external_service,
        message=message,
        correlation_id=correlation_id,
        **details,
    )
