"""QLoRA on one GPU and on two of one machine, through `lorafit train`: useful tokens a second, and their ratios.

    python bench/several_gpus.py base FOLDER             # the random 8B base of make_random_base.py
    python bench/several_gpus.py run FOLDER [--gpus 1 2] [--work real dense] [--limit 170] [--out DIR]

Work: `real` has the rows of instruction sets (lognormal lengths, mean 147 tokens), 64 for each GPU in a step; `dense`
has 4 rows of 2,048 tokens for each GPU. Weak scaling, as the peers were measured. The rate is of the steps after the
first three, by timings.jsonl; loading, compiling and the dry run are in `total_s`. Prints one JSON line an arm.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from engine import add_base, make_base, write_rows

SKIPPED_STEPS = 3
LENGTH = 2048
EXAMPLES = {"real": 64, "dense": 4}
STEPS = {"real": 24, "dense": 16}
SETTINGS = (
    "epochs=1 holdout=0 save_minutes=0 save_steps=100000 dropout=0 rank=16 alpha=32 targets=qv quantization=nf4 "
    f"optimizer=adamw max_length={LENGTH}"
)


def measure(options: argparse.Namespace, work: str, gpus: int, folder: Path) -> dict[str, Any]:
    """Train one epoch on `gpus` GPUs, and return the arm's figures."""
    examples, run = EXAMPLES[work] * gpus, folder / f"{work}-{gpus}"
    rows = examples * STEPS[work]
    asked = argparse.Namespace(work=work, length=LENGTH, rows=rows, folder=str(options.folder))
    data = write_rows(folder / f"{work}-{gpus}.jsonl", asked, rows)
    words = [sys.executable, "-m", "lorafit", "train", str(data), "--base", str(options.folder), "--out", str(run)]
    words += ["--json", "--gpus", str(gpus)] if gpus > 1 else ["--json"]
    for setting in [*SETTINGS.split(), f"examples_per_step={examples}", "ignore=D,P", *options.set]:
        words += ["--set", setting]
    started = time.perf_counter()
    arm: dict[str, Any] = {"work": work, "gpus": gpus}
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=options.limit)
    except subprocess.TimeoutExpired as late:
        said = [part.decode() if isinstance(part, bytes) else part or "" for part in (late.stdout, late.stderr)]
        return arm | {"error": f"no end in {options.limit} s", "said": "".join(said)[-1500:]}
    arm["total_s"] = round(time.perf_counter() - started, 1)
    if done.returncode:
        return arm | {"error": done.returncode, "said": (done.stdout + done.stderr)[-3000:]}
    return arm | figures(run, json.loads(done.stdout), done.stderr)


def figures(run: Path, result: dict[str, Any], said: str) -> dict[str, Any]:
    """Return the rate and the peak of a finished run."""
    elapsed = [json.loads(line)["elapsed_s"] for line in (run / "timings.jsonl").read_text().splitlines()]
    steps = [json.loads(line) for line in said.splitlines() if line.startswith('{"event": "step"')]
    tokens = result["tokens_per_s"] * result["train_s"] / len(elapsed)  # of all processes, a step
    step_s = (elapsed[-1] - elapsed[SKIPPED_STEPS - 1]) / (len(elapsed) - SKIPPED_STEPS)
    engine = json.loads((run / "engine.json").read_text()) if (run / "engine.json").exists() else {}
    return {
        "tokens_s": round(tokens / step_s),
        "tokens_s_all_steps": result["tokens_per_s"],
        "step_ms": round(step_s * 1e3, 1),
        "steps": len(elapsed),
        "peak_gib_of_process_0": round(max((step["memory_bytes"] for step in steps), default=0) / 2**30, 2),
        "policy": engine.get("policy"),
        "loss": result["loss"],
    }


def run_arms(options: argparse.Namespace) -> None:
    """Measure every arm, and print the ratio of the last number of GPUs to the first of each work."""
    folder = Path(tempfile.mkdtemp(prefix="several-"))
    for work in options.work:
        rates = []
        for gpus in options.gpus:
            arm = measure(options, work, gpus, folder)
            rates.append(arm.get("tokens_s", 0))
            print(json.dumps(arm), flush=True)
        if all(rates):
            print(json.dumps({"work": work, "ratio": round(rates[-1] / rates[0], 3), "of": options.gpus}), flush=True)
    if options.out:
        for path in folder.glob("*/*.json*"):
            (target := options.out / path.parent.name).mkdir(parents=True, exist_ok=True)
            shutil.copy(path, target)
    shutil.rmtree(folder, ignore_errors=True)


def main() -> None:
    """Make the base, or measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    add_base(verbs)
    run = verbs.add_parser("run")
    run.add_argument("folder", type=Path)
    run.add_argument("--gpus", type=int, nargs="+", default=[1, 2])
    run.add_argument("--work", nargs="+", default=["real", "dense"], choices=tuple(EXAMPLES))
    run.add_argument("--limit", type=float, default=170, help="seconds of one arm")
    run.add_argument("--out", type=Path, help="folder for the runs' JSON files")
    run.add_argument("--set", action="append", default=[], help="a setting of every arm, as KEY=VALUE")
    options = parser.parse_args()
    make_base(options) if options.verb == "base" else run_arms(options)


if __name__ == "__main__":
    main()
