"""The values and rules of the core: no services at all."""

from __future__ import annotations

import datetime
import os
import random
import uuid
from pathlib import Path

import grpc
import pytest
from events import order
from google.protobuf.any_pb2 import Any as ProtoAny
from google.rpc import error_details_pb2, status_pb2

import outbox_client
from outbox_client import (
    MARKER_DDL,
    TLS,
    AlreadyDecidedError,
    CallError,
    Config,
    ConfigError,
    DeniedError,
    Event,
    ExhaustedError,
    IdReusedError,
    InvalidError,
    OutboxClient,
    Reason,
    UnavailableError,
    UnknownTransactionError,
    Upkeep,
    id_time,
    new_id,
)
from outbox_client._core import status
from outbox_client._core.backoff import Backoff
from outbox_client._core.check import clip
from outbox_client._core.limits import Limits, check, topic_problem
from outbox_client._core.wire import Kind, encode_call, encode_calls
from outbox_client._gen.outbox.v1 import outbox_service_pb2 as pb
from outbox_client._gen.outbox.v1 import transaction_pb2
from outbox_client._source.cleanup import parse_time
from outbox_client._source.outcome import certainly_rolled_back, sqlstate
from outbox_client.event import event_from_proto, event_to_proto
from outbox_client.ids import first_id
from outbox_client.marker import marker_statements
from outbox_client.transaction import DatabaseTransaction, Mode, State, Transaction

pytestmark = pytest.mark.unit


def test_ids_sort_by_time_and_are_version_7() -> None:
    ids = [new_id() for _ in range(5000)]
    assert ids == sorted(ids)
    assert len(set(ids)) == len(ids)
    assert {i.version for i in ids} == {7}
    assert {i.variant for i in ids} == {uuid.RFC_4122}
    made = id_time(ids[0])
    assert made is not None
    assert abs(made - datetime.datetime.now(datetime.timezone.utc)) < datetime.timedelta(minutes=1)
    assert id_time(uuid.uuid4()) is None
    assert first_id(made.timestamp() - 1) < ids[0] < first_id(made.timestamp() + 60)


def test_events_travel_as_they_are() -> None:
    at = datetime.datetime(2026, 11, 24, 10, 30, 0, 123456, tzinfo=datetime.timezone.utc)
    e = order("å", key="k", headers=[("a", "1"), ("a", b"\xff")], occurred_at=at, content_type="application/json")
    back = event_from_proto(event_to_proto(e, 0))
    assert (back.aggregate_id, back.key, back.occurred_at, back.event_id) == ("å", b"k", at, e.event_id)
    assert back.headers == [("a", b"1"), ("a", b"\xff")]
    p = event_to_proto(order(), 5.5, [("traceparent", "t")])
    assert (p.occurred_at.seconds, p.occurred_at.nanos) == (5, 500_000_000)
    assert not p.HasField("key")
    assert [(h.name, h.value) for h in p.headers] == [("traceparent", b"t")]
    assert event_to_proto(order(key=b""), 1).HasField("key")


def test_a_trace_context_of_the_callers_own_wins_and_none_makes_an_event_too_large() -> None:
    trace = [("traceparent", "ours")]
    assert [h.value for h in event_to_proto(order(headers={"TraceParent": "mine"}), 1, trace).headers] == [b"mine"]
    full = event_to_proto(order(headers=[("h", "")] * 64), 1, trace)
    assert len(full.headers) == 64
    check([full], Limits())
    check([event_to_proto(order(headers={"h": "x" * (16 * 1024 - 1)}), 1, trace)], Limits())


@pytest.mark.parametrize(
    ("field", "event"),
    [
        ("topic", order(topic="")),
        ("topic", order(topic="a b")),
        ("topic", order(topic="ä")),
        ("topic", order(topic="__x")),
        ("topic", order(topic="..")),
        ("topic", order(topic="x" * 250)),
        ("aggregate_type", order(aggregate_type="")),
        ("aggregate_id", order(aggregate_id="ä" * 128)),
        ("event_type", order(event_type="a\0b")),
        ("content_type", order(content_type="x" * 256)),
        ("key", order(key=b"x" * 4097)),
        ("headers", order(headers=[("a", "")] * 65)),
        ("headers", order(headers={"a": "x" * 16_384})),
        ("headers.name", order(headers={"": "x"})),
        ("headers.name", order(headers={"outbox-epoch": "x"})),
        ("occurred_at", order(occurred_at=datetime.datetime(1969, 1, 1, tzinfo=datetime.timezone.utc))),
        ("occurred_at", order(occurred_at=datetime.datetime(2300, 1, 1, tzinfo=datetime.timezone.utc))),
        ("", order(payload=b"x" * (1 << 20))),
    ],
)
def test_what_the_platform_would_refuse_is_refused_here(field: str, event: Event) -> None:
    client = OutboxClient(Config("x", "s", plaintext=True))
    with pytest.raises(InvalidError) as caught:
        client.check_events(order(), event)
    assert caught.value.fields[0].field == f"events[1].{field}".rstrip(".")
    assert caught.value.local
    large = field == "key" or ("more than" in caught.value.message and field in ("", "headers"))
    assert caught.value.reason == (
        Reason.EVENT_TOO_LARGE if large and "entries" not in caught.value.message else Reason.FIELD_INVALID
    )


@pytest.mark.parametrize(
    "event",
    [
        order(topic="\ud800"),
        order(occurred_at=datetime.datetime(2026, 1, 1)),
        order(payload="text"),
        order(key=5),
        order(aggregate_id=7),
    ],
)
def test_what_cannot_be_encoded_is_invalid(event: Event) -> None:
    with pytest.raises(InvalidError, match=r"events\[0\]"):
        OutboxClient(Config("x", "s", plaintext=True)).check_events(event)


def test_limits_of_a_transaction() -> None:
    e = event_to_proto(order(), 1)
    with pytest.raises(InvalidError, match="is empty"):
        check([], Limits())
    with pytest.raises(InvalidError, match="used twice"):
        check([e, e], Limits())
    with pytest.raises(InvalidError, match="2 entries, more than 1"):
        check([e, e], Limits(events_per_transaction=1))
    with pytest.raises(InvalidError, match="events has"):
        check([e, event_to_proto(order(), 1)], Limits(transaction_bytes=100))
    bad = [event_to_proto(order(topic=""), 1) for _ in range(100)]
    with pytest.raises(InvalidError) as caught:
        check(bad, Limits())
    assert len(caught.value.fields) == 16
    assert Limits.told(pb.Limits()) == Limits()
    assert Limits.told(pb.Limits(max_open_calls=3)).open_calls == 3
    assert topic_problem("orders.v1") == ""


def test_frames_are_what_protobuf_would_write() -> None:
    rng = random.Random(7)
    for _ in range(200):
        calls = []
        frames = []
        for _ in range(rng.randrange(1, 4)):
            kind = rng.choice(list(Kind))
            id, source = rng.getrandbits(rng.randrange(1, 64)), "s" * rng.randrange(1, 300)
            call = pb.SessionRequest.Call(call_id=id)
            getattr(call, kind.word).source = source
            calls.append(call)
            frames.append(encode_call(kind, id, getattr(call, kind.word).SerializeToString()))
        read = pb.SessionRequest.FromString(encode_calls(frames))
        assert list(read.calls.calls) == calls
    assert Kind.PREPARE.method == "/outbox.v1.OutboxService/Prepare"


def made(code: grpc.StatusCode, reason: str = "", retry: float = 0) -> CallError:
    s = status_pb2.Status(code=code.value[0], message="m")
    if reason:
        s.details.add().Pack(error_details_pb2.ErrorInfo(reason=reason, domain="outbox.v1", metadata={"k": "v"}))
    s.details.add().Pack(error_details_pb2.ErrorInfo(reason="OTHER", domain="elsewhere"))
    bad = error_details_pb2.BadRequest()
    bad.field_violations.add(field="f", description="d")
    s.details.add().Pack(bad)
    s.details.append(ProtoAny(type_url="type.googleapis.com/from.the.Future"))
    if retry:
        info = error_details_pb2.RetryInfo()
        info.retry_delay.FromTimedelta(datetime.timedelta(seconds=retry))
        s.details.add().Pack(info)
    return status.error_of_status(s)


def test_statuses_become_errors() -> None:
    code = grpc.StatusCode
    e = made(code.PERMISSION_DENIED, Reason.TOPIC_DENIED, 1.5)
    assert isinstance(e, DeniedError)
    assert (e.reason, e.metadata, e.fields[0].field, e.retry_after) == (Reason.TOPIC_DENIED, {"k": "v"}, "f", 1.5)
    assert str(e) == "PERMISSION_DENIED (TOPIC_DENIED): m"
    kinds = {
        UnknownTransactionError: made(code.NOT_FOUND, Reason.TRANSACTION_UNKNOWN),
        AlreadyDecidedError: made(code.FAILED_PRECONDITION, Reason.TRANSACTION_ALREADY_DECIDED),
        IdReusedError: made(code.ALREADY_EXISTS, Reason.TRANSACTION_ID_REUSED),
        UnavailableError: made(code.UNAVAILABLE),
        ExhaustedError: made(code.RESOURCE_EXHAUSTED, Reason.BACKLOG_FULL, 1),
        CallError: made(code.INTERNAL),
    }
    for kind, error in kinds.items():
        assert type(error) is kind
    assert status.retryable(kinds[UnavailableError])
    assert status.retryable(kinds[ExhaustedError])
    assert not status.retryable(made(code.RESOURCE_EXHAUSTED))
    assert status.retryable(made(code.ABORTED, Reason.CONTENTION))
    assert not status.retryable(made(code.ABORTED))
    assert not status.retryable(made(code.INTERNAL))
    assert not status.retryable(CallError(code.UNAVAILABLE, "", local=True))
    assert status.refused_for_good(made(code.PERMISSION_DENIED, Reason.TOPIC_DENIED))
    assert not status.refused_for_good(made(code.PERMISSION_DENIED, Reason.SOURCE_DENIED))
    assert status.refused_for_good(made(code.INVALID_ARGUMENT))
    assert status.error_of_status(status_pb2.Status(code=99)).code is code.UNKNOWN


def rpc(trailers: dict[str, str | bytes], code: grpc.StatusCode = grpc.StatusCode.UNAVAILABLE) -> CallError:
    error = grpc.aio.AioRpcError(code, grpc.aio.Metadata(), grpc.aio.Metadata(*trailers.items()), details="d")
    return status.error_of_rpc(error)


def test_pushback_and_details_of_unary_calls() -> None:
    assert rpc({}).message == "d"
    assert rpc({"grpc-retry-pushback-ms": "250"}).retry_after == 0.25
    assert status.retryable(rpc({"grpc-retry-pushback-ms": "250"}))
    assert not status.retryable(rpc({"grpc-retry-pushback-ms": "-1"}))
    told = status_pb2.Status(code=5, message="unknown").SerializeToString()
    assert rpc({"grpc-status-details-bin": told}).code is grpc.StatusCode.NOT_FOUND
    assert status.error_of_rpc(ZeroDivisionError()).code is grpc.StatusCode.UNKNOWN


def test_configuration(tmp_path: Path) -> None:
    ca = tmp_path / "ca"
    ca.write_bytes(b"pem")
    token = tmp_path / "token"
    token.write_text("secret\n")
    env = {
        "OUTBOX_ADDRESS": "o:1",
        "OUTBOX_SOURCE": "s",
        "OUTBOX_TLS_CA": str(ca),
        "OUTBOX_TOKEN_FILE": str(token),
        "OUTBOX_CLIENT_PREPARE_TIMEOUT": "250ms",
        "OUTBOX_CLIENT_CALL_TIMEOUT": "2",
        "OUTBOX_CLIENT_SESSIONS": "2",
        "OUTBOX_CLIENT_UNARY": "true",
        "OUTBOX_CLIENT_INSTANCE": "me",
    }
    c = Config.from_env(env, max_in_flight=7)
    assert (c.address, c.source, c.tls, c.plaintext) == ("o:1", "s", TLS(b"pem"), False)
    assert (c.prepare_timeout, c.call_timeout, c.sessions, c.unary, c.max_in_flight) == (0.25, 2.0, 2, True, 7)
    assert c.bearer() == "secret"
    assert c.instance_name() == "me"
    assert "secret" not in repr(Config("a", "s", token="secret", tls=TLS(key=b"secret")))
    assert Config.from_env({"OUTBOX_SOURCE": "s", "OUTBOX_TOKEN": "t"}).bearer() == "t"
    plain = Config.from_env({"OUTBOX_SOURCE": "s"})
    assert plain.plaintext
    assert plain.address == "127.0.0.1:7070"
    assert str(os.getpid()) in plain.instance_name()
    assert Config.from_env({"OUTBOX_SOURCE": "s", "OUTBOX_TLS": "true"}).tls == TLS()
    assert Config.from_env({"OUTBOX_SOURCE": "s", "OUTBOX_TLS": "true"}, plaintext=True).tls is None
    assert not Config.from_env({"OUTBOX_SOURCE": "s"}, tls=TLS()).plaintext


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"address": ""}, "OUTBOX_ADDRESS"),
        ({"source": ""}, "OUTBOX_SOURCE"),
        ({"source": "ä" * 128}, "256 bytes"),
        ({"tls": TLS(), "plaintext": True}, "both set"),
        ({"sessions": 17}, "sessions is 17"),
        ({"max_in_flight": 0}, "max_in_flight is 0"),
        ({"call_timeout": 0}, "call_timeout is 0"),
    ],
)
def test_a_configuration_that_cannot_work(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Config(**{"address": "a", "source": "s", **settings})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "value"),
    [("TLS", "perhaps"), ("CLIENT_SESSIONS", "many"), ("CLIENT_CALL_TIMEOUT", "soon"), ("TLS_CA", "/does/not/exist")],
)
def test_variables_that_cannot_be_read(name: str, value: str) -> None:
    with pytest.raises(ConfigError, match=f"OUTBOX_{name}"):
        Config.from_env({"OUTBOX_SOURCE": "s", f"OUTBOX_{name}": value})


def test_upkeep_must_be_positive() -> None:
    with pytest.raises(ConfigError, match="drain_interval"):
        Upkeep(drain_interval=0)
    with pytest.raises(ConfigError, match="CLIENT_ONLY"):
        Upkeep(mode=Mode.CLIENT_ONLY)


def test_back_off_doubles_to_its_limit() -> None:
    b = Backoff(first=0.1, limit=0.4)
    pauses = [next(b) for _ in range(5)]
    for pause, middle in zip(pauses, (0.1, 0.2, 0.4, 0.4, 0.4), strict=True):
        assert middle * 0.5 <= pause <= middle * 1.5
    b.reset()
    assert next(b) <= 0.15


def test_database_transactions_and_states() -> None:
    d = DatabaseTransaction(2**40, 2**63 + 1, 3, 4, 5, "x", Mode.XID_FENCED)
    assert DatabaseTransaction.from_proto(d.to_proto()) == d
    assert DatabaseTransaction.from_proto(transaction_pb2.DatabaseTransaction()).mode is Mode.MARKER
    future = transaction_pb2.DatabaseTransaction()
    future.MergeFromString(b"\x38\x63")  # mode = 99
    assert DatabaseTransaction.from_proto(future).mode in (Mode.CLIENT_ONLY, Mode.MARKER)
    tx = transaction_pb2.Transaction(transaction_id=new_id().bytes)
    tx.events.add(event_id=new_id().bytes, place="PLACE_BLOCKED")
    read = Transaction.from_proto(tx)
    assert read.state is State.PREPARED
    assert read.prepared_at is None
    assert read.events[0].place == "BLOCKED"


def test_times_of_the_platform() -> None:
    utc = datetime.timezone.utc
    assert parse_time("2026-11-24T10:00:00.123456789Z") == datetime.datetime(2026, 11, 24, 10, 0, 0, 123456, tzinfo=utc)
    assert parse_time("2026-11-24T10:00:00Z") == datetime.datetime(2026, 11, 24, 10, tzinfo=utc)
    assert parse_time("") is None


class DriverError(Exception):
    def __init__(self, sqlstate: str | None = None, severity: str | None = None) -> None:
        self.sqlstate, self.severity_en = sqlstate, severity


@pytest.mark.parametrize(
    ("error", "certain"),
    [
        (DriverError("23505", "ERROR"), True),
        (DriverError("40001", "ERROR"), True),
        (DriverError("40003", "ERROR"), False),
        (DriverError("57P01", "FATAL"), False),
        (DriverError("40001", "FATAL"), False),
        (DriverError("23505"), False),
        (DriverError(), False),
        (ConnectionResetError(), False),
        (None, False),
    ],
)
def test_which_errors_of_commit_are_certain(error: BaseException | None, certain: bool) -> None:
    assert certainly_rolled_back(error) is certain
    outer = RuntimeError()
    outer.__cause__ = error
    assert certainly_rolled_back(outer) is certain


def test_sqlstates_are_found_inside() -> None:
    outer = RuntimeError()
    outer.__cause__ = DriverError("22023", "ERROR")
    assert sqlstate(outer) == "22023"
    assert sqlstate(RuntimeError()) == ""
    circle = RuntimeError()
    circle.__cause__ = circle
    assert sqlstate(circle) == ""
    assert not certainly_rolled_back(circle)


def test_clipping_keeps_characters_whole() -> None:
    assert clip("aäb", 2) == "a"
    assert clip("aäb", 3) == "aä"


def test_the_marker_table_is_that_of_the_go_sdk() -> None:
    assert (Path(__file__).parents[2] / "marker.sql").read_text() == MARKER_DDL
    assert len(marker_statements()) == 2


def test_everything_public_is_there() -> None:
    for name in outbox_client.__all__:
        assert getattr(outbox_client, name) is not None
    assert outbox_client.__version__


def test_only_our_own_modules_are_imported() -> None:
    """No foreign top-level module is shipped, and the core imports no database."""
    package = Path(outbox_client.__file__).parent
    generated = {p.relative_to(package / "_gen").parts[0] for p in (package / "_gen").rglob("*.py")}
    assert generated == {"__init__.py", "outbox"}
    for path in (package / "_core").glob("*.py"):
        for word in ("sqlalchemy", "asyncpg", "psycopg", "django"):
            assert f"import {word}" not in path.read_text()
            assert f"from {word}" not in path.read_text()
