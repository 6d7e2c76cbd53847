"""gunicorn's prefork model, with the application loaded (and the client used) before the fork."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import wait_for

from outbox_client.testing import FakePlatform

pytestmark = pytest.mark.unit


@pytest.fixture
def gunicorn(platform: FakePlatform, tmp_path: Path) -> Iterator[str]:
    log = tmp_path / "log"
    env = {
        **os.environ,
        "PYTHONPATH": "src:tests:tests/programs",
        "OUTBOX_ADDRESS": platform.address,
        "OUTBOX_SOURCE": "test",
    }
    flags = ["--preload", "--workers", "3", "--threads", "2", "--bind", "127.0.0.1:0", "--no-control-socket"]
    with log.open("w") as out:
        process = subprocess.Popen(
            [sys.executable, "-m", "gunicorn", *flags, "gunicorn_app:application"], env=env, stdout=out, stderr=out
        )
    try:
        found = wait_for(
            lambda: re.search(r"Listening at: (http://\S+)", log.read_text()) or (process.poll() is not None),
            "gunicorn",
        )
        assert isinstance(found, re.Match), log.read_text()
        yield found.group(1)
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(30)


def get(url: str) -> int:
    with urllib.request.urlopen(url, timeout=20) as answer:
        return int(answer.read())


def test_prefork(gunicorn: str, platform: FakePlatform) -> None:
    workers: set[int] = set()
    sent = 0

    def all_seen() -> bool:
        nonlocal sent
        workers.add(get(f"{gunicorn}/{sent}"))
        sent += 1
        return len(workers) == 3

    wait_for(all_seen, "all workers to have answered", timeout=60)
    # A worker dies, and gunicorn forks another one off its master.
    killed = workers.pop()
    os.kill(killed, signal.SIGKILL)
    fresh: set[int] = set()

    def replaced() -> bool:
        nonlocal sent
        try:
            fresh.add(get(f"{gunicorn}/{sent}"))
        except OSError:
            return False  # the request that the dead worker had taken
        sent += 1
        return bool(fresh - workers - {killed})

    wait_for(replaced, "a new worker", timeout=60)
    assert {e.aggregate_id for e in platform.published()} >= {"master", *map(str, range(sent))}
