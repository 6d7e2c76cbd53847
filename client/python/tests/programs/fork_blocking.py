"""Publishes, forks while connected and while another thread is about to publish, and publishes on both sides."""

import os
import sys
import threading

from events import order

from outbox_client import Config, OutboxClient

client = OutboxClient(Config(sys.argv[1], "test", plaintext=True))
client.publish(order("before"))
thread = threading.Thread(target=lambda: client.publish(order("thread")))
thread.start()
pid = os.fork()
if pid == 0:
    client.publish(order("child"))
    client.close()
    print("child ok", flush=True)
    os._exit(0)
assert os.waitpid(pid, 0)[1] == 0
thread.join()
client.publish(order("after"))
client.close()
print("parent ok", flush=True)
