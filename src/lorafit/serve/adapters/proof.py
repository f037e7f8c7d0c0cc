"""proof: golden prompts, replayed through the slots and through plain forward passes."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from lorafit.data import Template
from lorafit.errors import BackboneError, VerificationError
from lorafit.methods.lora import plain_adapter
from lorafit.serve.adapters.source import AdapterVersion, Weights
from lorafit.serve.decoding.batch import BatchDecoder, Tail

FLOORS = 10.0
LEAST_FLOOR = {torch.float32: 1e-7, torch.bfloat16: 2e-4, torch.float16: 2e-5}
"""KL in nats that rounding alone makes, where fewer digits than that were measured."""
POSITIONS, ADAPTER_POSITIONS = 8, 4
"""Last positions of each prompt that are compared, for the base and for each adapter."""


class GoldenProof:
    """Prove a base, and then each of its adapters, on golden prompts.

    An adapter costs one plain forward pass and `ADAPTER_POSITIONS` passes through slots, each over all prompts.

    Attributes:
        floor: the noise floor: mean KL between the base's plain forward pass and its slots.
    """

    def __init__(self, decoder: BatchDecoder, template: Template) -> None:
        """Prove the base, and fuse its kernels. Raises BackboneError for a family that the engine gets wrong."""
        self._decoder = decoder
        prompts = [ids[: decoder.positions] for _, ids in template.golden_prompts()]
        self._tails = tails_of(prompts, ADAPTER_POSITIONS)
        self.floor = prove_base(decoder, tails_of(prompts, POSITIONS))
        self._base: list[Tensor] | None = None

    def prove_adapter(self, version: AdapterVersion, weights: Weights, slot: int) -> float:
        """Return the largest KL between the adapter in `slot` and its own weights.

        Raises VerificationError above ten floors, and for an adapter that answers as the base everywhere.
        """
        decoder = self._decoder
        decoder.adapters.put(slot, weights, version.scale)
        wanted = decoder.plain_log_probs(self._tails, partial(plain_adapter, decoder.model, weights, version.scale))
        found = decoder.spare_log_probs(self._tails, slot)
        worst = _largest_kl(wanted, found)
        if not worst <= FLOORS * self.floor:
            what = f"the adapter's golden prompts differ by {worst:.1e} nats from its own weights"
            raise VerificationError(
                f"{what} (floor {self.floor:.1e})", where=str(version.folder), fix="report this base"
            )
        if all(torch.equal(ours, theirs) for ours, theirs in zip(wanted, self._of_the_base(), strict=True)):
            what = "the adapter changes no answer to the golden prompts: it is the base"
            raise VerificationError(what, where=str(version.folder), fix="train it longer")
        return worst

    def _of_the_base(self) -> list[Tensor]:
        # computed once, and not in the constructor: dequantized copies of the base may come after it
        if self._base is None:
            self._base = self._decoder.plain_log_probs(self._tails)
        return self._base


def tails_of(prompts: Sequence[Sequence[int]], positions: int) -> list[Tail]:
    """Return the prompts with their last `positions` tokens to compare."""
    return [Tail(ids, max(0, len(ids) - positions)) for ids in prompts]


def prove_base(decoder: BatchDecoder, tails: Sequence[Tail]) -> float:
    """Return the noise floor of the base, and fuse its kernels.

    Raises BackboneError for a family whose cache, masks or positions the engine gets wrong.
    """
    least = LEAST_FLOOR[decoder.dtype]
    plain = [decoder.plain_log_probs([tail])[0] for tail in tails]
    decoder.fuse()
    worst = _largest_kl(plain, [decoder.slot_log_probs(tail, 0, 0) for tail in tails])
    if not worst <= FLOORS * FLOORS * least:
        what = f"the builtin engine computes {type(decoder.model).__name__} with an error of {worst:.1e} nats"
        raise BackboneError(what, fix="merge the run, and serve it with vLLM")
    return max(worst, least)


def _largest_kl(wanted: Sequence[Tensor], found: Sequence[Tensor]) -> float:
    each = [
        F.kl_div(theirs, ours, reduction="batchmean", log_target=True)
        for ours, theirs in zip(wanted, found, strict=True)
    ]
    return float(torch.stack(each).max())  # NaN if any is
