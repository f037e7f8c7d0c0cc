"""The timeline of one micro-batch: when each layer computes, when its saved tensors leave and come back.

Copies on their way are bounded in bytes: they may fill whatever room the layers that stay have not filled yet, which
early in the forward pass is nearly all of it. So early layers may leave long after they were computed and come back
long before they are needed, and only the sum of the bytes has to fit the time. The other way, two layers at a time,
one at work and one in flight, needs no known room, and stalls at every layer that computes faster than it is copied.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass
from itertools import accumulate

from lorafit.config.memory_policy import MemoryPolicy
from lorafit.memory.layer_costs import LayerCosts, Link, Split


@dataclass(frozen=True, slots=True)
class OffloadSchedule:
    """Say which offloaded layers are on the device at each moment; made from bytes alone.

    `on_device_from[i]` bounds which of the offloaded layers are on the device while layer i works, in either pass;
    the last entry (index `layers`) is for the loss. Forward: before layer i runs, the copies to the host of all
    layers below this index are done and their device memory is free. Backward: before layer i runs, the copies
    to the device of all offloaded layers from this index on have been started; layer i then waits for its own.
    """

    on_device_from: tuple[int, ...]


IN_FLIGHT = 2
"""Offloaded layers on the device at a time, unless bytes bound them. A policy set by hand has no other bound."""


def offload_schedule(
    costs: LayerCosts, policy: MemoryPolicy, room_bytes: int, by_bytes: bool = True
) -> OffloadSchedule:
    """Return the schedule of `policy`: IN_FLIGHT offloaded layers on the device, or `by_bytes` as many as fit.

    `room_bytes` is for what is saved and what works beside it, as `solve` counts them. Bounded by bytes, one layer at
    work and one in flight are allowed in any case.
    """
    split = Split.of(policy, costs)
    layers, offload = costs.layers, policy.offloaded_layers
    tops = [min(layer + 1, layers) for layer in range(layers + 1)]
    if not by_bytes:
        return OffloadSchedule(tuple(max(0, min(offload, top - IN_FLIGHT)) for top in tops))
    sums = list(accumulate((costs.saved[split.level(layer)] for layer in range(layers)), initial=0))
    firsts = []
    for layer, top in enumerate(tops):
        stays = sums[top] - sums[min(top, offload)]
        room = max(0, room_bytes - split.beside(layer) - stays)
        first = bisect_left(sums, sums[min(top, offload)] - room)
        nearest = layer - 1 if layer < layers else layers
        firsts.append(max(0, min(first, offload, nearest)))
    return OffloadSchedule(tuple(firsts))


def fullest_bytes(costs: LayerCosts, policy: MemoryPolicy, schedule: OffloadSchedule) -> int:
    """Return the most bytes that the device holds under `policy` and its schedule, saved and working ones."""
    split = Split.of(policy, costs)
    firsts = schedule.on_device_from
    return max(
        split.saved_by(min(layer + 1, costs.layers))
        - split.saved_by(min(policy.offloaded_layers, first))
        + split.beside(layer)
        for layer, first in enumerate(firsts)
    )


def timeline_s(costs: LayerCosts, policy: MemoryPolicy, link: Link, room_bytes: int, by_bytes: bool = True) -> float:
    """Return the seconds of one micro-batch under that schedule: two copy streams beside the one that computes.

    A layer's copy to the host starts when its forward is done and the copy before it is; a copy to the device when
    the schedule asks for it and the copy before it is done. Tensors that may leave after the loss stay, and are not
    copied back. Copies slow down what computes beside them by `link.drag` of their time.
    """
    split = Split.of(policy, costs)
    saved = [costs.saved[split.level(layer)] for layer in range(policy.offloaded_layers)]
    first = offload_schedule(costs, policy, room_bytes, by_bytes).on_device_from
    now = _forward_s(costs, saved, first, link) + costs.loss_s
    free, asked, back = now, policy.offloaded_layers, [0.0] * policy.offloaded_layers
    for layer in reversed(range(costs.layers)):
        while asked > first[layer]:
            asked -= 1
            if asked < first[-1]:
                free = max(free, now) + saved[asked] / link.to_device_bytes_s
                back[asked] = free
        if layer < first[-1]:
            now = max(now, back[layer]) + link.drag * saved[layer] / link.to_device_bytes_s
        now += costs.backwards[split.level(layer)]
    return now


def _forward_s(costs: LayerCosts, saved: list[int], first: tuple[int, ...], link: Link) -> float:
    """When the loss may start."""
    now = 0.0
    left: list[float] = []
    for layer in range(costs.layers):
        if first[layer]:
            now = max(now, left[first[layer] - 1])
        now += costs.forward_s
        if layer < len(saved):
            copy_s = saved[layer] / link.to_host_bytes_s
            now += link.drag * copy_s
            left.append(max(now, left[-1] if left else 0.0) + copy_s)
    return max(now, left[first[-1] - 1]) if first[-1] else now
