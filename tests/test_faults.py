"""The fault campaign in its short form: kill, damage, fill, block and poison runs. The whole: bench/faults.py."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).parent.parent / "bench" / "faults.py"


@pytest.mark.slow
def test_no_fault_of_the_short_campaign_loses_anything_or_passes_unseen():
    command = [sys.executable, str(BENCH), "--short"]
    ended = subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=600
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr[-3000:]
    assert "0 steps lost beyond the newest checkpoint" in ended.stdout
