"""docs/concepts/memory.md: its picture is today's estimate."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PICTURE = ROOT / "docs" / "concepts" / "memory.svg"


def described(picture: Path) -> dict[str, tuple[float, float]]:
    """GiB on the GPU and on the host by setting, as the picture's description has them."""
    text = re.search(r"<dc:description>(.*?)</dc:description>", picture.read_text(), re.DOTALL)[1]
    found = re.findall(r"(\S+): ([\d.]+) GiB, host ([\d.]+)", text)
    return {policy: (float(gpu), float(host)) for policy, gpu, host in found}


def test_the_picture_is_drawn_alike_each_time_and_shows_todays_estimate(tmp_path):
    script = str(ROOT / "bench" / "memory_picture.py")
    drawn = [tmp_path / name for name in ("one.svg", "two.svg")]
    for path in drawn:
        subprocess.run([sys.executable, script, str(path)], check=True, timeout=100)
    assert drawn[0].read_bytes() == drawn[1].read_bytes()
    shown, today = described(PICTURE), described(drawn[0])
    assert len(today) == 10 and list(shown) == list(today), "draw it again: python bench/memory_picture.py PICTURE"
    for policy, sizes in today.items():
        assert shown[policy] == pytest.approx(sizes, rel=0.02, abs=0.02), f"draw it again: {policy} has changed"


def test_measured_peaks_lie_within_the_estimates_error():
    script = (
        "import json, memory_picture as m;"
        "print(json.dumps([[s.label, s.measured, m.bar_of(s).total] for s in m.SETTINGS if s.measured]))"
    )
    ended = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT / "bench", capture_output=True, text=True, check=True, timeout=100
    )
    measured = json.loads(ended.stdout)
    assert len(measured) == 5
    for policy, peak, estimate in measured:
        assert estimate == pytest.approx(peak, rel=0.10), policy
