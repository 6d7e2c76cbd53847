"""Makes both clients, as modules do at import, and forks workers that use them."""

import asyncio
import os
import sys

from events import order

from outbox_client import AsyncOutboxClient, Config, OutboxClient

config = Config(sys.argv[1], "test", plaintext=True)
blocking, asynchronous = OutboxClient(config), AsyncOutboxClient(config)


async def publish(id: str) -> None:
    await asynchronous.publish(order(id))
    await asynchronous.close()


children = []
for i in range(4):
    pid = os.fork()
    if pid == 0:
        blocking.publish(order(f"b{i}"))
        blocking.close()
        asyncio.run(publish(f"a{i}"))
        print("ok", flush=True)
        os._exit(0)
    children.append(pid)
for pid in children:
    assert os.waitpid(pid, 0)[1] == 0
