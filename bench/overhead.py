"""What a training step costs the processor: the Python of 32 decoder layers whose arithmetic is next to nothing.

    python bench/overhead.py [--targets qv|all-linear] [--steps 30] [--profile]

A random Llama of hidden size 64 in NF4, driven as `lorafit.train` drives a model on a GPU: compiled layers, packed
attention, autocast, chunked loss. Frozen linears and attention are hollow here, for their kernels on a CPU are not
those of a GPU: what an operator's own Python and its launches cost there comes on top. Prints one JSON line;
`--profile` adds where the time goes, by function.
"""

from __future__ import annotations

import argparse
import cProfile
import json
import pstats
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from make_random_base import make_tokenizer
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from lorafit.backbone import load_backbone
from lorafit.config import resolve
from lorafit.config.memory_policy import MemoryPolicy
from lorafit.engine import DecoderLayers, MicroBatch, collate, packed, summed_loss
from lorafit.methods.lora import attach

LAYERS, HIDDEN = 32, 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", default="qv", choices=("qv", "all-linear"))
    parser.add_argument("--policy", default="keep")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--profile", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        model = random_model(Path(folder), options.targets)
    random = np.random.default_rng(0)
    rows = [(random.integers(4, 250, length), np.arange(length) > 0) for length in (7, 9)]
    hollow = hollow_operators()
    layers = DecoderLayers(model, MemoryPolicy.parse(options.policy, LAYERS))
    with layers, packed(model):
        found = timed(layers, model, collate(rows), options.steps)
        if options.profile:
            profile(model, collate(rows))
    del hollow
    print(json.dumps({"targets": options.targets, "torch": torch.__version__, "notes": layers.notes, **found}))


def random_model(folder: Path, targets: str) -> Any:
    """A random Llama in bf16 and NF4 with adapters, which unpacks its weights in each call as on a GPU."""
    config = LlamaConfig(
        hidden_size=HIDDEN, intermediate_size=2 * HIDDEN, num_hidden_layers=LAYERS, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=600, dtype=torch.bfloat16,
    )  # fmt: skip
    torch.manual_seed(0)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    flags = {"base": str(folder), "targets": targets, "rank": 16, "dropout": 0.0, "compute": "bf16"}
    settled = resolve(flags=flags).config
    return attach(load_backbone(settled, dense_budget_bytes=0), settled).train()


def hollow_operators() -> torch.library.Library:
    """While it lives, the frozen linear and attention on a CPU give zeros of the right shape, at once."""

    def linear(x: Tensor, *weight: Any) -> Tensor:
        *_, out_features, in_features, transposed = weight
        return x.new_zeros(*x.shape[:-1], in_features if transposed else out_features)

    def attention(query: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
        _, heads, tokens, dim = query.shape
        return query.new_zeros(1, tokens, heads, dim), query.new_empty(0, 0, dtype=torch.float32)

    def attention_backward(grad: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
        return tuple(x.new_zeros(x.transpose(1, 2).shape).transpose(1, 2) for x in inputs[:3])

    library = torch.library.Library("lorafit", "IMPL")
    for name, hollow in (
        ("frozen_product", linear),
        ("packed_attention", attention), ("packed_attention_backward", attention_backward),
    ):  # fmt: skip
        library.impl(name, hollow, "CPU")
    return library


def step(model: Any, batch: MicroBatch) -> tuple[float, float]:
    """Seconds of one forward and one backward."""
    started = time.perf_counter()
    with torch.autocast("cpu", torch.bfloat16):
        loss = summed_loss(model, batch)
    between = time.perf_counter()
    loss.backward()
    return between - started, time.perf_counter() - between


def timed(layers: DecoderLayers, model: Any, batch: MicroBatch, steps: int) -> dict[str, float]:
    """The fastest of `steps` passes, for other work may share the processor; after those that compile."""
    started = time.perf_counter()
    step(model, batch)
    first = time.perf_counter() - started
    for _ in range(3):
        model.zero_grad()
        step(model, batch)
    passes = []
    for _ in range(steps):
        model.zero_grad()
        passes.append(step(model, batch))
    forward, backward = (min(times) for times in zip(*passes, strict=True))
    return {
        "forward_us_a_layer": round(forward * 1e6 / LAYERS),
        "backward_us_a_layer": round(backward * 1e6 / LAYERS),
        "step_ms": round((forward + backward) * 1e3, 2),
        "first_step_s": round(first, 1),
    }


def profile(model: Any, batch: MicroBatch) -> None:
    """Print the functions that take the most time of three steps."""
    with torch.autograd.set_multithreading_enabled(False), cProfile.Profile() as taken:
        for _ in range(3):
            model.zero_grad()
            step(model, batch)
    pstats.Stats(taken).sort_stats("tottime").print_stats(45)


if __name__ == "__main__":
    main()
