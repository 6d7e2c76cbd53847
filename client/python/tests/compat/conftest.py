"""Fixtures of the tests of the HuleEdu layer."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator

import pytest
import pytest_asyncio
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine
from sqlalchemy.pool import NullPool

from outbox_client import MARKER_DDL
from outbox_client.compat.huleedu import close, configure, errors
from outbox_client.compat.huleedu import repository as repository_module
from outbox_client.testing import FakePlatform

from .devplatform import DevPlatform


@pytest.fixture(scope="session")
def dev() -> Iterator[DevPlatform]:
    """The real platform and a PostgreSQL, one for all tests."""
    with DevPlatform() as running:
        yield running


@pytest_asyncio.fixture(autouse=True)
async def _unconfigured(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[None]:
    """Each test finds the layer as a new process does."""
    for name in ("OUTBOX_ADDRESS", "OUTBOX_SOURCE", "ENVIRONMENT"):
        monkeypatch.delenv(name, raising=False)
    configure()
    errors.set_error_factory(None)
    repository_module._told.clear()
    yield
    await close()
    errors.set_error_factory(None)


@pytest_asyncio.fixture
async def engine(dev: DevPlatform) -> AsyncIterator[AsyncEngine]:
    """An engine on a new PostgreSQL database with a table users and the marker table."""
    name = dev.new_database_name()
    admin = create_async_engine(dev.url("postgres"), isolation_level="AUTOCOMMIT", poolclass=NullPool)
    async with admin.connect() as c:
        await c.execute(text(f"CREATE DATABASE {name}"))
    await admin.dispose()
    made = create_async_engine(dev.url(name), pool_size=20)
    async with made.begin() as c:
        await c.execute(text("CREATE TABLE users (name text PRIMARY KEY)"))
        for statement in MARKER_DDL.split(";"):
            if statement.strip():
                await c.execute(text(statement))
    yield made
    await close()
    await made.dispose()


@pytest.fixture
def platform(outbox_platform: FakePlatform, monkeypatch: pytest.MonkeyPatch) -> FakePlatform:
    """A platform in memory, found by the environment."""
    monkeypatch.setenv("OUTBOX_ADDRESS", outbox_platform.address)
    return outbox_platform
