"""A server on a port of its own, in a thread, with the sockets of `lorafit serve`."""

import threading
import time
from contextlib import contextmanager

import uvicorn

from lorafit.serve.connections import socket_config

KEY, ADMIN = "owner-key-0123456789", "admin-key-0123456789"
ACME = "acme-key-0123456789abc"
TENANTS = f"""
tenants:
  acme: {{key: {ACME}, adapters: [alice], requests_per_minute: 5, concurrent: 2, priority: 2.0}}
"""


@contextmanager
def listening(app, **settings):
    """The address of `app`."""
    running = uvicorn.Server(socket_config(app, port=0, **settings))
    thread = threading.Thread(target=running.run, daemon=True)
    thread.start()
    while not running.started:
        time.sleep(0.01)
    yield f"http://127.0.0.1:{running.servers[0].sockets[0].getsockname()[1]}"
    running.should_exit = True
    thread.join(20)
