"""The command: it prints an address and a key, answers, and finishes running answers on SIGTERM."""

import json
import os
import signal
import subprocess
import sys

import httpx
import pytest

from lorafit.cli.app import main
from lorafit.demo import BASE
from lorafit.errors import UsageError
from lorafit.serve.tenants import read_tenants

BODY = {"model": "alice", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 40}


@pytest.mark.slow
def test_a_started_server_answers_with_its_key_and_drains_on_sigterm(runs, own_answers):
    command = [sys.executable, "-m", "lorafit", "serve", str(runs["alice"]), "--port", "0", "--json"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("LORAFIT_A")}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, env=environment, text=True)
    try:
        lines = iter(process.stdout.readline, "}\n")
        started = json.loads("".join(lines) + "}")
        assert started["address"].startswith("http://127.0.0.1:") and started["models"] == [BASE.name, "alice"]
        headers = {"authorization": f"Bearer {started['api_key']}"}
        assert httpx.get(f"{started['address']}/v1/models").status_code == 401
        with httpx.Client(base_url=started["address"], headers=headers, timeout=30) as client:
            whole = client.post("/v1/chat/completions", json=BODY).json()["choices"][0]["message"]["content"]
            assert whole.startswith(own_answers["alice", 1])
            with client.stream("POST", "/v1/chat/completions", json={**BODY, "stream": True}) as answer:
                lines = answer.iter_lines()
                first = next(lines)
                process.send_signal(signal.SIGTERM)
                chunks = [json.loads(line[6:]) for line in (first, *lines) if line.startswith("data: {")]
        assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks) == whole
        assert process.wait(20) in (0, -signal.SIGTERM)
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["nowhere"], "no such folder"),
        (["RUN", "RUN/../alice"], "two runs are called alice"),
        (["RUN", "--api-key-file", "missing"], "the API key cannot be read"),
        (["RUN", "--tenants", "missing"], "cannot read"),
    ],
)
def test_what_cannot_start_is_one_sentence(runs, capsys, arguments, reason, monkeypatch):
    monkeypatch.setenv("LORAFIT_API_KEY", "x" * 32)
    with pytest.raises(SystemExit) as ended:
        main(["serve", *(word.replace("RUN", str(runs["alice"])) for word in arguments)])
    assert ended.value.code in (1, 2)
    assert reason in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("key", "reason"), [("short", "fewer than 16 characters"), ("schlüssel-0123456789", "beyond ASCII")]
)
def test_a_key_that_is_short_or_that_no_header_carries_is_refused(runs, capsys, monkeypatch, key, reason):
    monkeypatch.setenv("LORAFIT_API_KEY", key)
    with pytest.raises(SystemExit):
        main(["serve", str(runs["alice"])])
    assert reason in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    "text",
    [
        "tenants: {}",
        "other: 1",
        "tenants: {a: {key: short}}",
        "tenants: {a: {key: schlüssel-0123456789}}",
        "tenants: {a: {key: aaaaaaaaaaaaaaaaaaaa, concurrent: 0}}",
        "tenants: {a: {key: aaaaaaaaaaaaaaaaaaaa, typo: 1}}",
        "tenants: {owner: {key: aaaaaaaaaaaaaaaaaaaa}}",
    ],
)
def test_a_wrong_file_of_tenants_is_refused(tmp_path, text):
    (tmp_path / "tenants.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(UsageError):
        read_tenants(tmp_path / "tenants.yaml")
