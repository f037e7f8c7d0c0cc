"""docs/engine.md: its picture is today's estimate, and what it names exists."""

import json
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

from lorafit.config import RunConfig
from lorafit.config.memory_policy import MemoryPolicy
from lorafit.engine import Rehearsal

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "engine.md").read_text()
PICTURE = ROOT / "docs" / "engine-memory.svg"


def described(picture: Path) -> dict[str, tuple[float, float]]:
    """GiB on the card and on the host by setting, as the picture's description has them."""
    text = re.search(r"<dc:description>(.*?)</dc:description>", picture.read_text(), re.DOTALL)[1]
    found = re.findall(r"(\S+): ([\d.]+) GiB, host ([\d.]+)", text)
    return {policy: (float(card), float(host)) for policy, card, host in found}


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
        "print(json.dumps([[s.policy, s.measured, m.bar_of(s).total] for s in m.SETTINGS if s.measured]))"
    )
    ended = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT / "bench", capture_output=True, text=True, check=True, timeout=100
    )
    measured = json.loads(ended.stdout)
    assert len(measured) == 5
    for policy, peak, estimate in measured:
        assert estimate == pytest.approx(peak, rel=0.10), policy


def test_every_file_that_the_page_names_exists():
    named = re.findall(r"`((?:api|backbone|config|engine|hardware|memory|planning|shapes)/(?:\w+/)?\w+\.py)`", PAGE)
    assert len(set(named)) >= 20
    for path in named:
        assert (ROOT / "src" / "lorafit" / path).exists(), path
    for path in re.findall(r"bench/\w+\.py", PAGE):
        assert (ROOT / path).exists(), path


def test_every_setting_that_the_page_writes_is_one():
    written = re.findall(r"--set (\w+)=(\S+)", PAGE) + re.findall(r"`(\w+): (\w+)`", PAGE)
    assert {"memory_policy", "compile", "compute"} <= {key for key, _ in written}
    for key, value in written:
        config = RunConfig(**{key: value})
        if key == "memory_policy":
            assert MemoryPolicy.parse(config.memory_policy, layers=32) != MemoryPolicy() or value == "keep"


def test_every_key_of_engine_json_that_the_page_names_is_written():
    listed = re.search(r"\*\*Written\*\* to `engine.json`.*?: (.*)\.\n", PAGE)[1]
    keys = set(re.findall(r"`(\w+)`", listed))
    assert keys and keys <= {field.name for field in fields(Rehearsal)} | {"asked", "planned", "gpu_memory", "notes"}
