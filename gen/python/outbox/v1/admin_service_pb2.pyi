import datetime

from buf.validate import validate_pb2 as _validate_pb2
from google.protobuf import timestamp_pb2 as _timestamp_pb2
from outbox.v1 import event_pb2 as _event_pb2
from outbox.v1 import outbox_service_pb2 as _outbox_service_pb2
from outbox.v1 import transaction_pb2 as _transaction_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class RecordProfile(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    RECORD_PROFILE_UNSPECIFIED: _ClassVar[RecordProfile]
    RECORD_PROFILE_CLOUDEVENTS: _ClassVar[RecordProfile]
    RECORD_PROFILE_DEBEZIUM: _ClassVar[RecordProfile]
    RECORD_PROFILE_HULEEDU: _ClassVar[RecordProfile]
    RECORD_PROFILE_PLAIN: _ClassVar[RecordProfile]

class FailurePolicy(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    FAILURE_POLICY_UNSPECIFIED: _ClassVar[FailurePolicy]
    FAILURE_POLICY_BLOCK: _ClassVar[FailurePolicy]
    FAILURE_POLICY_PARK: _ClassVar[FailurePolicy]
    FAILURE_POLICY_SKIP: _ClassVar[FailurePolicy]

class AggregateAction(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    AGGREGATE_ACTION_UNSPECIFIED: _ClassVar[AggregateAction]
    AGGREGATE_ACTION_REDRIVE: _ClassVar[AggregateAction]
    AGGREGATE_ACTION_SKIP: _ClassVar[AggregateAction]
    AGGREGATE_ACTION_DISCARD: _ClassVar[AggregateAction]
RECORD_PROFILE_UNSPECIFIED: RecordProfile
RECORD_PROFILE_CLOUDEVENTS: RecordProfile
RECORD_PROFILE_DEBEZIUM: RecordProfile
RECORD_PROFILE_HULEEDU: RecordProfile
RECORD_PROFILE_PLAIN: RecordProfile
FAILURE_POLICY_UNSPECIFIED: FailurePolicy
FAILURE_POLICY_BLOCK: FailurePolicy
FAILURE_POLICY_PARK: FailurePolicy
FAILURE_POLICY_SKIP: FailurePolicy
AGGREGATE_ACTION_UNSPECIFIED: AggregateAction
AGGREGATE_ACTION_REDRIVE: AggregateAction
AGGREGATE_ACTION_SKIP: AggregateAction
AGGREGATE_ACTION_DISCARD: AggregateAction

class Source(_message.Message):
    __slots__ = ("name", "topics", "record_profile", "failure_policy", "cloudevents_source", "databases", "revision", "create_time", "update_time")
    NAME_FIELD_NUMBER: _ClassVar[int]
    TOPICS_FIELD_NUMBER: _ClassVar[int]
    RECORD_PROFILE_FIELD_NUMBER: _ClassVar[int]
    FAILURE_POLICY_FIELD_NUMBER: _ClassVar[int]
    CLOUDEVENTS_SOURCE_FIELD_NUMBER: _ClassVar[int]
    DATABASES_FIELD_NUMBER: _ClassVar[int]
    REVISION_FIELD_NUMBER: _ClassVar[int]
    CREATE_TIME_FIELD_NUMBER: _ClassVar[int]
    UPDATE_TIME_FIELD_NUMBER: _ClassVar[int]
    name: str
    topics: _containers.RepeatedScalarFieldContainer[str]
    record_profile: RecordProfile
    failure_policy: FailurePolicy
    cloudevents_source: str
    databases: _containers.RepeatedCompositeFieldContainer[SourceDatabase]
    revision: int
    create_time: _timestamp_pb2.Timestamp
    update_time: _timestamp_pb2.Timestamp
    def __init__(self, name: _Optional[str] = ..., topics: _Optional[_Iterable[str]] = ..., record_profile: _Optional[_Union[RecordProfile, str]] = ..., failure_policy: _Optional[_Union[FailurePolicy, str]] = ..., cloudevents_source: _Optional[str] = ..., databases: _Optional[_Iterable[_Union[SourceDatabase, _Mapping]]] = ..., revision: _Optional[int] = ..., create_time: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., update_time: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ...) -> None: ...

class SourceDatabase(_message.Message):
    __slots__ = ("name", "mode", "dsn_ref")
    NAME_FIELD_NUMBER: _ClassVar[int]
    MODE_FIELD_NUMBER: _ClassVar[int]
    DSN_REF_FIELD_NUMBER: _ClassVar[int]
    name: str
    mode: _transaction_pb2.DatabaseMode
    dsn_ref: str
    def __init__(self, name: _Optional[str] = ..., mode: _Optional[_Union[_transaction_pb2.DatabaseMode, str]] = ..., dsn_ref: _Optional[str] = ...) -> None: ...

class ListSourcesRequest(_message.Message):
    __slots__ = ("page_size", "page_token")
    PAGE_SIZE_FIELD_NUMBER: _ClassVar[int]
    PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    page_size: int
    page_token: str
    def __init__(self, page_size: _Optional[int] = ..., page_token: _Optional[str] = ...) -> None: ...

class ListSourcesResponse(_message.Message):
    __slots__ = ("sources", "next_page_token")
    SOURCES_FIELD_NUMBER: _ClassVar[int]
    NEXT_PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    sources: _containers.RepeatedCompositeFieldContainer[Source]
    next_page_token: str
    def __init__(self, sources: _Optional[_Iterable[_Union[Source, _Mapping]]] = ..., next_page_token: _Optional[str] = ...) -> None: ...

class GetSourceRequest(_message.Message):
    __slots__ = ("name",)
    NAME_FIELD_NUMBER: _ClassVar[int]
    name: str
    def __init__(self, name: _Optional[str] = ...) -> None: ...

class GetSourceResponse(_message.Message):
    __slots__ = ("source",)
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    source: Source
    def __init__(self, source: _Optional[_Union[Source, _Mapping]] = ...) -> None: ...

class ApplySourceRequest(_message.Message):
    __slots__ = ("source", "validate_only", "reason")
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    VALIDATE_ONLY_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    source: Source
    validate_only: bool
    reason: str
    def __init__(self, source: _Optional[_Union[Source, _Mapping]] = ..., validate_only: _Optional[bool] = ..., reason: _Optional[str] = ...) -> None: ...

class ApplySourceResponse(_message.Message):
    __slots__ = ("source", "previous")
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    PREVIOUS_FIELD_NUMBER: _ClassVar[int]
    source: Source
    previous: Source
    def __init__(self, source: _Optional[_Union[Source, _Mapping]] = ..., previous: _Optional[_Union[Source, _Mapping]] = ...) -> None: ...

class DeleteSourceRequest(_message.Message):
    __slots__ = ("name", "reason")
    NAME_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    name: str
    reason: str
    def __init__(self, name: _Optional[str] = ..., reason: _Optional[str] = ...) -> None: ...

class DeleteSourceResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ListShardsRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ListShardsResponse(_message.Message):
    __slots__ = ("shards",)
    SHARDS_FIELD_NUMBER: _ClassVar[int]
    shards: _containers.RepeatedCompositeFieldContainer[Shard]
    def __init__(self, shards: _Optional[_Iterable[_Union[Shard, _Mapping]]] = ...) -> None: ...

class Shard(_message.Message):
    __slots__ = ("shard", "holder", "epoch", "lease_until", "checkpoint", "oldest_age_seconds", "lag_segments", "parked")
    SHARD_FIELD_NUMBER: _ClassVar[int]
    HOLDER_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    LEASE_UNTIL_FIELD_NUMBER: _ClassVar[int]
    CHECKPOINT_FIELD_NUMBER: _ClassVar[int]
    OLDEST_AGE_SECONDS_FIELD_NUMBER: _ClassVar[int]
    LAG_SEGMENTS_FIELD_NUMBER: _ClassVar[int]
    PARKED_FIELD_NUMBER: _ClassVar[int]
    shard: int
    holder: str
    epoch: int
    lease_until: _timestamp_pb2.Timestamp
    checkpoint: str
    oldest_age_seconds: float
    lag_segments: int
    parked: int
    def __init__(self, shard: _Optional[int] = ..., holder: _Optional[str] = ..., epoch: _Optional[int] = ..., lease_until: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., checkpoint: _Optional[str] = ..., oldest_age_seconds: _Optional[float] = ..., lag_segments: _Optional[int] = ..., parked: _Optional[int] = ...) -> None: ...

class ListBlockedAggregatesRequest(_message.Message):
    __slots__ = ("source", "page_size", "page_token")
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    PAGE_SIZE_FIELD_NUMBER: _ClassVar[int]
    PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    source: str
    page_size: int
    page_token: str
    def __init__(self, source: _Optional[str] = ..., page_size: _Optional[int] = ..., page_token: _Optional[str] = ...) -> None: ...

class ListBlockedAggregatesResponse(_message.Message):
    __slots__ = ("aggregates", "next_page_token")
    AGGREGATES_FIELD_NUMBER: _ClassVar[int]
    NEXT_PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    aggregates: _containers.RepeatedCompositeFieldContainer[BlockedAggregate]
    next_page_token: str
    def __init__(self, aggregates: _Optional[_Iterable[_Union[BlockedAggregate, _Mapping]]] = ..., next_page_token: _Optional[str] = ...) -> None: ...

class BlockedAggregate(_message.Message):
    __slots__ = ("source", "aggregate_type", "aggregate_id", "shard", "cause", "explanation", "since", "waiting", "topic", "attempts", "transaction_id")
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    AGGREGATE_TYPE_FIELD_NUMBER: _ClassVar[int]
    AGGREGATE_ID_FIELD_NUMBER: _ClassVar[int]
    SHARD_FIELD_NUMBER: _ClassVar[int]
    CAUSE_FIELD_NUMBER: _ClassVar[int]
    EXPLANATION_FIELD_NUMBER: _ClassVar[int]
    SINCE_FIELD_NUMBER: _ClassVar[int]
    WAITING_FIELD_NUMBER: _ClassVar[int]
    TOPIC_FIELD_NUMBER: _ClassVar[int]
    ATTEMPTS_FIELD_NUMBER: _ClassVar[int]
    TRANSACTION_ID_FIELD_NUMBER: _ClassVar[int]
    source: str
    aggregate_type: str
    aggregate_id: str
    shard: int
    cause: str
    explanation: str
    since: _timestamp_pb2.Timestamp
    waiting: int
    topic: str
    attempts: int
    transaction_id: bytes
    def __init__(self, source: _Optional[str] = ..., aggregate_type: _Optional[str] = ..., aggregate_id: _Optional[str] = ..., shard: _Optional[int] = ..., cause: _Optional[str] = ..., explanation: _Optional[str] = ..., since: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., waiting: _Optional[int] = ..., topic: _Optional[str] = ..., attempts: _Optional[int] = ..., transaction_id: _Optional[bytes] = ...) -> None: ...

class ListDeadLettersRequest(_message.Message):
    __slots__ = ("source", "page_size", "page_token")
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    PAGE_SIZE_FIELD_NUMBER: _ClassVar[int]
    PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    source: str
    page_size: int
    page_token: str
    def __init__(self, source: _Optional[str] = ..., page_size: _Optional[int] = ..., page_token: _Optional[str] = ...) -> None: ...

class ListDeadLettersResponse(_message.Message):
    __slots__ = ("dead_letters", "next_page_token")
    DEAD_LETTERS_FIELD_NUMBER: _ClassVar[int]
    NEXT_PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    dead_letters: _containers.RepeatedCompositeFieldContainer[DeadLetter]
    next_page_token: str
    def __init__(self, dead_letters: _Optional[_Iterable[_Union[DeadLetter, _Mapping]]] = ..., next_page_token: _Optional[str] = ...) -> None: ...

class DeadLetter(_message.Message):
    __slots__ = ("source", "transaction_id", "event_id", "topic", "aggregate_type", "aggregate_id", "event_type", "shard", "error", "attempts", "since", "payload_bytes")
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    TRANSACTION_ID_FIELD_NUMBER: _ClassVar[int]
    EVENT_ID_FIELD_NUMBER: _ClassVar[int]
    TOPIC_FIELD_NUMBER: _ClassVar[int]
    AGGREGATE_TYPE_FIELD_NUMBER: _ClassVar[int]
    AGGREGATE_ID_FIELD_NUMBER: _ClassVar[int]
    EVENT_TYPE_FIELD_NUMBER: _ClassVar[int]
    SHARD_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    ATTEMPTS_FIELD_NUMBER: _ClassVar[int]
    SINCE_FIELD_NUMBER: _ClassVar[int]
    PAYLOAD_BYTES_FIELD_NUMBER: _ClassVar[int]
    source: str
    transaction_id: bytes
    event_id: bytes
    topic: str
    aggregate_type: str
    aggregate_id: str
    event_type: str
    shard: int
    error: str
    attempts: int
    since: _timestamp_pb2.Timestamp
    payload_bytes: int
    def __init__(self, source: _Optional[str] = ..., transaction_id: _Optional[bytes] = ..., event_id: _Optional[bytes] = ..., topic: _Optional[str] = ..., aggregate_type: _Optional[str] = ..., aggregate_id: _Optional[str] = ..., event_type: _Optional[str] = ..., shard: _Optional[int] = ..., error: _Optional[str] = ..., attempts: _Optional[int] = ..., since: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., payload_bytes: _Optional[int] = ...) -> None: ...

class AddDeadLetterRequest(_message.Message):
    __slots__ = ("source", "transaction_id", "event_id", "topic", "aggregate_type", "aggregate_id", "event_type", "key", "payload", "content_type", "headers", "error", "attempts")
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    TRANSACTION_ID_FIELD_NUMBER: _ClassVar[int]
    EVENT_ID_FIELD_NUMBER: _ClassVar[int]
    TOPIC_FIELD_NUMBER: _ClassVar[int]
    AGGREGATE_TYPE_FIELD_NUMBER: _ClassVar[int]
    AGGREGATE_ID_FIELD_NUMBER: _ClassVar[int]
    EVENT_TYPE_FIELD_NUMBER: _ClassVar[int]
    KEY_FIELD_NUMBER: _ClassVar[int]
    PAYLOAD_FIELD_NUMBER: _ClassVar[int]
    CONTENT_TYPE_FIELD_NUMBER: _ClassVar[int]
    HEADERS_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    ATTEMPTS_FIELD_NUMBER: _ClassVar[int]
    source: str
    transaction_id: bytes
    event_id: bytes
    topic: str
    aggregate_type: str
    aggregate_id: str
    event_type: str
    key: bytes
    payload: bytes
    content_type: str
    headers: _containers.RepeatedCompositeFieldContainer[_event_pb2.Header]
    error: str
    attempts: int
    def __init__(self, source: _Optional[str] = ..., transaction_id: _Optional[bytes] = ..., event_id: _Optional[bytes] = ..., topic: _Optional[str] = ..., aggregate_type: _Optional[str] = ..., aggregate_id: _Optional[str] = ..., event_type: _Optional[str] = ..., key: _Optional[bytes] = ..., payload: _Optional[bytes] = ..., content_type: _Optional[str] = ..., headers: _Optional[_Iterable[_Union[_event_pb2.Header, _Mapping]]] = ..., error: _Optional[str] = ..., attempts: _Optional[int] = ...) -> None: ...

class AddDeadLetterResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class OperateAggregateRequest(_message.Message):
    __slots__ = ("source", "aggregate_type", "aggregate_id", "action", "reason")
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    AGGREGATE_TYPE_FIELD_NUMBER: _ClassVar[int]
    AGGREGATE_ID_FIELD_NUMBER: _ClassVar[int]
    ACTION_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    source: str
    aggregate_type: str
    aggregate_id: str
    action: AggregateAction
    reason: str
    def __init__(self, source: _Optional[str] = ..., aggregate_type: _Optional[str] = ..., aggregate_id: _Optional[str] = ..., action: _Optional[_Union[AggregateAction, str]] = ..., reason: _Optional[str] = ...) -> None: ...

class OperateAggregateResponse(_message.Message):
    __slots__ = ("operation_id", "done", "outcome", "events")
    OPERATION_ID_FIELD_NUMBER: _ClassVar[int]
    DONE_FIELD_NUMBER: _ClassVar[int]
    OUTCOME_FIELD_NUMBER: _ClassVar[int]
    EVENTS_FIELD_NUMBER: _ClassVar[int]
    operation_id: int
    done: bool
    outcome: str
    events: int
    def __init__(self, operation_id: _Optional[int] = ..., done: _Optional[bool] = ..., outcome: _Optional[str] = ..., events: _Optional[int] = ...) -> None: ...

class ListInDoubtTransactionsRequest(_message.Message):
    __slots__ = ("source", "page_size", "page_token")
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    PAGE_SIZE_FIELD_NUMBER: _ClassVar[int]
    PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    source: str
    page_size: int
    page_token: str
    def __init__(self, source: _Optional[str] = ..., page_size: _Optional[int] = ..., page_token: _Optional[str] = ...) -> None: ...

class ListInDoubtTransactionsResponse(_message.Message):
    __slots__ = ("transactions", "next_page_token")
    TRANSACTIONS_FIELD_NUMBER: _ClassVar[int]
    NEXT_PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    transactions: _containers.RepeatedCompositeFieldContainer[InDoubtTransaction]
    next_page_token: str
    def __init__(self, transactions: _Optional[_Iterable[_Union[InDoubtTransaction, _Mapping]]] = ..., next_page_token: _Optional[str] = ...) -> None: ...

class InDoubtTransaction(_message.Message):
    __slots__ = ("source", "transaction_id", "database_transaction", "aggregate_type", "aggregate_id", "since", "checks", "last_answer", "next_check_time", "events", "waiting")
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    TRANSACTION_ID_FIELD_NUMBER: _ClassVar[int]
    DATABASE_TRANSACTION_FIELD_NUMBER: _ClassVar[int]
    AGGREGATE_TYPE_FIELD_NUMBER: _ClassVar[int]
    AGGREGATE_ID_FIELD_NUMBER: _ClassVar[int]
    SINCE_FIELD_NUMBER: _ClassVar[int]
    CHECKS_FIELD_NUMBER: _ClassVar[int]
    LAST_ANSWER_FIELD_NUMBER: _ClassVar[int]
    NEXT_CHECK_TIME_FIELD_NUMBER: _ClassVar[int]
    EVENTS_FIELD_NUMBER: _ClassVar[int]
    WAITING_FIELD_NUMBER: _ClassVar[int]
    source: str
    transaction_id: bytes
    database_transaction: _transaction_pb2.DatabaseTransaction
    aggregate_type: str
    aggregate_id: str
    since: _timestamp_pb2.Timestamp
    checks: int
    last_answer: str
    next_check_time: _timestamp_pb2.Timestamp
    events: int
    waiting: int
    def __init__(self, source: _Optional[str] = ..., transaction_id: _Optional[bytes] = ..., database_transaction: _Optional[_Union[_transaction_pb2.DatabaseTransaction, _Mapping]] = ..., aggregate_type: _Optional[str] = ..., aggregate_id: _Optional[str] = ..., since: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., checks: _Optional[int] = ..., last_answer: _Optional[str] = ..., next_check_time: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., events: _Optional[int] = ..., waiting: _Optional[int] = ...) -> None: ...

class DecideTransactionRequest(_message.Message):
    __slots__ = ("source", "transaction_id", "decision", "reason")
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    TRANSACTION_ID_FIELD_NUMBER: _ClassVar[int]
    DECISION_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    source: str
    transaction_id: bytes
    decision: _transaction_pb2.Transaction.State
    reason: str
    def __init__(self, source: _Optional[str] = ..., transaction_id: _Optional[bytes] = ..., decision: _Optional[_Union[_transaction_pb2.Transaction.State, str]] = ..., reason: _Optional[str] = ...) -> None: ...

class DecideTransactionResponse(_message.Message):
    __slots__ = ("state",)
    STATE_FIELD_NUMBER: _ClassVar[int]
    state: _transaction_pb2.Transaction.State
    def __init__(self, state: _Optional[_Union[_transaction_pb2.Transaction.State, str]] = ...) -> None: ...

class CheckTransactionRequest(_message.Message):
    __slots__ = ("source", "transaction_id")
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    TRANSACTION_ID_FIELD_NUMBER: _ClassVar[int]
    source: str
    transaction_id: bytes
    def __init__(self, source: _Optional[str] = ..., transaction_id: _Optional[bytes] = ...) -> None: ...

class CheckTransactionResponse(_message.Message):
    __slots__ = ("outcome", "reason", "evidence", "method", "state")
    OUTCOME_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    EVIDENCE_FIELD_NUMBER: _ClassVar[int]
    METHOD_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    outcome: _outbox_service_pb2.SessionRequest.CheckAnswer.Outcome
    reason: str
    evidence: str
    method: str
    state: _transaction_pb2.Transaction.State
    def __init__(self, outcome: _Optional[_Union[_outbox_service_pb2.SessionRequest.CheckAnswer.Outcome, str]] = ..., reason: _Optional[str] = ..., evidence: _Optional[str] = ..., method: _Optional[str] = ..., state: _Optional[_Union[_transaction_pb2.Transaction.State, str]] = ...) -> None: ...

class ConfirmFailoverRequest(_message.Message):
    __slots__ = ("source", "database", "timeline", "reason", "validate_only")
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    DATABASE_FIELD_NUMBER: _ClassVar[int]
    TIMELINE_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    VALIDATE_ONLY_FIELD_NUMBER: _ClassVar[int]
    source: str
    database: str
    timeline: int
    reason: str
    validate_only: bool
    def __init__(self, source: _Optional[str] = ..., database: _Optional[str] = ..., timeline: _Optional[int] = ..., reason: _Optional[str] = ..., validate_only: _Optional[bool] = ...) -> None: ...

class ConfirmFailoverResponse(_message.Message):
    __slots__ = ("committed", "aborted", "undecided")
    COMMITTED_FIELD_NUMBER: _ClassVar[int]
    ABORTED_FIELD_NUMBER: _ClassVar[int]
    UNDECIDED_FIELD_NUMBER: _ClassVar[int]
    committed: int
    aborted: int
    undecided: int
    def __init__(self, committed: _Optional[int] = ..., aborted: _Optional[int] = ..., undecided: _Optional[int] = ...) -> None: ...
