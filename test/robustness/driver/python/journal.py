"""The history of a run, as ../../journal writes and reads it: JSON lines, each written before or after a step."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Where in a step an entry stands.
INVOKE, OK, FAIL, INFO = "invoke", "ok", "fail", "info"

# The steps.
PREPARE, AGAIN, OTHER, PUBLISH = "prepare", "again", "other", "publish"
LOCAL, ROLLBACK, COMMIT, ABORT, GET = "local", "rollback", "commit", "abort", "get"
MISUSE, ALARM = "misuse", "alarm"


@dataclass(frozen=True)
class Noted:
    """An event as it was prepared."""

    id: uuid.UUID
    topic: str
    aggregate: str
    version: int
    locked: bool
    key: bytes
    payload: bytes
    headers: Sequence[tuple[str, bytes]]

    def entry(self) -> dict[str, Any]:
        """What stands in the journal."""
        return {
            "id": str(self.id),
            "topic": self.topic,
            "aggregate": self.aggregate,
            "version": self.version,
            "locked": self.locked,
            "key": _bytes(self.key),
            "hash": _bytes(hashlib.sha256(self.payload).digest()),
            "headers": [{"name": name, "value": _bytes(value)} for name, value in self.headers],
        }


class Journal:
    """Appends to the journal of one process."""

    def __init__(self, directory: str, process: str, source: str) -> None:
        self._process, self._source = process, source
        path = Path(directory) / f"{process}.jsonl"
        self._file = os.open(path, os.O_CREAT | os.O_APPEND | os.O_WRONLY, 0o600)

    def write(
        self,
        kind: str,
        step: str,
        tx: uuid.UUID | None = None,
        *,
        worker: int = 0,
        profile: str = "",
        events: Sequence[Noted] = (),
        state: str = "",
        note: object = "",
    ) -> None:
        """Writes one entry. The kernel has it when this returns: it survives the death of the process."""
        entry: dict[str, Any] = {
            "at": time.clock_gettime_ns(time.CLOCK_MONOTONIC),
            "process": self._process,
            "worker": worker,
            "type": kind,
            "f": step,
            "source": self._source,
            "profile": profile,
            "state": state,
            "note": str(note),
        }
        if tx is not None:
            entry["tx"] = str(tx)
        if events:
            entry["events"] = [event.entry() for event in events]
        line = json.dumps(entry, separators=(",", ":")).encode() + b"\n"
        if os.write(self._file, line) != len(line):
            raise OSError("the journal is cut off")  # nothing that is not written down may happen


def _bytes(value: bytes) -> str:
    """As Go's encoding/json writes them."""
    return base64.b64encode(value).decode()
