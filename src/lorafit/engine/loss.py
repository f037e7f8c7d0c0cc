"""The loss of a packed micro-batch: summed cross entropy over supervised positions only."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

from lorafit.engine.batch import MicroBatch, collate
from lorafit.engine.families import LogitSteps, logit_steps
from lorafit.engine.vocabulary_loss import apply_steps, chunked_loss

# largest relative difference that rounding explains: own logits may be scaled and capped in their own dtype
TOLERANCE = {torch.float32: 1e-4, torch.float16: 2e-3, torch.bfloat16: 1e-2}

PROOF_TOKENS = 64
"""Supervised tokens on which the chunked loss is compared with the model's own logits."""

Row = tuple[np.ndarray, np.ndarray]


@dataclass(frozen=True, slots=True)
class VocabularyLoss:
    """How one model's loss is computed: in chunks with `steps` after the head, or from whole logits (None).

    Made once a model, by `vocabulary_loss_for`; `reason` says in one line why logits are whole.
    """

    steps: LogitSteps | None
    reason: str = ""

    @classmethod
    def expected(cls, model: Any) -> VocabularyLoss:
        """What the family's table says, without a proof."""
        steps, name = logit_steps(unwrapped(model).config), type(unwrapped(model)).__name__
        if steps is None:
            return cls(None, f"{name} may change its logits after the head in a way that lorafit does not know")
        if _head(model) is None:
            return cls(None, f"{name} has no head that lorafit can call")
        return cls(steps)

    def summed(self, model: Any, batch: MicroBatch, share: float | Tensor = 1.0) -> Tensor:
        """`share` (a tensor () in fp32, where it changes under a recorded graph) times the sum (not mean) of the token
        losses, in fp32.

        `share` is one over the whole step's supervised tokens: a mean over each micro-batch, averaged over the step,
        would weigh tokens by their neighbours. Multiplying the result by it would round the gradient once more.
        """
        if self.steps is None:
            return cross_entropy(supervised_logits(model, batch).float(), batch.targets, reduction="sum") * share
        head = _head(model)
        assert head is not None, "the model lost its head since its loss was chosen"
        with _watched(head, starve=True) as seen:
            _run(model, batch)
        assert len(seen) == 1, "the model does not call its head once"
        hidden, autocast = seen[0]
        with autocast:
            return chunked_loss(hidden[0], batch.targets, head, self.steps, share=share)


def summed_loss(model: Any, batch: MicroBatch) -> Tensor:
    """Summed loss of `batch` in fp32, in chunks where the family's table says how; see VocabularyLoss.summed."""
    return VocabularyLoss.expected(model).summed(model, batch)


def supervised_logits(model: Any, batch: MicroBatch) -> Tensor:
    """Logits (supervised tokens, vocabulary) at the positions that predict a supervised token.

    The head runs at those positions only (transformers' `logits_to_keep`), so prompt tokens cost no vocabulary.
    """
    logits: Tensor = _run(model, batch).logits[0]
    return logits


def vocabulary_loss_for(model: Any, rows: Sequence[Row]) -> VocabularyLoss:
    """The chunked loss if it is that of the model's own logits on `rows`, else the loss from whole logits.

    `model` must be on packed attention. Never a wrong loss: logits, loss and gradient are compared.
    """
    expected = VocabularyLoss.expected(model)
    head = _head(model)
    if head is None:
        return expected
    steps = expected.steps or LogitSteps()  # the table does not know: perhaps there is no step at all
    was_training = model.training
    model.eval()
    batch = collate(rows).to(next(head.parameters()).device)
    first = slice(0, PROOF_TOKENS)
    difference = _difference(
        model, head, replace(batch, predictors=batch.predictors[first], targets=batch.targets[first]), steps
    )
    model.train(was_training)
    if difference is None:
        return VocabularyLoss(steps)
    name = type(unwrapped(model)).__name__
    return VocabularyLoss(None, f"{name}'s logits are made whole, which takes more memory: {difference}")


def unwrapped(model: Any) -> Any:
    """The transformers model within PEFT's and DistributedDataParallel's wrappers."""
    inner = model.module if isinstance(model, DistributedDataParallel) else model
    return inner.get_base_model() if hasattr(inner, "get_base_model") else inner


def _head(model: Any) -> nn.Module | None:
    core = unwrapped(model)
    head = core.get_output_embeddings() if hasattr(core, "get_output_embeddings") else None
    return head if isinstance(head, nn.Module) else None


def _run(model: Any, batch: MicroBatch) -> Any:
    return model(
        input_ids=batch.ids,
        position_ids=batch.positions,
        attention_mask=None,
        use_cache=False,
        logits_to_keep=batch.predictors,
        segments=batch.segments,
    )


@contextmanager
def _watched(head: nn.Module, *, starve: bool) -> Iterator[list[tuple[Tensor, torch.autocast]]]:
    """What the head is given within, (1, tokens, hidden) each, and under which autocast; `starve` gives it no token.

    The model's own forward runs, so its family, PEFT and DistributedDataParallel all do their part.
    """
    seen: list[tuple[Tensor, torch.autocast]] = []

    def note(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        seen.append((inputs[0], _autocast_here(inputs[0].device.type)))
        return (inputs[0][:, :0], *inputs[1:]) if starve else None

    handle = head.register_forward_pre_hook(note)
    try:
        yield seen
    finally:
        handle.remove()


def _autocast_here(device: str) -> torch.autocast:
    """The autocast in force, to be entered again: accelerate's ends with the model's forward, before the loss."""
    return torch.autocast(device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device))


def _difference(model: Any, head: nn.Module, batch: MicroBatch, steps: LogitSteps) -> str | None:
    """How the chunked loss departs from the model's own logits on `batch`; None when rounding explains it."""
    with torch.no_grad(), _watched(head, starve=False) as seen:
        own = _run(model, batch).logits[0]
    if len(seen) != 1 or seen[0][0].shape[:2] != (1, batch.supervised):
        return "its head is not called once, on the supervised tokens"
    hidden, autocast = seen[0]
    leaf = hidden[0].detach().requires_grad_()
    with autocast:
        given = head(leaf)
        chunked = chunked_loss(leaf, batch.targets, head, steps)
    logits = apply_steps(given, steps)
    if logits.shape != own.shape:
        return f"its head gives {logits.shape[1]} logits and the model {own.shape[1]}"
    whole = cross_entropy(logits, batch.targets, reduction="sum")
    gradients = [torch.autograd.grad(loss, leaf)[0] for loss in (chunked, whole)]
    for name, (got, expected) in {"logits": (logits, own), "loss": (chunked, whole), "gradient": gradients}.items():
        off = _relative(got.detach(), expected.detach())
        if not off <= TOLERANCE.get(given.dtype, 1e-2):
            return f"after the head it takes steps that lorafit does not know ({name} {off:.1%} off)"
    return None


def _relative(got: Tensor, expected: Tensor) -> float:
    return float((got.float() - expected.float()).norm() / expected.float().norm().clamp_min(1e-9))
