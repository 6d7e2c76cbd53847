"""What one event costs an async SQLAlchemy transaction: make bench-python.

Three kinds of transaction take turns in every task: bare (an INSERT and an UPDATE), outbox (the same with one event through the SDK
and a real platform) and row (the same with one row in an outbox table of its own, as a library does it, without counting its relay).
Everything runs on this machine: PostgreSQL, server, relay and broker in one `outbox dev`.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import random
import sys
import tempfile
import time
import uuid
from collections import defaultdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from conftest import DevProcess, SourceDatabase, Stack
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine

from outbox_client import AsyncOutboxClient, Config, Event
from outbox_client.sqlalchemy import Outbox

KINDS = ("bare", "outbox", "row")
TABLES = """
CREATE TABLE customers (id int PRIMARY KEY, orders int NOT NULL DEFAULT 0);
INSERT INTO customers SELECT generate_series(0, 999);
CREATE TABLE placed (id uuid PRIMARY KEY, customer int NOT NULL, total int NOT NULL);
CREATE TABLE event_outbox (
    id uuid PRIMARY KEY, aggregate_id text NOT NULL, aggregate_type text NOT NULL, event_type text NOT NULL, event_data jsonb NOT NULL,
    event_key text, topic text NOT NULL, created_at timestamptz NOT NULL DEFAULT now(), published_at timestamptz,
    retry_count int NOT NULL DEFAULT 0, last_error text);
CREATE INDEX ON event_outbox (created_at) WHERE published_at IS NULL;
"""
INSERT = text("INSERT INTO placed (id, customer, total) VALUES (:id, :customer, 42)")
UPDATE = text("UPDATE customers SET orders = orders + 1 WHERE id = :customer")
ROW = text(
    "INSERT INTO event_outbox (id, aggregate_id, aggregate_type, event_type, event_data, event_key, topic) "
    "VALUES (:id, :a, 'order', 'order.placed.v1', cast(:data as jsonb), :a, 'orders')"
)


async def transaction(kind: str, engine: Any, outbox: Outbox[AsyncOutboxClient], customer: int, payload: bytes) -> None:
    """Does one transaction."""
    async with AsyncSession(engine) as session, session.begin():
        id = uuid.uuid4()
        await session.execute(INSERT, {"id": id, "customer": customer})
        await session.execute(UPDATE, {"customer": customer})
        if kind == "outbox":
            outbox.collect(
                session,
                Event(
                    topic="orders",
                    aggregate_type="order",
                    aggregate_id=str(customer),
                    event_type="order.placed.v1",
                    payload=payload,
                ),
            )
        elif kind == "row":
            await session.execute(ROW, {"id": uuid.uuid4(), "a": str(customer), "data": payload.decode()})


async def measure(stack: Stack, db: SourceDatabase, tasks: int, seconds: float, pause: float) -> dict[str, list[float]]:
    """Runs so many tasks for so long, with pauses in seconds, and returns the latencies in seconds by kind."""
    engine = create_async_engine(db.asyncpg_url, pool_size=tasks)
    payload = json.dumps({"order": "x" * 400}).encode()
    taken: dict[str, list[float]] = defaultdict(list)
    async with AsyncOutboxClient(Config(stack.api, "bench", plaintext=True)) as client:
        outbox = Outbox(client, engine)
        await client.connect(20)
        warm_until = time.monotonic() + 2
        end = warm_until + seconds

        async def work(task: int) -> None:
            i = task
            while time.monotonic() < end:
                kind = KINDS[i % len(KINDS)]
                i += 1
                begun = time.perf_counter()
                await transaction(kind, engine, outbox, (task * 61 + i) % 1000, payload)
                if time.monotonic() > warm_until:
                    taken[kind].append(time.perf_counter() - begun)
                if pause:
                    await asyncio.sleep(random.uniform(0.5, 1.5) * pause)

        await asyncio.gather(*(work(t) for t in range(tasks)))
    await engine.dispose()
    return taken


def percentile(values: list[float], p: float) -> float:
    """A percentile in milliseconds."""
    return sorted(values)[min(len(values) - 1, int(len(values) * p))] * 1000


def main() -> None:
    """Measures and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", default="1,16", help="numbers of concurrent tasks (default 1,16)")
    parser.add_argument("--seconds", type=float, default=15, help="of each run, after 2 s to warm up (default 15)")
    parser.add_argument(
        "--pauses", default="0,0.05", help="mean pauses of a task in s (default 0,0.05); 0: as fast as it can"
    )
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="outbox-bench-") as directory:
        Path(directory).chmod(0o755)
        process = DevProcess(Path(directory))
        try:
            stack = process.ready()
            stack.register("bench")
            db = SourceDatabase(stack)
            db.execute(TABLES)
            print("| tasks | pause ms | transaction | per second | p50 ms | p99 ms | overhead p50 / p99 ms |")
            print("|--:|--:|---|--:|--:|--:|--:|")
            runs = [(int(t), float(p)) for p in arguments.pauses.split(",") for t in arguments.tasks.split(",")]
            for tasks, pause in runs:
                gc.collect()
                taken = asyncio.run(measure(stack, db, tasks, arguments.seconds, pause))
                for kind in KINDS:
                    p50, p99 = (percentile(taken[kind], p) for p in (0.5, 0.99))
                    base = (percentile(taken["bare"], p) for p in (0.5, 0.99))
                    over = (
                        ""
                        if kind == "bare"
                        else " / ".join(f"{now - b:.1f}" for now, b in zip((p50, p99), base, strict=True))
                    )
                    rate = len(taken[kind]) / arguments.seconds
                    print(
                        f"| {tasks} | {pause * 1000:.0f} | {kind} | {rate:.0f} | {p50:.1f} | {p99:.1f} | {over} |",
                        flush=True,
                    )
        finally:
            process.stop()


main()
