"""Django against a real PostgreSQL: atomic blocks, savepoints, requests, TestCase."""

from __future__ import annotations

import unittest
from collections.abc import Iterator
from typing import Any

import django_project
import grpc
import pytest
from conftest import SourceDatabase, Stack
from events import order

from outbox_client import (
    AsyncCommitError,
    DeniedError,
    InvalidError,
    NoTransactionError,
    OutcomeUnknownError,
    Reason,
    SavepointError,
    UnavailableError,
    Upkeep,
)
from outbox_client import django as outbox
from outbox_client.testing import FakePlatform, Fault, fault_error
from outbox_client.transaction import State


@pytest.fixture(scope="module")
def database(stack: Stack) -> SourceDatabase:
    db = SourceDatabase(stack)
    db.execute("DROP TABLE outbox_marker")
    django_project.configure(db.dsn)
    from django.core.management import call_command

    call_command("migrate", verbosity=0)
    return db


@pytest.fixture
def db(database: SourceDatabase, platform: FakePlatform) -> Iterator[SourceDatabase]:
    from django.conf import settings
    from django.db import connections

    database.execute("TRUNCATE outbox_marker, orders, late")
    settings.OUTBOX = {
        "address": platform.address,
        "source": "test",
        "plaintext": True,
        "prepare_timeout": 0.5,
        "call_timeout": 1.0,
        "close_timeout": 0.2,
        "upkeep": Upkeep(drain_interval=0.1),
    }
    yield database
    outbox.close()
    outbox.close()
    connections.close_all()


def committed(platform: FakePlatform, *ids: str) -> None:
    platform.wait(lambda: [e.aggregate_id for e in platform.published()] == list(ids), f"orders {ids}")


def test_the_migration_makes_the_table_of_the_ddl(db: SourceDatabase, stack: Stack) -> None:
    columns = """
        SELECT column_name, data_type, is_nullable, column_default, is_identity
        FROM information_schema.columns WHERE table_name = 'outbox_marker' ORDER BY 1"""
    assert db.rows(columns) == SourceDatabase(stack).rows(columns)


def test_commit(db: SourceDatabase, platform: FakePlatform) -> None:
    with outbox.atomic():
        django_project.insert("1")
        ids = outbox.publish(order("1"), order("2"))
        assert not platform.calls("prepare")
    committed(platform, "1", "2")
    assert [e.event_id for e in platform.published()] == ids
    assert db.markers() == 1
    assert len(platform.calls("prepare")) == 1


def test_decorator_without_events(db: SourceDatabase, platform: FakePlatform) -> None:
    @outbox.atomic()
    def work() -> None:
        django_project.insert("1")

    work()
    assert db.orders() == ["1"]
    assert db.markers() == 0


def test_rollback(db: SourceDatabase, platform: FakePlatform) -> None:
    from django.db import transaction

    with pytest.raises(ZeroDivisionError), outbox.atomic():
        django_project.insert("1")
        outbox.publish(order("1"))
        raise ZeroDivisionError
    with outbox.atomic():
        django_project.insert("1")
        outbox.publish(order("1"))
        transaction.set_rollback(True)
    assert db.orders() == []
    assert not platform.calls("prepare")


def test_savepoints(db: SourceDatabase, platform: FakePlatform) -> None:
    from django.db import transaction

    with outbox.atomic():
        outbox.publish(order("1"))
        with pytest.raises(ZeroDivisionError), transaction.atomic():
            outbox.publish(order("2"))
            with transaction.atomic():
                outbox.publish(order("3"))
            raise ZeroDivisionError
        with transaction.atomic():
            outbox.publish(order("4"))
    committed(platform, "1", "4")


def test_outside_of_a_block(db: SourceDatabase, platform: FakePlatform) -> None:
    from django.db import transaction

    with pytest.raises(NoTransactionError):
        outbox.publish(order())
    with transaction.atomic():
        with pytest.raises(NoTransactionError):
            outbox.publish(order())
        with pytest.raises(RuntimeError, match="durable"), outbox.atomic():
            pass
    with outbox.atomic(), pytest.raises(InvalidError):
        outbox.publish(order(topic="__x"))


def test_unsafe_transactions_are_refused(db: SourceDatabase, platform: FakePlatform) -> None:
    from django.db import connection

    for statement, error in (
        ("SET LOCAL synchronous_commit = off", AsyncCommitError),
        ("SAVEPOINT mine", SavepointError),
    ):
        with pytest.raises(error), outbox.atomic():
            with connection.cursor() as cursor:
                cursor.execute(statement)
            outbox.publish(order())
    assert not platform.calls("prepare")


def test_error_in_commit(db: SourceDatabase, platform: FakePlatform) -> None:
    from django.db import IntegrityError, connection

    for values in ("('a'), ('a')", "('a')"):
        try:
            with outbox.atomic():
                with connection.cursor() as cursor:
                    cursor.execute(f"INSERT INTO late VALUES {values}")
                outbox.publish(order())
        except IntegrityError:
            assert len(values) > 5
    platform.wait(
        lambda: [t.state for t in platform.transactions()] == [State.ABORTED, State.COMMITTED], "both decisions"
    )


def test_unknown_outcome(db: SourceDatabase, platform: FakePlatform) -> None:
    def cut(call: Any) -> Fault | None:
        if call.name == "prepare":
            db.terminate_others()
        return None

    platform.fault = cut
    with pytest.raises(OutcomeUnknownError), outbox.atomic():
        django_project.insert("1")
        outbox.publish(order())
    [stored] = platform.transactions()
    assert platform.ask(stored.id).outcome == 2
    assert not platform.calls("abort")


def test_retry_loop(db: SourceDatabase, platform: FakePlatform) -> None:
    from django.db import OperationalError, connection

    db.execute("INSERT INTO orders (id) VALUES ('1')")
    attempts = 0
    while True:
        attempts += 1
        try:
            with outbox.atomic(), connection.cursor() as cursor:
                cursor.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
                cursor.execute("SELECT n FROM orders")
                if attempts < 3:
                    db.execute("UPDATE orders SET n = n + 1")
                outbox.publish(order())
                cursor.execute("UPDATE orders SET n = n + 1")
            break
        except OperationalError as e:
            assert "could not serialize" in str(e)
    assert attempts == 3
    committed(platform, "1")


def test_refused(db: SourceDatabase, platform: FakePlatform) -> None:
    refusal = fault_error(grpc.StatusCode.PERMISSION_DENIED, Reason.TOPIC_DENIED)
    platform.fault = lambda call: Fault(error=refusal) if call.name == "prepare" else None
    with pytest.raises(DeniedError), outbox.atomic():
        django_project.insert("1")
        outbox.publish(order())
    assert db.orders() == []


def test_spill(db: SourceDatabase, platform: FakePlatform) -> None:
    platform.stop()
    with outbox.atomic():
        django_project.insert("1")
        outbox.publish(order())
    assert db.spilled() == 1
    platform.start()
    committed(platform, "1")


def test_spill_not_allowed(db: SourceDatabase, platform: FakePlatform) -> None:
    from django.conf import settings

    settings.OUTBOX["spill"] = False
    platform.fault = lambda call: Fault(lose_answer=call.name == "prepare")
    with pytest.raises(UnavailableError), outbox.atomic():
        django_project.insert("1")
        outbox.publish(order())
    platform.wait(lambda: [t.state for t in platform.transactions()] == [State.ABORTED], "the abort")
    assert db.orders() == []


def test_requests(db: SourceDatabase, platform: FakePlatform) -> None:
    from django.test import Client

    web = Client(raise_request_exception=False)
    assert web.get("/place/1").content == b"placed"
    assert web.get("/place/2?fail=1").status_code == 500
    assert web.get("/plain").content == b"False"
    assert web.get("/atomic").content == b"True"
    committed(platform, "1")
    assert db.orders() == ["1"]


def test_in_a_testcase(db: SourceDatabase, platform: FakePlatform) -> None:
    from django.test import TestCase

    class Shop(TestCase):  # type: ignore[misc]
        def test_it(self) -> None:
            with outbox.atomic():
                django_project.insert("1")
                outbox.publish(order())
            assert [e.aggregate_id for e in platform.published()] == ["1"]
            with pytest.raises(ZeroDivisionError), outbox.atomic():
                outbox.publish(order("2"))
                raise ZeroDivisionError
            assert [e.aggregate_id for e in platform.published()] == ["1"]

    result = unittest.TestResult()
    unittest.TestSuite([Shop("test_it")]).run(result)
    assert result.testsRun == 1
    assert not result.errors, result.errors
    assert not result.failures, result.failures
    assert db.orders() == []
