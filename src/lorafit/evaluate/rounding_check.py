"""rounding_check: measure the cost of quantizing a base on the rows of a run, before it is trained."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorafit.backbone import with_stored_weights
from lorafit.config import RunConfig, base_folder
from lorafit.data import Rows
from lorafit.engine import padded_logits
from lorafit.findings import Finding, Severity

ROWS, LONGEST = 16, 128
"""Rows that are measured, and their most tokens: the shortest ones, in one forward pass."""
LOST = 0.05
"""Nats of loss that quantizing may cost."""
ERRORS = 3.0
"""Standard errors of the mean difference that chance explains."""


def quantization_loss(base: nn.Module, config: RunConfig, rows: Rows) -> Iterator[Finding]:
    """Yield finding S006 if `base` in NF4 has a higher loss on `rows` than with its weights as stored.

    The cost is two forward passes over at most 16 short rows, and one more read of the base, weight by weight. A base
    without 16-bit weights, one on several devices, and memory too small for the pass yield nothing.
    """
    if config.quantization != "nf4" or len({weight.device for weight in base.parameters()}) > 1:
        return
    folder = base_folder(config.base, config.revision, weights=True)
    try:
        losses = _losses(base, folder, rows)
    except torch.OutOfMemoryError:
        torch.cuda.empty_cache()
        return
    if losses is None or not len(losses[0]):
        return
    rounded, stored = losses
    difference = (rounded - stored).double()
    lost, error = float(difference.mean()), float(difference.std()) / math.sqrt(len(difference))
    if lost > LOST and lost > ERRORS * error:
        yield _finding(float(rounded.mean()), float(stored.mean()), len(difference), folder)


def _losses(base: nn.Module, folder: Path, rows: Rows) -> tuple[Tensor, Tensor] | None:
    """Return the losses (tokens,) in NF4 and with the stored weights; None if the base has none."""
    with with_stored_weights(base, folder) as has_weights:
        if not has_weights:
            return None
        stored = _loss(base, rows)
    return _loss(base, rows), stored


def _loss(base: Any, rows: Rows) -> Tensor:
    """Return the loss of every supervised token of the shortest rows, in fp32 on the CPU."""
    chosen = [int(row) for row in rows.lengths.argsort(kind="stable")[:ROWS]]
    ids, masks = [rows.ids(row)[:LONGEST] for row in chosen], [rows.mask(row)[:LONGEST] for row in chosen]
    logits = padded_logits(base, ids)
    # the first token of a row has none before it
    predicted = torch.cat([each[: len(mask) - 1][mask[1:]] for each, mask in zip(logits, masks, strict=True)])
    targets = np.concatenate([each[1:][mask[1:]] for each, mask in zip(ids, masks, strict=True)])
    wanted = torch.as_tensor(targets.astype(np.int64), device=predicted.device)
    losses: Tensor = F.cross_entropy(predicted.float(), wanted, reduction="none").cpu()
    return losses


def _finding(rounded: float, stored: float, tokens: int, folder: Path) -> Finding:
    return Finding(
        "S006",
        Severity.WARNING,
        f"quantizing costs this base {rounded - stored:.2f} nats: the loss on {tokens} tokens of your rows is "
        f"{rounded:.3f} in NF4 and {stored:.3f} in its own precision",
        where=str(folder),
        why="a model that was merged onto a quantized base loses in NF4 what it was taught",
        fix="set quantization: none, or merge that run again with --onto original",
    )
