"""LengthLimit: the length above which a row changes how a model computes, so that rows cannot share a micro-batch.

Some models choose rotary frequencies by the longest position of a forward, and some attend within chunks. Rows that
share a micro-batch with a longer one would be computed as if they were as long. Sparse attention picks its keys by
scores that are often equal, and the padding decides among those.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

ROPE_KEYS = ("rope_parameters", "rope_scaling")
ORIGINAL = "original_max_position_embeddings"
BY_LENGTH = ("longrope", "su", "dynamic")
"""Kinds of rotary scaling that depend on the longest position."""


@dataclass(frozen=True, slots=True)
class LengthLimit:
    """Hold a length and what changes above it.

    Attributes:
        tokens: Longest row that may share a micro-batch with others.
        why: What changes above, in one clause.
    """

    tokens: int
    why: str

    def reason(self, longest: int) -> str:
        """Return why rows of up to `longest` tokens cannot share a micro-batch; empty if they can."""
        return f"{self.why} above {self.tokens:,} tokens, and a row has {longest:,}" if longest > self.tokens else ""


def length_limit(text: Mapping[str, Any]) -> LengthLimit | None:
    """Return the lowest limit in the settings of a text decoder; None without one."""
    return min([*_of_rope(text), *_of_chunks(text), *_of_picks(text)], key=lambda limit: limit.tokens, default=None)


def _of_rope(text: Mapping[str, Any]) -> Iterator[LengthLimit]:
    for rope in (text.get(key) for key in ROPE_KEYS):
        if not isinstance(rope, Mapping):
            continue
        # a model may have settings for each type of layer
        for one in (rope, *(value for value in rope.values() if isinstance(value, Mapping))):
            kind = str(one.get("rope_type", one.get("type", "")))
            own = (one.get(ORIGINAL), text.get(ORIGINAL), text.get("max_position_embeddings"))
            tokens = next((value for value in own if isinstance(value, int) and value > 0), 0)
            if kind in BY_LENGTH and tokens:
                yield LengthLimit(tokens, f"its rotary frequencies change ({kind})")


def _of_chunks(text: Mapping[str, Any]) -> Iterator[LengthLimit]:
    size, kinds = text.get("attention_chunk_size"), text.get("layer_types")
    if isinstance(size, int) and size > 0 and (not isinstance(kinds, list) or "chunked_attention" in kinds):
        yield LengthLimit(size, "it attends within chunks")


def _of_picks(text: Mapping[str, Any]) -> Iterator[LengthLimit]:
    picked = text.get("index_topk")
    if isinstance(picked, int) and picked > 0:
        yield LengthLimit(picked, "its attention picks its keys")
