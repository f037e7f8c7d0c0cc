"""SlotCache: static keys and values, one slot a running answer, and the masks over them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from lorafit.errors import BackboneError

LEAST_SPAN = 64
StoreKernel = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], None]
"""Writes keys and values of one token a row: (kept keys, kept values, new keys, new values, write positions)."""


@dataclass
class Places:
    """Say where the tokens of one forward pass lie.

    Attributes:
        slots: the slots of the batch's rows: a range of neighbours, or any slots as indices (rows,).
        writes: position in the cache of each token (rows, tokens).
        span: number of leading positions that attention reads.
        store: writes the keys and values of one-token rows at once; None where there is no such kernel.
    """

    slots: range | Tensor
    writes: Tensor
    span: int
    store: StoreKernel | None = None


class _SlotLayer(CacheLayerMixin):
    """Hold keys and values (slots, kv heads, positions + 1, dim) of one layer. The last position is scratch."""

    is_sliding = False

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        super().__init__()
        self.keys, self.values, self.is_initialized = keys, values, True
        self.places: Places | None = None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Do nothing: memory is taken once, at the start."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write (rows, kv heads, tokens, dim) at their places, and return what attention reads."""
        places = self.places
        assert places is not None
        if places.store is not None and isinstance(places.slots, range):
            keys, values = (kept[places.slots.start : places.slots.stop] for kept in (self.keys, self.values))
            if _is_alike(keys, values, key_states, value_states):
                places.store(keys, values, key_states, value_states, places.writes)
                return keys[:, :, : places.span], values[:, :, : places.span]
        read = []
        for kept, states in ((self.keys, key_states), (self.values, value_states)):
            if isinstance(places.slots, Tensor):
                slots, writes = places.slots[:, None], places.writes
                kept[slots, :, writes] = states.to(kept.dtype).transpose(1, 2)
                read.append(kept[places.slots, :, : places.span])
                continue
            rows = kept[places.slots.start : places.slots.stop]
            index = places.writes[:, None, :, None].expand(-1, rows.shape[1], -1, rows.shape[3])
            rows.scatter_(2, index, states.to(rows.dtype))
            read.append(rows[:, :, : places.span])
        return read[0], read[1]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return (keys, offset) for masks that transformers would make."""
        assert self.places is not None
        return self.places.span, 0

    def get_seq_length(self) -> int:
        """Return 0: positions are always given."""
        return 0

    def get_max_length(self) -> int:
        """Return the positions of a slot."""
        return int(self.keys.shape[2]) - 1


class SlotCache(Cache):
    """Hold the keys and values of all layers for a fixed number of slots."""

    def __init__(self, shapes: Sequence[tuple[Tensor, Tensor]], slots: int, positions: int) -> None:
        """Take the memory. `shapes` holds a layer's keys and values (1, kv heads, tokens, dim), one pair a layer."""
        layers = [_SlotLayer(*(_room(states, slots, positions) for states in pair)) for pair in shapes]
        super().__init__(layers=layers)
        self.slots, self.positions = slots, positions

    def at(self, places: Places) -> SlotCache:
        """Return the cache, set to write and read at `places`."""
        for layer in self.layers:
            layer.places = places
        return self

    def size_bytes(self) -> int:
        """Return the bytes of all keys and values."""
        return sum(layer.keys.nbytes + layer.values.nbytes for layer in self.layers)


def _is_alike(keys: Tensor, values: Tensor, key: Tensor, value: Tensor) -> bool:
    """Return True if one kernel can write one token of each row."""
    each = (keys, values, key, value)
    return (
        key.shape == value.shape
        and keys.shape == values.shape
        and key.shape == (*keys.shape[:2], 1, keys.shape[3])
        and all(tensor.is_contiguous() and tensor.dtype is keys.dtype for tensor in each)
    )


def _room(states: Tensor, slots: int, positions: int) -> Tensor:
    _, heads, _, dim = states.shape
    return states.new_zeros(slots, heads, positions + 1, dim)


def span_for(positions: int, most: int) -> int:
    """Return the span that covers `positions`: a power of two, so that few shapes occur."""
    return min(most, max(LEAST_SPAN, 1 << (positions - 1).bit_length()))


def masks(config: Any, positions: Tensor, span: int, dtype: torch.dtype, *, as_bool: bool) -> Any:
    """Return the attention masks (rows, 1, tokens, span) of queries at `positions` (rows, tokens).

    Families with several kinds of layers get a mapping from kind to mask.
    """
    text = config.get_text_config()
    window = getattr(text, "sliding_window", None)
    kinds = getattr(text, "layer_types", None)
    made = {
        "full_attention": _mask(positions, span, None, dtype, as_bool),
        "sliding_attention": _mask(positions, span, window, dtype, as_bool),
    }
    if kinds is None:
        return made["sliding_attention" if window else "full_attention"]
    if other := set(kinds) - set(made):
        what = f"the builtin engine has no cache for layers of the kind {min(other)}"
        raise BackboneError(what, fix="merge the run, and serve it with vLLM")
    return {kind: made[kind] for kind in set(kinds)} if len(set(kinds)) > 1 else made[kinds[0]]


def _mask(positions: Tensor, span: int, window: int | None, dtype: torch.dtype, as_bool: bool) -> Tensor:
    keys = torch.arange(span, device=positions.device)
    queries = positions[:, :, None]
    seen = keys <= queries
    if window:
        seen = seen & (keys > queries - window)
    if as_bool:
        return seen[:, None]
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, torch.finfo(dtype).min)[:, None]
