from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from typing import ClassVar as _ClassVar

DESCRIPTOR: _descriptor.FileDescriptor

class ErrorReason(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    ERROR_REASON_UNSPECIFIED: _ClassVar[ErrorReason]
    ERROR_REASON_FIELD_INVALID: _ClassVar[ErrorReason]
    ERROR_REASON_EVENT_TOO_LARGE: _ClassVar[ErrorReason]
    ERROR_REASON_SOURCE_DENIED: _ClassVar[ErrorReason]
    ERROR_REASON_TOPIC_DENIED: _ClassVar[ErrorReason]
    ERROR_REASON_TRANSACTION_ID_REUSED: _ClassVar[ErrorReason]
    ERROR_REASON_TRANSACTION_UNKNOWN: _ClassVar[ErrorReason]
    ERROR_REASON_TRANSACTION_ALREADY_DECIDED: _ClassVar[ErrorReason]
    ERROR_REASON_QUOTA_EXCEEDED: _ClassVar[ErrorReason]
    ERROR_REASON_BACKLOG_FULL: _ClassVar[ErrorReason]
    ERROR_REASON_STORE_UNAVAILABLE: _ClassVar[ErrorReason]
    ERROR_REASON_CONTENTION: _ClassVar[ErrorReason]
    ERROR_REASON_IDENTITY_UNKNOWN: _ClassVar[ErrorReason]
    ERROR_REASON_METHOD_DENIED: _ClassVar[ErrorReason]
    ERROR_REASON_NOT_FOUND: _ClassVar[ErrorReason]
    ERROR_REASON_SOURCE_IN_USE: _ClassVar[ErrorReason]
    ERROR_REASON_INTERNAL: _ClassVar[ErrorReason]
    ERROR_REASON_NOT_IN_DOUBT: _ClassVar[ErrorReason]
    ERROR_REASON_SOURCE_DATABASE_UNFIT: _ClassVar[ErrorReason]
ERROR_REASON_UNSPECIFIED: ErrorReason
ERROR_REASON_FIELD_INVALID: ErrorReason
ERROR_REASON_EVENT_TOO_LARGE: ErrorReason
ERROR_REASON_SOURCE_DENIED: ErrorReason
ERROR_REASON_TOPIC_DENIED: ErrorReason
ERROR_REASON_TRANSACTION_ID_REUSED: ErrorReason
ERROR_REASON_TRANSACTION_UNKNOWN: ErrorReason
ERROR_REASON_TRANSACTION_ALREADY_DECIDED: ErrorReason
ERROR_REASON_QUOTA_EXCEEDED: ErrorReason
ERROR_REASON_BACKLOG_FULL: ErrorReason
ERROR_REASON_STORE_UNAVAILABLE: ErrorReason
ERROR_REASON_CONTENTION: ErrorReason
ERROR_REASON_IDENTITY_UNKNOWN: ErrorReason
ERROR_REASON_METHOD_DENIED: ErrorReason
ERROR_REASON_NOT_FOUND: ErrorReason
ERROR_REASON_SOURCE_IN_USE: ErrorReason
ERROR_REASON_INTERNAL: ErrorReason
ERROR_REASON_NOT_IN_DOUBT: ErrorReason
ERROR_REASON_SOURCE_DATABASE_UNFIT: ErrorReason
