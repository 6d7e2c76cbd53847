"""Section 2 of the contract: OutboxManager."""

from __future__ import annotations

import inspect
import logging
from typing import Any
from unittest.mock import AsyncMock
from uuid import UUID, uuid4

import pytest
from sqlalchemy.ext.asyncio import AsyncEngine

from outbox_client.compat.huleedu import OutboxRepositoryProtocol, PostgreSQLOutboxRepository
from outbox_client.compat.huleedu.errors import HuleEduError, set_error_factory
from outbox_client.compat.huleedu.manager import OutboxManager, resolve_partition_key
from outbox_client.testing import FakePlatform

from .envelope import EventEnvelope, Redis, envelope

NIL = UUID("00000000-0000-0000-0000-000000000000")


def repository(**kwargs: Any) -> AsyncMock:
    made = AsyncMock(spec=OutboxRepositoryProtocol)
    made.add_event.configure_mock(**kwargs)
    return made


async def publish(manager: OutboxManager, event: Any = None, **changes: Any) -> Any:
    given: dict[str, Any] = {
        "aggregate_type": "essay",
        "aggregate_id": "essay-1",
        "event_type": "argument.event.type",
        "event_data": envelope() if event is None else event,
        "topic": "argument.topic",
        **changes,
    }
    return await manager.publish_to_outbox(**given)


async def failing(manager: OutboxManager, event: Any = None, **changes: Any) -> HuleEduError:
    with pytest.raises(HuleEduError) as raised:
        await publish(manager, event, **changes)
    return raised.value


def test_2_signatures() -> None:
    assert list(inspect.signature(OutboxManager.__init__).parameters) == [
        "self",
        "outbox_repository",
        "redis_client",
        "service_name",
    ]
    parameters = inspect.signature(OutboxManager.publish_to_outbox).parameters
    assert list(parameters) == [
        "self",
        "aggregate_type",
        "aggregate_id",
        "event_type",
        "event_data",
        "topic",
        "message_key",
        "headers",
        "session",
    ]
    assert [parameters[n].default for n in ("message_key", "headers", "session")] == [None, None, None]
    assert inspect.signature(OutboxManager.__init__).parameters["service_name"].default == "unknown_service"
    assert list(inspect.signature(resolve_partition_key).parameters) == ["event_type", "aggregate_id", "metadata"]


def test_2_the_constructor_does_no_io_and_keeps_its_arguments() -> None:
    store, redis = repository(), Redis()
    manager = OutboxManager(store, redis, "file_service")
    assert (manager.outbox_repository, manager.redis_client, manager.service_name) == (store, redis, "file_service")
    assert store.mock_calls == []
    assert redis.calls == []


def test_2_a_repository_of_none_is_accepted() -> None:
    assert OutboxManager(outbox_repository=None).outbox_repository is None  # type: ignore[arg-type]


async def test_2_it_returns_none_and_takes_positional_arguments() -> None:
    store, session = repository(), object()
    answer: object = await OutboxManager(store).publish_to_outbox(  # type: ignore[func-returns-value]
        "essay", "essay-1", "type", envelope(), "topic", "key", {"h": "v"}, session
    )
    assert answer is None
    given = store.add_event.call_args.kwargs
    assert (given["aggregate_type"], given["aggregate_id"], given["event_type"]) == ("essay", "essay-1", "type")
    assert (given["topic"], given["event_key"], given["session"]) == ("topic", "key", session)
    assert given["event_data"]["headers"] == {"h": "v"}


async def test_2_1_all_by_keyword_session_also_when_none() -> None:
    store = repository()
    await publish(OutboxManager(store))
    assert store.add_event.call_count == 1
    assert store.add_event.call_args.args == ()
    assert set(store.add_event.call_args.kwargs) == {
        "aggregate_id",
        "aggregate_type",
        "event_type",
        "event_data",
        "topic",
        "event_key",
        "session",
    }
    assert store.add_event.call_args.kwargs["session"] is None


async def test_2_1_the_session_object_is_passed_on_untouched() -> None:
    store, session = repository(), AsyncMock()
    await publish(OutboxManager(store), session=session)
    assert store.add_event.call_args.kwargs["session"] is session
    assert session.mock_calls == []


async def test_2_1_event_data_is_the_dump_plus_topic() -> None:
    store, event = repository(), envelope()
    await publish(OutboxManager(store), event)
    stored = store.add_event.call_args.kwargs["event_data"]
    assert isinstance(stored, dict)
    assert stored == {**event.model_dump(mode="json"), "topic": "argument.topic"}


@pytest.mark.parametrize(("headers", "there"), [(None, False), ({}, False), ({"a": "b"}, True)])
async def test_2_1_headers_only_if_the_caller_gave_a_non_empty_dict(headers: Any, there: bool) -> None:
    store = repository()
    await publish(OutboxManager(store), headers=headers)
    stored = store.add_event.call_args.kwargs["event_data"]
    assert ("headers" in stored) is there
    assert not there or stored["headers"] == headers


async def test_2_1_uuids_and_timestamps_are_strings_and_non_ascii_text_is_kept_as_characters() -> None:
    store, event = repository(), envelope()
    await publish(OutboxManager(store), event)
    stored = store.add_event.call_args.kwargs["event_data"]
    assert stored["event_id"] == str(event.event_id)
    assert isinstance(stored["event_timestamp"], str)
    assert stored["data"]["text"] == "å ä ö"


@pytest.mark.parametrize(
    ("metadata", "message_key", "expected"),
    [
        ({"partition_key": "from metadata"}, "argument", "from metadata"),
        ({"partition_key": "from metadata"}, None, "from metadata"),
        ({"other": "x"}, "argument", "argument"),
        ({}, "argument", "argument"),
        (None, "argument", "argument"),
        ({}, None, "essay-1"),
        ({}, "", "essay-1"),
        (None, None, "essay-1"),
    ],
)
async def test_2_1_event_key_is_metadata_then_message_key_then_aggregate_id(
    metadata: Any, message_key: Any, expected: str
) -> None:
    store = repository()
    await publish(OutboxManager(store), envelope(metadata=metadata), message_key=message_key)
    assert store.add_event.call_args.kwargs["event_key"] == expected


async def test_2_1_event_type_and_topic_are_passed_as_given_and_not_compared_with_the_envelope() -> None:
    store = repository()
    await publish(OutboxManager(store), envelope(event_type="another"), event_type="x y", topic="z")
    given = store.add_event.call_args.kwargs
    assert (given["event_type"], given["topic"], given["event_data"]["event_type"]) == ("x y", "z", "another")


@pytest.mark.parametrize("answer", [None, object(), uuid4(), "text"])
async def test_2_1_the_result_of_add_event_is_only_logged(answer: Any) -> None:
    assert await publish(OutboxManager(repository(return_value=answer))) is None


async def test_2_2_exactly_one_wake_up_after_a_successful_add_event() -> None:
    redis = Redis()
    await publish(OutboxManager(repository(), redis, "file_service"))
    assert redis.calls == [("lpush", "outbox:wake:file_service", "wake")]


async def test_2_2_no_wake_up_without_a_redis_client() -> None:
    await publish(OutboxManager(repository(), None))


async def test_2_2_an_exception_of_lpush_is_logged_as_a_warning_and_swallowed(caplog: pytest.LogCaptureFixture) -> None:
    store = repository()
    with caplog.at_level(logging.WARNING):
        await publish(OutboxManager(store, Redis(ConnectionError("no redis")), "s"))
    assert store.add_event.call_count == 1
    assert [r.levelname for r in caplog.records] == ["WARNING"]


async def test_2_2_no_wake_up_when_add_event_failed_and_no_other_redis_method() -> None:
    redis = Redis()
    await failing(OutboxManager(repository(side_effect=RuntimeError("x")), redis))
    assert redis.calls == []


async def test_2_3_repository_falsy() -> None:
    event = envelope()
    error = await failing(OutboxManager(None, service_name="file_service"), event)  # type: ignore[arg-type]
    detail = error.error_detail
    assert (detail.service, detail.operation) == ("file_service", "publish_to_outbox")
    assert detail.message == "Outbox repository not configured for transactional publishing"
    assert detail.error_code.value == "EXTERNAL_SERVICE_ERROR"
    assert detail.correlation_id == event.correlation_id
    assert detail.details == {
        "external_service": "outbox_repository",
        "aggregate_id": "essay-1",
        "event_type": "argument.event.type",
    }


async def test_2_3_repository_falsy_without_a_correlation_id_has_the_nil_uuid() -> None:
    error = await failing(OutboxManager(None), object())  # type: ignore[arg-type]
    assert error.error_detail.correlation_id == NIL


class WithCorrelationId:
    correlation_id = UUID("6fa459ea-ee8a-3ca4-894e-db77e160355e")


@pytest.mark.parametrize(
    ("event", "correlation_id"),
    [
        (WithCorrelationId(), WithCorrelationId.correlation_id),
        ({"correlation_id": "6fa459ea-ee8a-3ca4-894e-db77e160355e"}, WithCorrelationId.correlation_id),
        ({"correlation_id": "no uuid"}, NIL),
        ({"correlation_id": None}, NIL),
        ({}, NIL),
        ("text", NIL),
    ],
)
async def test_2_3_event_data_without_model_dump(event: Any, correlation_id: UUID) -> None:
    store = repository()
    error = await failing(OutboxManager(store, service_name="file_service"), event)
    detail = error.error_detail
    assert detail.message == "Failed to store event in outbox: ValueError"
    assert detail.details["error_type"] == "ValueError"
    assert f"OutboxManager expects Pydantic EventEnvelope, got {type(event)}" in detail.details["error_details"]
    assert {"external_service", "aggregate_id", "event_type"} <= set(detail.details)
    assert detail.correlation_id == correlation_id
    assert store.mock_calls == []


async def test_2_3_any_exception_of_add_event() -> None:
    event = envelope()
    error = await failing(
        OutboxManager(repository(side_effect=ConnectionError("no database")), service_name="s"), event
    )
    detail = error.error_detail
    assert detail.message == "Failed to store event in outbox: ConnectionError"
    assert detail.details == {
        "external_service": "outbox_repository",
        "aggregate_id": "essay-1",
        "event_type": "argument.event.type",
        "error_type": "ConnectionError",
        "error_details": "no database",
    }
    assert detail.correlation_id == event.correlation_id


async def test_2_3_an_exception_with_error_detail_is_the_same_object() -> None:
    class TheirError(Exception):
        error_detail = "anything"

    theirs = TheirError("x")
    with pytest.raises(TheirError) as raised:
        await publish(OutboxManager(repository(side_effect=theirs)))
    assert raised.value is theirs


async def test_2_3_the_check_for_a_missing_repository_comes_before_the_check_of_the_envelope() -> None:
    error = await failing(OutboxManager(None), {"a": "dict"})  # type: ignore[arg-type]
    assert error.error_detail.message.startswith("Outbox repository not configured")


async def test_2_3_errors_are_made_by_an_injected_factory_with_the_keywords_of_raise_external_service_error() -> None:
    class OtherError(Exception):
        pass

    given: dict[str, Any] = {}

    def factory(**keywords: Any) -> Any:
        given.update(keywords)
        raise OtherError

    set_error_factory(factory)
    with pytest.raises(OtherError):
        await publish(OutboxManager(repository(side_effect=RuntimeError("x")), service_name="s"))
    assert {"service", "operation", "external_service", "message", "correlation_id"} <= set(given)


async def test_2_3_huleedu_service_libs_is_used_when_present(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys
    import types

    class TheirError(Exception):
        pass

    def raise_external_service_error(**keywords: Any) -> Any:
        raise TheirError(keywords["message"])

    handling = types.ModuleType("huleedu_service_libs.error_handling")
    handling.raise_external_service_error = raise_external_service_error  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "huleedu_service_libs", types.ModuleType("huleedu_service_libs"))
    monkeypatch.setitem(sys.modules, "huleedu_service_libs.error_handling", handling)
    with pytest.raises(TheirError, match="RuntimeError"):
        await publish(OutboxManager(repository(side_effect=RuntimeError("x"))))


def test_2_3_the_error_has_the_shape_of_huleedus() -> None:
    from outbox_client.compat.huleedu.errors import raise_external_service_error

    with pytest.raises(HuleEduError) as raised:
        raise_external_service_error(
            service="s", operation="o", external_service="e", message="m", correlation_id=NIL, detail=1
        )
    error = raised.value
    assert (error.service, error.operation, error.error_code, error.correlation_id) == (
        *("s", "o"),
        *("EXTERNAL_SERVICE_ERROR", str(NIL)),
    )
    assert str(error) == "[EXTERNAL_SERVICE_ERROR] m"
    assert error.to_dict()["error_detail"]["details"] == {"external_service": "e", "detail": 1}


async def test_2_3_platform_failures_are_useful_in_an_operators_log(
    engine: AsyncEngine, platform: FakePlatform, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OUTBOX_FALLBACK", "fail")
    monkeypatch.setenv("OUTBOX_CLIENT_CALL_TIMEOUT", "300ms")
    manager = OutboxManager(PostgreSQLOutboxRepository(engine, "file_service"), service_name="file_service")
    error = await failing(manager, topic="not a topic")
    assert error.error_detail.details["error_type"] == "InvalidError"
    assert "topic" in error.error_detail.details["error_details"]
    error = await failing(manager, EventEnvelope[Any](event_type="t", source_service="s", data="x" * 2_000_000))
    assert error.error_detail.details["error_type"] == "InvalidError"
    assert "bytes" in error.error_detail.details["error_details"]
    platform.stop()
    error = await failing(manager)
    assert error.error_detail.details["error_type"] == "UnavailableError"
    platform.start()


@pytest.mark.parametrize(
    ("event_type", "metadata", "expected"),
    [
        ("huleedu.assessment.result.v1", {"cj_assessment_job_id": "j"}, "j"),
        ("huleedu.cj_assessment.completed.v1", {}, "a"),
        ("huleedu.batch.phase.v1", {"batch_id": "b"}, "b"),
        ("huleedu.spellcheck.done.v1", {"batch_id": "b", "essay_id": "e"}, "b"),
        ("huleedu.nlp.done.v1", {"essay_id": "e"}, "a"),
        ("huleedu.student.matching.v1", {"batch_id": "b"}, "b"),
        ("huleedu.essay.slot.v1", {"essay_id": "e"}, "e"),
        ("huleedu.els.slot.v1", {"essay_id": "e", "entity_ref": "r"}, "r"),
        ("huleedu.els.slot.v1", None, "a"),
        ("something.else", {"batch_id": "b"}, "a"),
    ],
)
def test_2_resolve_partition_key(event_type: str, metadata: dict[str, Any] | None, expected: str) -> None:
    assert resolve_partition_key(event_type, "a", metadata) == expected
