"""The soak in its short form: clients leave, adapters come and go. The whole: bench/serve_soak.py."""

import asyncio
import os
import sys
import threading
import time
from pathlib import Path

import pytest
import uvicorn

from lorafit.serve.http import ServerOptions, make_app
from lorafit.serve.http.metrics import Metrics
from lorafit.serve.http.server import Server
from lorafit.serve.tenants import Tenants
from made_runs import MOST_TOKENS, QUESTIONS

BENCH = str(Path(__file__).parent.parent.parent / "bench")
KEY = "owner-key-0123456789"
SECONDS = 3.0


@pytest.fixture
def soaking(make_engine, runs, monkeypatch):
    """The soak's module, and the address of a server of three adapters in a thread."""
    monkeypatch.syspath_prepend(BENCH)
    engine = make_engine()
    for name, run in runs.items():
        engine.add_adapter(name, run)
    engine.scheduler.watch = metrics = Metrics()
    server = Server(engine, Tenants.of(KEY, KEY, None), metrics, ServerOptions(drain_s=1))
    running = uvicorn.Server(uvicorn.Config(make_app(server), port=0, log_level="warning", lifespan="on"))
    thread = threading.Thread(target=running.run, daemon=True)
    thread.start()
    while not running.started:
        time.sleep(0.01)
    import serve_soak

    monkeypatch.setattr(serve_soak, "QUESTIONS", QUESTIONS)
    monkeypatch.setattr(serve_soak, "NEW", MOST_TOKENS)
    yield serve_soak, f"http://127.0.0.1:{running.servers[0].sockets[0].getsockname()[1]}"
    running.should_exit = True
    thread.join(20)
    for name in ("serve_soak", "serve_http", "serve_engine"):
        sys.modules.pop(name, None)


def test_no_answer_is_another_adapters_while_clients_leave_and_adapters_come_and_go(soaking, runs):
    module, url = soaking
    soak = asyncio.run(module.run(url, KEY, os.getpid(), runs, seconds=SECONDS, clients=6, kill_s=0))
    assert soak.wrong == []
    assert soak.seen["right"] > 3 and soak.seen["left"] and soak.seen["loaded"]
    taken = soak.own["alice", "Hello"]
    soak.judge("bob", "Hello", taken, left=False)
    assert soak.seen["of another adapter"] == 1, "the soak sees an answer of another adapter"
