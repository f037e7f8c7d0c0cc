"""What FP8 costs a full run: pretraining losses of the demo's base in FP8 beside bf16, over several seeds.

    python bench/full_fp8.py                                    # on a CPU: FP8's rounding, without its speed
    python bench/full_fp8.py --steps 600 --batch 128 --length 256    # on a GPU of compute capability 8.9 or more
    python bench/full_fp8.py products                           # a GPU: TFLOP/s of each product of an 8B layer

The first trains the demo's base from random weights on the demo's text, once in each precision from the same weights
over the same batches: bf16 weights with fp32 master copies, as `method: full` with `adamw`. Most CPUs emulate bf16
slowly, so that all but the products' operands is in fp32 there, in both arms. The loss is the mean over
held-out text after the last step; it is well away from zero, as the text holds what no model can know. The bound is a
difference of 1 % in the mean over the seeds. The second times products with either sum, and their quantization. Both
print a Markdown table; the exit status is 1 when the bound is missed.
"""

from __future__ import annotations

import argparse
import sys
from functools import partial
from statistics import mean
from typing import Any

import torch
from torch import Tensor, nn

BOUND = 0.01
E4M3 = torch.float8_e4m3fn
SHAPES = {"q, o": (4096, 4096), "k, v": (1024, 4096), "gate, up": (14336, 4096), "down": (4096, 14336)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("verb", nargs="?", default="losses", choices=("losses", "products"))
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=96)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--tokens", type=int, default=8192, help="of a product")
    options = parser.parse_args()
    if options.verb == "products":
        time_products(options.tokens)
        return
    found = [losses(seed, options) for seed in map(int, options.seeds.split(","))]
    print("| seed | bf16 | fp8 | difference |\n|---|---|---|---|")
    for seed, (exact, fp8) in zip(options.seeds.split(","), found, strict=True):
        print(f"| {seed} | {exact:.4f} | {fp8:.4f} | {fp8 / exact - 1:+.2%} |")
    change = mean(fp8 for _, fp8 in found) / mean(exact for exact, _ in found) - 1
    print(f"| mean | | | {change:+.2%} |")
    sys.exit(abs(change) > BOUND)


def losses(seed: int, options: argparse.Namespace) -> tuple[float, float]:
    """Return the held-out losses after training in bf16 and in FP8."""
    pieces = demo_pieces(seed, (options.steps + 8) * options.batch, options.length)
    batches = list(pieces.split(options.batch))
    return trained(batches, seed, options, fp8=False), trained(batches, seed, options, fp8=True)


def demo_pieces(seed: int, count: int, length: int) -> Tensor:
    """Return `count` pieces of the demo's text (count, length)."""
    from random import Random

    from tokenizers import Tokenizer

    from lorafit.demo import BASE
    from lorafit.demo.text import document

    tokenizer, random, ids = Tokenizer.from_file(str(BASE / "tokenizer.json")), Random(seed), list[int]()
    while len(ids) < count * length:
        ids += tokenizer.encode(document(random)).ids
    return torch.tensor(ids[: count * length]).reshape(count, length)


def trained(batches: list[Tensor], seed: int, options: argparse.Namespace, *, fp8: bool) -> float:
    """Return the loss of the last eight batches after training on the others."""
    from transformers import LlamaForCausalLM

    from lorafit.demo.make_base import ARCHITECTURE
    from lorafit.methods.full import MasterWeights
    from lorafit.methods.full.in_fp8 import multiply_in_fp8

    device, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
    torch.manual_seed(seed)
    model: Any = LlamaForCausalLM(ARCHITECTURE).to(device, dtype)
    if fp8:
        multiply_in_fp8(model)
    settings = {"lr": options.lr, "betas": (0.9, 0.95), "weight_decay": 0.0}
    optimizer = MasterWeights(torch.optim.AdamW, [{"params": list(model.parameters())}], settings)

    def loss_of(ids: Tensor) -> Tensor:
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
        return nn.functional.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten())

    compiled: Any = torch.compile(loss_of) if device == "cuda" else loss_of
    for step, ids in enumerate(batches[:-8]):
        share = step / options.steps
        optimizer.param_groups[0]["lr"] = options.lr * min(1, (step + 1) / 20) * min(1, max(0.02, (1 - share) / 0.4))
        compiled(ids.to(device)).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    with torch.no_grad():
        return mean(float(compiled(ids.to(device))) for ids in batches[-8:])


def time_products(tokens: int) -> None:
    """Print TFLOP/s of products alone, and of linears forward and backward with their quantization."""
    from lorafit.backbone.kernels.trained_linear_fp8 import linear_fp8

    print("| product | bf16 | fp8, fast sum | fp8, fp32 sum | linear, bf16 | linear, fp8 compiled |")
    print("|---|---|---|---|---|---|")
    compiled = torch.compile(linear_fp8)
    for name, (outputs, inputs) in SHAPES.items():
        x = torch.randn(1, tokens, inputs, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        weight = torch.randn(outputs, inputs, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        grad = torch.randn(1, tokens, outputs, device="cuda", dtype=torch.bfloat16)
        plain, narrow = ([x.detach()[0].to(kind), weight.detach().to(kind)] for kind in (torch.bfloat16, E4M3))
        arms = [
            (1, partial(product, *plain, None)),
            (1, partial(product, *narrow, True)),
            (1, partial(product, *narrow, False)),
            (3, partial(both_ways, nn.functional.linear, x, weight, grad)),
            (3, partial(both_ways, compiled, x, weight, grad)),
        ]
        rates = [2e-12 * products * tokens * outputs * inputs / seconds(work) for products, work in arms]
        print(f"| {name} | " + " | ".join(f"{rate:,.0f}" for rate in rates) + " |", flush=True)


def product(a: Tensor, b: Tensor, is_fast: bool | None) -> Tensor:
    """Return `a (m, k) @ b (n, k)ᵀ`; in FP8 unless `is_fast` is None."""
    if is_fast is None:
        return a @ b.t()
    one = torch.ones((), device=a.device)
    return torch._scaled_mm(a, b.t(), scale_a=one, scale_b=one, out_dtype=torch.bfloat16, use_fast_accum=is_fast)


def both_ways(multiply: Any, x: Tensor, weight: Tensor, grad: Tensor) -> None:
    """Run a linear forward and backward."""
    x.grad = weight.grad = None
    multiply(x, weight).backward(grad)


def seconds(work: Any, times: int = 20) -> float:
    """Return the seconds of one call of `work` on the GPU."""
    for _ in range(5):
        work()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(times):
        work()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1000 / times


if __name__ == "__main__":
    main()
