"""Runs the service with everything that it needs: python -m file_service.dev.

Needs the platform's binary: bin/outbox of this repository, one named by OUTBOX_BIN, or `outbox` on the PATH.
"""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import signal
import subprocess
import tempfile
import threading
from pathlib import Path
from types import TracebackType
from typing import Any

from confluent_kafka import Consumer, KafkaError, KafkaException
from confluent_kafka.admin import AdminClient, NewTopic  # type: ignore[attr-defined]
from hypercorn.asyncio import serve
from hypercorn.config import Config
from sqlalchemy import text
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.pool import NullPool

from file_service.app import create_app
from file_service.config import SERVICE, Settings
from file_service.di import make_container
from file_service.events import TOPICS

SOURCE = f"""name: {SERVICE}
topics: ["huleedu.file.*"]
record_profile: huleedu
"""


def binary() -> str:
    """Where the platform's binary is."""
    built = Path(__file__).resolve().parents[4] / "bin" / "outbox"
    found = os.environ.get("OUTBOX_BIN") or (str(built) if built.exists() else shutil.which("outbox"))
    if not found:
        raise RuntimeError("the binary outbox is missing: run `make build` in the repository, or set OUTBOX_BIN")
    return found


def run(*arguments: str, stdin: str = "") -> str:
    """Runs a command of the platform and returns what it printed."""
    done = subprocess.run([binary(), *arguments], input=stdin, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"outbox {' '.join(arguments)}: {done.stderr}")
    return done.stdout


class Process:
    """A process of the platform, whose output is kept. Use it as a context manager."""

    def __init__(self, *arguments: str, ready: str) -> None:
        """ready: a pattern that a line of output has once it is up. Empty: whoever starts it finds out."""
        self._arguments, self._ready = arguments, re.compile(ready)
        self._up = threading.Event()
        if not ready:
            self._up.set()
        self.lines: list[str] = []

    def __enter__(self) -> Process:
        keep = {k: v for k, v in os.environ.items() if not k.startswith("OUTBOX_") or k == "OUTBOX_POSTGRES_BIN"}
        self.process = subprocess.Popen(
            [binary(), *self._arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=keep
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        if not self._up.wait(120) or self.process.poll() is not None:
            self.__exit__(None, None, None)
            raise RuntimeError(f"outbox {self._arguments[0]} did not start:\n{''.join(self.lines)}")
        return self

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line)
            if self._ready.search(line):
                self._up.set()
        self._up.set()

    def said(self, pattern: str) -> str:
        """The first group of a pattern in its output."""
        found = re.search(pattern, "".join(self.lines), re.MULTILINE)
        if found is None:
            raise RuntimeError("".join(self.lines))
        return found.group(1)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(30)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        self._reader.join(10)
        if self.process.stdout is not None:
            self.process.stdout.close()


def dev(directory: str) -> Process:
    """`outbox dev` without its demo, on free ports."""
    return Process(
        *("dev", "--no-demo", "--dir", directory, "--grpc-listen", "127.0.0.1:0", "--http-listen", "127.0.0.1:0"),
        *("--kafka-port", "0"),
        ready="^ready",
    )


def url(dsn: str, database: str) -> str:
    """SQLAlchemy's URL of another database on the same server."""
    rest = dsn.partition("://")[2]
    return f"postgresql+asyncpg://{rest.rpartition('/')[0]}/{database}"


async def create_database(dsn: str, name: str) -> None:
    """Creates a database if it is not there."""
    engine = create_async_engine(url(dsn, "postgres"), isolation_level="AUTOCOMMIT", poolclass=NullPool)
    async with engine.connect() as c:
        known = await c.execute(text("SELECT 1 FROM pg_database WHERE datname = :name"), {"name": name})
        if known.scalar() is None:
            await c.execute(text(f'CREATE DATABASE "{name}"'))
    await engine.dispose()


def create_topics(kafka: str) -> None:
    """Creates the service's topics: the platform never does."""
    admin = AdminClient({"bootstrap.servers": kafka, "enable.metrics.push": False})
    for done in admin.create_topics([NewTopic(topic, 3, 1) for topic in TOPICS.values()]).values():
        try:
            done.result(30)
        except KafkaException as e:
            if e.args[0].code() != KafkaError.TOPIC_ALREADY_EXISTS:
                raise


def print_events(kafka: str, ended: threading.Event) -> None:
    """Prints what arrives, each event once."""
    consumer = Consumer(
        {
            "bootstrap.servers": kafka,
            "group.id": "file-service-dev",
            "auto.offset.reset": "earliest",
            "enable.metrics.push": False,
        }
    )
    consumer.subscribe(list(TOPICS.values()))
    seen: set[bytes] = set()
    while not ended.is_set():
        message = consumer.poll(0.2)
        if message is None or message.error() is not None:
            continue
        pairs: Any = message.headers() or []
        event_id = dict(pairs)["event_id"]
        if event_id not in seen:
            seen.add(event_id)
            print(f"arrived  {message.topic()}  {message.key()!r}  {message.value()!r}", flush=True)
    consumer.close()


async def serve_here(port: int) -> None:
    """Runs everything until Ctrl-C."""
    directory = os.environ.get("FILE_SERVICE_DIR") or tempfile.mkdtemp(prefix="file-service-", dir="/tmp")
    os.chmod(directory, 0o755)
    with dev(f"{directory}/outbox") as platform:
        address, dsn = platform.said(r"^API +(\S+)"), platform.said(r"^store +(\S+)")
        run("source", "apply", "-", "--address", address, stdin=SOURCE)
        await create_database(dsn, "files")
        os.environ["OUTBOX_ADDRESS"] = address
        await asyncio.to_thread(create_topics, platform.said(r"^Kafka +(\S+)"))
        config = Config()
        config.bind = [f"127.0.0.1:{port}"]
        print(f"file service http://127.0.0.1:{port}, platform {address}, Kafka {platform.said(r'^Kafka +(.+)$')}")
        ended = asyncio.Event()
        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(number, ended.set)
        app = create_app(make_container(Settings(url(dsn, "files"), os.environ.get("FILE_SERVICE_REDIS_URL", ""))))
        stop_printing = threading.Event()
        printing = asyncio.create_task(asyncio.to_thread(print_events, platform.said(r"^Kafka +(\S+)"), stop_printing))
        try:
            await serve(app, config, shutdown_trigger=ended.wait)
        finally:
            stop_printing.set()
            await printing


if __name__ == "__main__":
    asyncio.run(serve_here(int(os.environ.get("FILE_SERVICE_PORT", "8080"))))
