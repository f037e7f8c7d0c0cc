"""What a micro-batch leaves in memory between its forward and its backward pass, per layer and per loss.

Counted from what autograd saves in transformers' layers (`torch.autograd.graph.saved_tensors_hooks`), in bytes:
- a norm keeps its input in fp32;
- attention keeps queries, keys, values and its output; values cut from a fused projection keep all of it;
- attention with capped scores keeps every score: tanh, fp32 softmax and its 16-bit copy;
- a gated feed-forward keeps gate, activation and up, a plain one its inner values;
- an adapter keeps its input after dropout, and the dropout's mask.
A frozen linear keeps nothing: its weight is already there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from lorafit.planning.shape import ModelShape, Projection

LOSS_CHUNK_TOKENS = 1024
NORM_BYTES = 4
SOFTMAX_BYTES = 4
BYTES_PER_LOGIT = 12


@dataclass(frozen=True, slots=True)
class Execution:
    """How the layers and the loss are run, as far as memory can tell.

    `fused`: compiled layers, where a norm and an activation are recomputed inside the kernel. `loss`: logits of
    `all` positions at once, of the `supervised` ones, or in `chunks`. `wide_stream`: embeddings, and so the
    residual stream, in fp32, as peft's `prepare_model_for_kbit_training` leaves them.
    """

    fused: bool = False
    loss: Literal["all", "supervised", "chunks"] = "supervised"
    wide_stream: bool = False


LORAFIT = Execution()
"""What lorafit does today; the engine to come makes it fused and chunked."""


@dataclass(frozen=True, slots=True)
class Activations:
    """Bytes one micro-batch needs: kept of every layer, of one layer, of the checkpoints, and passing ones."""

    kept_bytes: int
    layer_bytes: int
    checkpoint_bytes: int
    backward_bytes: int
    loss_bytes: int

    def peak_bytes(self, recompute: bool) -> int:
        """The most that is there at once: what was saved, and the larger of the loss's and one layer's backward."""
        saved = self.checkpoint_bytes if recompute else self.kept_bytes
        layer = self.backward_bytes + (self.layer_bytes if recompute else 0)
        return saved + max(self.loss_bytes, layer)


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """The size of one micro-batch: its tokens, those in the loss, and the longest row's."""

    tokens: int
    supervised: int
    longest: int


def activations(
    shape: ModelShape,
    targets: tuple[str, ...],
    batch: MicroBatch,
    *,
    width: int,
    mask_bytes: int = 0,
    execution: Execution = LORAFIT,
) -> Activations:
    """The activations of one micro-batch.

    `width` is the compute dtype's size in bytes, `mask_bytes` that of one entry of a dropout mask (0: no dropout).
    """
    stream = NORM_BYTES if execution.wide_stream else width
    adapter = _adapter_inputs(shape, targets, execution.fused) * (width + mask_bytes)
    layer = round(batch.tokens * (adapter + _layer_bytes_per_token(shape, batch.longest, width, stream, execution)))
    return Activations(
        kept_bytes=shape.layers * layer,
        layer_bytes=layer,
        checkpoint_bytes=shape.layers * shape.hidden * stream * batch.tokens,
        backward_bytes=_backward_bytes(shape, batch.tokens, width),
        loss_bytes=_loss_bytes(shape, batch, width, execution),
    )


def _layer_bytes_per_token(shape: ModelShape, longest: int, width: int, stream: int, execution: Execution) -> float:
    queries, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    attention = width * (2 * queries + 2 * keys)
    if any(part.role == "qkv" for part in shape.projections):
        attention += width * (queries + keys)
    if shape.capped_scores:
        attention += shape.heads * longest * (2 * width + SOFTMAX_BYTES) + 2 * width * (queries - keys)
    norms = 2 * shape.hidden * stream if execution.fused else NORM_BYTES * shape.normed_width
    feed_forward = sum(_feed_forward(part, shape, execution.fused) for part in shape.projections) * width
    return norms + attention + feed_forward


def _feed_forward(part: Projection, shape: ModelShape, fused: bool) -> float:
    """Values per token and (mean) layer that the activation after this projection keeps."""
    if part.role not in ("up", "gate_up") or part.inputs != shape.hidden:
        return 0.0
    inner = part.outputs // 2 if part.role == "gate_up" else part.outputs
    copies = (2 if fused else 3) if shape.is_gated else 1
    if not part.stacked:
        return inner * copies * part.count / shape.layers
    # each token visits a few experts, and is copied for each of them
    layers = part.count * part.active / max(shape.experts_per_token, 1)
    return shape.experts_per_token * (inner * copies + 2 * shape.hidden) * layers / shape.layers


def _adapter_inputs(shape: ModelShape, targets: tuple[str, ...], fused: bool) -> float:
    """Values per token and (mean) layer that adapters keep; fused layers share one input among their adapters."""
    chosen = shape.named(targets)
    if fused:
        inputs = {(part.path.rpartition(".")[0], part.inputs): part for part in chosen}
        return sum(part.inputs * part.count for part in inputs.values()) / shape.layers
    return sum(part.inputs * part.count for part in chosen) / shape.layers


def _backward_bytes(shape: ModelShape, tokens: int, width: int) -> int:
    """Gradients that pass through one layer, and its largest weight, dequantised."""
    largest = max((part.inputs * part.outputs for part in shape.linears), default=0)
    inner = max(shape.intermediate, shape.hidden)
    return width * (tokens * (3 * inner + 4 * shape.hidden) + largest)


def _loss_bytes(shape: ModelShape, batch: MicroBatch, width: int, execution: Execution) -> int:
    """Log-probabilities, their gradient and the logits' gradient, each in fp32: what the loss holds at its peak."""
    chunk = min(batch.supervised, LOSS_CHUNK_TOKENS)
    rows = {"all": batch.tokens, "supervised": batch.supervised, "chunks": chunk}[execution.loss]
    head = shape.vocab * shape.hidden * width if execution.wide_stream else 0
    return rows * shape.vocab * BYTES_PER_LOGIT + head + batch.tokens * shape.hidden * (width + 4)
