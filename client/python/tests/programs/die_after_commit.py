"""Does one transaction and dies by SIGKILL when COMMIT has returned, before the Commit call goes out."""

import asyncio
import json
import os
import signal
import sys
import uuid
from typing import Any

from events import order
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine

from outbox_client import AsyncOutboxClient, Config
from outbox_client.sqlalchemy import Outbox

api, source, url, id = sys.argv[1:]


class Mortal(AsyncOutboxClient):
    """Dies instead of telling."""

    def commit_later(self, transaction_id: uuid.UUID, token: bytes = b"", **_: Any) -> None:
        print("committed", flush=True)
        os.kill(os.getpid(), signal.SIGKILL)


async def main() -> None:
    engine = create_async_engine(url)
    client = Mortal(Config(api, source, plaintext=True))
    outbox = Outbox(client, engine)
    await client.connect()
    async with AsyncSession(engine) as session, outbox.transaction(session) as tx:
        await session.execute(text("INSERT INTO orders (id) VALUES (:id)"), {"id": id})
        tx.publish(order(id, topic=source, payload=json.dumps({"n": int(id)}).encode()))


asyncio.run(main())
