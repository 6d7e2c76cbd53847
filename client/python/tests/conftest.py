"""What the tests run against: a real PostgreSQL, a real platform and a broker, all of one `outbox dev`, started once."""

from __future__ import annotations

import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import psycopg
import pytest

from outbox_client import MARKER_DDL, DatabaseTransaction, Event, new_id
from outbox_client._gen.outbox.v1 import outbox_service_pb2 as pb
from outbox_client.event import event_to_proto
from outbox_client.testing import FakePlatform

T = TypeVar("T")

REPOSITORY = Path(__file__).parents[3]
BINARY = Path(os.environ.get("OUTBOX_BIN", REPOSITORY / "bin" / "outbox"))
TABLES = """
CREATE TABLE orders (id text PRIMARY KEY, n int NOT NULL DEFAULT 0);
CREATE TABLE late (id text UNIQUE DEFERRABLE INITIALLY DEFERRED);
"""


def wait_for(condition: Callable[[], T | None], what: str, timeout: float = 20.0) -> T:
    """Polls until a condition holds, and returns what it returned."""
    deadline = time.monotonic() + timeout
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited {timeout:g} s for: {what}")
        threading.Event().wait(0.01)


@dataclass(frozen=True)
class Stack:
    """One `outbox dev`: its addresses."""

    api: str
    kafka: str
    dsn: str
    """Of the cluster, with the name of a database left out: add it."""

    def register(self, source: str, **settings: str) -> None:
        """Registers a source that may use every topic."""
        text = "\n".join(
            [f"name: {source}", 'topics: ["*"]', "record_profile: plain", *(f"{k}: {v}" for k, v in settings.items())]
        )
        run = subprocess.run(
            [BINARY, "source", "apply", "-", "--address", self.api, "--reason", "test"],
            input=text,
            text=True,
            capture_output=True,
        )
        assert run.returncode == 0, run.stderr


class DevProcess:
    """A running `outbox dev`."""

    def __init__(self, directory: Path, kafka_port: int = 0) -> None:
        if not BINARY.exists():
            pytest.fail(f"{BINARY} is missing: run `make build`")
        flags = ["--grpc-listen", "127.0.0.1:0", "--http-listen", "127.0.0.1:0", "--kafka-port", str(kafka_port)]
        self.log = directory / "dev.out"
        with self.log.open("w") as out:
            self.process = subprocess.Popen(
                [BINARY, "dev", "--no-demo", "--dir", directory / "data", *flags], stdout=out, stderr=subprocess.STDOUT
            )

    def ready(self) -> Stack:
        def look() -> Stack | None:
            text = self.log.read_text()
            if self.process.poll() is not None:
                pytest.fail(f"outbox dev ended: {text}")
            if "\nready" not in text:
                return None
            found = [re.search(p, text) for p in (r"API +(\S+) \(gRPC\)", r"Kafka +(\S+)", r"store +(\S+?)outbox\?")]
            api, kafka, dsn = (m.group(1) for m in found if m)
            return Stack(api, kafka, dsn)

        return wait_for(look, "outbox dev", timeout=120)  # the first start fetches PostgreSQL

    def stop(self) -> None:
        self.process.send_signal(signal.SIGINT)
        self.process.wait(30)


@pytest.fixture(scope="session")
def workdir() -> Iterator[Path]:
    """A directory that the user of PostgreSQL can reach."""
    path = Path(tempfile.mkdtemp(prefix="outbox-python-"))
    path.chmod(0o755)
    yield path
    shutil.rmtree(path, ignore_errors=True)


@pytest.fixture(scope="session")
def stack(workdir: Path) -> Iterator[Stack]:
    """The platform of this test run."""
    process = DevProcess(workdir)
    try:
        yield process.ready()
    finally:
        process.stop()


class SourceDatabase:
    """A new database with the marker table and some of a service's own."""

    def __init__(self, stack: Stack) -> None:
        self.name = f"t{secrets.token_hex(4)}"
        with psycopg.connect(f"{stack.dsn}postgres", autocommit=True) as c:
            c.execute(f"CREATE DATABASE {self.name}")
        self.dsn = f"{stack.dsn}{self.name}"
        self.execute(MARKER_DDL + TABLES)

    @property
    def asyncpg_url(self) -> str:
        return self.dsn.replace("postgres://", "postgresql+asyncpg://")

    @property
    def psycopg_url(self) -> str:
        return self.dsn.replace("postgres://", "postgresql+psycopg://")

    def execute(self, sql: str, *args: Any) -> None:
        with psycopg.connect(self.dsn, autocommit=True) as c:
            c.execute(sql, args or None)

    def rows(self, sql: str, *args: Any) -> list[Any]:
        with psycopg.connect(self.dsn, autocommit=True) as c:
            return c.execute(sql, args or None).fetchall()

    def value(self, sql: str, *args: Any) -> Any:
        return self.rows(sql, *args)[0][0]

    def orders(self) -> list[str]:
        return [r[0] for r in self.rows("SELECT id FROM orders ORDER BY id")]

    def markers(self) -> int:
        return int(self.value("SELECT count(*) FROM outbox_marker"))

    def spilled(self) -> int:
        return int(self.value("SELECT count(*) FROM outbox_marker WHERE spilled IS NOT NULL"))

    def spill(self, event: Event) -> None:
        """Leaves a spilled request, as an earlier transaction would."""
        id = new_id()
        request = pb.PrepareRequest(
            source="test",
            transaction_id=id.bytes,
            database_transaction=DatabaseTransaction(1).to_proto(),
            events=[event_to_proto(event, time.time())],
        )
        self.execute("INSERT INTO outbox_marker (id, spilled) VALUES (%s, %s)", id, request.SerializeToString())

    def terminate_others(self) -> None:
        """Ends all connections but its own."""
        self.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()"
        )


@pytest.fixture
def db(stack: Stack) -> SourceDatabase:
    """A source database of the test's own."""
    return SourceDatabase(stack)


@pytest.fixture
def platform(outbox_platform: FakePlatform) -> FakePlatform:
    """A platform in memory."""
    return outbox_platform


@pytest.fixture
def python() -> str:
    """The interpreter for child processes."""
    return sys.executable
