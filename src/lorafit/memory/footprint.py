"""Footprint: the bytes of static memory, and of activations between forward and backward."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from lorafit.hardware.device import GIB
from lorafit.memory.inputs import MASTER_BYTES, UPDATE_BYTES, MicroBatchSize, PlanInputs, moment_bytes
from lorafit.memory.sharded import GATHERED_LAYERS, gathered_bytes, held_bytes, shard_bytes
from lorafit.shapes import ModelShape, Projection

NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)
"""Bytes of a weight in NF4. It has 4 bits, an 8-bit scale per 64 weights, and a 32-bit scale per 256 scales."""
QUANT_STATE_BYTES = 2048
"""Code tables and allocation slack of one quantized matrix."""
CUDA_CONTEXT_BYTES = 7 * GIB // 8
CPU_PROCESS_BYTES = 5 * GIB // 8
DENSE_SHARE = 0.5
"""Share of the free memory that dequantized copies take on a CPU (backbone's own rule)."""
LOSS_CHUNK_BYTES = 256 << 20
"""Largest size of one chunk's logits in the engine's loss. Their gradient overwrites them."""
OTHERS_CHUNK_TOKENS = 1024
NORM_BYTES = 4
SOFTMAX_BYTES = 4
BYTES_PER_LOGIT = 12
SCORES, SCORES_COPIES = 1 << 26, 5
"""Scores that grouped attention stores at a time, and copies of them. Scores (rows, heads, queries, keys) take 256 MiB
in fp32. The five copies are scores, capped scores, softmax and two gradients."""


@dataclass(frozen=True, slots=True)
class Component:
    """Hold one part of the peak memory.

    Attributes:
        name: Name of the part.
        size_bytes: Size of the part.
        assumes: Assumption behind the size.
        spare: Whether the part only fills unused memory.
    """

    name: str
    size_bytes: int
    assumes: str
    spare: bool = False


def total_bytes(components: Iterable[Component]) -> int:
    """Return the total size of the components."""
    return sum(component.size_bytes for component in components)


def movable_embedding_bytes(inputs: PlanInputs) -> int:
    """Return the bytes of input embeddings that may move to host memory.

    They may on CUDA, unless lm_head shares them or they train.
    """
    if not inputs.on_cuda or inputs.shape.tied_embeddings or inputs.is_full:
        return 0
    return inputs.shape.embedding_parameters * inputs.width


def dense_bytes(inputs: PlanInputs, layers: int) -> int:
    """Return the bytes of the dequantized weights of `layers` layers.

    A weight takes 16 bits, in FP8 eight for each direction. The result is 0 on a CPU, which always keeps copies, and
    for a base that is not in 4 bits.
    """
    if not inputs.on_cuda or not inputs.in_4_bits or inputs.base_shards > 1:
        return 0
    return round(inputs.shape.packed_parameters * inputs.width * layers / inputs.shape.layers)


def static_memory(
    inputs: PlanInputs, *, wide: bool = False, host_embeddings: bool = False, dequantized_layers: int = 0
) -> list[Component]:
    """Return every component that stays for the whole run.

    `wide` means embeddings and lm_head in fp32. `host_embeddings` moves the input embeddings to host memory.
    `dequantized_layers` counts the layers with dequantized weights beside the quantized ones.
    """
    if inputs.shards > 1:
        return [*_sharded(inputs), _process(inputs)]
    moved = movable_embedding_bytes(inputs) if host_embeddings else 0
    base = _shared(inputs, moved) if inputs.base_shards > 1 else _base(inputs, wide, moved)
    trained = _trained_weights(inputs) if inputs.is_full else _adapters(inputs)
    return [*base, *_dense_copies(inputs, base, dequantized_layers), *trained, _process(inputs)]


def _base(inputs: PlanInputs, wide: bool, moved_bytes: int) -> list[Component]:
    shape, width = inputs.shape, inputs.width
    outside_width = 4 if wide else width
    outside = (shape.embedding_parameters + shape.head_parameters) * outside_width - moved_bytes
    where = "; the input embeddings are in host memory" if moved_bytes else ""
    packed = shape.packed if inputs.in_4_bits else ()
    unpacked = sum(part.parameters for part in shape.projections if part.stacked and part not in packed)
    matrices = shape.linear_parameters + shape.expert_parameters - unpacked
    name = "base, linear layers and experts" if shape.expert_parameters > unpacked else "base, linear layers"
    if inputs.in_4_bits:
        tensors = sum(part.count // part.group for part in packed)
        size = round(matrices * NF4_BYTES) + tensors * QUANT_STATE_BYTES
        base = Component(name, size, "NF4 with double quantization: 0.516 bytes a weight")
    else:
        base = Component(name, matrices * width, f"{8 * width}-bit weights")
    rest = "norms, biases, experts" if unpacked else "norms, biases"
    return [
        base,
        Component("embeddings and lm_head", outside, f"never quantized: {8 * outside_width}-bit{where}"),
        Component(rest, (shape.norm_parameters + unpacked) * width, f"never quantized: {8 * width}-bit"),
        *_towers(inputs),
    ]


def _shared(inputs: PlanInputs, moved_bytes: int) -> list[Component]:
    """Return the components of a frozen base on each GPU, where all share its layers."""
    whole, outside, norms, *towers = _base(inputs, False, moved_bytes)
    layers = whole.size_bytes + norms.size_bytes
    gathered = GATHERED_LAYERS * layers // inputs.shape.layers
    return [
        Component("base, layers, sharded", layers // inputs.base_shards, f"1/{inputs.base_shards}; {whole.assumes}"),
        Component("gathered layers", gathered, "the running one and the next"),
        outside,
        *towers,
    ]


def base_layer_bytes(inputs: PlanInputs) -> int:
    """Return the bytes of all decoder layers of the frozen base."""
    whole, _, norms, *_ = _base(inputs, False, 0)
    return whole.size_bytes + norms.size_bytes


def _towers(inputs: PlanInputs) -> list[Component]:
    size = inputs.shape.tower_parameters * inputs.width
    return [Component("image and audio towers", size, f"never quantized: {8 * inputs.width}-bit")] if size else []


def _dense_copies(inputs: PlanInputs, base: list[Component], layers: int) -> list[Component]:
    if not inputs.in_4_bits:
        return []
    if inputs.on_cuda:
        size = dense_bytes(inputs, layers)
        why = f"the weights of {layers} of {inputs.shape.layers} layers, also dequantized for speed"
        return [Component("dequantized copies", size, why, spare=True)] if size else []
    left = inputs.hardware.memory_bytes - CPU_PROCESS_BYTES - total_bytes(base)
    size = max(0, min(inputs.shape.packed_parameters * inputs.width, round(left * DENSE_SHARE)))
    return [Component("dequantized copies", size, "kept on a CPU for speed, in at most half of the free memory")]


def _adapters(inputs: PlanInputs) -> list[Component]:
    weights, initial = inputs.adapter_parameters, inputs.initial_parameters
    whole = inputs.whole_parameters
    table = Component("trained embedding and head", 4 * whole, f"{whole:,} weights in fp32, beside the frozen ones")
    product = Component("initial products", 4 * initial, "frozen copies of what the adapters began with, in fp32")
    return [
        Component("adapters", (weights - whole) * 4, f"{weights - whole:,} weights in fp32"),
        *([table] if whole else []),
        *([product] if initial else []),
        Component("gradients" if whole else "adapter gradients", weights * 4, "fp32"),
        _optimizer_state(inputs),
    ]


def _trained_weights(inputs: PlanInputs) -> list[Component]:
    """Return the components of full fine-tuning beside the weights."""
    if inputs.updates_in_backward:
        return [Component("gradients", gradients_in_backward(inputs), "of one layer, or of the embeddings, at a time")]
    weights = inputs.trained_parameters
    copies = Component("master weights", weights * MASTER_BYTES, "fp32 copies, which take the updates")
    return [
        *([copies] if inputs.has_master_weights else []),
        Component("gradients", weights * inputs.width, f"{weights:,} weights in {8 * inputs.width} bits"),
        _optimizer_state(inputs),
    ]


def gradients_in_backward(inputs: PlanInputs) -> int:
    """Return the bytes of gradients, and of an update, where each weight is updated within the backward pass."""
    shape = inputs.shape
    outside = shape.embedding_parameters + shape.head_parameters + shape.tower_parameters
    largest = max((shape.parameters - outside) // shape.layers, shape.embedding_parameters, shape.head_parameters)
    return largest * inputs.width + UPDATE_BYTES


def _sharded(inputs: PlanInputs) -> list[Component]:
    """Return the components on each of several GPUs where every weight trains."""
    weights, gradients, moments = held_bytes(inputs)
    part, bits = f"1/{inputs.shards} of {inputs.shape.parameters:,} weights", 8 * shard_bytes(inputs)
    return [
        Component("weights, sharded", weights, f"{part} in {bits} bits"),
        Component("gradients, sharded", gradients, f"{bits} bits, summed in fp32"),
        Component("optimizer state, sharded", moments, "two moments of AdamW"),
        Component("gathered weights", gathered_bytes(inputs), "embeddings, head and two layers, with their gradients"),
    ]


def _optimizer_state(inputs: PlanInputs) -> Component:
    size = round(inputs.trained_parameters * moment_bytes(inputs.optimizer))
    return Component(
        "optimizer state", size, f"two moments of AdamW in {32 if inputs.optimizer == 'adamw' else 8} bits"
    )


def _process(inputs: PlanInputs) -> Component:
    if inputs.on_cuda:
        return Component("CUDA context", CUDA_CONTEXT_BYTES, "driver, kernels and workspaces")
    return Component("process", CPU_PROCESS_BYTES, "Python with torch and transformers loaded")


@dataclass(frozen=True, slots=True)
class Execution:
    """Hold the properties of the layers' and the loss's execution that change memory.

    Attributes:
        fused: Whether layers are compiled, so that kernels recompute norms and activations.
        loss: Positions with logits at one time: `all`, the `supervised` ones, or `chunks` of these.
        wide_stream: Whether the residual stream is in fp32, as peft's `prepare_model_for_kbit_training` leaves it.
    """

    fused: bool = False
    loss: Literal["all", "supervised", "chunks"] = "chunks"
    wide_stream: bool = False


def execution_of(inputs: PlanInputs) -> Execution:
    """Return lorafit's own execution: compiled on CUDA unless `compile` is off, the loss in chunks."""
    compiled = inputs.config.compile
    return Execution(fused=compiled == "on" or (inputs.on_cuda and compiled != "off"))


@dataclass(frozen=True, slots=True)
class Activations:
    """Hold the bytes of one layer, and of the loss, for one micro-batch.

    Attributes:
        layer_bytes: Kept by a layer when nothing is recomputed.
        feed_forward_bytes: Kept by a layer when the MLP is recomputed.
        input_bytes: The layer's input.
        backward_bytes: Working memory of the layer's backward.
        weight_bytes: Largest dequantized weight, which is part of `backward_bytes`.
        loss_bytes: Working memory of the loss.
        chunk_bytes: A chunk of logits and the head's gradient, which are part of `loss_bytes`.
        heaviest_bytes: Kept by the layer that keeps most when nothing is recomputed; 0 where all layers are alike.
    """

    layer_bytes: int
    feed_forward_bytes: int
    input_bytes: int
    backward_bytes: int
    weight_bytes: int
    loss_bytes: int
    chunk_bytes: int
    heaviest_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Trained:
    """Hold the trained parts that activations depend on.

    Attributes:
        targets: Names of the modules with an adapter.
        mask_bytes: Size of one entry of a dropout mask; 0 without dropout.
        dora: Whether adapters train the lengths of rows too, and keep their outputs.
        rows: Whether rows of tokens train, for which the gradient of the logits is copied.
        head_gradient_bytes: Bytes that the loss takes for each weight of a head that trains; 0 for a frozen head.
    """

    targets: tuple[str, ...] = ()
    mask_bytes: int = 0
    dora: bool = False
    rows: bool = False
    head_gradient_bytes: int = 0


def activations(
    shape: ModelShape, trained: Trained, batch: MicroBatchSize, *, width: int, execution: Execution
) -> Activations:
    """Return the activations of one micro-batch; `width` is the size of the compute dtype in bytes."""
    stream = NORM_BYTES if execution.wide_stream else width
    linears = shape.named(trained.targets)
    inner = tuple(part for part in linears if part.role == "down")
    adapters, inner_adapters = (
        _adapter_bytes(shape, parts, execution.fused, width, trained.mask_bytes) for parts in (linears, inner)
    )
    if trained.dora:
        within = tuple(part for part in linears if part.role in ("gate", "up", "gate_up", "down"))
        adapters += _output_bytes(shape, linears, width)
        inner_adapters += _output_bytes(shape, within, width)
    attention = _attention_bytes_per_token(shape, batch.longest, width, stream, execution)
    feed_forward = sum(_feed_forward(part, shape, execution.fused) for part in shape.projections) * width
    gradients = _gradient_bytes(shape, batch.tokens, width, execution)
    weight = width * max((part.tensor_parameters for part in shape.packed), default=0)
    chunk = _logit_bytes(shape, batch, width, execution) * (2 if trained.rows else 1)
    head = shape.vocab * shape.hidden * trained.head_gradient_bytes
    return Activations(
        layer_bytes=round(batch.tokens * (attention + feed_forward + adapters)),
        feed_forward_bytes=round(batch.tokens * (attention + adapters - inner_adapters)),
        input_bytes=shape.hidden * stream * batch.tokens,
        backward_bytes=max(gradients, _scores_bytes(shape, batch, execution)) + weight,
        weight_bytes=weight,
        loss_bytes=chunk + head + batch.tokens * shape.hidden * (width + 4),
        chunk_bytes=chunk + head,
    )


def _attention_bytes_per_token(shape: ModelShape, longest: int, width: int, stream: int, execution: Execution) -> float:
    """Return the bytes that norms and attention of one layer keep per token."""
    queries, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    attention: float = width * attention_values(shape)
    if shape.capped_scores and not execution.fused:
        attention += shape.heads * longest * (2 * width + SOFTMAX_BYTES) + 2 * width * (queries - keys)
    # compiled norms keep their inputs in the stream's dtype, others copies in fp32
    norms = shape.normed_width * (stream if execution.fused else NORM_BYTES)
    return norms + attention


def attention_values(shape: ModelShape) -> int:
    """Return the values per token that one layer's attention keeps: queries, keys, values and output."""
    queries, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    fused = any(part.role == "qkv" for part in shape.projections)
    return 2 * queries + 2 * keys + (queries + keys if fused else 0)


def _scores_bytes(shape: ModelShape, batch: MicroBatchSize, execution: Execution) -> int:
    """Return the bytes of capped scores, with copies, that compiled attention stores.

    It stores at least the scores of one key head of the longest row at a time (engine/attention/grouped.py).
    """
    if not shape.capped_scores or not execution.fused:
        return 0
    head = shape.heads // shape.kv_heads * batch.longest**2
    every = shape.heads * batch.longest * batch.tokens
    return SCORES_COPIES * SOFTMAX_BYTES * min(every, max(head, SCORES))


def _feed_forward(part: Projection, shape: ModelShape, fused: bool) -> float:
    """Return the values per token and mean layer that the activation after this projection keeps."""
    if part.role not in ("up", "gate_up") or part.inputs != shape.hidden:
        return 0.0
    inner = part.outputs // 2 if part.role == "gate_up" else part.outputs
    copies = (2 if fused else 3) if shape.is_gated else 1
    if not part.stacked:
        return inner * copies * part.count * part.active / shape.layers
    # each token has an output of every expert that it visits; 16-bit experts keep their inputs too
    streams = 1 if part in shape.packed else 2
    layers = part.count * part.active / max(shape.experts_per_token, 1)
    return shape.experts_per_token * (inner * copies + streams * shape.hidden) * layers / shape.layers


def _adapter_bytes(shape: ModelShape, parts: tuple[Projection, ...], fused: bool, width: int, mask_bytes: int) -> float:
    """Return the bytes per token and mean layer that adapters keep.

    They keep dropout masks, and their inputs unless fused. Experts' adapters keep the copy of a token that each of its
    experts reads.
    """
    kept = mask_bytes + (0 if fused else width)
    inputs = sum((width if part.stacked else kept) * part.inputs * part.count * part.active for part in parts)
    return inputs / shape.layers


def _output_bytes(shape: ModelShape, parts: tuple[Projection, ...], width: int) -> float:
    """Return the bytes per token and mean layer of the outputs that DoRA's magnitudes multiply."""
    return width * sum(part.outputs * part.count for part in parts) / shape.layers


def _gradient_bytes(shape: ModelShape, tokens: int, width: int, execution: Execution) -> int:
    """Return the bytes of temporary gradients in one layer's backward."""
    inner = max(shape.intermediate, shape.hidden)
    copies = 4 if execution.fused else 3
    routed = max((part.inputs for part in shape.projections if part.stacked and part.role == "down"), default=0)
    through_experts = shape.experts_per_token * (copies * routed + 2 * shape.hidden) if routed else 0
    return width * tokens * (max(copies * inner, through_experts) + 4 * shape.hidden)


def _logit_bytes(shape: ModelShape, batch: MicroBatchSize, width: int, execution: Execution) -> int:
    """Return the bytes of logits and their gradients.

    The gradient overwrites a chunk's logits; in fp32, which has no kernel for that, both exist. Other tools hold
    log-probabilities, their gradient and the logits' gradient, each in fp32.
    """
    if execution.loss == "chunks" and not execution.wide_stream:
        return min(batch.supervised * shape.vocab * width, LOSS_CHUNK_BYTES) * (2 if width == 4 else 1)
    chunk = min(batch.supervised, OTHERS_CHUNK_TOKENS)
    rows = {"all": batch.tokens, "supervised": batch.supervised, "chunks": chunk}[execution.loss]
    head = shape.vocab * shape.hidden * width if execution.wide_stream else 0
    return rows * shape.vocab * BYTES_PER_LOGIT + head
