"""What `--deterministic` costs on this machine, what a save costs the training thread, and whether bits come back.

`python bench/deterministic.py BASE DATA [KEY=VALUE …]` trains twice undisturbed and once stopped half way and resumed,
without and with `--deterministic`, and prints a table; a step's time is the median over all but the first five.
"""

import contextlib
import hashlib
import os
import signal
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from transformers import TrainerCallback

from lorafit.api.train import train
from lorafit.config import parse_assignments
from lorafit.errors import TrainingStopped

STEPS, WARM = 30, 5


class Watch(TrainerCallback):
    """Times steps and saves; stops the run after step `stop`."""

    def __init__(self, stop: int = 0) -> None:
        self.stop, self.began, self.ended = stop, 0.0, 0.0
        self.steps: list[float] = []
        self.saves: list[float] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        _wait()
        self.began = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        _wait()
        self.ended = time.perf_counter()
        self.steps.append(self.ended - self.began)
        if state.global_step == self.stop:
            os.kill(os.getpid(), signal.SIGTERM)

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.saves.append(time.perf_counter() - self.ended)


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def run(folder: Path, data: str, base: str, stop: int = 0, **settings: Any) -> Watch:
    """One process' worth of training in `folder`."""
    watch = Watch(stop)
    given = {"max_steps": STEPS, "save_steps": 10, "holdout": 0.0, **settings}
    with contextlib.suppress(TrainingStopped):
        train(data, base, out=folder, callbacks=[watch], **given)
    return watch


def bits(folder: Path) -> str:
    """A hash of the final adapter and of the metrics."""
    files = (folder / "adapter" / "adapter_model.safetensors", folder / "metrics.jsonl")
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()


def main() -> None:
    base, data, *assignments = sys.argv[1:]
    settings = parse_assignments(assignments)
    print("| | step | save, on the training thread | again, same bits | stopped and resumed, same bits |")
    print("|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as name:
        for asked in (False, True):
            folder = Path(name) / str(asked)
            first = run(folder / "one", data, base, deterministic=asked, **settings)
            run(folder / "two", data, base, deterministic=asked, **settings)
            run(folder / "cut", data, base, STEPS // 2, deterministic=asked, **settings)
            run(folder / "cut", data, base, deterministic=asked, **settings)
            same = [bits(folder / "one") == bits(folder / other) for other in ("two", "cut")]
            words = " | ".join("yes" if one else "no" for one in same)
            times = f"{median(first.steps[WARM:]) * 1e3:.1f} ms | {median(first.saves) * 1e3:.1f} ms"
            print(f"| {'--deterministic' if asked else 'default'} | {times} | {words} |", flush=True)


if __name__ == "__main__":
    main()
