"""Comparison: how far one model is from another on the same rows."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

Row = tuple[np.ndarray, np.ndarray]
"""(ids (tokens,), mask (tokens,)): True in the mask marks the tokens that are supervised."""

REFERENCE_BYTES = 1 << 30


@dataclass(frozen=True)
class Comparison:
    """Means over the supervised positions: KL in nats from the reference, top-1 agreement with it, own task loss."""

    kl: float
    top1_agreement: float
    loss: float


@dataclass(frozen=True)
class Reference:
    """The reference model's log-probabilities, row by row: each (positions, vocabulary), fp32, on the CPU."""

    rows: tuple[Row, ...]
    log_probs: tuple[Tensor, ...]
    loss: float

    @property
    def positions(self) -> int:
        """Supervised positions in all rows."""
        return sum(len(part) for part in self.log_probs)

    @classmethod
    def of(cls, model: nn.Module, rows: Sequence[Row], max_bytes: int = REFERENCE_BYTES) -> Reference:
        """Run `model` over `rows`, in their order, as long as the log-probabilities fit into `max_bytes`."""
        used: list[Row] = []
        kept: list[Tensor] = []
        with _evaluating(model):
            for row in rows:
                log_probs = log_probabilities(model, row)
                if kept and sum(part.nbytes for part in kept) + log_probs.nbytes > max_bytes:
                    break
                used.append(row)
                kept.append(log_probs)
        return cls(tuple(used), tuple(kept), _mean_loss(used, kept))

    def compare(self, model: nn.Module) -> Comparison:
        """How `model` differs from the reference: KL(reference ‖ model), agreement, and its own loss."""
        kl = agree = nll = 0.0
        with _evaluating(model):
            for row, ours in zip(self.rows, self.log_probs):
                theirs = log_probabilities(model, row)
                kl += float(F.kl_div(theirs, ours, reduction="sum", log_target=True))
                agree += float((ours.argmax(-1) == theirs.argmax(-1)).sum())
                nll += float(F.nll_loss(theirs, _targets(row), reduction="sum"))
        return Comparison(kl / self.positions, agree / self.positions, nll / self.positions)


def log_probabilities(model: nn.Module, row: Row) -> Tensor:
    """Log-softmax in fp32 (positions, vocabulary) of what `model` predicts at the supervised tokens of `row`.

    One row at a time, unpadded, so that nothing but the row itself decides the numbers.
    """
    device = next(model.parameters()).device
    ids = torch.as_tensor(np.asarray(row[0], dtype=np.int64), device=device)[None]
    predicting = torch.as_tensor(_predicting(row), device=device)
    with torch.inference_mode():
        if "logits_to_keep" in inspect.signature(_innermost(model).forward).parameters:
            logits = model(input_ids=ids, use_cache=False, logits_to_keep=predicting).logits[0]
        else:
            logits = model(input_ids=ids, use_cache=False).logits[0, predicting]
        return logits.float().log_softmax(-1).cpu()


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def _innermost(model: Any) -> nn.Module:
    inner: nn.Module = model.get_base_model() if hasattr(model, "get_base_model") else model
    return inner


def _predicting(row: Row) -> np.ndarray:
    """Positions whose logits predict a supervised token: the one before it."""
    supervised = np.flatnonzero(np.asarray(row[1], dtype=bool))
    return supervised[supervised > 0] - 1


def _targets(row: Row) -> Tensor:
    return torch.as_tensor(np.asarray(row[0], dtype=np.int64)[_predicting(row) + 1])


def _mean_loss(rows: Sequence[Row], log_probs: Sequence[Tensor]) -> float:
    total = sum(float(F.nll_loss(part, _targets(row), reduction="sum")) for row, part in zip(rows, log_probs))
    return total / max(1, sum(len(part) for part in log_probs))
