"""Section 8 of the contract: known traps. And install(), which gives unchanged services this layer."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from pathlib import Path
from unittest.mock import AsyncMock

import pytest
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession

from outbox_client.compat.huleedu import PostgreSQLOutboxRepository
from outbox_client.compat.huleedu.manager import OutboxManager
from outbox_client.compat.huleedu.models import Base, EventOutbox
from outbox_client.testing import FakePlatform

from .envelope import Redis, envelope
from .test_contract_3_repository import add


async def test_8_the_wake_up_value_is_wake() -> None:
    redis = Redis()
    await OutboxManager(AsyncMock(), redis, "email_service").publish_to_outbox(
        aggregate_type="email", aggregate_id="a", event_type="t", event_data=envelope(), topic="t"
    )
    assert redis.calls == [("lpush", "outbox:wake:email_service", "wake")]


async def test_8_the_stored_dict_is_the_whole_envelope() -> None:
    repository, event = AsyncMock(), envelope()
    await OutboxManager(repository).publish_to_outbox(
        aggregate_type="essay", aggregate_id="a", event_type="t", event_data=event, topic="t"
    )
    assert repository.add_event.call_args.kwargs["event_data"]["data"] == event.data.model_dump(mode="json")


@pytest.mark.parametrize("event_type", ["processing.essay.v1", "huleedu.essay.v1", "x y/z", "", "å" * 255])
async def test_8_the_form_of_an_event_type_is_never_validated(
    engine: AsyncEngine, platform: FakePlatform, event_type: str
) -> None:
    await add(PostgreSQLOutboxRepository(engine, "s"), event_type=event_type)
    assert dict(platform.published()[0].headers)["event_type"] == event_type.encode()


@pytest.mark.parametrize(
    "aggregate_id", ["550e8400-e29b-41d4-a716-446655440000", "elev@example.org", "Åsa Öberg", "å" * 255, "a" * 255, ""]
)
async def test_8_aggregate_id_can_be_any_string_up_to_255(
    engine: AsyncEngine, platform: FakePlatform, aggregate_id: str
) -> None:
    repository = PostgreSQLOutboxRepository(engine, "s")
    await add(repository, aggregate_id=aggregate_id, event_key=aggregate_id)
    async with AsyncSession(engine) as session, session.begin():
        await add(repository, aggregate_id=aggregate_id, event_key=aggregate_id, session=session)
    await asyncio.to_thread(platform.wait, lambda: len(platform.published()) == 2)
    first, second = platform.published()
    assert first.key == second.key == aggregate_id.encode()
    assert first.aggregate_id == second.aggregate_id


async def test_8_long_names_that_differ_stay_different(engine: AsyncEngine, platform: FakePlatform) -> None:
    repository = PostgreSQLOutboxRepository(engine, "s")
    await add(repository, aggregate_id="å" * 254 + "a")
    await add(repository, aggregate_id="å" * 254 + "b")
    first, second = platform.published()
    assert first.aggregate_id != second.aggregate_id


async def test_8_a_mock_that_add_event_returns_is_no_trouble() -> None:
    await OutboxManager(AsyncMock()).publish_to_outbox(
        aggregate_type="essay", aggregate_id="a", event_type="t", event_data=envelope(), topic="t"
    )


def test_1_3_the_table_of_migrations_and_schema_tests() -> None:
    assert EventOutbox.__tablename__ == "event_outbox"
    assert EventOutbox.metadata is Base.metadata
    assert [c.name for c in EventOutbox.__table__.columns] == [
        *("id", "aggregate_id", "aggregate_type", "event_type", "event_data", "event_key", "topic"),
        *("created_at", "published_at", "retry_count", "last_error"),
    ]
    assert {i.name for i in EventOutbox.__table__.indexes} == {
        *("ix_event_outbox_unpublished", "ix_event_outbox_aggregate", "ix_event_outbox_event_type"),
    }


# install()

UNCHANGED = """
from huleedu_service_libs.outbox import OutboxRepositoryProtocol, PostgreSQLOutboxRepository, OutboxProvider
from huleedu_service_libs.outbox.manager import OutboxManager, resolve_partition_key
from huleedu_service_libs.outbox.protocols import OutboxRepositoryProtocol as again
from huleedu_service_libs.outbox.relay import EventRelayWorker, OutboxSettings
from huleedu_service_libs.outbox.di import OutboxSettingsProvider
from huleedu_service_libs.outbox.monitoring import OutboxMetrics
from huleedu_service_libs.outbox.models import EventOutbox, Base
from huleedu_service_libs.outbox.repository import PostgreSQLOutboxRepository as same
import huleedu_service_libs.outbox
assert again is OutboxRepositoryProtocol and same is PostgreSQLOutboxRepository
import outbox_client.compat.huleedu.manager
assert OutboxManager is outbox_client.compat.huleedu.manager.OutboxManager
assert huleedu_service_libs.outbox is outbox_client.compat.huleedu
print("fine")
"""


def run(code: str, path: Path | None = None) -> subprocess.CompletedProcess[str]:
    before = f"import sys; sys.path.insert(0, {str(path)!r})\n" if path else ""
    return subprocess.run([sys.executable, "-c", before + code], capture_output=True, text=True, check=False)


def library(at: Path, outbox: str) -> Path:
    """A huleedu_service_libs as services have it installed."""
    package = at / "huleedu_service_libs"
    (package / "outbox").mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "outbox" / "__init__.py").write_text(outbox)
    (package / "outbox" / "manager.py").write_text("raise SystemExit('the old library was imported')")
    (package / "protocols.py").write_text("class KafkaPublisherProtocol: pass\nclass AtomicRedisClientProtocol: pass\n")
    return at


def test_install_first_thing_in_an_unchanged_service(tmp_path: Path) -> None:
    done = run(
        "from outbox_client.compat.huleedu import install; install(); install()\n" + UNCHANGED,
        library(tmp_path, "raise SystemExit('the old library was imported')"),
    )
    assert (done.returncode, done.stdout) == (0, "fine\n"), done.stderr


def test_install_from_a_package_in_the_old_ones_place(tmp_path: Path) -> None:
    shim = "from outbox_client.compat.huleedu import install\ninstall(__name__)\n"
    done = run(UNCHANGED, library(tmp_path, shim))
    assert (done.returncode, done.stdout) == (0, "fine\n"), done.stderr


def test_install_without_huleedu_service_libs() -> None:
    done = run("from outbox_client.compat.huleedu import install; install()\n" + UNCHANGED)
    assert (done.returncode, done.stdout) == (0, "fine\n"), done.stderr


def test_install_too_late_is_an_error(tmp_path: Path) -> None:
    done = run(
        "import huleedu_service_libs.outbox\nfrom outbox_client.compat.huleedu import install; install()",
        library(tmp_path, ""),
    )
    assert done.returncode == 1
    assert "AlreadyImportedError" in done.stderr


def test_1_4_huleedus_own_protocols_are_used_where_they_are(tmp_path: Path) -> None:
    """Dishka resolves by type identity, and services supply those."""
    code = """
from outbox_client.compat.huleedu import protocols
import huleedu_service_libs.protocols as theirs
assert protocols.KafkaPublisherProtocol is theirs.KafkaPublisherProtocol
assert protocols.AtomicRedisClientProtocol is theirs.AtomicRedisClientProtocol
"""
    done = run(code, library(tmp_path, ""))
    assert done.returncode == 0, done.stderr
