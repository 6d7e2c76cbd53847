"""The real platform, started with `outbox dev`: PostgreSQL, a Kafka broker, server and relay in one process."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import tempfile
import threading
import uuid
from pathlib import Path
from types import TracebackType

REPOSITORY = Path(__file__).resolve().parents[4]


class DevPlatform:
    """One `outbox dev`. Use it as a context manager."""

    def __init__(self) -> None:
        self._binary = os.environ.get("OUTBOX_BIN") or str(REPOSITORY / "bin" / "outbox")
        if not Path(self._binary).exists():
            raise RuntimeError(f"{self._binary} is missing: run `make build`, or set OUTBOX_BIN")
        self._dir = tempfile.TemporaryDirectory(prefix="outbox-dev-", dir="/tmp", ignore_cleanup_errors=True)
        self._lines: list[str] = []
        self._ready = threading.Event()

    def __enter__(self) -> DevPlatform:
        os.chmod(self._dir.name, 0o755)
        environment = {k: v for k, v in os.environ.items() if not k.startswith("OUTBOX_") or k == "OUTBOX_POSTGRES_BIN"}
        self._process = subprocess.Popen(
            [
                *(self._binary, "dev", "--no-demo", "--dir", f"{self._dir.name}/data"),
                *("--grpc-listen", "127.0.0.1:0", "--http-listen", "127.0.0.1:0", "--kafka-port", "0"),
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment,
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        if not self._ready.wait(120) or self._process.poll() is not None:
            self.__exit__(None, None, None)
            raise RuntimeError("outbox dev did not start:\n" + "".join(self._lines))
        said = "".join(self._lines)
        self.store_dsn = self._found(r"^store +(\S+)", said)
        self.kafka = self._found(r"^Kafka +(\S+)", said)
        self.address = self._found(r"^API +(\S+)", said)
        return self

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._lines.append(line)
            if line.startswith("ready"):
                self._ready.set()
        self._ready.set()

    @staticmethod
    def _found(pattern: str, text: str) -> str:
        match = re.search(pattern, text, re.MULTILINE)
        assert match, text
        return match.group(1)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
            try:
                self._process.wait(30)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        self._reader.join(10)
        if self._process.stdout is not None:
            self._process.stdout.close()
        self._dir.cleanup()

    def outbox(self, *arguments: str, stdin: str = "") -> str:
        """Runs a command of the platform against it, and returns what it printed."""
        done = subprocess.run(
            [self._binary, *arguments, "--address", self.address],
            input=stdin,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    def register(self, source: str, *topics: str) -> None:
        """Registers a source with the record profile of HuleEdu."""
        text = f"name: {source}\ntopics: [{', '.join(topics)}]\nrecord_profile: huleedu\n"
        self.outbox("source", "apply", "-", stdin=text)

    def new_database_name(self) -> str:
        """A name that no database has."""
        return "t" + uuid.uuid4().hex

    def url(self, database: str) -> str:
        """SQLAlchemy's URL of a database on its PostgreSQL."""
        scheme, _, rest = self.store_dsn.partition("://")
        assert scheme in ("postgres", "postgresql"), self.store_dsn
        return f"postgresql+asyncpg://{rest.rpartition('/')[0]}/{database}"
