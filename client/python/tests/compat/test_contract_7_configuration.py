"""Section 7 of the contract: configuration of the layer."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading

import pytest
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from outbox_client import AsyncOutboxClient, ConfigError
from outbox_client.compat.huleedu import PostgreSQLOutboxRepository, close, configure
from outbox_client.compat.huleedu.platform import Settings, platform_of
from outbox_client.testing import FakePlatform

from .test_contract_3_repository import add


async def test_7_environment_variables_are_read_when_the_first_write_needs_them(
    outbox_platform: FakePlatform, monkeypatch: pytest.MonkeyPatch
) -> None:
    repository = PostgreSQLOutboxRepository(create_async_engine("sqlite+aiosqlite://"), "file_service")
    monkeypatch.setenv("OUTBOX_ADDRESS", outbox_platform.address)
    await add(repository)
    assert len(outbox_platform.published()) == 1


def test_7_nothing_is_read_or_connected_at_import() -> None:
    code = """
import os, socket
os.environ["OUTBOX_ADDRESS"] = "not an address"
os.environ["OUTBOX_CLIENT_SESSIONS"] = "not a number"
def refuse(*a, **k): raise SystemExit("connected")
socket.socket.connect = refuse
import outbox_client.compat.huleedu, outbox_client.compat.huleedu.manager
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


async def test_7_a_clear_error_at_first_use_if_something_is_missing() -> None:
    engine = create_async_engine("sqlite+aiosqlite://")
    with pytest.raises(ConfigError, match="OUTBOX_ADDRESS"):
        await add(PostgreSQLOutboxRepository(engine, "file_service"))
    with pytest.raises(ConfigError, match="OUTBOX_ADDRESS and OUTBOX_SOURCE"):
        await add(PostgreSQLOutboxRepository(engine))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("OUTBOX_BREAKER_FAILURES", "many"),
        ("OUTBOX_BREAKER_FAILURES", "0"),
        ("OUTBOX_BREAKER_SECONDS", "-1"),
        ("OUTBOX_FALLBACK", "maybe"),
        ("OUTBOX_CLIENT_CALL_TIMEOUT", "soon"),
    ],
)
async def test_7_a_clear_error_names_the_variable(
    platform: FakePlatform, name: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=name):
        await add(PostgreSQLOutboxRepository(create_async_engine("sqlite+aiosqlite://"), "file_service"))


@pytest.mark.usefixtures("platform")
def test_7_settings_and_their_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = Settings.from_env("file_service")
    assert (settings.config.source, settings.database, settings.fallback) == ("file_service", "default", True)
    assert (settings.breaker_failures, settings.breaker_seconds) == (5, 5.0)
    for name, value in {
        "OUTBOX_SOURCE": "files",
        "OUTBOX_DATABASE": "second",
        "OUTBOX_FALLBACK": "fail",
        "OUTBOX_BREAKER_FAILURES": "7",
        "OUTBOX_BREAKER_SECONDS": "0.5",
    }.items():
        monkeypatch.setenv(name, value)
    settings = Settings.from_env("file_service")
    assert (settings.config.source, settings.database, settings.fallback) == ("files", "second", False)
    assert (settings.breaker_failures, settings.breaker_seconds) == (7, 0.5)


async def test_7_a_repository_built_in_one_loop_is_used_in_another(engine: AsyncEngine, platform: FakePlatform) -> None:
    repository = PostgreSQLOutboxRepository(engine, "file_service")
    await add(repository, event_key="first")
    failed: list[BaseException] = []

    def other_loop(key: str) -> None:
        async def work() -> None:
            await add(repository, event_key=key)
            await platform_of("file_service").client.close()

        try:
            asyncio.run(work())
        except BaseException as e:
            failed.append(e)

    thread = threading.Thread(target=other_loop, args=("second",))
    thread.start()
    await asyncio.to_thread(thread.join)
    assert failed == []
    assert [e.key for e in platform.published()] == [b"first", b"second"]


async def test_configure_gives_a_client_or_settings(outbox_platform: FakePlatform) -> None:
    repository = PostgreSQLOutboxRepository(create_async_engine("sqlite+aiosqlite://"))
    async with AsyncOutboxClient(outbox_platform.config()) as client:
        configure(client)
        await add(repository, event_key="client")
        await close()
        configure(client, Settings(client.config, breaker_failures=1))
        await add(repository, event_key="both")
        await close()  # leaves a client alone that it did not make
        await client.connect()
    configure(settings=Settings(outbox_platform.config()))
    await add(repository, event_key="settings")
    assert [e.key for e in outbox_platform.published()] == [b"client", b"both", b"settings"]


@pytest.mark.usefixtures("platform")
async def test_close_and_the_next_write_opens_again() -> None:
    repository = PostgreSQLOutboxRepository(create_async_engine("sqlite+aiosqlite://"), "file_service")
    await add(repository)
    await close()
    await add(repository)
