import datetime

from google.protobuf import timestamp_pb2 as _timestamp_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class DatabaseMode(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    DATABASE_MODE_UNSPECIFIED: _ClassVar[DatabaseMode]
    DATABASE_MODE_MARKER: _ClassVar[DatabaseMode]
    DATABASE_MODE_XID_FENCED: _ClassVar[DatabaseMode]
    DATABASE_MODE_CLIENT_ONLY: _ClassVar[DatabaseMode]
DATABASE_MODE_UNSPECIFIED: DatabaseMode
DATABASE_MODE_MARKER: DatabaseMode
DATABASE_MODE_XID_FENCED: DatabaseMode
DATABASE_MODE_CLIENT_ONLY: DatabaseMode

class DatabaseTransaction(_message.Message):
    __slots__ = ("database", "xid", "system_identifier", "timeline", "database_oid", "marker_oid", "mode")
    DATABASE_FIELD_NUMBER: _ClassVar[int]
    XID_FIELD_NUMBER: _ClassVar[int]
    SYSTEM_IDENTIFIER_FIELD_NUMBER: _ClassVar[int]
    TIMELINE_FIELD_NUMBER: _ClassVar[int]
    DATABASE_OID_FIELD_NUMBER: _ClassVar[int]
    MARKER_OID_FIELD_NUMBER: _ClassVar[int]
    MODE_FIELD_NUMBER: _ClassVar[int]
    database: str
    xid: int
    system_identifier: int
    timeline: int
    database_oid: int
    marker_oid: int
    mode: DatabaseMode
    def __init__(self, database: _Optional[str] = ..., xid: _Optional[int] = ..., system_identifier: _Optional[int] = ..., timeline: _Optional[int] = ..., database_oid: _Optional[int] = ..., marker_oid: _Optional[int] = ..., mode: _Optional[_Union[DatabaseMode, str]] = ...) -> None: ...

class Transaction(_message.Message):
    __slots__ = ("source", "transaction_id", "state", "prepare_time", "decide_time", "decided_by", "database_transaction", "evidence", "events")
    class State(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        STATE_UNSPECIFIED: _ClassVar[Transaction.State]
        STATE_PREPARED: _ClassVar[Transaction.State]
        STATE_COMMITTED: _ClassVar[Transaction.State]
        STATE_ABORTED: _ClassVar[Transaction.State]
    STATE_UNSPECIFIED: Transaction.State
    STATE_PREPARED: Transaction.State
    STATE_COMMITTED: Transaction.State
    STATE_ABORTED: Transaction.State
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    TRANSACTION_ID_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    PREPARE_TIME_FIELD_NUMBER: _ClassVar[int]
    DECIDE_TIME_FIELD_NUMBER: _ClassVar[int]
    DECIDED_BY_FIELD_NUMBER: _ClassVar[int]
    DATABASE_TRANSACTION_FIELD_NUMBER: _ClassVar[int]
    EVIDENCE_FIELD_NUMBER: _ClassVar[int]
    EVENTS_FIELD_NUMBER: _ClassVar[int]
    source: str
    transaction_id: bytes
    state: Transaction.State
    prepare_time: _timestamp_pb2.Timestamp
    decide_time: _timestamp_pb2.Timestamp
    decided_by: str
    database_transaction: DatabaseTransaction
    evidence: str
    events: _containers.RepeatedCompositeFieldContainer[EventStatus]
    def __init__(self, source: _Optional[str] = ..., transaction_id: _Optional[bytes] = ..., state: _Optional[_Union[Transaction.State, str]] = ..., prepare_time: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., decide_time: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., decided_by: _Optional[str] = ..., database_transaction: _Optional[_Union[DatabaseTransaction, _Mapping]] = ..., evidence: _Optional[str] = ..., events: _Optional[_Iterable[_Union[EventStatus, _Mapping]]] = ...) -> None: ...

class EventStatus(_message.Message):
    __slots__ = ("event_id", "topic", "aggregate_type", "aggregate_id", "shard", "place", "explanation")
    class Place(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        PLACE_UNSPECIFIED: _ClassVar[EventStatus.Place]
        PLACE_IN_DOUBT: _ClassVar[EventStatus.Place]
        PLACE_QUEUED: _ClassVar[EventStatus.Place]
        PLACE_WAITING: _ClassVar[EventStatus.Place]
        PLACE_BLOCKED: _ClassVar[EventStatus.Place]
        PLACE_PUBLISHED: _ClassVar[EventStatus.Place]
        PLACE_DEAD_LETTER: _ClassVar[EventStatus.Place]
        PLACE_DROPPED: _ClassVar[EventStatus.Place]
    PLACE_UNSPECIFIED: EventStatus.Place
    PLACE_IN_DOUBT: EventStatus.Place
    PLACE_QUEUED: EventStatus.Place
    PLACE_WAITING: EventStatus.Place
    PLACE_BLOCKED: EventStatus.Place
    PLACE_PUBLISHED: EventStatus.Place
    PLACE_DEAD_LETTER: EventStatus.Place
    PLACE_DROPPED: EventStatus.Place
    EVENT_ID_FIELD_NUMBER: _ClassVar[int]
    TOPIC_FIELD_NUMBER: _ClassVar[int]
    AGGREGATE_TYPE_FIELD_NUMBER: _ClassVar[int]
    AGGREGATE_ID_FIELD_NUMBER: _ClassVar[int]
    SHARD_FIELD_NUMBER: _ClassVar[int]
    PLACE_FIELD_NUMBER: _ClassVar[int]
    EXPLANATION_FIELD_NUMBER: _ClassVar[int]
    event_id: bytes
    topic: str
    aggregate_type: str
    aggregate_id: str
    shard: int
    place: EventStatus.Place
    explanation: str
    def __init__(self, event_id: _Optional[bytes] = ..., topic: _Optional[str] = ..., aggregate_type: _Optional[str] = ..., aggregate_id: _Optional[str] = ..., shard: _Optional[int] = ..., place: _Optional[_Union[EventStatus.Place, str]] = ..., explanation: _Optional[str] = ...) -> None: ...
