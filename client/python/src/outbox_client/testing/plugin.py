"""The pytest plugin of outbox-client. It comes with the package; nothing has to be switched on."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from outbox_client.config import Config
from outbox_client.testing.platform import FakePlatform


@pytest.fixture
def outbox_platform() -> Iterator[FakePlatform]:
    """A platform in memory, empty, on a port of its own."""
    with FakePlatform() as platform:
        yield platform


@pytest.fixture
def outbox_config(outbox_platform: FakePlatform) -> Config:
    """The configuration of a client of outbox_platform, for the source "test"."""
    return outbox_platform.config()


@pytest.fixture
def outbox_env(outbox_platform: FakePlatform, monkeypatch: pytest.MonkeyPatch) -> FakePlatform:
    """outbox_platform, with OUTBOX_ADDRESS and OUTBOX_SOURCE set to it: for code that uses Config.from_env()."""
    monkeypatch.setenv("OUTBOX_ADDRESS", outbox_platform.address)
    monkeypatch.setenv("OUTBOX_SOURCE", "test")
    return outbox_platform
