"""Speed and layout: packed micro-batches, attention over them, the loss, and generation."""

from lorafit.engine.attention import packed, unpacked, use_packed_attention, use_plain_attention
from lorafit.engine.batch import MicroBatch, Step, collate
from lorafit.engine.generate import generate
from lorafit.engine.isolation import Isolation, assert_isolated
from lorafit.engine.loss import summed_loss, supervised_logits
from lorafit.engine.segments import Segments

__all__ = [
    "Isolation",
    "MicroBatch",
    "Segments",
    "Step",
    "assert_isolated",
    "collate",
    "generate",
    "packed",
    "summed_loss",
    "supervised_logits",
    "unpacked",
    "use_packed_attention",
    "use_plain_attention",
]
