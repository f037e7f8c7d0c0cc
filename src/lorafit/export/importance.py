"""importance: how much each column of a weight counts, by which K-quants weigh their rounding errors.

Source: llama.cpp's importance matrix (tools/imatrix): the mean square of a linear's input, column by column.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lorafit.backbone import is_plain_linear, plain_name
from lorafit.engine import logits_at
from lorafit.export.formats import Row


@torch.inference_mode()
def input_squares(model: nn.Module, rows: Sequence[Row]) -> dict[str, np.ndarray]:
    """Return the mean square of the input of every linear of the live `model`, by the base's name of its weight.

    Positions count that predict a supervised token of `rows`: with those of prompts, whose predictions nobody uses,
    the answers of the demo's Q4_K_M come out worse than without any importance.
    """
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = {}

    def add(name: str, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        tokens = inputs[0].reshape(-1, inputs[0].shape[-1]).float()
        if len(tokens) == len(row.ids):  # the head may have been given fewer
            tokens = tokens[row.predicting]
        counts[name] = counts.get(name, 0) + len(tokens)
        sums[name] = tokens.square().sum(0) + sums.get(name, 0)

    handles = [
        module.register_forward_pre_hook(partial(add, name))
        for name, module in ((plain_name(f"{name}.weight"), each) for name, each in model.named_modules())
        if is_plain_linear(module) and ".lora_" not in name
    ]
    try:
        for row in rows:
            logits_at(model, row.ids, row.predicting)
    finally:
        for handle in handles:
            handle.remove()
    return {name: (total / counts[name]).cpu().numpy() for name, total in sums.items()}
