"""Clients that mean no good, or that are slow: they cost nobody else anything."""

import asyncio
import socket
import threading
import time
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace

import httpx
import pytest

from lorafit.errors import AdapterError, RunDirError, UsageError
from lorafit.serve.connections import GuardedConnection, allow_many_connections
from lorafit.serve.decoding import Generation, Sampling, Scheduler
from lorafit.serve.http import requests
from lorafit.serve.http.access import _key_in
from lorafit.serve.tenants import Tenants
from made_runs import MOST_TOKENS, QUESTIONS
from made_server import ADMIN, KEY, listening

MANY = 1000
LONG_KEY = "k" * 5000
WRONG_KEYS = {
    "empty": b"Bearer ",
    "the word alone": b"Bearer",
    "no word": KEY.encode(),
    "another word": b"Basic " + KEY.encode(),
    "shorter": f"Bearer {KEY[:-1]}".encode(),
    "longer": f"Bearer {KEY}x".encode(),
    "very long": b"Bearer " + KEY.encode() * 2000,
    "not ASCII": "Bearer owner-këy-0123456789".encode(),
    "no text at all": b"Bearer \xff\xfe\x80",
    "two in one": f"Bearer {KEY}, Bearer {ADMIN}".encode(),
}


@contextmanager
def connection(url):
    """A plain socket to the server."""
    host, _, port = url.removeprefix("http://").partition(":")
    with socket.create_connection((host, int(port)), timeout=10) as opened:
        yield opened


def status_with(url, header):
    """The status of the answer to a request with this `authorization`."""
    with connection(url) as opened:
        opened.sendall(b"GET /v1/models HTTP/1.1\r\nhost: x\r\nauthorization: " + header + b"\r\n\r\n")
        return opened.recv(1 << 16).split()[1]


def is_closed(opened, within_s):
    """Whether the server ends the connection in that time."""
    opened.settimeout(within_s)
    try:
        while opened.recv(1 << 16):
            pass
    except TimeoutError:
        return False
    except ConnectionError:
        pass
    return True


def test_only_the_very_key_is_one(served):
    statuses = {what: status_with(served.url, header) for what, header in WRONG_KEYS.items()}
    assert set(statuses.values()) == {b"401"}, statuses
    assert status_with(served.url, f"bEARER   {KEY} ".encode()) == b"200"
    tenants = Tenants.of(LONG_KEY, ADMIN)
    for header in ("authorization", "x-api-key"):
        word = "Bearer " if header == "authorization" else ""
        for key, found in ((LONG_KEY, True), (LONG_KEY[:-1], False), (LONG_KEY + "k", False)):
            given = _key_in({"headers": [(header.encode(), (word + key).encode())]})
            assert (tenants.find(given) is not None) is found


def test_a_thousand_idle_connections_hold_nobody_up(served, client, own_answers):
    allow_many_connections()
    with ExitStack() as opened:
        for _ in range(MANY):
            opened.enter_context(connection(served.url))
        answer = client.chat.completions.create(
            model="bob", messages=[{"role": "user", "content": QUESTIONS[0]}], max_completion_tokens=MOST_TOKENS
        )
        assert answer.choices[0].message.content == own_answers["bob", 0]


@pytest.fixture(scope="module")
def impatient():
    """A server that waits half a second for a request and for a reader; it notes clients that went."""
    seen = SimpleNamespace(gone=threading.Event(), url="")

    async def app(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})
        if scope["path"] == "/slow":
            await asyncio.sleep(1.4)  # an answer takes as long as it takes
        leaving = asyncio.create_task(left(receive))
        while scope["path"] == "/endless" and not leaving.done():
            await send({"type": "http.response.body", "body": b"x" * (1 << 16), "more_body": True})
        seen.gone.set() if leaving.done() else leaving.cancel()
        await send({"type": "http.response.body", "body": b"done"})

    async def left(receive):
        while (await receive())["type"] != "http.disconnect":
            pass

    guarded = type("Impatient", (GuardedConnection,), {"stuck_s": 0.5})
    with listening(app, lifespan="off", http=guarded, timeout_keep_alive=0.5, log_level="critical") as seen.url:
        yield seen


def test_a_client_that_sends_no_request_is_let_go(impatient):
    with ExitStack() as opened:
        idle, dribbling, second = (opened.enter_context(connection(impatient.url)) for _ in range(3))
        answering = opened.enter_context(connection(impatient.url))
        answering.sendall(b"GET /slow HTTP/1.1\r\nhost: x\r\n\r\n")
        second.sendall(b"GET / HTTP/1.1\r\nhost: x\r\n\r\nGET / HTTP/1.1\r\nx: ")
        began = time.monotonic()
        ended = {}
        while len(ended) < 2 and time.monotonic() - began < 6:
            for name, each in (("dribbling", dribbling), ("second", second)):
                try:
                    each.sendall(b"G" if name == "dribbling" else b"y")
                except OSError:
                    ended.setdefault(name, time.monotonic() - began)
            time.sleep(0.05)
        assert set(ended) == {"dribbling", "second"} and max(ended.values()) < 5, ended
        assert is_closed(idle, 0.5)
        answering.settimeout(5)
        said = b""
        while b"done" not in said and (piece := answering.recv(4096)):
            said += piece
        assert b"done" in said, "an answer that takes longer is not cut"


def test_a_client_that_does_not_read_is_let_go_and_its_work_ends(impatient):
    impatient.gone.clear()
    with connection(impatient.url) as opened:
        opened.sendall(b"GET /endless HTTP/1.1\r\nhost: x\r\n\r\n")
        assert impatient.gone.wait(5)


def test_a_body_that_does_not_come_is_answered_with_408(served, monkeypatch):
    monkeypatch.setattr(requests, "BODY_S", 0.2)
    with connection(served.url) as opened:
        head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {KEY}\r\n"
        opened.sendall(f"{head}content-length: 500\r\n\r\n{{".encode())
        assert b"408" in opened.recv(1 << 16).split(b"\r\n")[0]
        assert is_closed(opened, 3)


@pytest.mark.parametrize(
    "lines",
    [
        b"GET /v1/%ff%fe HTTP/1.1\r\nhost: x\r\nx-api-key: " + KEY.encode(),
        b"GET /v1/models?\xff HTTP/1.1\r\nhost: x\r\nx-api-key: " + KEY.encode(),
        b"GET /v1/%00models HTTP/1.1\r\nhost: x\r\nx-api-key: " + KEY.encode(),
        b"GET / HTTP/1.1\r\nhost: x\r\n" + b"a: b\r\n" * 20_000,
        b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: -1",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
    ],
    ids=["path no UTF-8", "query no ASCII", "NUL", "headers without end", "negative length", "TLS"],
)
def test_what_is_no_request_is_a_4xx_or_the_end_of_the_connection(served, lines):
    with connection(served.url) as opened:
        try:
            opened.sendall(lines + b"\r\n\r\n")
            first = opened.recv(1 << 16).split(b"\r\n")[0]
        except ConnectionError:
            first = b""
        assert not first or first.split()[1].startswith(b"4"), first
    assert httpx.get(f"{served.url}/ready", headers={"x-api-key": KEY}).status_code == 200


def test_requests_of_clients_that_left_make_nobody_wait():
    ended = []
    scheduler = Scheduler(None, None, None)
    waiting = [
        Generation([1], None, Sampling(), 1, frozenset(), None, lambda reason, error: ended.append(reason), tenant)
        for tenant in ("a", "b")
        for _ in range(50)
    ]
    for each in waiting:
        scheduler.submit(each)
    for each in waiting[:-1]:
        scheduler.cancel(each)
    scheduler._drop_cancelled()
    assert ended == ["cancelled"] * 99 and scheduler.load == (0, 1)


def test_no_link_leads_to_another_users_adapter(served, runs, tmp_path):
    import shutil

    theirs = shutil.copytree(runs["bob"], tmp_path / "theirs")
    root = runs["alice"].parent
    outside, inside, file = root / "link", root / "linked-adapter", root / "linked-file"
    outside.symlink_to(theirs)
    shutil.copytree(theirs, inside, ignore=shutil.ignore_patterns("adapter"))
    (inside / "adapter").symlink_to(theirs / "adapter")
    shutil.copytree(theirs, file)
    (file / "adapter" / "adapter_model.safetensors").unlink()
    (file / "adapter" / "adapter_model.safetensors").symlink_to(theirs / "adapter" / "adapter_model.safetensors")
    try:
        for path in (outside, inside, file, root / ".." / tmp_path.name / "theirs", theirs, root / "link" / "adapter"):
            with pytest.raises((UsageError, AdapterError, RunDirError)):
                served.engine.add_adapter("mine", path)
    finally:
        for path in (inside, file):
            shutil.rmtree(path)
        outside.unlink()
    assert "mine" not in served.engine.pool.names()
