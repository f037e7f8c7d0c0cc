"""The tampering campaign in its short form: every file of a run is changed. The whole: bench/tampering.py."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).parent.parent / "bench" / "tampering.py"


@pytest.mark.slow
def test_no_changed_file_of_a_run_is_taken_up_in_silence():
    command = [sys.executable, str(BENCH), "--short"]
    ended = subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=300
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr[-3000:]
    assert "| merge |" in ended.stdout
