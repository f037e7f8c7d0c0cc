"""The start-up self-test: packed rows must have the logits they have alone, on the user's own model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from lorafit.engine.attention import unpacked
from lorafit.engine.batch import collate
from lorafit.engine.loss import supervised_logits
from lorafit.errors import TrainingError

# largest relative difference that rounding explains; a leak between rows is of order one
TOLERANCE = {torch.float32: 1e-3, torch.float16: 5e-2, torch.bfloat16: 1e-1}


@dataclass(frozen=True, slots=True)
class Isolation:
    """How far packed logits stood from the same rows alone: ‖packed − alone‖ / ‖alone‖, worst row."""

    relative_difference: float
    rows: int


def assert_isolated(model: Any, rows: Sequence[tuple[np.ndarray, np.ndarray]]) -> Isolation:
    """Compare packed logits with plain unpacked ones on `rows`; TrainingError when rows see each other."""
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    with torch.no_grad():
        batch = collate(rows).to(device)
        packed = supervised_logits(model, batch)
        worst, start = 0.0, 0
        with unpacked(model):
            for ids, mask in rows:
                alone = model(input_ids=torch.from_numpy(ids.astype(np.int64))[None].to(device), use_cache=False)
                wanted = alone.logits[0, np.flatnonzero(mask[1:])].float()
                got = packed[start : start + len(wanted)].float()
                start += len(wanted)
                worst = max(worst, float((got - wanted).norm() / wanted.norm().clamp_min(1e-9)))
    model.train(was_training)
    dtype = packed.dtype
    if not worst <= TOLERANCE.get(dtype, 1e-1):
        raise TrainingError(
            f"packed rows see each other in this model (logits differ by {worst:.1%} from the same rows alone)",
            where=type(model).__name__,
            fix="set examples_per_step=1 to train one row at a time, and report the model family",
        )
    return Isolation(worst, len(rows))
