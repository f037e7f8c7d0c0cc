"""logits: the logits of a row alone at chosen positions, or of several rows in one forward pass."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lorafit.engine.loss.vocabulary import keeps_logits


def logits_at(model: Any, ids: Sequence[int] | np.ndarray, positions: Sequence[int] | np.ndarray) -> Tensor:
    """Return the logits (positions, vocabulary) of `ids` at `positions`, on the model's device.

    The row runs alone and unpadded, so that no other row affects the numbers. A model whose forward pass can leave
    positions out computes no other logits.
    """
    device = next(model.parameters()).device
    row = torch.as_tensor(np.asarray(ids, dtype=np.int64), device=device)[None]
    chosen = torch.as_tensor(np.asarray(positions, dtype=np.int64), device=device)
    with evaluating(model), torch.inference_mode():
        if keeps_logits(model):
            found: Tensor = model(input_ids=row, use_cache=False, logits_to_keep=chosen).logits[0]
        else:
            found = model(input_ids=row, use_cache=False).logits[0, chosen]
    return found


def padded_logits(model: Any, rows: Sequence[Sequence[int] | np.ndarray]) -> Tensor:
    """Return the logits (rows, longest, vocabulary) of all rows of ids, on the model's device, in one forward pass.

    Rows are padded on the right, and no token sees what comes after it.
    """
    ids = np.zeros((len(rows), max(map(len, rows))), np.int64)
    for place, row in enumerate(rows):
        ids[place, : len(row)] = row
    device = next(model.parameters()).device
    with evaluating(model), torch.inference_mode():
        found: Tensor = model(input_ids=torch.as_tensor(ids, device=device), use_cache=False).logits
    return found


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put `model` in evaluation mode within the block."""
    was_training = model.training
    if not was_training:
        yield
        return
    model.eval()
    try:
        yield
    finally:
        model.train(True)
