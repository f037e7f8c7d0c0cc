"""The soak in its short form: clients leave, adapters come and go. The whole: bench/serve_soak.py."""

import asyncio
import os
import sys
from pathlib import Path

import pytest

from made_runs import MOST_TOKENS, QUESTIONS
from made_server import ADMIN

BENCH = str(Path(__file__).parent.parent.parent / "bench")
SECONDS = 3.0


@pytest.fixture
def soaking(served, monkeypatch):
    """The soak's module."""
    monkeypatch.syspath_prepend(BENCH)
    import serve_soak

    monkeypatch.setattr(serve_soak, "QUESTIONS", QUESTIONS)
    monkeypatch.setattr(serve_soak, "NEW", MOST_TOKENS)
    yield serve_soak
    for name in ("serve_soak", "serve_http", "serve_engine"):
        sys.modules.pop(name, None)


def test_no_answer_is_another_adapters_while_clients_leave_and_adapters_come_and_go(soaking, served, runs):
    options = {"seconds": SECONDS, "clients": 6, "kill_s": 0}
    soak = asyncio.run(soaking.run(served.url, ADMIN, os.getpid(), runs, **options))
    assert soak.wrong == []
    assert soak.seen["right"] > 3 and soak.seen["left"] and soak.seen["loaded"]
    taken = soak.own["alice", "Hello"]
    soak.judge("bob", "Hello", taken, left=False)
    assert soak.seen["of another adapter"] == 1, "the soak sees an answer of another adapter"


def test_a_server_that_ends_with_an_error_of_several_lines_is_read_whole(soaking):
    from serve_http import first_object

    told = b'{\n  "error": {\n    "what": "x"\n  }\n}\n'
    assert first_object(told.splitlines(keepends=True)) == {"error": {"what": "x"}}
    assert first_object([b"{\n"]) == {}
