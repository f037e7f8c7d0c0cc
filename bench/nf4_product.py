"""Products of a few rows by NF4 weights: one kernel, beside dequantizing first. On a GPU.

python bench/nf4_product.py [--rows 64]    # a line for each shape of an 8B model and each size of the kernel's tiles
"""

from __future__ import annotations

import argparse
import itertools
import json

import bitsandbytes.functional as bnb
import torch

from lorafit.backbone.kernels import nf4_product
from lorafit.backbone.kernels.frozen_linear_op import code_values, unpack_weight

SHAPES = ((4096, 4096), (1024, 4096), (14336, 4096), (4096, 14336))
COUNTS = (2, 2, 2, 1)
"""Weights of each shape (out, in) in a layer."""
SIZES = tuple(itertools.product((32, 64, 128), (4, 8), (128, 256, 512)))
"""Features, warps and programs."""


def microseconds(work: object, repeats: int = 20) -> float:
    """Return the time of `work` alone, in a CUDA graph that repeats it."""
    work()  # type: ignore[operator]
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(repeats):
            work()  # type: ignore[operator]
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    graph.replay()
    start.record()
    graph.replay()
    end.record()
    end.synchronize()
    return 1e3 * start.elapsed_time(end) / repeats


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=64)
    rows = parser.parse_args().rows
    weights = []
    for features, columns in SHAPES:
        packed, state = bnb.quantize_4bit(
            torch.randn(features, columns, device="cuda").bfloat16(), compress_statistics=True, quant_type="nf4"
        )
        scales = (state.absmax, state.state2.code, state.state2.absmax, state.offset)
        weights.append((packed, scales, torch.randn(rows, columns, device="cuda").bfloat16()))
    table = code_values(weights[0][0].device)
    dense, errors = [], []
    for (features, columns), (packed, scales, x) in zip(SHAPES, weights, strict=True):
        unpacked = unpack_weight(packed, scales, 64, "nf4", features, columns, torch.bfloat16)
        made = nf4_product.multiply(x, packed, scales, table, 64, x.new_empty(rows, features))
        errors.append(float((made - x @ unpacked.t()).abs().max() / made.abs().max()))

        def both(
            packed: torch.Tensor = packed,
            scales: tuple = scales,
            x: torch.Tensor = x,
            f: int = features,
            c: int = columns,
        ) -> torch.Tensor:
            return x @ unpack_weight(packed, scales, 64, "nf4", f, c, torch.bfloat16).t()

        dense.append(microseconds(both))
    layer = sum(count * each for count, each in zip(COUNTS, dense, strict=True))
    print(json.dumps({"rows": rows, "dequantized": dense, "a_layer_us": layer, "errors": errors}), flush=True)
    for features, warps, programs in SIZES:
        nf4_product.FEATURES, nf4_product.WARPS, nf4_product.PROGRAMS = features, warps, programs
        found = []
        for (wide, _), (packed, scales, x) in zip(SHAPES, weights, strict=True):
            out = x.new_empty(rows, wide)
            found.append(
                microseconds(
                    lambda x=x, packed=packed, scales=scales, out=out: nf4_product.multiply(  # type: ignore[misc]
                        x, packed, scales, table, 64, out
                    )
                )
            )
        layer = sum(count * each for count, each in zip(COUNTS, found, strict=True))
        sizes = {"features": features, "warps": warps, "programs": programs}
        print(json.dumps(sizes | {"us": [round(each, 1) for each in found], "a_layer_us": round(layer, 1)}), flush=True)


if __name__ == "__main__":
    main()
