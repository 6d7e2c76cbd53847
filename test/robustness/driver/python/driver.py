"""A service that works on the platform with the Python SDK and writes down what it does, as the Go driver beside it does.

Runs in a process of its own, so that it can be killed, and is told what to do by a file that the suite writes: see ../config.go.
"""

from __future__ import annotations

import asyncio
import json
import logging
import signal
import sys
from pathlib import Path

import asyncpg
from outbox_client import ExhaustedError, OutcomeUnknownError, UnavailableError
from sqlalchemy.exc import DBAPIError

import by_hand
import by_sdk
import fault
from plan import DIRECT, DUPLICATE, MISUSE, RACE, SYNC, TWO_PHASE
from service import PATIENCE, Service, Settings
from worker import Worker

log = logging.getLogger("driver")

# What goes wrong in a transaction when something is away. Anything else is a fault of the SDK or of this program, and ends it.
AWAY = (
    UnavailableError,
    ExhaustedError,
    OutcomeUnknownError,
    by_hand.WaitingError,
    DBAPIError,
    asyncpg.PostgresError,
    asyncpg.InterfaceError,
    OSError,
    asyncio.TimeoutError,
)


class Limiter:
    """Bounds how many transactions begin in a second, 0: not at all."""

    def __init__(self, per_second: float) -> None:
        self._step = 1 / per_second if per_second else 0.0
        self._next = 0.0

    async def wait(self) -> None:
        """Waits for the next turn. What was missed in 50 ms is made up for."""
        now = asyncio.get_running_loop().time()
        self._next = max(self._next, now - 0.05) + self._step
        await asyncio.sleep(self._next - now)


async def work(worker: Worker, limiter: Limiter, profiles: list[str]) -> None:
    """Does one transaction after the other. What it has begun it finishes: nothing but time ends it."""
    service = worker.service
    while await service.enter():
        await limiter.wait()
        with service.under_way():
            try:
                await asyncio.wait_for(transact(worker, worker.random.choice(profiles)), PATIENCE)
            except AWAY as e:
                log.debug("transaction: %r", e)
                await asyncio.sleep(0.02)  # no reason to spin


async def transact(worker: Worker, profile: str) -> None:
    """Does one transaction."""
    if profile == DIRECT:
        await by_hand.publish(worker)
    elif profile == MISUSE:
        await by_sdk.misuse(worker)
    elif profile in (TWO_PHASE, DUPLICATE, SYNC, RACE):
        await by_hand.transact(worker, profile)
    else:
        await by_sdk.transact(worker, profile)


async def obey(service: Service) -> None:
    """Watches the control file and does what it says."""
    control = Path(service.settings.Control)
    last = ""
    while True:
        content = control.read_text() if control.exists() else ""
        if content and content != last:
            last = content
            order = content.partition(" ")[0]
            if order == "work":
                service.go()
            else:
                await service.quiet()
            if order == "probe":
                try:
                    await by_hand.probe(Worker(service, 0), Path(f"{control}.xid"))
                except AWAY as e:
                    log.debug("probe: %r", e)
            Path(f"{control}.done").write_text(content)
        await asyncio.sleep(0.02)


async def main(settings: Settings) -> None:
    """Runs until SIGTERM."""
    service = Service(settings)
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, service.stopping.set)
    await service.start(by_sdk.Teller)
    by_sdk.watch(service.engine)
    profiles = [name for name, weight in sorted(settings.Profiles.items()) for _ in range(weight)]
    limiter = Limiter(settings.PerSecond)
    workers = [work(Worker(service, n + 1), limiter, profiles) for n in range(settings.Workers)]
    watchers = [asyncio.ensure_future(watcher) for watcher in (fault.watch(), obey(service))]
    done = asyncio.gather(*workers)
    for watcher in watchers:
        watcher.add_done_callback(lambda ended: ended.cancelled() or done.cancel())
    await done
    await service.quiet()
    for watcher in watchers:
        watcher.cancel()
    await service.stop()


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    try:
        asyncio.run(main(Settings(**json.loads(sys.argv[1]))))
    except BaseException:
        log.exception("the driver broke")
        raise
