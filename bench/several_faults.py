"""Kill random processes of runs of several, at random steps or moments, and compare their ends bit by bit.

    PYTHONPATH=src:tests python bench/several_faults.py [--kills 100] [--world 2] [--limit 400]
    PYTHONPATH=src:tests python bench/several_faults.py --kills 102 --lanes 6 --set compile=off    # two GPUs, over NCCL

Each run of `lorafit train --gpus`, on gloo where there is no GPU, is killed a few times, resumed, and held against an
uninterrupted one. Kills come after a step, while a checkpoint is written, or at a time, from the first import on. Stops
by SIGTERM, to a process or to the launcher, are among them. Campaigns in several lanes
share the GPUs: a start takes most of a kill's seconds, and little of a GPU. Prints one JSON line a run and one in all;
exit code 1 if a run ended in other bits, or a command without the one sentence and the code that its harm calls for.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from little_run import write_rows
from several_worker import Ended, Harm, launched

STEPS, KILLS_A_RUN = 8, 3
COMPARED = ("adapter/adapter_model.safetensors", "model/model.safetensors", "metrics.jsonl")


def harm_of(draw: random.Random, world: int, done: int) -> Harm:
    """Draw who is harmed after which step, of those after `done`, and how."""
    step, rank = min(STEPS - 1, done + draw.randrange(1, 4)), draw.randrange(world)
    way = draw.choice(["kill", "kill", "kill at a time", "kill while saving", "stop", "stop at a time", "stop all"])
    number = signal.SIGKILL if way.startswith("kill") else signal.SIGTERM
    if way == "kill while saving":
        return Harm(rank=0, step=step + step % 2, signal=int(number), saving=True)
    after_s = draw.uniform(0.01, 6) if way.endswith("at a time") else 0
    return Harm(rank=rank, step=step, signal=int(number), to_launcher=way == "stop all", after_s=after_s)


def ends_well(ended: Ended, harm: Harm) -> bool:
    """Return True for one sentence and the exit code that `harm` calls for; 0 if the run may have ended before it."""
    was_early = ended.code == 0 and (harm.after_s > 0 or ended.errors.startswith("finished: "))
    is_code = ended.code == (1 if harm.signal == signal.SIGKILL else 143)
    return was_early or (is_code and len(ended.sentences) == 1)


def last_step(run: Path) -> int:
    """Return the newest checkpoint's step."""
    return max((int(folder.name.removeprefix("step-")) for folder in run.glob("checkpoints/step-*")), default=0)


def campaign(folder: Path, given: argparse.Namespace) -> bool:
    """Run until `kills` or `limit` seconds; return True if every run ended in the bits of the whole one."""
    draw, data, began = random.Random(given.seed), write_rows(folder / "rows.jsonl", 40), time.monotonic()
    whole, kills, world, limit_s = folder / "whole", given.kills, given.world, given.limit
    more = [word for setting in given.set for word in ("--set", setting)]
    first = launched(data, whole, None, *more, world=world)
    assert first.code == 0, first.errors
    compared = [name for name in COMPARED if (whole / name).exists()]
    done = runs = identical = wrong_ends = 0
    slowest = 0.0
    while done < kills and time.monotonic() - began < limit_s:
        run = folder / f"run-{runs}"
        for _ in range(KILLS_A_RUN):
            harm = harm_of(draw, world, last_step(run))
            ended = launched(data, run, harm, *more, world=world)
            done, slowest = done + 1, max(slowest, ended.seconds)
            if not ends_well(ended, harm):
                wrong_ends += 1
                print(json.dumps({"harm": repr(harm), "code": ended.code, "said": ended.sentences[-5:]}), flush=True)
        wrong_ends += launched(data, run, None, *more, world=world).code != 0
        same = all((run / name).read_bytes() == (whole / name).read_bytes() for name in compared)
        runs, identical = runs + 1, identical + same
        print(json.dumps({"run": runs, "kills": done, "identical": same}), flush=True)
        shutil.rmtree(run)
    counts = {"world": world, "kills": done, "runs": runs, "identical": identical, "wrong_ends": wrong_ends}
    print(json.dumps({**counts, "slowest_s": round(slowest, 1)}), flush=True)
    return identical == runs and not wrong_ends


def main() -> None:
    """Run the campaign in a folder of its own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--world", type=int, default=2)
    parser.add_argument("--limit", type=float, default=3600, help="seconds after which no further run begins")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="a setting of every run")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--lanes", type=int, default=1, help="campaigns at a time, each with its share of the kills")
    given = parser.parse_args()
    if given.lanes > 1:
        sys.exit(in_lanes(given))
    with tempfile.TemporaryDirectory(prefix="several-") as folder:
        ok = campaign(Path(folder), given)
    sys.exit(0 if ok else 1)


def in_lanes(given: argparse.Namespace) -> int:
    """Run campaigns of other seeds beside each other; return 1 if one failed."""
    words = ["--kills", str(-(-given.kills // given.lanes)), "--world", str(given.world), "--limit", str(given.limit)]
    words += [f"--set={setting}" for setting in given.set]
    lanes = [subprocess.Popen([sys.executable, __file__, *words, "--seed", str(lane)]) for lane in range(given.lanes)]
    return max([lane.wait() != 0 for lane in lanes])


if __name__ == "__main__":
    main()
