"""The demo itself, whole: the promise of `make demo`."""

import json
import os
import subprocess
import sys

import pytest


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
    assert (tmp_path / "run" / "exports" / "merged-quantized" / "model.safetensors").is_file()
