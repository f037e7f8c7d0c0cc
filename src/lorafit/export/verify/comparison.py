"""Comparison: the distance of one model from another on the same rows."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from lorafit.export.formats import OpenedModel, Row, TellsTop

REFERENCE_BYTES = 1 << 30


@dataclass(frozen=True)
class Comparison:
    """Hold means over the supervised positions.

    Attributes:
        kl: KL divergence from the reference, in nats.
        top1_agreement: Share of positions with the reference's most likely token.
        loss: The model's own task loss, in nats.
        median_kl: The KL of the row with the median one.
    """

    kl: float
    top1_agreement: float
    loss: float
    median_kl: float = math.nan


@dataclass(frozen=True)
class Reference:
    """Hold the reference model's log-probabilities.

    Attributes:
        rows: the rows that were run.
        log_probs: a tensor for each row: (positions, vocabulary), fp32, on the CPU.
        loss: the reference's mean task loss, in nats.
    """

    rows: tuple[Row, ...]
    log_probs: tuple[Tensor, ...]
    loss: float

    @property
    def positions(self) -> int:
        """Return the number of supervised positions in all rows."""
        return sum(len(part) for part in self.log_probs)

    @classmethod
    def of(cls, model: OpenedModel, rows: Sequence[Row], max_bytes: int = REFERENCE_BYTES) -> Reference:
        """Run `model` over `rows` in order, while the log-probabilities fit into `max_bytes`."""
        used: list[Row] = []
        kept: list[Tensor] = []
        for row in rows:
            log_probs = model.log_probabilities(row)
            if kept and sum(part.nbytes for part in kept) + log_probs.nbytes > max_bytes:
                break
            used.append(row)
            kept.append(log_probs)
        return cls.known(used, kept)

    @classmethod
    def known(cls, rows: Sequence[Row], log_probs: Sequence[Tensor]) -> Reference:
        """Return a reference from its rows and their log-probabilities."""
        return cls(tuple(rows), tuple(log_probs), _mean_loss(rows, log_probs))

    def compare(self, model: OpenedModel) -> Comparison:
        """Return KL(reference ‖ model), top-1 agreement and the loss of `model`.

        Of a model that tells the most likely tokens only, all others count as one: its KL is that of the two
        distributions over the told tokens and the rest, a lower bound.
        """
        told = (model.log_probabilities(row) for row in self.rows)
        if isinstance(model, TellsTop):
            told = (with_rest(theirs, ours) for theirs, ours in zip(told, self.log_probs, strict=True))
        return self.compare_to(told)

    def compare_to(self, log_probs: Iterable[Tensor]) -> Comparison:
        """Return the comparison with a model's log-probabilities of the same rows."""
        agree = nll = 0.0
        kls = []
        for row, ours, theirs in zip(self.rows, self.log_probs, log_probs, strict=True):
            kls.append(float(F.kl_div(theirs, ours, reduction="sum", log_target=True)))
            agree += float((ours.argmax(-1) == theirs.argmax(-1)).sum())
            nll += float(F.nll_loss(theirs, row.targets, reduction="sum"))
        each = sorted(kl / max(1, len(row.predicting)) for kl, row in zip(kls, self.rows, strict=True))
        median = each[len(each) // 2] if each else math.nan
        return Comparison(sum(kls) / self.positions, agree / self.positions, nll / self.positions, median)


def median_row(reference: Reference, log_probs: Iterable[Tensor]) -> Comparison:
    """Return the comparison of the row with the median KL.

    Some models are unstable at a position: rounding alone moves it by as much as a nat, and a mean of few rows too.
    """
    each = zip(reference.rows, reference.log_probs, log_probs, strict=True)
    found = [Reference.known([row], [ours]).compare_to([theirs]) for row, ours, theirs in each]
    return sorted(found, key=lambda one: one.kl)[len(found) // 2]


def with_rest(told: Tensor, reference: Tensor) -> Tensor:
    """Return `told` (positions, vocabulary) with its missing probability on the tokens that are -inf.

    It is divided among them as `reference` divides its own.
    """
    untold = told.isneginf()
    left = (1 - told.double().exp().sum(-1, keepdim=True)).clamp_min(torch.finfo(torch.float64).tiny).log()
    theirs = reference.double().masked_fill(~untold, -torch.inf)
    spread = theirs - theirs.logsumexp(-1, keepdim=True) + left
    return torch.where(untold, spread, told.double()).float()


def _mean_loss(rows: Sequence[Row], log_probs: Sequence[Tensor]) -> float:
    total = sum(float(F.nll_loss(part, row.targets, reduction="sum")) for row, part in zip(rows, log_probs))
    return total / max(1, sum(len(part) for part in log_probs))
