"""Memory of recurrent layers: the plan's peak beside the CPU's allocator, in a training step of small hybrids.

    PYTHONPATH=src:tests python bench/recurrent_memory.py                  # every shape; one JSON line each
    PYTHONPATH=src:tests python bench/recurrent_memory.py qwen3_5_text --rows 4 --length 512

The decoder runs in fp32 without adapters. `peak_mib` is that of torch's profiler of allocations, `without_mib` the
plan's before recurrent layers were counted.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from transformers import AutoConfig, AutoModelForCausalLM

from lorafit.memory.footprint import Activations, Execution, Trained, activations
from lorafit.memory.inputs import MicroBatchSize
from lorafit.memory.recurrent_layers import with_recurrent_layers
from lorafit.shapes import ModelShape

COMMON: dict[str, Any] = {"hidden_size": 256, "num_hidden_layers": 4, "vocab_size": 512}
ATTENTION: dict[str, Any] = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64}
SHAPES: dict[str, dict[str, Any]] = {
    "qwen3_5_text": ATTENTION | {
        "intermediate_size": 768, "linear_num_key_heads": 4, "linear_num_value_heads": 8, "linear_key_head_dim": 64,
        "linear_value_head_dim": 64,
    },
    "granitemoehybrid": {
        "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 4,
        "num_experts_per_tok": 2, "shared_intermediate_size": 256, "mamba_n_heads": 8, "mamba_d_head": 64,
        "mamba_d_state": 64, "layer_types": ["mamba", "mamba", "attention", "mamba"],
        "position_embedding_type": "nope",
    },
    "falcon_h1": ATTENTION | {
        "intermediate_size": 512, "mamba_d_ssm": 256, "mamba_n_heads": 4, "mamba_d_head": 64, "mamba_d_state": 64,
        "mamba_n_groups": 1,
    },
    "mamba": {"state_size": 16},
}  # fmt: skip
MIB = 1 << 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="*", default=tuple(SHAPES))
    parser.add_argument("--rows", type=int, default=2)
    parser.add_argument("--length", type=int, default=512, help="tokens of a row")
    options = parser.parse_args()
    for family in options.families or SHAPES:
        print(json.dumps(compared(family, options.rows, options.length)), flush=True)


def compared(family: str, rows: int, length: int) -> dict[str, Any]:
    """Return the peak in the plan and in the allocator, MiB."""
    config = AutoConfig.for_model(family, **COMMON, **SHAPES[family])
    shape = ModelShape.from_config(config.to_dict(), family)
    batch = MicroBatchSize(rows * length, rows * length, length)
    eager = activations(shape, Trained(), batch, width=4, execution=Execution())
    live = with_recurrent_layers(eager, eager, shape, batch, 4)
    peak, planned = allocated(config, rows, length), peak_of(live, shape)
    found = {"peak_mib": peak, "plan_mib": planned, "without_mib": peak_of(eager, shape)}
    return {"family": family, "rows": rows, "length": length, "ratio": round(planned / peak, 3)} | {
        name: round(size / MIB, 1) for name, size in found.items()
    }


def peak_of(live: Activations, shape: ModelShape) -> int:
    return shape.layers * live.layer_bytes + live.backward_bytes


def allocated(config: Any, rows: int, length: int) -> int:
    """Return the peak of what forward and backward of the decoder allocate, bytes."""
    model = AutoModelForCausalLM.from_config(config).requires_grad_(False).train()
    hidden = torch.randn(rows, length, config.hidden_size, requires_grad=True)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        out = model.get_decoder()(inputs_embeds=hidden, use_cache=False)[0]
        out.backward(torch.ones_like(out))
    now = peak = 0
    events = [event for event in seen.profiler.kineto_results.events() if event.name() == "[memory]"]  # type: ignore
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


if __name__ == "__main__":
    main()
