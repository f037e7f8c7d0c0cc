"""Full fine-tuning: tokens a second and peak memory at each budget, beside what the plan predicts.

    python bench/full.py run --size 8b --gib 80          # one GPU, one budget, one JSON line
    torchrun --nproc-per-node 2 bench/full.py run        # weights, gradients and moments sharded; a line of process 0
    python bench/full.py table OUT --arms 8b:140 8b:80   # each in a process of its own, into OUT/full.jsonl

The weights are random and made on the GPU, and nothing is saved: 8B would take 112 GB of disk for each checkpoint. All
else is lorafit's own: the plan decides optimizer and memory policy, the dry run proves the policy, and the training
loop runs the steps. Rows are dense: all tokens are supervised. FLOPs are six a weight and token, and attention's.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

from make_random_base import SIZES

GIB = 1 << 30


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    run = verbs.add_parser("run")
    run.add_argument("--size", default="8b", choices=tuple(SIZES))
    run.add_argument("--gib", type=float, default=0, help="memory budget; 0 for all")
    run.add_argument("--optimizer", default="auto", help="auto, adamw or adamw_8bit")
    run.add_argument("--memory-policy", default="auto")
    run.add_argument("--compute", default="auto", help="auto, or fp8")
    run.add_argument("--profile", action="store_true", help="print the kernels of one step more to stderr")
    run.add_argument("--rows", type=int, default=4, help="rows of a step, for each GPU")
    run.add_argument("--length", type=int, default=2048, help="tokens of a row")
    run.add_argument("--steps", type=int, default=10)
    run.add_argument("--warm", type=int, default=3)
    table = verbs.add_parser("table")
    table.add_argument("out", type=Path)
    table.add_argument("--arms", nargs="+", default=["8b:140", "8b:80", "8b:52", "1b:24"], help="SIZE:GIB[:OPTIMIZER]")
    table.add_argument("--limit", type=int, default=165, help="seconds for an arm")
    options = parser.parse_args()
    if options.verb == "table":
        make_table(options)
        return
    from lorafit.training.distributed import joined

    with joined() as processes:
        line = json.dumps(measure(options, processes))
        if processes.is_main:
            print(line, flush=True)


def make_table(options: argparse.Namespace) -> None:
    """Run each arm in a process of its own, and write its line."""
    options.out.mkdir(parents=True, exist_ok=True)
    for arm in options.arms:
        size, gib, optimizer = (*arm.split(":"), "auto")[:3]
        command = [sys.executable, __file__, "run", "--size", size, "--gib", gib, "--optimizer", optimizer]
        try:
            ended = subprocess.run(command, capture_output=True, text=True, timeout=options.limit)
            lines = ended.stdout.strip().splitlines()
            line = lines[-1] if ended.returncode == 0 and lines else json.dumps({"error": ended.stderr[-800:]})
        except subprocess.TimeoutExpired:
            line = json.dumps({"error": f"over {options.limit} s"})
        with (options.out / "full.jsonl").open("a") as file:
            file.write(json.dumps({"arm": arm, **json.loads(line)}) + "\n")
        print(arm, line, flush=True)


def measure(options: argparse.Namespace, processes: Any) -> dict[str, Any]:
    """Train `steps` steps of dense rows, and return speed and memory a GPU beside the plan's."""
    import torch

    from lorafit.api.build_model import BuiltModel, enforce_budget
    from lorafit.backbone import compute_dtype, default_device
    from lorafit.config import resolve
    from lorafit.engine import prove_rows
    from lorafit.hardware import hardware_here
    from lorafit.methods import METHODS
    from lorafit.methods.full.sharding import free_gathered, shard
    from lorafit.methods.lora import count_parameters
    from lorafit.objectives import objective_of
    from lorafit.planning import make_plan
    from lorafit.shapes import ModelShape

    folder, world = Path(tempfile.mkdtemp(prefix="lorafit-full-")), processes.world
    options.rows *= world
    flags = {
        "method": "full", "base": str(folder), "examples_per_step": options.rows, "max_length": options.length,
        "gpus": world,
        "gpu_memory": f"{options.gib}GiB" if options.gib else None, "max_steps": options.steps + 50, "save_minutes": 0,
        "memory_policy": options.memory_policy, "optimizer": options.optimizer, "compute": options.compute,
    }  # fmt: skip
    resolved = resolve(flags=flags)
    enforce_budget(resolved.config)
    rows, stats = dense_rows(options)
    shape = ModelShape.from_config({**SIZES[options.size], "model_type": "llama"}, options.size)
    plan = make_plan(resolved, stats, shape, hardware_here(resolved.config))
    if not plan.runnable or plan.blocked:
        return {"refused": [finding.message for finding in plan.findings]}
    resolved = resolved.planned(plan.settings())
    config, started = resolved.config, time.perf_counter()
    model, method = METHODS["full"].prepare(random_model(options.size, config), config), METHODS["full"]
    if world > 1:
        dtype = compute_dtype(config)
        shard(model, default_device(), dtype=dtype, wide=config.optimizer == "adamw")
    mode, loss = prove_rows(model, [(rows.ids(0)[:256], rows.mask(0)[:256])])
    free_gathered(model)
    built = BuiltModel(model, method, objective_of(config, loss), count_parameters(model), loss.reason, mode)
    timed = train_timed(options, built, resolved, rows, folder, processes)
    tokens, step_s = options.rows * options.length // world, timed.step_s
    attention = 6 * shape.layers * 2 * shape.heads * shape.head_dim * options.length / 2
    peak = torch.cuda.max_memory_reserved() if torch.cuda.is_available() else 0
    return {
        "size": options.size, "gpus": world, "gib": options.gib, "optimizer": config.optimizer, "policy": timed.policy,
        "compute": config.compute,
        "tokens_per_s_gpu": round(tokens / step_s), "step_s": round(step_s, 4),
        "tflops": round(tokens * (6 * shape.active_parameters + attention) / step_s / 1e12, 1),
        "peak_gib": round(peak / GIB, 2), "plan_gib": round(plan.memory.peak_bytes / GIB, 2),
        "plan_time_assumes": plan.time_assumes[0], "first_step_s": timed.first_s,
        "build_s": round(timed.ready - started, 2), "tries": len(timed.tries), "losses": timed.losses,
    }  # fmt: skip


class Timed(NamedTuple):
    """Hold what a timed run measured: seconds, its policy with those tried before, and its losses."""

    ready: float
    first_s: float
    step_s: float
    policy: str
    tries: list[str]
    losses: list[float]


def train_timed(
    options: argparse.Namespace, built: Any, resolved: Any, rows: Any, folder: Path, processes: Any
) -> Timed:
    """Train `built` as `lorafit train` does, without checkpoints, for the steps of `options`."""
    from lorafit.api.build_model import tune_memory
    from lorafit.runs import RunDir
    from lorafit.training import EventLog, RunContext, TrainingLoop

    watch, config = stopwatch(options, processes.is_main), resolved.config
    with tune_memory(built, resolved, rows, RunDir(folder), EventLog(), processes) as (memory, dry_run):
        ready = time.perf_counter()
        parts = (built.model, built.method, built.objective, config, rows, None)
        context = RunContext(folder / "checkpoints", processes=processes, callbacks=[watch])
        loop = TrainingLoop(*parts, context, memory)
        loop.run()
        policy = str(memory.layers.policy) if memory.layers is not None else config.memory_policy
    return Timed(
        ready,
        round(watch.first - ready, 2),
        (watch.ended - watch.warmed) / (options.steps - options.warm),
        policy,
        [attempt.policy for attempt in dry_run.attempts] if dry_run else [],
        [round(entry["loss"], 3) for entry in loop.state.log_history if "loss" in entry],
    )


def dense_rows(options: argparse.Namespace) -> tuple[Any, Any]:
    """Return rows of one length with random ids, and their data stats."""
    import numpy as np

    from lorafit.data import Encoded, Rows
    from lorafit.memory import DataStats

    random, count = np.random.default_rng(0), options.rows * (options.steps + 50)
    mask = [place > 0 for place in range(options.length)]
    ids = random.integers(3, 600, (count, options.length))
    rows = Rows.from_encoded([Encoded(row.tolist(), mask, ()) for row in ids])
    tokens = count * options.length
    return rows, DataStats(
        count, tokens, tokens, options.length, float(options.length), 0, options.rows * options.length
    )


def random_model(size: str, config: Any) -> Any:
    """Return a model of random weights in the compute dtype, on the GPU if there is one."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from lorafit.backbone import compute_dtype, default_device

    architecture = LlamaConfig(max_position_embeddings=8192, use_cache=False, **SIZES[size])
    architecture._attn_implementation = "sdpa"
    torch.manual_seed(0)
    dtype = compute_dtype(config)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(default_device()):
            model = LlamaForCausalLM(architecture)
    finally:
        torch.set_default_dtype(before)
    model.config.dtype = dtype
    return model


def stopwatch(options: argparse.Namespace, is_main: bool) -> Any:
    """Return a callback that times steps between synchronisations, and ends the run without a checkpoint.

    With `profile` one step more is recorded, after the timed ones.
    """
    import torch
    from transformers import TrainerCallback

    class Watch(TrainerCallback):
        first = warmed = ended = 0.0
        profile: Any = None

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            places = {1: "first", options.warm: "warmed", options.steps: "ended"}
            if state.global_step in places:
                if torch.cuda.is_available():
                    torch.cuda.synchronize()
                setattr(self, places[state.global_step], time.perf_counter())
            if state.global_step == options.steps and options.profile:
                self.profile = torch.profiler.profile().__enter__()
            elif state.global_step >= options.steps:
                control.should_training_stop, control.should_save = True, False
                if self.profile is not None:
                    self.profile.__exit__(None, None, None)
                    if is_main:
                        found = self.profile.key_averages()
                        print(found.table(sort_by="self_device_time_total", row_limit=30), file=sys.stderr)

    return Watch()


if __name__ == "__main__":
    main()
