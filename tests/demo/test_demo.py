"""The demo itself, whole: the promise of `make demo`."""

import json
import os
import subprocess
import sys

import pytest

from lorafit.errors import UsageError


@pytest.mark.slow
def test_the_demo_teaches_and_proves(tmp_path):
    command = [sys.executable, "-m", "lorafit", "demo", "--json", "--task", "tickets", "--seed", "1"]
    command += ["--out", str(tmp_path / "run")]
    # one thread: two, beside a neighbour test, would spend their time waiting for each other
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert ended.returncode == 0, ended.stderr
    result = json.loads(ended.stdout)
    assert result["exact_match_before"] <= 0.05
    assert result["exact_match_after"] >= 0.9
    assert result["verification"]["passed"]
    assert {"train_s", "total_s", "run"} <= set(result)
    assert (tmp_path / "run" / "exports" / "merged" / "model.safetensors").is_file()


def test_the_demo_has_a_mode_that_trains_every_weight(tmp_path, monkeypatch):
    """The same stages on few rows; that the whole mode teaches is the campaign's (bench/demo.py)."""
    from lorafit.api import demo as module

    monkeypatch.setattr(module, "TRAIN_ROWS", 24)
    monkeypatch.setattr(module, "HELD_OUT_ROWS", 8)
    result = module.demo("tickets", 1, tmp_path / "run", method="full").to_dict()
    assert (result["method"], result["verification"]["onto"]) == ("full", "whole")
    assert result["verification"]["passed"] and (tmp_path / "run" / "exports" / "full" / "config.json").is_file()
    with pytest.raises(UsageError, match="'dora' is no method"):
        module.demo("tickets", method="dora")
