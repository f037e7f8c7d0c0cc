"""Recurrent layers: the activations of decoders whose layers carry a state along the sequence.

Such layers run one operation at a time and are recomputed whole or not at all (engine/layers/decoder.py). Their
recurrent modules were counted in the code that runs (backbone/skeleton/recurrence.py); the rest is as in other layers.
"""

from __future__ import annotations

from dataclasses import replace

from lorafit.memory.footprint import Activations, attention_values
from lorafit.memory.inputs import MicroBatchSize
from lorafit.shapes import ModelShape


def with_recurrent_layers(
    live: Activations, eager: Activations, shape: ModelShape, batch: MicroBatchSize, width: int
) -> Activations:
    """Return the activations of the mean layer and of the heaviest.

    `live` are those of a layer with attention, as it runs; `eager` those of the same layer run one operation at a time.
    """
    found = shape.recurrences
    rows = batch.tokens / batch.longest
    share = min(1.0, sum(part.count for part in found) / shape.layers)
    own = eager.layer_bytes - (0 if _beside_attention(shape, share) else round(_attention_bytes(shape, batch, width)))
    kept = [part.kept_bytes(rows, batch.longest, width) for part in found]
    mean = sum(size * part.count for size, part in zip(kept, found, strict=True)) / sum(part.count for part in found)
    working = max(part.working_bytes(rows, batch.longest, width) for part in found)
    return replace(
        live,
        layer_bytes=round((1 - share) * live.layer_bytes + share * (own + mean)),
        feed_forward_bytes=round((1 - share) * live.feed_forward_bytes + share * live.input_bytes),
        heaviest_bytes=max(live.layer_bytes, own + max(kept)),
        backward_bytes=max(live.backward_bytes, working + live.input_bytes + live.weight_bytes),
    )


def _beside_attention(shape: ModelShape, share: float) -> bool:
    """Return True if layers have attention beside their recurrent module, as Falcon-H1's do."""
    with_attention = max((part.count for part in shape.projections if part.role == "v"), default=0)
    return with_attention / shape.layers > 1 - share


def _attention_bytes(shape: ModelShape, batch: MicroBatchSize, width: int) -> int:
    return width * attention_values(shape) * batch.tokens
