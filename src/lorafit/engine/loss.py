"""The loss of a packed micro-batch: summed cross entropy over supervised positions only."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import cross_entropy

from lorafit.engine.batch import MicroBatch


def supervised_logits(model: Any, batch: MicroBatch) -> torch.Tensor:
    """Logits (supervised tokens, vocabulary) at the positions that predict a supervised token.

    The head runs at those positions only (transformers' `logits_to_keep`), so prompt tokens cost no vocabulary.
    """
    output = model(
        input_ids=batch.ids,
        position_ids=batch.positions,
        attention_mask=None,
        use_cache=False,
        logits_to_keep=batch.predictors,
        segments=batch.segments,
    )
    return output.logits[0]


def summed_loss(model: Any, batch: MicroBatch) -> torch.Tensor:
    """Sum (not mean) of the token losses in fp32; the caller divides by the whole step's supervised tokens.

    A mean over each micro-batch, averaged over the step, would weigh tokens by their neighbours.
    """
    return cross_entropy(supervised_logits(model, batch).float(), batch.targets, reduction="sum")
