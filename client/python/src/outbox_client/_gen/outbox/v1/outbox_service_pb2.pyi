from google.rpc import status_pb2 as _status_pb2
from outbox_client._gen.outbox.v1 import event_pb2 as _event_pb2
from outbox_client._gen.outbox.v1 import transaction_pb2 as _transaction_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class PrepareRequest(_message.Message):
    __slots__ = ("source", "transaction_id", "database_transaction", "events")
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    TRANSACTION_ID_FIELD_NUMBER: _ClassVar[int]
    DATABASE_TRANSACTION_FIELD_NUMBER: _ClassVar[int]
    EVENTS_FIELD_NUMBER: _ClassVar[int]
    source: str
    transaction_id: bytes
    database_transaction: _transaction_pb2.DatabaseTransaction
    events: _containers.RepeatedCompositeFieldContainer[_event_pb2.Event]
    def __init__(self, source: _Optional[str] = ..., transaction_id: _Optional[bytes] = ..., database_transaction: _Optional[_Union[_transaction_pb2.DatabaseTransaction, _Mapping]] = ..., events: _Optional[_Iterable[_Union[_event_pb2.Event, _Mapping]]] = ...) -> None: ...

class PrepareResponse(_message.Message):
    __slots__ = ("token",)
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    token: bytes
    def __init__(self, token: _Optional[bytes] = ...) -> None: ...

class CommitRequest(_message.Message):
    __slots__ = ("source", "transaction_id", "token")
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    TRANSACTION_ID_FIELD_NUMBER: _ClassVar[int]
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    source: str
    transaction_id: bytes
    token: bytes
    def __init__(self, source: _Optional[str] = ..., transaction_id: _Optional[bytes] = ..., token: _Optional[bytes] = ...) -> None: ...

class CommitResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class AbortRequest(_message.Message):
    __slots__ = ("source", "transaction_id", "token")
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    TRANSACTION_ID_FIELD_NUMBER: _ClassVar[int]
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    source: str
    transaction_id: bytes
    token: bytes
    def __init__(self, source: _Optional[str] = ..., transaction_id: _Optional[bytes] = ..., token: _Optional[bytes] = ...) -> None: ...

class AbortResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class PublishRequest(_message.Message):
    __slots__ = ("source", "transaction_id", "events", "kept_by_caller")
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    TRANSACTION_ID_FIELD_NUMBER: _ClassVar[int]
    EVENTS_FIELD_NUMBER: _ClassVar[int]
    KEPT_BY_CALLER_FIELD_NUMBER: _ClassVar[int]
    source: str
    transaction_id: bytes
    events: _containers.RepeatedCompositeFieldContainer[_event_pb2.Event]
    kept_by_caller: bool
    def __init__(self, source: _Optional[str] = ..., transaction_id: _Optional[bytes] = ..., events: _Optional[_Iterable[_Union[_event_pb2.Event, _Mapping]]] = ..., kept_by_caller: _Optional[bool] = ...) -> None: ...

class PublishResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetTransactionRequest(_message.Message):
    __slots__ = ("source", "transaction_id")
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    TRANSACTION_ID_FIELD_NUMBER: _ClassVar[int]
    source: str
    transaction_id: bytes
    def __init__(self, source: _Optional[str] = ..., transaction_id: _Optional[bytes] = ...) -> None: ...

class GetTransactionResponse(_message.Message):
    __slots__ = ("transaction",)
    TRANSACTION_FIELD_NUMBER: _ClassVar[int]
    transaction: _transaction_pb2.Transaction
    def __init__(self, transaction: _Optional[_Union[_transaction_pb2.Transaction, _Mapping]] = ...) -> None: ...

class SessionRequest(_message.Message):
    __slots__ = ("hello", "calls", "check_answers")
    class Hello(_message.Message):
        __slots__ = ("source", "databases", "sdk", "instance")
        SOURCE_FIELD_NUMBER: _ClassVar[int]
        DATABASES_FIELD_NUMBER: _ClassVar[int]
        SDK_FIELD_NUMBER: _ClassVar[int]
        INSTANCE_FIELD_NUMBER: _ClassVar[int]
        source: str
        databases: _containers.RepeatedScalarFieldContainer[str]
        sdk: str
        instance: str
        def __init__(self, source: _Optional[str] = ..., databases: _Optional[_Iterable[str]] = ..., sdk: _Optional[str] = ..., instance: _Optional[str] = ...) -> None: ...
    class Calls(_message.Message):
        __slots__ = ("calls",)
        CALLS_FIELD_NUMBER: _ClassVar[int]
        calls: _containers.RepeatedCompositeFieldContainer[SessionRequest.Call]
        def __init__(self, calls: _Optional[_Iterable[_Union[SessionRequest.Call, _Mapping]]] = ...) -> None: ...
    class Call(_message.Message):
        __slots__ = ("call_id", "prepare", "commit", "abort", "publish")
        CALL_ID_FIELD_NUMBER: _ClassVar[int]
        PREPARE_FIELD_NUMBER: _ClassVar[int]
        COMMIT_FIELD_NUMBER: _ClassVar[int]
        ABORT_FIELD_NUMBER: _ClassVar[int]
        PUBLISH_FIELD_NUMBER: _ClassVar[int]
        call_id: int
        prepare: PrepareRequest
        commit: CommitRequest
        abort: AbortRequest
        publish: PublishRequest
        def __init__(self, call_id: _Optional[int] = ..., prepare: _Optional[_Union[PrepareRequest, _Mapping]] = ..., commit: _Optional[_Union[CommitRequest, _Mapping]] = ..., abort: _Optional[_Union[AbortRequest, _Mapping]] = ..., publish: _Optional[_Union[PublishRequest, _Mapping]] = ...) -> None: ...
    class CheckAnswers(_message.Message):
        __slots__ = ("question_id", "answers")
        QUESTION_ID_FIELD_NUMBER: _ClassVar[int]
        ANSWERS_FIELD_NUMBER: _ClassVar[int]
        question_id: int
        answers: _containers.RepeatedCompositeFieldContainer[SessionRequest.CheckAnswer]
        def __init__(self, question_id: _Optional[int] = ..., answers: _Optional[_Iterable[_Union[SessionRequest.CheckAnswer, _Mapping]]] = ...) -> None: ...
    class CheckAnswer(_message.Message):
        __slots__ = ("transaction_id", "outcome", "reason", "evidence", "naive_wrong", "failed_over_to")
        class Outcome(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
            __slots__ = ()
            OUTCOME_UNSPECIFIED: _ClassVar[SessionRequest.CheckAnswer.Outcome]
            OUTCOME_COMMITTED: _ClassVar[SessionRequest.CheckAnswer.Outcome]
            OUTCOME_ABORTED: _ClassVar[SessionRequest.CheckAnswer.Outcome]
            OUTCOME_IN_PROGRESS: _ClassVar[SessionRequest.CheckAnswer.Outcome]
            OUTCOME_UNKNOWN: _ClassVar[SessionRequest.CheckAnswer.Outcome]
        OUTCOME_UNSPECIFIED: SessionRequest.CheckAnswer.Outcome
        OUTCOME_COMMITTED: SessionRequest.CheckAnswer.Outcome
        OUTCOME_ABORTED: SessionRequest.CheckAnswer.Outcome
        OUTCOME_IN_PROGRESS: SessionRequest.CheckAnswer.Outcome
        OUTCOME_UNKNOWN: SessionRequest.CheckAnswer.Outcome
        TRANSACTION_ID_FIELD_NUMBER: _ClassVar[int]
        OUTCOME_FIELD_NUMBER: _ClassVar[int]
        REASON_FIELD_NUMBER: _ClassVar[int]
        EVIDENCE_FIELD_NUMBER: _ClassVar[int]
        NAIVE_WRONG_FIELD_NUMBER: _ClassVar[int]
        FAILED_OVER_TO_FIELD_NUMBER: _ClassVar[int]
        transaction_id: bytes
        outcome: SessionRequest.CheckAnswer.Outcome
        reason: str
        evidence: str
        naive_wrong: bool
        failed_over_to: int
        def __init__(self, transaction_id: _Optional[bytes] = ..., outcome: _Optional[_Union[SessionRequest.CheckAnswer.Outcome, str]] = ..., reason: _Optional[str] = ..., evidence: _Optional[str] = ..., naive_wrong: _Optional[bool] = ..., failed_over_to: _Optional[int] = ...) -> None: ...
    HELLO_FIELD_NUMBER: _ClassVar[int]
    CALLS_FIELD_NUMBER: _ClassVar[int]
    CHECK_ANSWERS_FIELD_NUMBER: _ClassVar[int]
    hello: SessionRequest.Hello
    calls: SessionRequest.Calls
    check_answers: SessionRequest.CheckAnswers
    def __init__(self, hello: _Optional[_Union[SessionRequest.Hello, _Mapping]] = ..., calls: _Optional[_Union[SessionRequest.Calls, _Mapping]] = ..., check_answers: _Optional[_Union[SessionRequest.CheckAnswers, _Mapping]] = ...) -> None: ...

class SessionResponse(_message.Message):
    __slots__ = ("welcome", "results", "check_question", "drain_notice")
    class Welcome(_message.Message):
        __slots__ = ("limits", "server")
        LIMITS_FIELD_NUMBER: _ClassVar[int]
        SERVER_FIELD_NUMBER: _ClassVar[int]
        limits: Limits
        server: str
        def __init__(self, limits: _Optional[_Union[Limits, _Mapping]] = ..., server: _Optional[str] = ...) -> None: ...
    class Results(_message.Message):
        __slots__ = ("results",)
        RESULTS_FIELD_NUMBER: _ClassVar[int]
        results: _containers.RepeatedCompositeFieldContainer[SessionResponse.Result]
        def __init__(self, results: _Optional[_Iterable[_Union[SessionResponse.Result, _Mapping]]] = ...) -> None: ...
    class Result(_message.Message):
        __slots__ = ("call_id", "status", "token")
        CALL_ID_FIELD_NUMBER: _ClassVar[int]
        STATUS_FIELD_NUMBER: _ClassVar[int]
        TOKEN_FIELD_NUMBER: _ClassVar[int]
        call_id: int
        status: _status_pb2.Status
        token: bytes
        def __init__(self, call_id: _Optional[int] = ..., status: _Optional[_Union[_status_pb2.Status, _Mapping]] = ..., token: _Optional[bytes] = ...) -> None: ...
    class CheckQuestion(_message.Message):
        __slots__ = ("question_id", "database", "transactions")
        QUESTION_ID_FIELD_NUMBER: _ClassVar[int]
        DATABASE_FIELD_NUMBER: _ClassVar[int]
        TRANSACTIONS_FIELD_NUMBER: _ClassVar[int]
        question_id: int
        database: str
        transactions: _containers.RepeatedCompositeFieldContainer[SessionResponse.CheckTransaction]
        def __init__(self, question_id: _Optional[int] = ..., database: _Optional[str] = ..., transactions: _Optional[_Iterable[_Union[SessionResponse.CheckTransaction, _Mapping]]] = ...) -> None: ...
    class CheckTransaction(_message.Message):
        __slots__ = ("transaction_id", "database_transaction")
        TRANSACTION_ID_FIELD_NUMBER: _ClassVar[int]
        DATABASE_TRANSACTION_FIELD_NUMBER: _ClassVar[int]
        transaction_id: bytes
        database_transaction: _transaction_pb2.DatabaseTransaction
        def __init__(self, transaction_id: _Optional[bytes] = ..., database_transaction: _Optional[_Union[_transaction_pb2.DatabaseTransaction, _Mapping]] = ...) -> None: ...
    class DrainNotice(_message.Message):
        __slots__ = ("grace_ms",)
        GRACE_MS_FIELD_NUMBER: _ClassVar[int]
        grace_ms: int
        def __init__(self, grace_ms: _Optional[int] = ...) -> None: ...
    WELCOME_FIELD_NUMBER: _ClassVar[int]
    RESULTS_FIELD_NUMBER: _ClassVar[int]
    CHECK_QUESTION_FIELD_NUMBER: _ClassVar[int]
    DRAIN_NOTICE_FIELD_NUMBER: _ClassVar[int]
    welcome: SessionResponse.Welcome
    results: SessionResponse.Results
    check_question: SessionResponse.CheckQuestion
    drain_notice: SessionResponse.DrainNotice
    def __init__(self, welcome: _Optional[_Union[SessionResponse.Welcome, _Mapping]] = ..., results: _Optional[_Union[SessionResponse.Results, _Mapping]] = ..., check_question: _Optional[_Union[SessionResponse.CheckQuestion, _Mapping]] = ..., drain_notice: _Optional[_Union[SessionResponse.DrainNotice, _Mapping]] = ...) -> None: ...

class Limits(_message.Message):
    __slots__ = ("max_events_per_transaction", "max_transaction_bytes", "max_event_bytes", "max_headers", "max_header_bytes", "max_open_calls")
    MAX_EVENTS_PER_TRANSACTION_FIELD_NUMBER: _ClassVar[int]
    MAX_TRANSACTION_BYTES_FIELD_NUMBER: _ClassVar[int]
    MAX_EVENT_BYTES_FIELD_NUMBER: _ClassVar[int]
    MAX_HEADERS_FIELD_NUMBER: _ClassVar[int]
    MAX_HEADER_BYTES_FIELD_NUMBER: _ClassVar[int]
    MAX_OPEN_CALLS_FIELD_NUMBER: _ClassVar[int]
    max_events_per_transaction: int
    max_transaction_bytes: int
    max_event_bytes: int
    max_headers: int
    max_header_bytes: int
    max_open_calls: int
    def __init__(self, max_events_per_transaction: _Optional[int] = ..., max_transaction_bytes: _Optional[int] = ..., max_event_bytes: _Optional[int] = ..., max_headers: _Optional[int] = ..., max_header_bytes: _Optional[int] = ..., max_open_calls: _Optional[int] = ...) -> None: ...
