"""Engines in a process of their own: keys, tenants and adapters before them, and a new start when they end."""

import json
import os
import signal
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import httpx
import openai
import pytest
import uvicorn
import yaml

from lorafit.api.load import load
from lorafit.errors import AdapterError, ProgramError, UsageError, VerificationError
from lorafit.export.serving.adapters_folder import vllm_settings
from lorafit.serve.engines import ServedFolder, SupervisedEngine, engine_for, supervised_engine
from lorafit.serve.http import ServerOptions
from lorafit.serve.http.forwarding import make_forwarding_app
from lorafit.serve.http.metrics import Metrics
from lorafit.serve.http.server import Server
from lorafit.serve.tenants import Tenants

KEY, ACME = "owner-key-0123456789", "acme-key-0123456789abc"
STUB = Path(__file__).parent.parent / "stub_engine.py"
HELLO = [{"role": "user", "content": "Hello"}]
TICKET = [{"role": "user", "content": "Route this ticket to a queue.\nThe courier lost my red lamp."}]


def write_adapter(folder, rank=4, template="{{ messages }}", status="proved"):
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text(json.dumps({"r": rank}))
    (folder / "adapter_model.safetensors").write_bytes(b"")
    (folder / "chat_template.jinja").write_text(template)
    (folder / "verification.json").write_text(json.dumps({"engines": [{"status": status}]}))
    return folder


@contextmanager
def door_to(engine, tmp, tenants=""):
    """A server before `engine`, on a port of its own."""
    file = None
    if tenants:
        file = tmp / "tenants.yaml"
        file.write_text(tenants)
    server = Server(engine, Tenants.of(KEY, KEY, file), Metrics(), ServerOptions(usage_log=tmp / "usage.jsonl"))
    engine._on_crash = server.metrics.on_crash
    running = uvicorn.Server(uvicorn.Config(make_forwarding_app(server), port=0, log_level="warning", lifespan="on"))
    thread = threading.Thread(target=running.run, daemon=True)
    thread.start()
    while not running.started:
        time.sleep(0.01)
    url = f"http://127.0.0.1:{running.servers[0].sockets[0].getsockname()[1]}"
    client = openai.OpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0)
    yield SimpleNamespace(url=url, client=client, server=server, log=tmp / "usage.jsonl")
    running.should_exit = True
    thread.join(20)


def post(door, path, body, key=KEY):
    return httpx.post(f"{door.url}{path}", json=body, headers={"authorization": f"Bearer {key}"}, timeout=20)


def said(door, model, messages=HELLO, **more):
    answer = door.client.chat.completions.create(model=model, messages=messages, **more)
    return answer.choices[0].message.content


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder as `lorafit export --to adapter` writes it, without weights."""
    folder = tmp_path_factory.mktemp("supervised") / "served"
    for name in ("alice", "bob"):
        write_adapter(folder / "adapters" / name)
    (folder / "base").mkdir()
    (folder / "base" / "chat_template.jinja").write_text("{{ messages }}")
    (folder / "serving.yaml").write_text(yaml.safe_dump(vllm_settings({"alice": 4, "bob": 12}, "base")))
    return folder


@pytest.fixture(scope="module")
def make(folder, tmp_path_factory):
    """A function that makes the engine of a folder over the stand-in."""
    program = tmp_path_factory.mktemp("program") / "vllm"
    program.write_text(f'#!/bin/sh\nPYTHONPATH={STUB.parent} exec {sys.executable} {STUB} "$@"\n')
    program.chmod(0o755)
    sizes = {"texts": 4, "tokens": 256, "adapter_dirs": [], "on_gpu": False, "on_crash": lambda error: None}

    def made(target=folder, **more):
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("LORAFIT_VLLM", str(more.pop("program", program)))
            return supervised_engine("vllm", target, None, **{**sizes, **more})

    return made


@pytest.fixture(scope="module")
def door(make, tmp_path_factory):
    engine = make()
    engine.start()
    tenants = f"tenants:\n  acme: {{key: {ACME}, adapters: [alice], requests_per_minute: 2}}\n"
    with door_to(engine, tmp_path_factory.mktemp("door"), tenants) as opened:
        yield opened


def seen(door):
    return httpx.get(f"{door.server.engine.url}/seen").json()


def test_every_adapter_answers_through_the_door_and_greedily(door):
    assert [said(door, name) for name in ("base", "alice", "bob")] == ["base", "alice", "bob"]
    assert said(door, "alice", temperature=0.7) == "alice"
    assert [body["temperature"] for body in seen(door)["bodies"][-2:]] == [0, 0.7]
    chunks = list(door.client.chat.completions.create(model="bob", messages=HELLO, stream=True))
    assert "".join(chunk.choices[0].delta.content for chunk in chunks) == "bob"
    assert {model.id for model in door.client.models.list()} == {"base", "alice", "bob"}
    used = [json.loads(line) for line in door.log.read_text().splitlines()]
    assert used[0]["completion_tokens"] == 2 and used[-1]["first_token_ms"] is not None


def test_vllm_gets_the_flags_of_the_export_and_no_hub(door):
    told = seen(door)
    assert (told["flags"]["model"], told["flags"]["max-lora-rank"]) == ("base", "16")
    assert told["flags"]["enable-lora"] is True and told["flags"]["max-model-len"] == "256"
    assert told["environment"]["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] == told["environment"]["HF_HUB_OFFLINE"] == "1"


def test_keys_tenants_and_wrong_requests_are_answered_at_the_door(door):
    ask = {"model": "bob", "messages": HELLO}
    assert post(door, "/v1/chat/completions", ask, "wrong").status_code == 401
    assert post(door, "/v1/chat/completions", ask, ACME).status_code == 403
    assert post(door, "/v1/load_lora_adapter", {"lora_name": "x", "lora_path": "y"}, ACME).status_code == 403
    assert post(door, "/v1/chat/completions", {**ask, "model": "nobody"}).status_code == 404
    assert post(door, "/v1/chat/completions", {**ask, "n": 99}).status_code == 400
    assert post(door, "/v1/chat/completions", {"messages": HELLO}).status_code == 400
    statuses = [post(door, "/v1/chat/completions", {**ask, "model": "alice"}, ACME).status_code for _ in range(3)]
    assert statuses == [200, 200, 429]
    assert {model["id"] for model in httpx.get(
        f"{door.url}/v1/models", headers={"authorization": f"Bearer {ACME}"}
    ).json()["data"]} == {"alice"}  # fmt: skip


def test_adapters_are_checked_before_they_are_loaded_at_run_time(door, folder, tmp_path):
    engine, adapters = door.server.engine, folder / "adapters"
    write_adapter(adapters / "wide", rank=64)
    write_adapter(adapters / "other", template="{{ other }}")
    write_adapter(adapters / "failed", status="failed")
    write_adapter(adapters / "pickled")
    (adapters / "pickled" / "x.ckpt").write_bytes(b"")
    outside = write_adapter(tmp_path / "outside")
    weights = write_adapter(adapters / "linked") / "adapter_model.safetensors"
    weights.unlink()
    weights.symlink_to(outside / weights.name)
    for name, error, reason in (
        ("wide", UsageError, "rank 64, and the server takes ranks up to 16"),
        ("other", VerificationError, "another chat template"),
        ("failed", VerificationError, "not proved"),
        ("pickled", AdapterError, "only safetensors"),
        ("linked", UsageError, "not loaded from this place"),
    ):
        with pytest.raises(error, match=reason):
            engine.add_adapter(name, adapters / name)
    with pytest.raises(UsageError, match="not loaded from this place"):
        engine.add_adapter("outside", outside)
    body = {"lora_name": "alice", "lora_path": str(adapters / "bob")}
    assert post(door, "/v1/load_lora_adapter", body).status_code == 400
    assert set(seen(door)["models"]) == {"base", "alice", "bob"}


def test_a_killed_engine_answers_503_and_starts_again_with_its_adapters(door, folder):
    engine = door.server.engine
    write_adapter(folder / "adapters" / "carol")
    assert post(
        door, "/v1/load_lora_adapter", {"lora_name": "carol", "lora_path": str(folder / "adapters/carol")}
    ).is_success
    assert post(door, "/v1/unload_lora_adapter", {"lora_name": "bob"}).is_success
    assert said(door, "carol") == "carol"
    os.kill(engine.process_id, signal.SIGKILL)
    statuses, deadline = set(), time.monotonic() + 30
    while (status := post(door, "/v1/chat/completions", {"model": "carol", "messages": HELLO}).status_code) != 200:
        statuses.add(status)
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert statuses == {503} and engine.restarts == 1 and engine.state == "ready"
    assert said(door, "alice") == "alice"
    assert set(seen(door)["models"]) == {"base", "alice", "carol"}
    assert "lorafit_engine_crashes_total 1.0" in door.server.metrics.text().decode()


def test_a_client_that_leaves_ends_the_engines_work(door):
    before = seen(door)["cancelled"]
    with httpx.stream(
        "POST", f"{door.url}/v1/chat/completions", json={"model": "base", "messages": HELLO, "stream": True},
        headers={"authorization": f"Bearer {KEY}"},
    ) as answer:  # fmt: skip
        next(answer.iter_lines())
    deadline = time.monotonic() + 10
    while seen(door)["cancelled"] == before:
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_a_program_that_ends_at_once_is_one_sentence(make, tmp_path):
    program = tmp_path / "vllm"
    program.write_text("#!/bin/sh\necho 'RuntimeError: no such device' && exit 3\n")
    program.chmod(0o755)
    engine = make(program=program)
    with pytest.raises(ProgramError, match=r"ended at its start .RuntimeError: no such device"):
        engine.start()
    assert engine.state == "failed" and engine.process_id is None


def test_a_stop_ends_the_program_that_is_just_being_started_again():
    made, began, may_run = [], threading.Event(), threading.Event()

    class Slow:
        name = "slow"

        def __init__(self):
            self.is_running = False
            made.append(self)

        def start(self):
            if len(made) > 1:
                began.set()
                may_run.wait(10)
            self.is_running = True

        def wait_until_healthy(self, timeout_s, stopped):
            if stopped():
                raise ProgramError("it ended at its start")

        def stop(self, timeout_s=1.0):
            self.is_running = False
            if began.is_set():
                may_run.set()

        def last_words(self):
            return ""

    engine = SupervisedEngine(Slow, ServedFolder("base"), lambda error: None)
    engine.start()
    made[0].is_running = False
    assert began.wait(10)
    engine.stop()
    assert len(made) == 2 and may_run.is_set()
    assert not made[1].is_running and engine.state == "stopped"


def test_the_engine_follows_from_what_is_served(tiny_run, folder, tmp_path):
    run, gguf = tiny_run.run.path, tmp_path / "x.gguf"
    gguf.write_bytes(b"")
    assert [engine_for([each], "auto") for each in (run, folder, gguf)] == ["builtin", "vllm", "llamacpp"]
    with pytest.raises(UsageError, match="engine vllm does not serve this; export the run with --to adapter"):
        engine_for([run], "vllm")
    with pytest.raises(UsageError, match="the engine builtin does not serve this"):
        engine_for([run, folder], "auto")
    with pytest.raises(UsageError, match="serves one folder"):
        engine_for([folder, folder], "auto")


def assert_a_kept_prompt_changes_nothing(url):
    """Ask llama.cpp itself twice with its kept prompt, and once without."""
    body = {"messages": TICKET, "max_tokens": 12, "logprobs": True, "lora": [{"id": 0, "scale": 1.0}]}
    told = [
        httpx.post(f"{url}/v1/chat/completions", json={**body, "cache_prompt": keeps}, timeout=20).json()
        for keeps in (False, True, True)
    ]
    fresh, *_, kept = [
        [(one["id"], one["logprob"]) for one in each["choices"][0]["logprobs"]["content"]] for each in told
    ]
    assert told[0]["timings"]["cache_n"] == 0 < told[-1]["timings"]["cache_n"], (
        "the last one took its prompt from before"
    )
    assert [token for token, _ in kept] == [token for token, _ in fresh]
    assert [chance for _, chance in kept] == pytest.approx([chance for _, chance in fresh], abs=1e-3)


def test_a_lora_file_answers_as_the_run_through_llama_cpp_and_its_base_beside_it(tiny_run, tmp_path):
    pytest.importorskip("xllamacpp")
    from lorafit.api.ship.export import export

    out = tmp_path / "served"
    exported = export(tiny_run.run.path, to="gguf-lora", quantization="f16", out=out, name="tickets")
    assert engine_for([out], "auto") == "llamacpp"
    sizes = {"texts": 2, "tokens": 512, "adapter_dirs": [], "on_gpu": False, "on_crash": lambda error: None}
    engine = supervised_engine("llamacpp", exported.folder, None, **sizes)
    engine.start()
    session = load(tiny_run.run.path)
    own, base = (session.answer(TICKET, max_new_tokens=12, tuned=tuned) for tuned in (True, False))
    with door_to(engine, tmp_path) as door:
        assert said(door, "tickets", TICKET, max_tokens=12) == own != base
        assert said(door, "base", TICKET, max_tokens=12) == base
        assert_a_kept_prompt_changes_nothing(engine._program.url)
        others = [{"id": 0, "scale": 1.0}]
        assert said(door, "base", TICKET, max_tokens=12, extra_body={"lora": others}) == base, (
            "a client chooses no other's"
        )
        with pytest.raises(UsageError, match="loads no adapters"):
            engine.add_adapter("x", tmp_path)
    assert engine.state == "stopped"
