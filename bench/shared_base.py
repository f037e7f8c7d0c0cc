"""QLoRA over a base whose layers several GPUs share: tokens a second and peak memory, beside what the plan predicts.

    torchrun --nproc-per-node 2 bench/shared_base.py run --size 70b --gib 30

The weights are random: each process makes one layer after another on its GPU, packs it and keeps its share, so no GPU
ever holds more than one whole layer. All else is lorafit's own. Rows are dense: all tokens are supervised. Process 0
prints one JSON line; `unchanged` says that the shares' bytes were the same at the end.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from full import GIB, dense_rows, train_timed
from make_random_base import SIZES

NAMED_ONES = ("norm",)
"""Parts of the names of weights that are near one."""


def main() -> None:
    """Measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    run = parser.add_subparsers(dest="verb", required=True).add_parser("run")
    run.add_argument("--size", default="70b", choices=tuple(SIZES))
    run.add_argument("--gib", type=float, default=0, help="memory budget of each GPU; 0 for all")
    run.add_argument("--quantization", default="nf4", choices=("nf4", "none"))
    run.add_argument("--memory-policy", default="auto")
    run.add_argument("--rows", type=int, default=2, help="rows of a step, for each GPU")
    run.add_argument("--length", type=int, default=2048, help="tokens of a row")
    run.add_argument("--steps", type=int, default=6)
    run.add_argument("--warm", type=int, default=2)
    options = parser.parse_args()
    from lorafit.training.distributed import joined

    with joined() as processes:
        line = json.dumps(measure(options, processes))
        if processes.is_main:
            print(line, flush=True)


def measure(options: argparse.Namespace, processes: Any) -> dict[str, Any]:
    """Train `steps` steps of dense rows, and return speed and memory of a GPU beside the plan's."""
    import torch

    from lorafit.api.build_model import BuiltModel, enforce_budget
    from lorafit.backbone import require_unchanged, shards_of
    from lorafit.config import resolve
    from lorafit.engine import prove_rows
    from lorafit.hardware import hardware_here
    from lorafit.methods import METHODS
    from lorafit.methods.lora import count_parameters
    from lorafit.objectives import objective_of
    from lorafit.planning import make_plan
    from lorafit.shapes import ModelShape

    folder, world = Path(tempfile.mkdtemp(prefix="lorafit-shared-")), processes.world
    options.rows *= world
    flags = {
        "base": str(folder), "examples_per_step": options.rows, "max_length": options.length, "gpus": world,
        "gpu_memory": f"{options.gib}GiB" if options.gib else None, "max_steps": options.steps + 50, "save_minutes": 0,
        "memory_policy": options.memory_policy, "quantization": options.quantization, "shard_base": "on", "rank": 16,
        "dropout": 0,
    }  # fmt: skip
    resolved = resolve(flags=flags)
    enforce_budget(resolved.config)
    rows, stats = dense_rows(options)
    shape = ModelShape.from_config({**SIZES[options.size], "model_type": "llama"}, options.size)
    plan = make_plan(resolved, stats, shape, hardware_here(resolved.config))
    if plan.blocked:
        return {"refused": [finding.message for finding in plan.findings]}
    resolved = resolved.planned(plan.settings())
    config, started = resolved.config, time.perf_counter()
    base, method = random_base(options.size, config), METHODS["lora"]
    loaded, peak_loading = time.perf_counter(), reserved_gib()
    model = method.prepare(base, config, plan.targets)
    mode, loss = prove_rows(model, [(rows.ids(0)[:256], rows.mask(0)[:256])])
    built = BuiltModel(model, method, objective_of(config, loss), count_parameters(model), loss.reason, mode)
    timed = train_timed(options, built, resolved, rows, folder, processes)
    require_unchanged(model)
    shards = shards_of(model)
    tokens, step_s = options.rows * options.length // world, timed.step_s
    return {
        "size": options.size, "gpus": world, "gib": options.gib, "quantization": config.quantization,
        "policy": timed.policy,
        "tokens_per_s_gpu": round(tokens / step_s), "step_s": round(step_s, 3),
        "plan_time_assumes": plan.time_assumes[0], "peak_gib": reserved_gib(),
        "plan_gib": round(plan.memory.peak_bytes / GIB, 2),
        "shards_gib": round(sum(len(shard) for shard in shards.shards) / GIB, 2) if shards else None,
        "loading_s": round(loaded - started, 1), "loading_peak_gib": peak_loading,
        "first_step_s": timed.first_s, "build_s": round(timed.ready - started, 1),
        "tries": timed.tries, "unchanged": True, "losses": timed.losses,
        "cuda": torch.version.cuda,
    }  # fmt: skip


def reserved_gib() -> float:
    """Return the peak of reserved memory."""
    import torch

    return round(torch.cuda.max_memory_reserved() / GIB, 2) if torch.cuda.is_available() else 0.0


def random_base(size: str, config: Any) -> Any:
    """Return a Llama shape of random weights, made and sharded one layer after another."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from lorafit.backbone import compute_dtype, default_device, read_sharded

    architecture = LlamaConfig(max_position_embeddings=8192, use_cache=False, **SIZES[size])
    architecture._attn_implementation = "sdpa"
    device, dtype = default_device(), compute_dtype(config)
    with torch.device("meta"):
        model = LlamaForCausalLM(architecture)
    torch.manual_seed(0)  # all processes draw the same weights
    readers = {name: partial(drawn, name, weight.shape, device, dtype) for name, weight in model.named_parameters()}
    made: Mapping[str, Callable[[], Any]] = readers
    return read_sharded(model, made, device, dtype, in_4_bits=config.quantization == "nf4")


def drawn(name: str, shape: Any, device: Any, dtype: Any) -> Any:
    """Return a random weight; a norm's is one."""
    import torch

    if any(part in name for part in NAMED_ONES):
        return torch.ones(shape, device=device, dtype=dtype)
    return torch.randn(shape, device=device, dtype=dtype) * 0.02


if __name__ == "__main__":
    main()
