"""Memory of published shapes on one GPU: the plan's peak beside what the engine reserves; one JSON line a shape.

    python bench/shape_memory.py qwen3.5-9b             # three steps of 4 × 2,048 tokens, q and v, NF4
    python bench/shape_memory.py granite4-h --length 512 --rows 2
    python bench/shape_memory.py gemma3-12b --plan-only --gpu H200    # the plan alone, without a GPU
    python bench/shape_memory.py gemma3-12b --trace  # and what was alive at the peak of the last step

Weights are random and made on the GPU (bench/mixtures.py); memory does not depend on their values. The plan counts the
CUDA context, which torch does not reserve, so `plan_gib` is without it. `ratio` is plan over reserved.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import mixtures
from hybrids import SINKS, TOKENS

import engine

SHAPES: dict[str, dict[str, Any]] = {
    "qwen3.5-9b": {
        "model_type": "qwen3_5_text", "hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 32,
        "num_attention_heads": 16, "num_key_value_heads": 4, "head_dim": 256, "linear_num_key_heads": 16,
        "linear_num_value_heads": 32, "linear_key_head_dim": 128, "linear_value_head_dim": 128, "vocab_size": 248320,
        "tie_word_embeddings": False,
    },
    "qwen3-30b-a3b": {"model_type": "qwen3_moe", **mixtures.SIZES["30b-a3b"]},
    "gpt-oss-20b": SINKS,
    "gemma3-12b": {
        "model_type": "gemma3_text", "hidden_size": 3840, "intermediate_size": 15360, "num_hidden_layers": 48,
        "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 256, "sliding_window": 1024,
        "vocab_size": 262208, "tie_word_embeddings": True,
    },
    "granite4-h": {
        "model_type": "granitemoehybrid", "hidden_size": 1536, "intermediate_size": 512, "num_hidden_layers": 40,
        "num_attention_heads": 12, "num_key_value_heads": 4, "num_local_experts": 64, "num_experts_per_tok": 6,
        "shared_intermediate_size": 1024, "mamba_n_heads": 48, "mamba_d_head": 64, "mamba_d_state": 128,
        "layer_types": [("attention" if layer % 10 == 5 else "mamba") for layer in range(40)],
        "position_embedding_type": "nope", "vocab_size": 100352, "tie_word_embeddings": True,
    },
}  # fmt: skip
WARM = 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", choices=tuple(SHAPES))
    parser.add_argument("--rows", type=int, default=4, help="rows of one step")
    parser.add_argument("--length", type=int, default=2048, help="tokens of a row")
    parser.add_argument("--targets", default="qv", choices=("qv", "all"))
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="one more setting of lorafit")
    parser.add_argument("--gpu", default="", help="GPU of the plan, instead of the one found")
    parser.add_argument("--plan-only", action="store_true")
    parser.add_argument("--trace", action="store_true", help="name what is alive at the peak of the last step")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder) / "base"
        found: dict[str, Any] = {"shape": options.shape, "parameters": make_base(options.shape, base)}
        found |= {name: getattr(options, name) for name in ("rows", "length", "targets", "set")}
        found |= planned(options, base, Path(folder))
        if not options.plan_only:
            found |= trained(options, base)
            found["ratio"] = round(found["plan_gib"] / found["peak_gib"], 3)
    print(json.dumps(found))


def make_base(shape: str, folder: Path) -> int:
    """Write config.json, a tokenizer and the header of the weights; return their number."""
    import torch
    from transformers import AutoConfig

    config = AutoConfig.for_model(**SHAPES[shape], **TOKENS, max_position_embeddings=8192, dtype=torch.bfloat16)
    return mixtures.write_base(config, folder)


def arguments_of(options: argparse.Namespace, base: Path) -> argparse.Namespace:
    """Return the arguments of `engine.run_lorafit`: one step beyond the two that warm up."""
    return argparse.Namespace(
        folder=str(base), work="dense", length=options.length, rows=options.rows, examples=options.rows, steps=1,
        warm=WARM, vram=0, targets=options.targets, compute="bf16", deterministic=False, dropout=0.0,
        activations="auto", profile="", set=options.set,
    )  # fmt: skip


def planned(options: argparse.Namespace, base: Path, folder: Path) -> dict[str, Any]:
    """Return the peak that the plan expects on the device, in all and by its parts, GiB."""
    import lorafit

    data = engine.write_rows(folder / "rows.jsonl", arguments_of(options, base), options.rows * (WARM + 1))
    settings = {"gpu": options.gpu} if options.gpu else {}
    settings |= dict(pair.split("=", 1) for pair in options.set)
    plan = lorafit.plan(
        data, str(base), rank=16, alpha=32.0, dropout=0.0, holdout=0, epochs=1, quantization="nf4", compute="bf16",
        targets=engine.TARGETS_OF_LORAFIT[options.targets], examples_per_step=options.rows, optimizer="adamw",
        ignore=("D", "P"), max_length=max(2048, options.length), **settings,
    ).plan  # fmt: skip
    parts = {part.name: round(part.size_bytes / mixtures.GIB, 2) for part in plan.memory.components}
    outside = sum(part.size_bytes for part in plan.memory.components if part.name == "CUDA context")
    return {
        "plan_gib": round((plan.memory.peak_bytes - outside) / mixtures.GIB, 2),
        "parts": parts,
        "counted": plan.shape.parameters,
        "plan_rows": plan.shape.unpacked or "packed",
    }


def trained(options: argparse.Namespace, base: Path) -> dict[str, Any]:
    """Return what the engine reserved in three steps, GiB."""
    import torch

    import lorafit.api.build_model as build_model

    def load(*_: object, **__: object) -> Any:
        model = mixtures.random_backbone(str(base))
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        return model

    build_model.load_backbone = load
    seen: dict[str, object] = {}
    mixtures.note_row_mode(seen)
    arguments = arguments_of(options, base)
    if options.trace:
        arguments.profile = "trace"
        engine.start_profile = start_trace  # type: ignore[attr-defined]
        engine.write_profile = lambda started, *_: seen.update(peak_of_trace(started))  # type: ignore[attr-defined]
    found = engine.run_lorafit(arguments)
    seen["allocated_gib"] = round(torch.cuda.max_memory_allocated() / mixtures.GIB, 2)
    kept = ("peak_gib", "step_ms", "first_s", "policy", "events", "losses")
    return {"torch": torch.__version__, **seen, **{name: found[name] for name in kept}}


def start_trace() -> int:
    """Begin to record what is allocated, and return the bytes allocated before."""
    import torch

    torch.cuda.memory._record_memory_history(context="alloc", stacks="python", max_entries=1_000_000)
    return torch.cuda.memory_allocated()


def peak_of_trace(before: int) -> dict[str, Any]:
    """Return the peak since `before` bytes were allocated, and the largest groups of blocks that were alive then."""
    import torch

    events = torch.cuda.memory._snapshot()["device_traces"][torch.cuda.current_device()]
    torch.cuda.memory._record_memory_history(enabled=None)
    now, peak, end = 0, 0, 0
    alive: dict[int, Any] = {}
    for at, event in enumerate(events):
        now += _step(event, alive)
        if now > peak:
            peak, end = now, at + 1
    alive.clear()
    for event in events[:end]:
        _step(event, alive)
    groups: dict[str, list[int]] = {}
    for event in alive.values():
        groups.setdefault(f"{_place(event)}, {event['size'] / 2**20:.0f} MiB", []).append(event["size"])
    largest = sorted(groups.items(), key=lambda group: -sum(group[1]))[:20]
    return {
        "before_step_gib": round(before / mixtures.GIB, 2),
        "step_gib": round((before + peak) / mixtures.GIB, 2),
        "alive_gib": {f"{len(sizes)} x {name}": round(sum(sizes) / mixtures.GIB, 3) for name, sizes in largest},
    }


def _step(event: Any, alive: dict[int, Any]) -> int:
    """Enter an event of the allocator, and return the bytes that it adds."""
    if event["action"] == "alloc":
        alive[event["addr"]] = event
        return int(event["size"])
    if event["action"] == "free_completed" and event["addr"] in alive:
        return -int(alive.pop(event["addr"])["size"])
    return 0


def _place(event: Any) -> str:
    """Return the line that allocated a block: the innermost outside torch's own files; none in a backward pass."""
    frames = [frame for frame in event.get("frames", ()) if "/torch/" not in frame["filename"]]
    return f"{frames[0]['filename'].rpartition('/')[2]}:{frames[0]['line']}" if frames else "backward"


if __name__ == "__main__":
    main()
