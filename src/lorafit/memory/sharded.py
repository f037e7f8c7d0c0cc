"""sharded: the bytes of full fine-tuning on each of several GPUs, and those moved between them."""

from __future__ import annotations

from lorafit.memory.inputs import MASTER_BYTES, PlanInputs, moment_bytes

GATHERED_LAYERS, REDUCED_LAYERS = 2, 2
"""Layers that are whole at one time: the running one and the next. Gradients of as many are being summed."""


def shard_bytes(inputs: PlanInputs) -> int:
    """Return the bytes of a weight's shard: fp32 under AdamW, which updates it, else the compute dtype's."""
    return MASTER_BYTES if inputs.optimizer == "adamw" else inputs.width


def held_bytes(inputs: PlanInputs) -> tuple[int, int, int]:
    """Return the bytes of weights, gradients and moments that each GPU holds of a sharded model."""
    weights, trained = inputs.shape.parameters / inputs.shards, inputs.trained_parameters / inputs.shards
    own = shard_bytes(inputs)
    return round(weights * own), round(trained * own), round(trained * moment_bytes(inputs.optimizer))


def outside_parameters(inputs: PlanInputs) -> int:
    """Return the weights outside the decoder layers: embeddings, head and towers."""
    shape = inputs.shape
    return shape.embedding_parameters + shape.head_parameters + shape.tower_parameters


def gathered_bytes(inputs: PlanInputs) -> int:
    """Return the bytes of gathered weights and of gradients on their way, at the peak of a backward pass.

    The fp32 gradients of embeddings and head are summed at its end, one after the other, on a stream whose memory
    activations cannot use.
    """
    shape, width = inputs.shape, inputs.width
    outside = outside_parameters(inputs)
    layer = (shape.parameters - outside) / shape.layers
    apart = 0 if shape.tied_embeddings else shape.embedding_parameters
    head = shape.head_parameters or shape.embedding_parameters
    in_layers = layer * (GATHERED_LAYERS * width + width + REDUCED_LAYERS * MASTER_BYTES)
    return round((outside - apart) * width + head * width + max(outside - apart, apart) * MASTER_BYTES + in_layers)


def moved_bytes(inputs: PlanInputs) -> tuple[float, float]:
    """Return the bytes that each GPU receives for one micro-batch: within the layers, and outside of them.

    A ring of N sends (N - 1) / N of a tensor. Layers are gathered twice in the compute dtype, all else once, and
    gradients are scattered in fp32.
    """
    ring = (inputs.shards - 1) / inputs.shards
    outside = outside_parameters(inputs)
    inside = inputs.shape.parameters - outside
    return ring * inside * (2 * inputs.width + MASTER_BYTES), ring * outside * (inputs.width + MASTER_BYTES)
