"""Solver: the fastest memory policy that fits the room, from bytes and seconds per layer and the link's rates.

Every split of the layers into recomputed, partly recomputed and kept ones is tried, with the fewest layers offloaded
that makes it fit; its seconds are those of its timeline. A lower bound of them leaves most splits out.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import product

from lorafit.config.memory_policy import MemoryPolicy
from lorafit.memory.layer_costs import IN_FLIGHT, LayerCosts, Link, Split, timeline_s

__all__ = ["LayerCosts", "Link", "Room", "Solution", "solve", "solve_micro"]

UNLIMITED = 1 << 62
WORTH_PINNING = 0.01
"""Gain in speed below which no host memory is pinned: taking it costs seconds, and the prediction is no surer."""
FINE_LAYERS = 48
"""Up to so many layers every split is considered."""


@dataclass(frozen=True, slots=True)
class Solution:
    """Hold the fastest policy, its seconds, and the bytes that it needs on the device and the host.

    Embeddings that the policy moves to the host are subtracted from `device_bytes`.
    """

    policy: MemoryPolicy
    step_s: float
    device_bytes: int
    host_bytes: int


@dataclass(frozen=True, slots=True)
class Room:
    """Hold the memory that activations may fill, and the price of moving them.

    Attributes:
        device_bytes: Left on the device beside static memory, embeddings included in that.
        host_bytes: Pinned host memory.
        link: Rates of the link; None where nothing can be offloaded.
        by_bytes: Whether copies on their way may fill the room; else they are two layers at a time.
        embedding_bytes: Embeddings that may move to the host.
        embedding_s: Seconds a micro-batch that this costs.
    """

    device_bytes: int
    host_bytes: int = UNLIMITED
    link: Link | None = None
    by_bytes: bool = True
    embedding_bytes: int = 0
    embedding_s: float = 0.0

    def less(self, size_bytes: int) -> Room:
        """The same with that much less on the device."""
        return replace(self, device_bytes=self.device_bytes - size_bytes)

    def without_embeddings(self) -> Room:
        """The same with the embeddings in host memory."""
        size = self.embedding_bytes
        return replace(
            self, device_bytes=self.device_bytes + size, host_bytes=self.host_bytes - size, embedding_bytes=0
        )


def solve(costs: LayerCosts, room: Room, bound_s: float = math.inf) -> Solution | None:
    """Return the fastest policy that fits `room`; None when none does, or none is faster than `bound_s`.

    Among equally fast policies the one that changes least wins. Same numbers, same answer.
    """
    found = _fastest(costs, room, bound_s)
    size = room.embedding_bytes
    if not size or size > room.host_bytes:
        return found
    bound = (found.step_s if found else bound_s) - room.embedding_s
    moved = _fastest(costs, room.without_embeddings(), bound)
    if moved is None:
        return found
    return Solution(
        replace(moved.policy, host_embeddings=True),
        moved.step_s + room.embedding_s,
        moved.device_bytes - size,
        moved.host_bytes + size,
    )


@lru_cache(maxsize=512)
def solve_micro(
    costs: LayerCosts, room: Room, *, tokens: int, longest: int, step_tokens: float | None = None
) -> Solution | None:
    """Return the fastest policy over micro-batches of `tokens`, a half, a quarter, …, down to the `longest` row.

    `costs` are those of `tokens`. `step_s` is that of a step of `step_tokens` (default `tokens`), at the speed of full
    micro-batches. A policy that needs no host memory wins against one that is faster by less than WORTH_PINNING.
    """
    wanted = step_tokens or tokens
    best = _over_sizes(costs, room, tokens, longest, wanted)
    if best is None or not best.host_bytes:
        return best
    alone = _over_sizes(costs, replace(room, link=None, embedding_bytes=0), tokens, longest, wanted)
    return alone if alone and alone.step_s <= best.step_s * (1 + WORTH_PINNING) else best


def _over_sizes(costs: LayerCosts, room: Room, tokens: int, longest: int, step_tokens: float) -> Solution | None:
    """The best of all micro-batches."""
    best: Solution | None = None
    for size in micro_sizes(tokens, longest):
        count, share = step_tokens / size, size / tokens
        bound = best.step_s / count if best else math.inf
        found = solve(costs.scaled(share), replace(room, embedding_s=room.embedding_s * share), bound)
        if found:
            policy = found.policy if size == tokens else replace(found.policy, micro_tokens=size)
            best = replace(found, policy=policy, step_s=found.step_s * count)
    return best


def micro_sizes(tokens: int, longest: int) -> Iterator[int]:
    """`tokens`, half of them, a quarter, …, and at last the longest row; every size holds that row."""
    yield tokens
    while tokens > longest:
        tokens = max(tokens // 2, longest)
        yield tokens


def _fastest(costs: LayerCosts, room: Room, bound_s: float) -> Solution | None:
    """Return the best of all splits; beyond FINE_LAYERS layers, of evenly spread ones and those around the best."""
    if room.device_bytes < min(size + max(work, costs.loss_bytes) for size, work in zip(costs.saved, costs.working)):
        return None
    last, step = costs.layers, -(-costs.layers // FINE_LAYERS)
    spread = sorted({*range(0, last + 1, step), *range(max(0, last - 2), last + 1)})
    best = _best_of(costs, room, bound_s, spread, spread)
    if best is None or step == 1:
        return best
    whole, light = best.policy.recompute_layers, best.policy.recompute_layers + best.policy.recompute_mlp_layers
    near = (range(max(0, count - step), min(last, count + step) + 1) for count in (whole, light))
    return _best_of(costs, room, best.step_s, *near) or best


def _best_of(
    costs: LayerCosts, room: Room, bound_s: float, wholes: Iterable[int], lights: Iterable[int]
) -> Solution | None:
    """Return the best of these splits, the most promising first, drawing timelines only for those that can win."""
    best: Solution | None = None
    splits = [Split(costs, whole, light) for whole, light in product(wholes, lights) if whole <= light]
    for least_s, _, split in sorted((_least_s(split, room), order, split) for order, split in enumerate(splits)):
        if least_s >= bound_s:
            break
        offload = _least_offload(split, room)
        if offload is None or split.saved_by(offload) > room.host_bytes:
            continue
        if split.work_s + _stall_s(split, offload, room) >= bound_s:
            continue
        policy = MemoryPolicy(split.light - split.whole, split.whole, offload)
        taken = split.work_s
        if offload and room.link:
            taken = timeline_s(costs, policy, room.link, room.device_bytes, room.by_bytes)
        if taken < bound_s:
            bound_s = taken
            best = Solution(policy, taken, split.device_bytes(offload), split.saved_by(offload))
    return best


def _least_offload(split: Split, room: Room) -> int | None:
    """Return the fewest layers to offload so that the rest fits the room; None when nothing does."""
    layers, room_bytes = split.costs.layers, room.device_bytes
    at_loss = split.saved_by(layers) + split.beside(layers)
    if at_loss <= room_bytes and split.device_bytes(0) <= room_bytes:
        return 0
    if room.link is None:
        return None
    at_tops = (split.saved_by(top) + split.beside(top - 1) for top in (split.light, split.whole) if top)
    offload = max(1, *(split.fewest(full - room_bytes) for full in (at_loss, *at_tops)))
    for count in range(offload, layers + 1):
        if split.size_bytes(count - 1, count) > room_bytes:
            return None  # one layer at work and one in flight are too much already, and later ones save more
        if split.device_bytes(count) <= room_bytes:
            return count
    return None


def _least_s(split: Split, room: Room) -> float:
    """Return seconds that no offload can beat: the work, and the excess leaving at the link's rate."""
    costs = split.costs
    excess = split.saved_by(costs.layers) + split.beside(costs.layers) - room.device_bytes
    if excess <= 0 or room.link is None:
        return split.work_s
    return split.work_s + max(0.0, excess / room.link.to_host_bytes_s - (costs.layers - 1) * costs.forward_s)


def _stall_s(split: Split, offload: int, room: Room) -> float:
    """Return the least seconds that copies cost: the link bounds leaving before the loss, and being back in time."""
    costs, link = split.costs, room.link
    if not offload or link is None:
        return 0.0
    gone, asked = _gone(split, offload, room), costs.layers
    leaving = split.saved_by(gone)
    out = [leaving / link.to_host_bytes_s - (costs.layers - 1) * costs.forward_s]
    ends = [top for top in {gone, split.light, split.light + 1, split.whole, split.whole + 1, 1} if 0 < top <= gone]
    if not room.by_bytes:
        # the last offloaded layer runs when all but so many have left; the first call comes so many layers ahead
        asked = min(asked, gone + IN_FLIGHT - 1)
        gone = max(offload - IN_FLIGHT, 0)
        starts = [start for start in (0, split.whole, split.light) if start < gone]
        sent = ((split.saved_by(gone) - split.saved_by(start), gone - start) for start in starts)
        out += [size / link.to_host_bytes_s - count * costs.forward_s for size, count in sent]
    late = [
        (leaving - split.saved_by(top - 1)) / link.to_device_bytes_s - _backward_s(split, top, asked) for top in ends
    ]
    drags = (link.drag * split.saved_by(offload) / link.to_host_bytes_s, link.drag * leaving / link.to_device_bytes_s)
    return max([drags[0], *out]) + max([drags[1], *late])


def _gone(split: Split, offload: int, room: Room) -> int:
    """Return how many of the first layers must have left before the loss."""
    layers = split.costs.layers
    if not room.by_bytes:
        return max(0, min(offload, layers - IN_FLIGHT))
    leaving = split.saved_by(offload)
    stays = split.saved_by(layers) - leaving
    return min(offload, split.fewest(leaving - max(0, room.device_bytes - split.beside(layers) - stays)))


def _backward_s(split: Split, start: int, end: int) -> float:
    """Seconds of the backward of layers `end` - 1 down to `start`."""
    whole, feed_forward, keep = split.costs.backwards
    light = max(min(split.light, end) - max(start, split.whole), 0)
    return (
        max(min(split.whole, end) - start, 0) * whole
        + light * feed_forward
        + max(end - max(start, split.light), 0) * keep
    )
