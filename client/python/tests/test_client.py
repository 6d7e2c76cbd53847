"""Both clients against a platform in memory, whose faults are real ones: streams that break, answers that are lost, servers that stop."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest
from conftest import wait_for
from events import order

from outbox_client import (
    TLS,
    AlarmKind,
    AlreadyDecidedError,
    AsyncOutboxClient,
    CallError,
    ClosedError,
    Config,
    ConfigError,
    DatabaseTransaction,
    DeniedError,
    ExhaustedError,
    ForkError,
    IdReusedError,
    InvalidError,
    OutboxClient,
    Reason,
    State,
    UnavailableError,
    UnknownTransactionError,
    new_id,
)
from outbox_client._core.limits import Limits
from outbox_client.testing import Call, FakePlatform, Fault, assert_not_published, assert_published, fault_error

pytestmark = pytest.mark.unit

QUICK: dict[str, Any] = {
    "call_timeout": 1.0,
    "prepare_timeout": 0.3,
    "connect_timeout": 1.0,
    "max_reconnect_delay": 0.1,
    "close_timeout": 0.3,
}


@pytest.fixture
def client(platform: FakePlatform) -> Iterator[OutboxClient]:
    with OutboxClient(platform.config(**QUICK)) as client:
        client.connect()
        yield client


def only(name: str, fault: Fault) -> Callable[[Call], Fault | None]:
    """A fault of calls with that name."""
    return lambda call: fault if call.name == name else None


def first(name: str, fault: Fault, times: int = 1) -> Callable[[Call], Fault | None]:
    """A fault of the first calls with that name."""
    left = [times]

    def choose(call: Call) -> Fault | None:
        if call.name != name or left[0] == 0:
            return None
        left[0] -= 1
        return fault

    return choose


# --- every call, in both clients ---


@pytest.mark.parametrize("unary", [False, True])
def test_calls(platform: FakePlatform, unary: bool) -> None:
    with OutboxClient(platform.config(unary=unary, **QUICK)) as client:
        client.connect()
        id = client.publish(order("1"), order("2"))
        assert [e.aggregate_id for e in assert_published(platform, "orders", count=2)] == ["1", "2"]
        assert client.get_transaction(id).state is State.COMMITTED
        prepared = new_id()
        token = client.prepare(prepared, DatabaseTransaction(1), order("3"))
        assert token == b"token"
        assert client.get_transaction(prepared).state is State.PREPARED
        client.commit(prepared, token)
        with pytest.raises(AlreadyDecidedError):
            client.abort(prepared)
        aborted = new_id()
        client.prepare(aborted, DatabaseTransaction(1), order("4"))
        client.abort(aborted)
        assert client.get_transaction(aborted).state is State.ABORTED
        with pytest.raises(UnknownTransactionError):
            client.get_transaction(new_id())
        with pytest.raises(IdReusedError):
            client.publish(order("5"), transaction_id=id)
        assert {c.unary for c in platform.calls("publish")} == {unary}
    assert client.link in ("up", "connecting")


async def test_calls_of_the_asyncio_client(platform: FakePlatform) -> None:
    async with AsyncOutboxClient(platform.config(**QUICK)) as client:
        await client.connect()
        id = await client.publish(order("1"))
        assert (await client.get_transaction(id)).state is State.COMMITTED
        prepared = new_id()
        token = await client.prepare(prepared, DatabaseTransaction(1), order("2"))
        await client.commit(prepared, token)
        aborted = new_id()
        await client.prepare(aborted, DatabaseTransaction(1), order("3"))
        await client.abort(aborted)
        later = new_id()
        client.commit_later(later, await client.prepare(later, DatabaseTransaction(1), order("4")))
        dropped = new_id()
        client.abort_later(dropped, await client.prepare(dropped, DatabaseTransaction(1), order("5")))
        assert client.link == "up"
        assert client.limits == Limits()
    assert [e.aggregate_id for e in platform.published()] == ["1", "2", "4"]
    assert client.stats().acknowledged == 2
    with pytest.raises(ClosedError):
        await client.publish(order())
    reasons: list[object] = []
    client.commit_later(later, done=reasons.append)
    assert isinstance(reasons[0], ClosedError)
    await client.close()


def test_repeating_with_the_same_id_is_safe(platform: FakePlatform, client: OutboxClient) -> None:
    id, event = new_id(), order(occurred_at=_now())
    client.publish(event, transaction_id=id)
    client.publish(event, transaction_id=id)
    assert len(platform.published()) == 1


def _now() -> Any:
    import datetime

    return datetime.datetime.now(datetime.timezone.utc)


def test_what_waits_travels_in_one_message(platform: FakePlatform, client: OutboxClient) -> None:
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda i: client.publish(order(str(i))), range(200)))
    assert len(platform.published()) == 200
    assert client.stats().messages < client.stats().calls == 200


def test_large_calls_travel_alone(platform: FakePlatform, client: OutboxClient) -> None:
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda i: client.publish(order(str(i), payload=b"x" * 400_000)), range(8)))
    assert len(platform.published()) == 8


# --- failures on the way ---


def test_a_broken_session_is_opened_again_and_sends_again(platform: FakePlatform, client: OutboxClient) -> None:
    platform.fault = first("publish", Fault(silent=True))
    with ThreadPoolExecutor(1) as pool:
        publishing = pool.submit(client.publish, order())
        platform.wait(lambda: platform.calls("publish"), "the call")
        platform.break_sessions()
        publishing.result()
    assert client.stats().resent == 1
    assert len(platform.published()) == 1
    assert client.stats().sessions == 2


def test_a_lost_answer_of_a_broken_session_is_no_second_event(platform: FakePlatform, client: OutboxClient) -> None:
    platform.fault = first("publish", Fault(lose_answer=True))
    with ThreadPoolExecutor(1) as pool:
        publishing = pool.submit(client.publish, order())
        platform.wait(lambda: platform.published(), "the event")
        platform.break_sessions()
        publishing.result()
    assert len(platform.published()) == 1


def test_the_platform_stops_and_comes_back(platform: FakePlatform, client: OutboxClient) -> None:
    platform.stop()
    wait_for(lambda: client.link == "down", "the link to be down")
    with pytest.raises(UnavailableError, match="no session"):
        client.publish(order())
    with pytest.raises(UnavailableError):
        client.connect(0.1)
    platform.start()
    client.connect(5)
    client.publish(order())
    assert client.stats().connect_failures > 0


def test_an_unanswered_call_ends_with_its_deadline(platform: FakePlatform, client: OutboxClient) -> None:
    platform.fault = only("prepare", Fault(silent=True))
    begun = time.monotonic()
    with pytest.raises(UnavailableError, match="no answer within 300 ms") as caught:
        client.prepare(new_id(), DatabaseTransaction(1), order())
    assert 0.25 < time.monotonic() - begun < 2
    assert caught.value.code is grpc.StatusCode.DEADLINE_EXCEEDED
    platform.fault = None
    client.publish(order())


def test_a_session_that_has_gone_silent_is_replaced(platform: FakePlatform, client: OutboxClient) -> None:
    platform.fault = only("prepare", Fault(silent=True))
    with pytest.raises(UnavailableError):
        client.prepare(new_id(), DatabaseTransaction(1), order())
    wait_for(lambda: client.stats().sessions == 2, "another session")


async def test_a_cancelled_call_is_forgotten(platform: FakePlatform) -> None:
    async with AsyncOutboxClient(platform.config(**QUICK)) as client:
        await client.connect()
        platform.fault = first("publish", Fault(silent=True))
        publishing = asyncio.ensure_future(client.publish(order()))
        await asyncio.to_thread(platform.wait, lambda: platform.calls("publish"))
        publishing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await publishing
        await client.publish(order("2"))
        assert [e.aggregate_id for e in platform.published()] == ["2"]


@pytest.mark.parametrize("unary", [False, True])
def test_retries_wait_as_long_as_the_platform_asks(platform: FakePlatform, unary: bool) -> None:
    error = fault_error(grpc.StatusCode.RESOURCE_EXHAUSTED, Reason.BACKLOG_FULL, 0.3)
    platform.fault = first("publish", Fault(error=error), 2)
    with OutboxClient(platform.config(unary=unary, **{**QUICK, "call_timeout": 3.0})) as client:
        client.connect()
        begun = time.monotonic()
        client.publish(order())
        assert time.monotonic() - begun >= 0.6
        assert client.stats().retries == 2
        platform.fault = first(
            "publish", Fault(error=fault_error(grpc.StatusCode.UNAVAILABLE, Reason.STORE_UNAVAILABLE)), 2
        )
        client.publish(order("2"))
        assert client.stats().retries == 4


def test_no_retry_when_it_is_no_use(platform: FakePlatform, client: OutboxClient) -> None:
    platform.fault = only(
        "publish", Fault(error=fault_error(grpc.StatusCode.RESOURCE_EXHAUSTED, Reason.QUOTA_EXCEEDED))
    )
    with pytest.raises(ExhaustedError):
        client.publish(order())
    platform.fault = only(
        "publish", Fault(error=fault_error(grpc.StatusCode.RESOURCE_EXHAUSTED, Reason.QUOTA_EXCEEDED, 60))
    )
    with pytest.raises(ExhaustedError) as caught:
        client.publish(order())
    assert caught.value.retry_after == 60
    platform.fault = only("publish", Fault(error=fault_error(grpc.StatusCode.INTERNAL, Reason.INTERNAL)))
    with pytest.raises(CallError):
        client.publish(order())
    assert client.stats().retries == 0
    with OutboxClient(platform.config(disable_retries=True, **QUICK)) as single:
        platform.fault = only("publish", Fault(error=fault_error(grpc.StatusCode.UNAVAILABLE)))
        with pytest.raises(UnavailableError):
            single.publish(order())


def test_the_platform_refuses_as_it_should(platform: FakePlatform) -> None:
    with FakePlatform(sources=["known"], topics=["orders"]) as strict:
        with OutboxClient(strict.config("known", **QUICK)) as client:
            client.publish(order())
            with pytest.raises(DeniedError) as caught:
                client.publish(order(topic="secret"))
            assert (caught.value.reason, caught.value.metadata) == (Reason.TOPIC_DENIED, {"topic": "secret"})
            strict.limits = Limits(event_bytes=10)
            with pytest.raises(InvalidError) as invalid:
                client.publish(order())
            assert invalid.value.fields
            assert not invalid.value.local
        with OutboxClient(strict.config("stranger", **QUICK)) as client:
            with pytest.raises(DeniedError) as caught:
                client.publish(order())
            assert caught.value.reason == Reason.SOURCE_DENIED
            wait_for(lambda: client.link == "down", "the refusal")
            with pytest.raises(DeniedError):
                client.publish(order())
            with pytest.raises(UnavailableError, match="SOURCE_DENIED"):
                client.connect(0.05)
        assert_not_published(strict, "secret")


def test_limits_are_told(platform: FakePlatform) -> None:
    platform.limits = Limits(events_per_transaction=1, open_calls=2)
    with OutboxClient(platform.config(**QUICK)) as client:
        client.connect()
        assert client.limits.events_per_transaction == 1
        with pytest.raises(InvalidError):
            client.publish(order("1"), order("2"))
        with ThreadPoolExecutor(16) as pool:
            list(pool.map(lambda i: client.publish(order(str(i))), range(50)))
    assert len(platform.published()) == 50


def test_unary_calls_where_sessions_are_not_served(platform: FakePlatform, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "outbox_client")
    platform.fault = only("session", Fault(error=fault_error(grpc.StatusCode.PERMISSION_DENIED, Reason.METHOD_DENIED)))
    with OutboxClient(platform.config(**QUICK)) as client:
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(lambda i: client.publish(order(str(i))), range(8)))
        assert client.link == "up"
        id = new_id()
        client.commit_later(id, client.prepare(id, DatabaseTransaction(1), order("9")))
        platform.wait(lambda: len(platform.published()) == 9, "the commit")
        assert {c.unary for c in platform.calls("publish")} == {True}
        platform.fault = lambda call: Fault(silent=call.name == "prepare", error=_method_denied(call))
        with pytest.raises(UnavailableError, match="no answer"):
            client.prepare(new_id(), DatabaseTransaction(1), order())
    assert [r.outbox["source"] for r in caplog.records if "does not serve" in r.message] == ["test"]  # type: ignore[attr-defined]


def _method_denied(call: Call) -> CallError | None:
    return fault_error(grpc.StatusCode.PERMISSION_DENIED, Reason.METHOD_DENIED) if call.name == "session" else None


def test_a_server_that_drains_is_left(platform: FakePlatform, client: OutboxClient) -> None:
    platform.fault = first("publish", Fault(after=0.3))
    with ThreadPoolExecutor(1) as pool:
        slow = pool.submit(client.publish, order("slow"))
        platform.wait(lambda: platform.calls("publish"), "the call")
        platform.drain(grace=2)
        client.publish(order("quick"))
        slow.result()
    assert client.stats().resent == 0
    assert client.stats().drains == 1
    platform.wait(lambda: len(platform.sessions) == 1, "the old session to end")


def test_a_drained_session_ends_with_its_grace(platform: FakePlatform, client: OutboxClient) -> None:
    platform.fault = first("publish", Fault(silent=True))
    with ThreadPoolExecutor(1) as pool:
        stuck = pool.submit(client.publish, order())
        platform.wait(lambda: platform.calls("publish"), "the call")
        platform.drain(grace=0.1)
        stuck.result()
    assert client.stats().resent == 1


def test_two_sessions(platform: FakePlatform) -> None:
    with OutboxClient(platform.config(sessions=2, **QUICK)) as client:
        platform.wait(lambda: len(platform.sessions) == 2, "two sessions")
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda i: client.publish(order(str(i))), range(20)))
        next(iter(platform.sessions)).end()
        client.publish(order("x"))
    assert len(platform.published()) == 21


def test_the_first_message_must_be_welcome(platform: FakePlatform) -> None:
    platform.fault = only("session", Fault(silent=True))
    with OutboxClient(platform.config(**{**QUICK, "connect_timeout": 0.1})) as client:
        with pytest.raises(UnavailableError, match=r"no session within 0\.1 s"):
            client.publish(order())


# --- bounds ---


def test_calls_in_flight_are_bounded(platform: FakePlatform) -> None:
    for fail_when_full in (True, False):
        platform.fault = only("publish", Fault(silent=True))
        settings = {**QUICK, "call_timeout": 0.5}
        with OutboxClient(platform.config(max_in_flight=1, fail_when_full=fail_when_full, **settings)) as client:
            client.connect()
            with ThreadPoolExecutor(1) as pool:
                stuck = pool.submit(client.publish, order())
                arrived = len(platform.calls("publish"))
                platform.wait(lambda n=arrived: len(platform.calls("publish")) >= max(1, n), "the first call")  # type: ignore[misc]
                with pytest.raises(CallError):
                    client.publish(order("2"))
                with pytest.raises(UnavailableError):
                    stuck.result()
        platform.clear()


def test_pending_commits_are_bounded(platform: FakePlatform) -> None:
    platform.fault = only("commit", Fault(silent=True))
    with OutboxClient(platform.config(max_pending_commits=1, **QUICK)) as client:
        reasons: list[object] = []
        done = threading.Event()
        client.commit_later(new_id())
        client.commit_later(new_id(), done=lambda e: (reasons.append(e), done.set()))  # type: ignore[func-returns-value, arg-type]
        assert done.wait(5)
        assert isinstance(reasons[0], ExhaustedError)
        assert client.stats().dropped_commits == 1
        assert client.stats().pending_commits == 1


# --- decisions in the background ---


def test_a_commit_is_repeated_until_it_is_acknowledged(platform: FakePlatform, client: OutboxClient) -> None:
    id = new_id()
    token = client.prepare(id, DatabaseTransaction(1), order())
    platform.fault = first("commit", Fault(error=fault_error(grpc.StatusCode.UNAVAILABLE, Reason.STORE_UNAVAILABLE)), 3)
    client.commit_later(id, token)
    assert_published(platform, "orders")
    wait_for(lambda: client.stats().acknowledged == 1, "the acknowledgement")
    assert len(platform.calls("commit")) == 4


def test_flush_waits_for_decisions(platform: FakePlatform) -> None:
    with OutboxClient(platform.config(**QUICK)) as client:
        id = new_id()
        token = client.prepare(id, DatabaseTransaction(1), order())
        platform.fault = only("commit", Fault(error=fault_error(grpc.StatusCode.UNAVAILABLE, Reason.STORE_UNAVAILABLE)))
        client.commit_later(id, token)
        assert not client.flush(0.05)
        platform.fault = None
        assert client.flush(10)
        assert client.stats().acknowledged == 1
    assert OutboxClient(platform.config(**QUICK)).flush()  # nothing was ever sent


async def test_flush_of_the_asyncio_client(platform: FakePlatform) -> None:
    client = AsyncOutboxClient(platform.config(**QUICK))
    assert await client.flush()  # nothing was ever sent
    async with client:
        id = new_id()
        client.commit_later(id, await client.prepare(id, DatabaseTransaction(1), order()))
        assert await client.flush(10)
        assert client.stats().acknowledged == 1


def test_a_commit_that_contradicts_raises_an_alarm(platform: FakePlatform) -> None:
    alarms: list[Any] = []

    def on_alarm(alarm: Any) -> None:
        alarms.append(alarm)
        raise ZeroDivisionError  # must not matter

    with OutboxClient(platform.config(on_alarm=on_alarm, **QUICK)) as client:
        id = new_id()
        client.prepare(id, DatabaseTransaction(1), order())
        platform.decide(id, State.ABORTED)
        client.commit_later(id)
        wait_for(lambda: alarms, "the alarm")
        assert (alarms[0].kind, alarms[0].transaction_id) == (AlarmKind.CONTRADICTION, id)


def test_an_abort_of_what_never_arrived_is_nothing(
    platform: FakePlatform, client: OutboxClient, caplog: pytest.LogCaptureFixture
) -> None:
    ends: list[object] = []
    client.abort_later(new_id(), done=ends.append)
    wait_for(lambda: ends, "the answer")
    assert not caplog.records
    client.commit_later(new_id(), done=ends.append)
    wait_for(lambda: len(ends) == 2, "the answer")
    assert "refused a decision" in caplog.text
    client.commit_later(new_id(), done=lambda e: 1 / 0)  # type: ignore[arg-type]
    wait_for(lambda: "after a decision" in caplog.text, "the log")


@pytest.mark.parametrize("denied", [False, True])
def test_commits_by_unary_calls(platform: FakePlatform, denied: bool) -> None:
    """Because the configuration says so, or because sessions turn out not to be served."""
    ids = [new_id(), new_id()]
    with OutboxClient(platform.config(**QUICK)) as other:
        for id in ids:
            other.prepare(id, DatabaseTransaction(1), order())
    failures = [Fault(error=fault_error(grpc.StatusCode.UNAVAILABLE, Reason.STORE_UNAVAILABLE))]

    def fault(call: Call) -> Fault | None:
        if call.name == "session":
            return Fault(error=_method_denied(call))
        return failures.pop() if call.name == "commit" and failures else None

    platform.fault = fault
    with OutboxClient(platform.config(unary=not denied, **QUICK)) as client:
        client.commit_later(ids[0])
        platform.wait(lambda: len(platform.published()) == 1, "the commit")
        assert all(c.unary for c in platform.calls("commit"))
        wait_for(lambda: client.stats().acknowledged == 1, "the acknowledgement")
        ends: list[object] = []
        platform.fault = (
            only("commit", Fault(silent=True))
            if not denied
            else lambda call: Fault(silent=call.name == "commit", error=_method_denied(call))
        )
        client.commit_later(ids[1], done=ends.append)
        platform.wait(lambda: len(platform.calls("commit")) == 3, "the commit")
    assert isinstance(ends[0], ClosedError)


async def test_a_commit_that_would_be_repeated_after_close_is_not(platform: FakePlatform) -> None:
    platform.fault = only(
        "commit", Fault(error=fault_error(grpc.StatusCode.UNAVAILABLE, Reason.STORE_UNAVAILABLE, 0.2))
    )
    ends: list[object] = []
    async with AsyncOutboxClient(platform.config(**QUICK)) as client:
        await client.connect()
        client.commit_later(new_id(), done=ends.append)
        await asyncio.to_thread(platform.wait, lambda: platform.calls("commit"), "the commit")
    await asyncio.to_thread(wait_for, lambda: ends, "its end")
    assert isinstance(ends[0], ClosedError)


def test_close_waits_for_commits(platform: FakePlatform) -> None:
    platform.fault = only("commit", Fault(after=0.1))
    client = OutboxClient(platform.config(**QUICK))
    id = new_id()
    client.commit_later(id, client.prepare(id, DatabaseTransaction(1), order()))
    client.close()
    assert platform.transaction(id).state is State.COMMITTED  # type: ignore[union-attr]
    with pytest.raises(ClosedError):
        client.publish(order())
    reasons: list[object] = []
    client.commit_later(id, done=reasons.append)
    assert isinstance(reasons[0], ClosedError)
    client.close()


def test_close_does_not_wait_for_ever(platform: FakePlatform) -> None:
    platform.fault = only("commit", Fault(silent=True))
    ends: list[object] = []
    client = OutboxClient(platform.config(**QUICK))
    client.connect()
    client.commit_later(new_id(), done=ends.append)
    platform.wait(lambda: platform.calls("commit"), "the commit")
    begun = time.monotonic()
    client.close()
    assert time.monotonic() - begun < 2
    assert isinstance(ends[0], ClosedError)


def test_commits_wait_in_the_queue_while_the_platform_is_away(platform: FakePlatform, client: OutboxClient) -> None:
    id = new_id()
    token = client.prepare(id, DatabaseTransaction(1), order())
    platform.stop()
    wait_for(lambda: client.link == "down", "the link to be down")
    client.commit_later(id, token)
    platform.start()
    assert_published(platform, "orders")


# --- event loops, threads, forks ---


def test_one_client_in_many_loops(platform: FakePlatform) -> None:
    client = AsyncOutboxClient(platform.config(**QUICK))
    for i in range(3):
        asyncio.run(_publish(client, str(i)))
    with ThreadPoolExecutor(3) as pool:
        list(pool.map(lambda i: asyncio.run(_publish(client, str(i))), range(3, 6)))
    assert len(platform.published()) == 6
    assert client._engines() == []


async def _publish(client: AsyncOutboxClient, id: str) -> None:
    await client.publish(order(id))


PROGRAMS = Path(__file__).parent / "programs"


def run(program: str, *args: str, timeout: float = 60) -> str:
    """Runs a program of the tests and returns what it printed."""
    done = subprocess.run(
        [sys.executable, PROGRAMS / program, *args],
        capture_output=True,
        text=True,
        timeout=timeout,
        env={**os.environ, "PYTHONPATH": "src:tests"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_fork_of_a_connected_blocking_client(platform: FakePlatform) -> None:
    assert run("fork_blocking.py", platform.address).split() == ["child", "ok", "parent", "ok"]
    assert sorted(e.aggregate_id for e in platform.published()) == ["after", "before", "child", "thread"]


async def test_a_connected_asyncio_client_refuses_to_work_after_a_fork(platform: FakePlatform) -> None:
    """What a fork calls in the child; a real one would run with a gRPC that may crash at any moment."""
    client = AsyncOutboxClient(platform.config(**QUICK))
    await client.publish(order())
    engine = client._engine()
    client._forked_child()
    with pytest.raises(ForkError):
        await client.publish(order())
    await engine.close()
    unused = AsyncOutboxClient(platform.config(**QUICK))
    unused._forked_child()
    await unused.publish(order())
    await unused.close()


def test_prefork_with_a_client_made_before_the_fork(platform: FakePlatform) -> None:
    assert run("fork_prefork.py", platform.address).count("ok") == 4
    assert len(platform.published()) == 8


# --- what goes with the calls ---


def test_the_token_goes_with_streams_and_unary_calls(platform: FakePlatform) -> None:
    tokens = iter(range(100))
    with OutboxClient(platform.config(token=lambda: f"t{next(tokens)}", **QUICK)) as client:
        id = client.publish(order())
        client.get_transaction(id)
    assert platform.tokens == ["Bearer t0", "Bearer t1"]


def test_a_token_that_cannot_be_had_is_an_error_of_the_call(platform: FakePlatform) -> None:
    def broken() -> str:
        raise OSError("no token")

    with OutboxClient(platform.config(token=broken, **QUICK)) as client, pytest.raises(CallError, match="no token"):
        client.publish(order())


async def test_the_trace_context_goes_into_events(platform: FakePlatform) -> None:
    from opentelemetry import trace
    from opentelemetry.sdk.trace import TracerProvider

    tracer = TracerProvider().get_tracer("test")
    async with AsyncOutboxClient(platform.config(**QUICK)) as client:
        with tracer.start_as_current_span("placing") as span:
            await client.publish(order())
            expected = f"00-{trace.format_trace_id(span.get_span_context().trace_id)}-"
        await client.publish(order("2"))
    [traced, plain] = platform.published()
    assert dict(traced.headers)["traceparent"].startswith(expected.encode())  # type: ignore[arg-type]
    assert list(plain.headers) == []


def test_tls(tmp_path: Path) -> None:
    """A server with a certificate of its own CA: accepted with that CA, refused without."""
    key, cert = tmp_path / "key.pem", tmp_path / "cert.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2"]
        + ["-keyout", key, "-out", cert, "-subj", "/CN=outbox.test", "-addext", "subjectAltName=DNS:outbox.test"],
        check=True,
        capture_output=True,
    )
    assert ssl.create_default_context(cafile=cert)
    with FakePlatform(tls=(key.read_bytes(), cert.read_bytes())) as platform:
        trusting = Config(
            platform.address, "test", tls=TLS(ca=cert.read_bytes(), server_name="outbox.test"), token="t", **QUICK
        )
        with OutboxClient(trusting) as client:
            client.publish(order())
        assert platform.tokens == ["Bearer t"]
        with OutboxClient(Config(platform.address, "test", tls=TLS(server_name="outbox.test"), **QUICK)) as client:
            with pytest.raises(UnavailableError):
                client.publish(order())


def test_a_database_is_registered_once(client: OutboxClient) -> None:
    client.register_database(_Nowhere())
    with pytest.raises(ConfigError):
        client.register_database(_Nowhere())


class _Nowhere:
    """A database that cannot be reached."""

    async def connect(self) -> Any:
        raise ConnectionRefusedError("nobody there")

    async def close(self) -> None:
        pass


async def test_a_database_that_cannot_be_reached_is_unknown(platform: FakePlatform) -> None:
    async with AsyncOutboxClient(platform.config(**QUICK)) as client:
        await client.connect()
        client.register_database(_Nowhere(), name="gone")  # after the session was opened
        await asyncio.to_thread(platform.wait, lambda: platform.databases() == ["gone"], "Hello to name it")
        id = new_id()
        await client.prepare(id, DatabaseTransaction(1, database="gone"), order())
        answer = await asyncio.to_thread(platform.ask, id, "gone")
        assert (answer.outcome, answer.reason) == (4, "asking the database: nobody there")
        assert await client.must_spill("gone")


def test_a_port_where_nobody_speaks_grpc() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = f"127.0.0.1:{listener.getsockname()[1]}"
        with OutboxClient(Config(address, "test", plaintext=True, **{**QUICK, "connect_timeout": 0.2})) as client:
            with pytest.raises(UnavailableError):
                client.publish(order())


# --- the testing kit itself ---


def test_assertions_say_what_is_wrong(platform: FakePlatform, client: OutboxClient) -> None:
    client.publish(order("1", headers={"h": "v"}), order("2", "paid"))
    assert_published(platform, "orders", event_types=["order.placed.v1", "order.paid.v1"])
    assert_published(platform, aggregate_id="1", payloads=[{"id": "1", "what": "placed"}], headers={"h": b"v"}, key="1")
    assert_published(platform, aggregate_id="2", payloads=[b'{"id": "2", "what": "paid"}'])
    mistakes: list[dict[str, Any]] = [
        {"event_types": ["order.paid.v1", "order.placed.v1"]},
        {"payloads": [{}, {}]},
        {"headers": {"h": "w"}},
        {"key": "1"},
        {"count": 3, "timeout": 0.05},
    ]
    for wrong in mistakes:
        with pytest.raises(AssertionError):
            assert_published(platform, "orders", **wrong)
    with pytest.raises(AssertionError, match="no events of nowhere"):
        assert_published(platform, "nowhere", timeout=0.05)
    with pytest.raises(AssertionError):
        assert_not_published(platform, "orders")


def test_the_environment_fixture(outbox_env: FakePlatform) -> None:
    with OutboxClient(Config.from_env(**QUICK)) as client:
        client.publish(order())
    assert_published(outbox_env, "orders", count=1)


def test_the_fake_refuses_what_is_no_request(platform: FakePlatform) -> None:
    from outbox_client._gen.outbox.v1 import outbox_service_pb2 as pb

    for message in (pb.PrepareRequest(source="s", transaction_id=b"1"), pb.PrepareRequest(transaction_id=b"1" * 16)):
        with pytest.raises(InvalidError):
            platform.prepare(message)
    with pytest.raises(InvalidError):
        platform.prepare(
            pb.PrepareRequest(
                source="s", transaction_id=b"1" * 16, events=OutboxClient(platform.config()).protos([order()])
            )
        )
    with pytest.raises(LookupError), OutboxClient(platform.config(**QUICK)) as client:
        client.register_database(_Nowhere())
        client.connect()
        platform.ask(new_id())
    with pytest.raises(TimeoutError):
        platform.wait(lambda: False, timeout=0.01)
