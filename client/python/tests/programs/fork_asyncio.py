"""Forks while an asyncio client is connected: gRPC does not work in the child, and the client says so at once."""

import asyncio
import os
import sys

from events import order

from outbox_client import AsyncOutboxClient, Config, ForkError


async def main() -> None:
    client = AsyncOutboxClient(Config(sys.argv[1], "test", plaintext=True))
    await client.publish(order("before"))
    pid = os.fork()
    if pid == 0:
        try:
            await client.publish(order("child"))
        except ForkError as e:
            print("child", type(e).__name__, flush=True)
            os._exit(0)
        os._exit(1)
    assert os.waitpid(pid, 0)[1] == 0
    print("parent ok", flush=True)
    await client.close()


asyncio.run(main())
