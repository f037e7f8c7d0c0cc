"""export --verify-in vllm: the verdict is vLLM's, asked through its own routes. A stand-in computes it here."""

import contextlib
import sys
import threading
from pathlib import Path

import pytest

import stub_vllm
from lorafit.api.ship.export import export
from lorafit.cli.app import main
from lorafit.errors import UsageError
from lorafit.export.verify import vllm_proof
from lorafit.programs import free_port, vllm_command

STUB = Path(__file__).parent.parent / "stub_vllm.py"


class InProcess:
    """The stand-in on a thread, for `Program`: this process has torch, whose import takes longer than the proof."""

    def __init__(self, program, settings, folder, log, **more):
        self.folder, port = folder, free_port()
        self.words, self.url = vllm_command(program, settings, port)[1:], f"http://127.0.0.1:{port}"

    def start(self):
        with contextlib.chdir(self.folder):
            self.server = stub_vllm.server_of(self.words)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def wait_until_healthy(self, timeout_s):
        pass

    def stop(self):
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture
def vllm(tmp_path, monkeypatch):
    """The stand-in as a program, and a function that breaks it."""
    program = tmp_path / "vllm"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} {STUB} "$@"\n')
    program.chmod(0o755)
    monkeypatch.setenv("LORAFIT_VLLM", str(program))
    return lambda how: monkeypatch.setenv("STUB_VLLM", how)


def proof_of(exported):
    return next(each for each in exported.verification["engines"] if each["engine"] == "vLLM")


@pytest.mark.slow
def test_an_adapter_is_proved_by_what_vllm_answers(tiny_run, tmp_path, vllm):
    exported = export(tiny_run.run.path, to="adapter", out=tmp_path / "served", name="one", verify_in="vllm")
    proof = proof_of(exported)
    assert (exported.verdict, proof["status"]) == ("proved", "proved"), proof["reason"]
    assert proof["prompts"]["equal"] == proof["prompts"]["total"] > 3
    assert proof["answers"]["equal"] >= proof["answers"]["rows"] - 1 > 8, "an answer may hang on a near tie"
    assert "| vLLM | proved |" in (exported.proved_in / "README.md").read_text()


@pytest.mark.slow
def test_a_vllm_that_answers_otherwise_fails_the_export(tiny_run, tmp_path, vllm, monkeypatch):
    monkeypatch.setattr(vllm_proof, "vllm_program", InProcess)
    monkeypatch.setattr(stub_vllm, "HARMS", {"weights", "template"})
    exported = export(tiny_run.run.path, to="adapter", out=tmp_path / "served", name="one", verify_in="vllm")
    proof = proof_of(exported)
    assert exported.verdict == "failed" and "above 10 × the noise floor" in proof["reason"]
    assert proof["prompts"]["equal"] == 0


@pytest.mark.slow
def test_a_vllm_that_is_missing_or_ends_is_not_proved_and_has_an_exit_code_of_its_own(
    tiny_run, tmp_path, vllm, monkeypatch, capsys
):
    vllm("exit")
    command = ["export", str(tiny_run.run.path), "--onto", "quantized", "--verify-in", "vllm", "--json"]
    for out in ("ends", "missing"):
        with pytest.raises(SystemExit) as ended:
            main([*command, "--out", str(tmp_path / out)])
        assert ended.value.code == 3
        said = capsys.readouterr().out
        assert ("no such device" if out == "ends" else "pip install vllm") in said
        assert (tmp_path / out / "model.safetensors").is_file()
        monkeypatch.setattr(sys.modules["lorafit.export.verify.vllm_proof"], "find_vllm", lambda: None)


def test_a_variable_that_names_no_program_is_told_before_anything_is_written(tiny_run, tmp_path, monkeypatch):
    monkeypatch.setenv("LORAFIT_VLLM", str(tmp_path / "nowhere"))
    with pytest.raises(UsageError, match="LORAFIT_VLLM names no program"):
        export(tiny_run.run.path, out=tmp_path / "unwritten")
    assert not (tmp_path / "unwritten").exists()


def test_vllm_is_not_asked_for_a_gguf_file(tiny_run):
    with pytest.raises(UsageError, match="vLLM proves no GGUF file"):
        export(tiny_run.run.path, to="gguf", verify_in="vllm")
