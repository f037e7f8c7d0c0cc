"""Kill random processes of runs of several, at random steps or moments, and compare their ends bit by bit.

    PYTHONPATH=src:tests python bench/several_faults.py [--kills 100] [--world 2] [--limit 400]

Each run of `lorafit train --gpus` on gloo is killed a few times, resumed, and held against an uninterrupted one. Stops
by SIGTERM, to a process or to the launcher, are among the kills. Prints one JSON line a run and one in all; exit code 1
if a run ended in other bits, or a launch took over 30 seconds to end after a kill.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

from little_run import write_rows
from several_worker import Harm, launched

STEPS, KILLS_A_RUN = 8, 3
COMPARED = ("adapter/adapter_model.safetensors", "metrics.jsonl")


def harm_of(draw: random.Random, world: int, done: int) -> Harm:
    """Draw who is harmed after which step, of those after `done`, and how."""
    step, rank = min(STEPS - 1, done + draw.randrange(1, 4)), draw.randrange(world)
    way = draw.choice(["kill", "kill", "kill", "stop", "stop all"])
    number = signal.SIGKILL if way == "kill" else signal.SIGTERM
    return Harm(rank=rank, step=step, signal=int(number), to_launcher=way == "stop all")


def last_step(run: Path) -> int:
    """Return the newest checkpoint's step."""
    return max((int(folder.name.removeprefix("step-")) for folder in run.glob("checkpoints/step-*")), default=0)


def campaign(folder: Path, kills: int, world: int, limit_s: float) -> bool:
    """Run until `kills` or `limit_s`; return True if every run ended in the bits of the whole one."""
    draw, data, began = random.Random(0), write_rows(folder / "rows.jsonl", 40), time.monotonic()
    whole = folder / "whole"
    assert launched(data, whole, world=world).code == 0
    done = runs = identical = codes_wrong = 0
    slowest = 0.0
    while done < kills and time.monotonic() - began < limit_s:
        run = folder / f"run-{runs}"
        for _ in range(KILLS_A_RUN):
            harm = harm_of(draw, world, last_step(run))
            ended = launched(data, run, harm, world=world)
            done, slowest = done + 1, max(slowest, ended.seconds)
            codes_wrong += ended.code != (1 if harm.signal == signal.SIGKILL else 143)
        codes_wrong += launched(data, run, world=world).code != 0
        same = all((run / name).read_bytes() == (whole / name).read_bytes() for name in COMPARED)
        runs, identical = runs + 1, identical + same
        print(json.dumps({"run": runs, "kills": done, "identical": same}), flush=True)
        shutil.rmtree(run)
    counts = {"world": world, "kills": done, "runs": runs, "identical": identical, "wrong_exit_codes": codes_wrong}
    print(json.dumps({**counts, "slowest_s": round(slowest, 1)}), flush=True)
    return identical == runs and not codes_wrong


def main() -> None:
    """Run the campaign in a folder of its own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--world", type=int, default=2)
    parser.add_argument("--limit", type=float, default=3600, help="seconds after which no further run begins")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="several-") as folder:
        ok = campaign(Path(folder), given.kills, given.world, given.limit)
    sys.exit(0 if ok else 1)


if __name__ == "__main__":
    main()
