"""Vocabulary loss: cross entropy summed over supervised positions, computed in chunks of logits."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import cross_entropy

from lorafit.backbone import unwrapped
from lorafit.engine.loss.kernel import HAS_TRITON, losses_to_gradient
from lorafit.engine.loss.logit_rules import LogitSteps, logit_steps
from lorafit.engine.packing import MicroBatch, collate, side_by_side

CHUNK_BYTES = 256 << 20
"""Largest size of one chunk's logits."""

IGNORED = -100
"""A target that has no loss and no gradient, as in torch."""

ROW_MULTIPLE = 16
"""Factor of a chunk's rows; matrix units are fastest with it."""
TOLERANCE = {torch.float32: 1e-4, torch.float16: 2e-3, torch.bfloat16: 1e-2}
"""Largest relative difference that rounding explains: the model may scale and cap its logits in its own dtype."""
PROOF_TOKENS = 64
"""Number of supervised tokens on which the chunked loss is compared with the model's own logits."""


def rows_per_chunk(vocabulary: int, itemsize: int) -> int:
    """Return the number of hidden rows whose logits take at most CHUNK_BYTES, at least one.

    A logit takes `itemsize` bytes.
    """
    rows = CHUNK_BYTES // (vocabulary * itemsize)
    return max(rows // ROW_MULTIPLE * ROW_MULTIPLE, min(rows, ROW_MULTIPLE), 1)


def gradient_bytes(head: nn.Module) -> int:
    """Return the bytes that `chunked_loss` takes for the trained weights of `head`.

    They are a sum in fp32; and for fp32 weights beside a frozen one in 16 bits (2 + 2 + 4 bytes) the rounded weights of
    a chunk, and their gradient in both precisions.
    """
    own: Any = head.weight
    trained = [weight for weight in head.parameters() if weight.requires_grad]
    return sum((4 if weight is own else 12) * weight.numel() for weight in trained)


def chunked_loss(
    hidden: Tensor,
    targets: Tensor,
    head: nn.Module,
    steps: LogitSteps,
    chunk_rows: int | None = None,
    share: float | Tensor = 1.0,
) -> Tensor:
    """Return `share` times the summed cross entropy of `steps(head(hidden))` against `targets`, in fp32.

    hidden (rows, hidden), targets (rows,) int64, IGNORED for rows that do not count, `head` maps (n, hidden) to
    (n, vocabulary). The gradient reaches `hidden` and the trained parameters of `head`; under no_grad only the loss is
    computed. `chunk_rows` is by default the number that CHUNK_BYTES allows. Passing `share`, rather than multiplying by
    it afterwards, saves the gradient a rounding in half precision; as a tensor () in fp32 it may change under a graph.
    """
    if chunk_rows is None:
        with torch.no_grad():
            empty = head(hidden[:0])  # has the vocabulary and dtype, under autocast and adapters too
        chunk_rows = rows_per_chunk(empty.shape[-1], empty.element_size())
    trained = [parameter for parameter in head.parameters() if parameter.requires_grad]
    differentiable = torch.is_grad_enabled()
    loss: Tensor = _ChunkedLoss.apply(hidden, targets, head, steps, chunk_rows, share, differentiable, *trained)
    return loss


class _ChunkedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        targets: Tensor,
        head: nn.Module,
        steps: LogitSteps,
        chunk_rows: int,
        share: float | Tensor,
        differentiable: bool,
        *trained: Tensor,
    ) -> Tensor:
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        grad_hidden = torch.empty_like(hidden) if differentiable else None
        sums = [torch.zeros_like(weight, dtype=torch.float32) for weight in trained] if differentiable else []
        weight, ctx.power = _weight_and_power(share)
        for start in range(0, hidden.shape[0], chunk_rows):
            rows = slice(start, start + chunk_rows)
            if grad_hidden is None:
                losses, _ = losses_and_gradient(head(hidden[rows]), targets[rows], steps)
                total += losses.sum()
            else:
                losses, to_hidden, *to_trained = _chunk(hidden[rows], targets[rows], head, steps, weight, trained)
                total += losses.sum()
                grad_hidden[rows] = to_hidden
                for accumulated, grad in zip(sums, to_trained, strict=True):
                    accumulated += grad
        if grad_hidden is not None:
            ctx.save_for_backward(grad_hidden, *sums)
            ctx.dtypes = [weight.dtype for weight in trained]
        return total * share

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator, unused-ignore]
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, *sums = ctx.saved_tensors
        factor = grad * ctx.power
        scaled = [(total * factor).to(dtype) for total, dtype in zip(sums, ctx.dtypes, strict=True)]
        return (grad_hidden * factor, None, None, None, None, None, None, *scaled)


Weight = float | Tensor


def _weight_and_power(share: Weight) -> tuple[Weight, Weight]:
    """Return `share` as a weight of 1 to 2 and a power of two.

    The logits' gradient takes the weight in fp32 before it is rounded. The power, which rounds nothing, is applied at
    the end, since fp16 would lose the logits of unlikely tokens below it.
    """
    if isinstance(share, Tensor):
        mantissas, exponents = torch.frexp(share)
        return 2.0 * mantissas, torch.ldexp(torch.ones_like(share), exponents - 1)
    mantissa, exponent = math.frexp(share)
    return 2.0 * mantissa, 2.0 ** (exponent - 1)


def _chunk(
    hidden: Tensor, targets: Tensor, head: nn.Module, steps: LogitSteps, weight: Weight, trained: tuple[Tensor, ...]
) -> list[Tensor]:
    """Return a chunk's losses (rows,), and `weight` times their sum's gradients.

    The gradients are those in `hidden` and in each of `trained`.
    """
    with torch.enable_grad():
        leaf = hidden.detach().requires_grad_()
        logits = head(leaf)
    losses, grad_logits = losses_and_gradient(logits.detach(), targets, steps, weight)
    # a disabled adapter still requires a gradient, but is not part of the graph
    grads = torch.autograd.grad(logits, (leaf, *trained), grad_logits, allow_unused=True, materialize_grads=True)
    return [losses, *grads]


def apply_steps(logits: Tensor, steps: LogitSteps) -> Tensor:
    """Return the family's logits in fp32, from its head's output."""
    scaled = logits.float() * steps.scale
    return scaled if steps.cap is None else torch.tanh(scaled / steps.cap) * steps.cap


def losses_and_gradient(
    logits: Tensor, targets: Tensor, steps: LogitSteps, weight: Weight = 1.0
) -> tuple[Tensor, Tensor]:
    """Return losses (rows,) in fp32, and `weight` times the gradient of their sum in `logits`.

    d loss / d z = (softmax - onehot) · (1 - tanh²(scale · z / cap)) · scale; 0 for IGNORED. The gradient has the dtype
    of `logits`, which are overwritten.
    """
    if HAS_TRITON and logits.is_cuda:
        return losses_to_gradient(logits, targets, steps, weight), logits
    return losses_and_gradient_in_torch(logits, targets, steps, weight)


def losses_and_gradient_in_torch(
    logits: Tensor, targets: Tensor, steps: LogitSteps, weight: Weight
) -> tuple[Tensor, Tensor]:
    """Return the result of `losses_and_gradient`, computed without a kernel."""
    z = logits.float().mul_(steps.scale) if logits.dtype is not torch.float32 else logits.mul_(steps.scale)
    counts = targets[:, None] != IGNORED
    slope = torch.where(counts, steps.scale * weight, 0.0).to(z.dtype)
    if steps.cap is not None:
        z = z.div_(steps.cap).tanh_()
        slope = (1 - z * z).mul_(slope)
        z = z.mul_(steps.cap)
    normaliser = torch.logsumexp(z, dim=-1, keepdim=True)
    own = targets[:, None].where(counts, 0)
    losses = (normaliser - z.gather(1, own)).where(counts, 0.0)[:, 0]
    gradient = z.sub_(normaliser).exp_()
    gradient.scatter_add_(1, own, torch.full_like(normaliser, -1.0))
    return losses, gradient.mul_(slope).to(logits.dtype)


Row = tuple[np.ndarray, np.ndarray]


@dataclass(frozen=True, slots=True)
class VocabularyLoss:
    """Hold the way in which one model's loss is computed.

    `vocabulary_loss_for` makes it once a model.

    Attributes:
        steps: The steps after the head, for a loss in chunks; None for a loss from whole logits.
        reason: The reason for whole logits, in one line.
        padded: True if the rows of a micro-batch are padded to one width, and run with the family's own attention.
    """

    steps: LogitSteps | None
    reason: str = ""
    padded: bool = False

    @classmethod
    def expected(cls, model: Any) -> VocabularyLoss:
        """Return the loss that the family table names, without a proof."""
        steps, name = logit_steps(unwrapped(model).config), type(unwrapped(model)).__name__
        if steps is None:
            return cls(None, f"{name} may change its logits after the head in an unknown way")
        if _head(model) is None:
            return cls(None, f"{name} has no output head that lorafit can call")
        return cls(steps)

    def summed(self, model: Any, batch: MicroBatch, share: float | Tensor = 1.0) -> Tensor:
        """Return `share` times the sum (not mean) of the token losses, in fp32.

        `share` is one over the whole step's supervised tokens: a mean over each micro-batch, averaged over the step,
        would weigh tokens by their neighbours. Multiplying the result by it would round the gradient once more. It is a
        tensor () in fp32 if it changes under a recorded graph.
        """
        if self.steps is None:
            logits = supervised_logits(model, batch, padded=self.padded).float()
            return cross_entropy(logits, batch.targets, reduction="sum") * share
        head = _head(model)
        assert head is not None, "the model's head was removed after its loss was chosen"
        with _watched(head, starve=True) as seen:
            _run(model, batch, self.padded)
        assert len(seen) == 1, "the model does not call its head exactly once"
        hidden, autocast = seen[0]
        with autocast:
            return chunked_loss(hidden[0], batch.targets, head, self.steps, share=share)


def summed_loss(model: Any, batch: MicroBatch) -> Tensor:
    """Return the summed loss of `batch` in fp32, in chunks if the family table allows it.

    See VocabularyLoss.summed.
    """
    return VocabularyLoss.expected(model).summed(model, batch)


def supervised_logits(model: Any, batch: MicroBatch, *, padded: bool = False) -> Tensor:
    """Return the logits (supervised tokens, vocabulary) that predict supervised tokens.

    The head runs at those positions only (transformers' `logits_to_keep`), so prompt tokens cost no vocabulary.
    """
    logits: Tensor = _run(model, batch, padded).logits[0]
    # a family that makes its logits without calling its head makes all of them
    return logits if len(logits) == batch.supervised else logits[batch.predictors]


def keeps_logits(model: Any) -> bool:
    """Return True if the family's forward takes `logits_to_keep`."""
    return "logits_to_keep" in inspect.signature(unwrapped(model).forward).parameters


def vocabulary_loss_for(model: Any, rows: Sequence[Row], *, padded: bool = False) -> VocabularyLoss:
    """Return the chunked loss if it equals the loss of the model's own logits on `rows`.

    Otherwise the loss is computed from whole logits. `model` must use packed attention, unless its rows are
    `padded`. Logits, loss and gradient are compared, so that the loss is never wrong.
    """
    expected = replace(VocabularyLoss.expected(model), padded=padded)
    head = _head(model)
    if head is None:
        return expected
    steps = expected.steps or LogitSteps()  # unknown to the table: try no steps
    was_training = model.training
    model.eval()
    batch = collate(rows, padded=padded).to(next(head.parameters()).device)
    first = slice(0, PROOF_TOKENS)
    probed = replace(batch, predictors=batch.predictors[first], targets=batch.targets[first])
    difference = _difference(model, head, probed, steps, padded)
    model.train(was_training)
    if difference is None:
        return VocabularyLoss(steps, padded=padded)
    reason = f"{type(unwrapped(model)).__name__}'s logits are computed whole, which takes more memory: {difference}"
    return VocabularyLoss(None, reason, padded)


def _head(model: Any) -> nn.Module | None:
    core = unwrapped(model)
    head = core.get_output_embeddings() if hasattr(core, "get_output_embeddings") else None
    return head if isinstance(head, nn.Module) else None


def _run(model: Any, batch: MicroBatch, padded: bool) -> Any:
    if padded:
        return _run_padded(model, batch)
    return model(
        input_ids=batch.ids,
        position_ids=batch.positions,
        attention_mask=None,
        use_cache=False,
        logits_to_keep=batch.predictors,
        segments=batch.segments,
    )


def _run_padded(model: Any, batch: MicroBatch) -> Any:
    """Run rows side by side as the family's users do, so that their positions and attention are its own.

    Padding is on the right, where no causal model looks from, so there is no mask. The logits are (1, n, vocabulary).
    """
    ids, head = side_by_side(batch), _head(model)
    if len(ids) == 1 and keeps_logits(model):
        return model(input_ids=ids, use_cache=False, logits_to_keep=batch.predictors)
    if head is None:
        return _in_one_row(model(input_ids=ids, use_cache=False))

    def keep(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (inputs[0].flatten(0, 1)[batch.predictors][None], *inputs[1:])

    handle = head.register_forward_pre_hook(keep, prepend=True)
    try:
        return _in_one_row(model(input_ids=ids, use_cache=False))
    finally:
        handle.remove()


def _in_one_row(output: Any) -> Any:
    """Lay the logits (rows, width, vocabulary) of `output` one row after another."""
    output.logits = output.logits.flatten(0, 1)[None]
    return output


@contextmanager
def _watched(head: nn.Module, *, starve: bool) -> Iterator[list[tuple[Tensor, torch.autocast]]]:
    """Yield the inputs of the head inside the block, (1, tokens, hidden) each, with their autocast.

    `starve` gives the head no token. The model's own forward runs, so its family, PEFT and DistributedDataParallel all
    do their part.
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
    """Return the current autocast, to be entered again.

    accelerate's autocast ends with the model's forward, before the loss.
    """
    return torch.autocast(device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device))


def _difference(model: Any, head: nn.Module, batch: MicroBatch, steps: LogitSteps, padded: bool) -> str | None:
    """Return the difference between the chunked loss and the model's own logits on `batch`.

    None if rounding explains it.
    """
    with torch.no_grad(), _watched(head, starve=False) as seen:
        own = supervised_logits(model, batch, padded=padded)
    if len(seen) != 1 or seen[0][0].shape[:2] != (1, batch.supervised):
        return "its head is not called exactly once on the supervised tokens"
    hidden, autocast = seen[0]
    leaf = hidden[0].detach().requires_grad_()
    with autocast:
        given = head(leaf)
        chunked = chunked_loss(leaf, batch.targets, head, steps)
    logits = apply_steps(given, steps)
    if logits.shape != own.shape:
        return f"its head returns {logits.shape[1]} logits, and the model {own.shape[1]}"
    whole = cross_entropy(logits, batch.targets, reduction="sum")
    gradients = [torch.autograd.grad(loss, leaf)[0] for loss in (chunked, whole)]
    for name, (got, expected) in {"logits": (logits, own), "loss": (chunked, whole), "gradient": gradients}.items():
        off = _relative(got.detach(), expected.detach())
        if not off <= TOLERANCE.get(given.dtype, 1e-2):
            return f"it changes its logits after the head in an unknown way ({name} {off:.1%} off)"
    return None


def _relative(got: Tensor, expected: Tensor) -> float:
    return float((got.float() - expected.float()).norm() / expected.float().norm().clamp_min(1e-9))
