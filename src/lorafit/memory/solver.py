"""Solver: the fastest memory policy that fits, from layer costs and the link's rates.

It tries every split of the layers into recomputed, partly recomputed and kept ones, each with the fewest offloaded
layers that make it fit. The seconds of a split are those of its timeline. A lower bound on them skips most splits.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import product

from lorafit.config.memory_policy import MemoryPolicy
from lorafit.memory.layer_costs import LayerCosts, Link, Split, timeline_s

__all__ = ["LayerCosts", "Link", "Room", "Solution", "solve", "solve_micro"]

UNLIMITED = 1 << 62
WORTH_PINNING = 0.01
"""Gain in speed below which no host memory is pinned. Pinning takes seconds, and predictions are not more exact."""
FINE_LAYERS = 48
"""Most layers for which every split is tried."""


@dataclass(frozen=True, slots=True)
class Solution:
    """Hold the fastest policy.

    Attributes:
        policy: The policy.
        step_s: Seconds of one micro-batch; of one step from `solve_micro`.
        device_bytes: Bytes needed on the device, less the embeddings that the policy moves to the host.
        host_bytes: Bytes needed on the host.
    """

    policy: MemoryPolicy
    step_s: float
    device_bytes: int
    host_bytes: int


@dataclass(frozen=True, slots=True)
class Room:
    """Hold the memory available to activations, and the cost of moving them.

    Attributes:
        device_bytes: Free on the device beside static memory, which includes the embeddings.
        host_bytes: Host memory that may be pinned.
        link: Rates of the link; None when nothing can be offloaded.
        embedding_bytes: Embeddings that may move to the host.
        embedding_s: Seconds a micro-batch of having the embeddings on the host.
        between_s: Seconds that each micro-batch of a step after the first adds to it.
    """

    device_bytes: int
    host_bytes: int = UNLIMITED
    link: Link | None = None
    embedding_bytes: int = 0
    embedding_s: float = 0.0
    between_s: float = 0.0

    def less(self, size_bytes: int) -> Room:
        """Return the same with `size_bytes` less on the device."""
        return replace(self, device_bytes=self.device_bytes - size_bytes)

    def without_embeddings(self) -> Room:
        """Return the same with the embeddings in host memory."""
        size = self.embedding_bytes
        return replace(
            self, device_bytes=self.device_bytes + size, host_bytes=self.host_bytes - size, embedding_bytes=0
        )


def solve(costs: LayerCosts, room: Room, bound_s: float = math.inf) -> Solution | None:
    """Return the fastest policy that fits `room`, or None when none is faster than `bound_s`.

    Among equally fast policies the one that changes least wins. The result is deterministic.
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
    """Return the fastest policy over all sizes of the micro-batch.

    The sizes are `tokens`, half of them, …, down to the `longest` row. `costs` are those of `tokens`. The solution's
    `step_s` is that of a step of `step_tokens` (default `tokens`), at the speed of full micro-batches. A policy without
    host memory wins unless another is faster by WORTH_PINNING.
    """
    step_tokens = step_tokens or tokens
    best = _over_sizes(costs, room, tokens, longest, step_tokens)
    if best is None or not best.host_bytes:
        return best
    device_only = _over_sizes(costs, replace(room, link=None, embedding_bytes=0), tokens, longest, step_tokens)
    return device_only if device_only and device_only.step_s <= best.step_s * (1 + WORTH_PINNING) else best


def _over_sizes(costs: LayerCosts, room: Room, tokens: int, longest: int, step_tokens: float) -> Solution | None:
    """Return the fastest policy over all sizes of the micro-batch."""
    best: Solution | None = None
    for size in micro_sizes(tokens, longest):
        count, share = step_tokens / size, size / tokens
        between_s = room.between_s * max(0.0, count - 1)
        bound = (best.step_s - between_s) / count if best else math.inf
        found = solve(costs.scaled(share), replace(room, embedding_s=room.embedding_s * share), bound)
        if found:
            policy = found.policy if size == tokens else replace(found.policy, micro_tokens=size)
            best = replace(found, policy=policy, step_s=found.step_s * count + between_s)
    return best


def micro_sizes(tokens: int, longest: int) -> Iterator[int]:
    """Yield `tokens`, half of them, a quarter, …, and at last the longest row."""
    yield tokens
    while tokens > longest:
        tokens = max(tokens // 2, longest)
        yield tokens


def _fastest(costs: LayerCosts, room: Room, bound_s: float) -> Solution | None:
    """Return the fastest of all splits.

    Beyond FINE_LAYERS layers only evenly spread splits and those around the best of them are tried.
    """
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
    """Return the fastest of these splits.

    Splits with the lowest bound come first, and only splits that can win get a timeline.
    """
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
        seconds = split.work_s
        if offload and room.link:
            seconds = timeline_s(costs, policy, room.link, room.device_bytes)
        if seconds < bound_s:
            bound_s = seconds
            best = Solution(policy, seconds, split.device_bytes(offload), split.saved_by(offload))
    return best


def _least_offload(split: Split, room: Room) -> int | None:
    """Return the fewest layers to offload so that the rest fits; None when nothing fits."""
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
            return None  # one layer in use and one in flight do not fit, and later layers save more
        if split.device_bytes(count) <= room_bytes:
            return count
    return None


def _least_s(split: Split, room: Room) -> float:
    """Return a lower bound of the seconds: work, and copying the excess to the host."""
    costs = split.costs
    excess = split.saved_by(costs.layers) + split.beside(costs.layers) - room.device_bytes
    if excess <= 0 or room.link is None:
        return split.work_s
    return split.work_s + max(0.0, excess / room.link.to_host_bytes_s - (costs.layers - 1) * costs.forward_s)


def _stall_s(split: Split, offload: int, room: Room) -> float:
    """Return the least seconds that copies add.

    The link's rates bound when layers have left before the loss, and when they are back for their backward.
    """
    costs, link = split.costs, room.link
    if not offload or link is None:
        return 0.0
    gone = _gone(split, offload, room)
    leaving = split.saved_by(gone)
    out = leaving / link.to_host_bytes_s - (costs.layers - 1) * costs.forward_s
    ends = [top for top in {gone, split.light, split.light + 1, split.whole, split.whole + 1, 1} if 0 < top <= gone]
    late = [
        (leaving - split.saved_by(top - 1)) / link.to_device_bytes_s - _backward_s(split, top, costs.layers)
        for top in ends
    ]
    drags = (link.drag * split.saved_by(offload) / link.to_host_bytes_s, link.drag * leaving / link.to_device_bytes_s)
    return max(drags[0], out) + max([drags[1], *late])


def _gone(split: Split, offload: int, room: Room) -> int:
    """Return the number of first layers that must have left the device before the loss."""
    layers = split.costs.layers
    leaving = split.saved_by(offload)
    stays = split.saved_by(layers) - leaving
    return min(offload, split.fewest(leaving - max(0, room.device_bytes - split.beside(layers) - stays)))


def _backward_s(split: Split, start: int, end: int) -> float:
    """Return the seconds of the backward of layers `end` - 1 down to `start`."""
    whole, feed_forward, keep = split.costs.backwards
    light = max(min(split.light, end) - max(start, split.whole), 0)
    return (
        max(min(split.whole, end) - start, 0) * whole
        + light * feed_forward
        + max(end - max(start, split.light), 0) * keep
    )
