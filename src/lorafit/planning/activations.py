"""What a micro-batch leaves in memory between its forward and its backward pass, per layer and per loss.

Counted from what autograd saves in transformers' layers (`torch.autograd.graph.saved_tensors_hooks`), in bytes:
- a norm keeps its input in fp32;
- attention keeps queries, keys, values and its output; values cut from a fused projection keep all of it;
- attention with capped scores keeps every score: tanh, fp32 softmax and its 16-bit copy; in compiled layers it keeps
  none, and writes some of them out at a time in its backward;
- a gated feed-forward keeps gate, activation and up, a plain one its inner values;
- an adapter keeps its input after dropout, and the dropout's mask.
A frozen linear keeps nothing: its weight is already there. Compiled layers make again what is computed element by
element (engine/recompute.py), and that is what an adapter takes in, or else attention's output, which is kept anyway.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from lorafit.config import RunConfig
from lorafit.planning.hardware import Hardware
from lorafit.planning.micro_batch import MicroBatch
from lorafit.planning.shape import ModelShape, Projection

LOSS_CHUNK_BYTES = 256 << 20
"""Largest size of one chunk's logits in the engine's loss, which turns them into their own gradient."""
OTHERS_CHUNK_TOKENS = 1024
NORM_BYTES = 4
SOFTMAX_BYTES = 4
BYTES_PER_LOGIT = 12
SCORES, SCORES_COPIES = 1 << 26, 5
"""Scores (of rows, heads, queries, keys) that grouped attention writes out at a time: 256 MiB in fp32, five times over:
scores, capped, softmaxed, two gradients."""


@dataclass(frozen=True, slots=True)
class Execution:
    """How the layers and the loss are run, as far as memory can tell.

    `fused`: compiled layers, where a norm and an activation are recomputed inside the kernel. `loss`: logits of
    `all` positions at once, of the `supervised` ones, or in `chunks`. `wide_stream`: embeddings, and so the
    residual stream, in fp32, as peft's `prepare_model_for_kbit_training` leaves them.
    """

    fused: bool = False
    loss: Literal["all", "supervised", "chunks"] = "chunks"
    wide_stream: bool = False


def execution_of(config: RunConfig, hardware: Hardware) -> Execution:
    """How lorafit runs `config` there: layers compiled on CUDA unless `compile` is off, the loss in chunks."""
    return Execution(fused=config.compile == "on" or (hardware.kind == "cuda" and config.compile != "off"))


@dataclass(frozen=True, slots=True)
class Activations:
    """Bytes of one micro-batch, of one layer: kept whole, kept when its feed-forward is recomputed, its input; what
    its backward works with, the largest weight of it dequantised; and what the loss works with, a chunk of logits
    of it."""

    layer_bytes: int
    feed_forward_bytes: int
    input_bytes: int
    backward_bytes: int
    weight_bytes: int
    loss_bytes: int
    chunk_bytes: int


def activations(
    shape: ModelShape,
    targets: tuple[str, ...],
    batch: MicroBatch,
    *,
    width: int,
    mask_bytes: int = 0,
    execution: Execution,
) -> Activations:
    """The activations of one micro-batch.

    `width` is the compute dtype's size in bytes, `mask_bytes` that of one entry of a dropout mask (0: no dropout).
    """
    stream = NORM_BYTES if execution.wide_stream else width
    linears = shape.named(targets)
    inner = tuple(part for part in linears if part.role == "down")
    adapters, inner_adapters = (
        _adapter_bytes(shape, parts, execution.fused, width, mask_bytes) for parts in (linears, inner)
    )
    attention = _attention_bytes_per_token(shape, batch.longest, width, stream, execution)
    feed_forward = sum(_feed_forward(part, shape, execution.fused) for part in shape.projections) * width
    passing = _passing_bytes(shape, batch.tokens, width, execution)
    weight = width * max((part.inputs * part.outputs for part in shape.linears), default=0)
    chunk = _logit_bytes(shape, batch, width, execution)
    return Activations(
        layer_bytes=round(batch.tokens * (attention + feed_forward + adapters)),
        feed_forward_bytes=round(batch.tokens * (attention + adapters - inner_adapters)),
        input_bytes=shape.hidden * stream * batch.tokens,
        backward_bytes=max(passing, _scores_bytes(shape, batch, execution)) + weight,
        weight_bytes=weight,
        loss_bytes=chunk + batch.tokens * shape.hidden * (width + 4),
        chunk_bytes=chunk,
    )


def _attention_bytes_per_token(shape: ModelShape, longest: int, width: int, stream: int, execution: Execution) -> float:
    """What norms and attention keep of a token in one layer."""
    queries, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    attention = width * (2 * queries + 2 * keys)
    if any(part.role == "qkv" for part in shape.projections):
        attention += width * (queries + keys)
    if shape.capped_scores and not execution.fused:
        attention += shape.heads * longest * (2 * width + SOFTMAX_BYTES) + 2 * width * (queries - keys)
    norms = 2 * shape.hidden * stream if execution.fused else NORM_BYTES * shape.normed_width
    return norms + attention


def _scores_bytes(shape: ModelShape, batch: MicroBatch, execution: Execution) -> int:
    """Capped scores that a compiled layer's attention writes out at a time (engine/grouped_attention.py), and what
    becomes of them: those of one key head of the longest row at least."""
    if not shape.capped_scores or not execution.fused:
        return 0
    head = shape.heads // shape.kv_heads * batch.longest**2
    every = shape.heads * batch.longest * batch.tokens
    return SCORES_COPIES * SOFTMAX_BYTES * min(every, max(head, SCORES))


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


def _adapter_bytes(shape: ModelShape, parts: tuple[Projection, ...], fused: bool, width: int, mask_bytes: int) -> float:
    """Bytes per token and (mean) layer that adapters of `parts` keep: each one's dropout mask, and its input where
    layers are not fused."""
    return (mask_bytes + (0 if fused else width)) * sum(part.inputs * part.count for part in parts) / shape.layers


def _passing_bytes(shape: ModelShape, tokens: int, width: int, execution: Execution) -> int:
    """Gradients that pass through one layer."""
    inner = max(shape.intermediate, shape.hidden)
    copies = 4 if execution.fused else 3
    return width * tokens * (copies * inner + 4 * shape.hidden)


def _logit_bytes(shape: ModelShape, batch: MicroBatch, width: int, execution: Execution) -> int:
    """In chunks: one chunk, which becomes its own gradient; in fp32, without a kernel for it, twice. Else
    log-probabilities, their gradient and the logits' gradient, each in fp32, as other tools' chunks hold them too."""
    if execution.loss == "chunks" and not execution.wide_stream:
        return min(batch.supervised * shape.vocab * width, LOSS_CHUNK_BYTES) * (2 if width == 4 else 1)
    chunk = min(batch.supervised, OTHERS_CHUNK_TOKENS)
    rows = {"all": batch.tokens, "supervised": batch.supervised, "chunks": chunk}[execution.loss]
    head = shape.vocab * shape.hidden * width if execution.wide_stream else 0
    return rows * shape.vocab * BYTES_PER_LOGIT + head
