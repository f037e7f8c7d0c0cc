"""proof: golden prompts, replayed through the slots and through one plain forward pass."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from lorafit.data import Template
from lorafit.data.template.template import GOLDEN
from lorafit.errors import BackboneError, TemplateError, VerificationError
from lorafit.methods.lora import dense_adapter
from lorafit.serve.adapters.source import AdapterVersion, Weights
from lorafit.serve.decoding.batch import BatchDecoder

FLOORS = 10.0
LEAST_FLOOR = {torch.float32: 1e-7, torch.bfloat16: 2e-4, torch.float16: 2e-5}
"""KL in nats that rounding alone makes, where fewer digits than that were measured."""
POSITIONS = 8


def golden_ids(template: Template, most: int) -> list[list[int]]:
    """Return the prompts of the golden conversations that the template accepts, cut to `most` tokens."""
    prompts = []
    for messages in GOLDEN:
        try:
            prompts.append(template.prompt_ids(messages)[:most])
        except TemplateError:
            continue
    return prompts


def prove_base(decoder: BatchDecoder, prompts: Sequence[Sequence[int]]) -> float:
    """Return the noise floor: mean KL between the base's plain forward pass and its slots.

    Raises BackboneError for a family whose cache, masks or positions the engine gets wrong.
    """
    worst, least = 0.0, LEAST_FLOOR[decoder.dtype]
    starts = [max(0, len(ids) - POSITIONS) for ids in prompts]
    plain = [decoder.plain_log_probs(ids, start) for ids, start in zip(prompts, starts, strict=True)]
    decoder.fuse()
    for ids, start, wanted in zip(prompts, starts, plain, strict=True):
        worst = max(worst, _kl(wanted, decoder.slot_log_probs(ids, start, 0, 0)))
    if not worst <= FLOORS * FLOORS * least:
        what = f"the builtin engine computes {type(decoder.model).__name__} with an error of {worst:.1e} nats"
        raise BackboneError(what, fix="merge the run, and serve it with vLLM")
    return max(worst, least)


def prove_adapter(
    decoder: BatchDecoder,
    version: AdapterVersion,
    weights: Weights,
    slot: int,
    prompts: Sequence[Sequence[int]],
    floor: float,
) -> float:
    """Return the largest KL between the adapter in `slot` and its dense update, on the golden prompts.

    Raises VerificationError above ten floors, and for an adapter that answers as the base everywhere.
    """
    decoder.adapters.put(slot, weights, version.scale)
    worst, moved = 0.0, False
    dense = partial(dense_adapter, decoder.model, weights, version.scale)
    for ids in prompts:
        start = max(0, len(ids) - POSITIONS)
        wanted = decoder.plain_log_probs(ids, start, dense)
        moved = moved or not torch.equal(wanted, decoder.plain_log_probs(ids, start))
        worst = max(worst, _kl(wanted, decoder.spare_log_probs(ids, start, slot)))
    if not worst <= FLOORS * floor:
        what = f"the adapter's golden prompts differ by {worst:.1e} nats from its own weights (floor {floor:.1e})"
        raise VerificationError(what, where=str(version.folder), fix="report this base")
    if not moved:
        what = "the adapter changes no answer to the golden prompts: it is the base"
        raise VerificationError(what, where=str(version.folder), fix="train it longer")
    return worst


def _kl(wanted: Tensor, found: Tensor) -> float:
    return float(F.kl_div(found, wanted, reduction="batchmean", log_target=True))
