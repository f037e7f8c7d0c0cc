"""Layer costs: bytes and seconds of decoder layers, and the timeline of compute and copies."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass, replace
from itertools import accumulate

from lorafit.config.memory_policy import MemoryPolicy

WHOLE, FEED_FORWARD, KEEP = range(3)
"""Recompute levels in the order of the layers. Each level keeps at least the bytes of the one before."""
WAITING = 0.2
"""Share by which a layer's GPU time must exceed its CPU time. Otherwise the GPU waits for kernel launches."""
FILLED = 1.125
"""Largest factor by which padding to its bucket's size grows a micro-batch."""


@dataclass(frozen=True, slots=True)
class LayerCosts:
    """Hold the bytes and seconds of one layer, and of the loss, for one micro-batch.

    Attributes:
        layers: Decoder layers, all with equal costs.
        kept_bytes: Saved for the backward pass when nothing is recomputed.
        feed_forward_bytes: Saved for the backward pass when the MLP is recomputed.
        whole_bytes: Saved for the backward pass when the layer is recomputed: its input.
        forward_s: Seconds of the forward pass.
        backward_s: Seconds of the backward pass, without recomputing.
        recompute_feed_forward_s: Seconds of recomputing the MLP.
        recompute_layer_s: Seconds of recomputing the layer.
        kept_working_bytes: Needed by the backward beside saved bytes, when nothing is recomputed.
        feed_forward_working_bytes: The same with the MLP recomputed, recomputed values included.
        whole_working_bytes: The same with the layer recomputed.
        fixed_working_bytes: Part of the working bytes that does not depend on the tokens: a dequantized weight.
        fixed_s: Part of either pass that does not depend on the tokens: dequantizing.
        launch_s: Least seconds of either pass: kernel launches.
        loss_bytes: Needed between the last layer's forward and its backward.
        fixed_loss_bytes: Part of `loss_bytes` that does not depend on the tokens: a chunk of logits.
        loss_s: Seconds of the loss.
    """

    layers: int
    kept_bytes: int
    feed_forward_bytes: int
    whole_bytes: int
    forward_s: float
    backward_s: float
    recompute_feed_forward_s: float
    recompute_layer_s: float
    kept_working_bytes: int = 0
    feed_forward_working_bytes: int = 0
    whole_working_bytes: int = 0
    fixed_working_bytes: int = 0
    fixed_s: float = 0.0
    launch_s: float = 0.0
    loss_bytes: int = 0
    fixed_loss_bytes: int = 0
    loss_s: float = 0.0

    @property
    def saved(self) -> tuple[int, int, int]:
        """Bytes saved by one layer at each level."""
        return self.whole_bytes, self.feed_forward_bytes, self.kept_bytes

    @property
    def working(self) -> tuple[int, int, int]:
        """Working bytes of one layer's backward at each level."""
        return self.whole_working_bytes, self.feed_forward_working_bytes, self.kept_working_bytes

    @property
    def backwards(self) -> tuple[float, float, float]:
        """Seconds of one layer's backward at each level, recomputation included."""
        back = self.backward_s
        return back + self.recompute_layer_s, back + self.recompute_feed_forward_s, back

    def scaled(self, share: float) -> LayerCosts:
        """Return the costs of a micro-batch with this share of the tokens."""

        def size(size_bytes: int, fixed_bytes: int = 0) -> int:
            fixed = min(fixed_bytes, size_bytes)
            return fixed + round((size_bytes - fixed) * share)

        def time(seconds: float, passes: float = 1.0) -> float:
            fixed = min(self.fixed_s * passes, seconds)
            return max(fixed + (seconds - fixed) * share, min(self.launch_s * passes, seconds))

        mlp_share = self.recompute_feed_forward_s / self.recompute_layer_s if self.recompute_layer_s else 0.0
        weight = self.fixed_working_bytes
        return replace(
            self,
            kept_bytes=size(self.kept_bytes),
            feed_forward_bytes=size(self.feed_forward_bytes),
            whole_bytes=size(self.whole_bytes),
            forward_s=time(self.forward_s),
            backward_s=time(self.backward_s),
            recompute_feed_forward_s=time(self.recompute_feed_forward_s, mlp_share),
            recompute_layer_s=time(self.recompute_layer_s),
            kept_working_bytes=size(self.kept_working_bytes, weight),
            feed_forward_working_bytes=size(self.feed_forward_working_bytes, weight),
            whole_working_bytes=size(self.whole_working_bytes, weight),
            loss_bytes=size(self.loss_bytes, self.fixed_loss_bytes),
            loss_s=self.loss_s * share,
        )

    def without_keeping(self) -> LayerCosts:
        """Return the costs with the MLP recomputed in every layer that would keep everything."""
        return replace(
            self,
            kept_bytes=self.feed_forward_bytes,
            kept_working_bytes=self.feed_forward_working_bytes,
            backward_s=self.backward_s + self.recompute_feed_forward_s,
            recompute_feed_forward_s=0.0,
        )


@dataclass(frozen=True, slots=True)
class Link:
    """Hold the link's rates between device and pinned host memory, while the device computes.

    Attributes:
        to_host_bytes_s: Bytes a second to the host.
        to_device_bytes_s: Bytes a second to the device.
        drag: Share of a copy's time by which it slows down the layers beside it, because both use the device's memory.
            A probe lost 11 ms by sending 9.6 GB to the host and back.
    """

    to_host_bytes_s: float
    to_device_bytes_s: float
    drag: float = 0.03


@dataclass(frozen=True, slots=True)
class PeakMemory:
    """Hold the activation bytes on the device at the peak.

    Attributes:
        stays_bytes: Saved activations that stay on the device.
        in_flight_bytes: Offloaded activations that are being copied.
        working_bytes: Working memory of one layer's backward or of the loss.
    """

    stays_bytes: int
    in_flight_bytes: int
    working_bytes: int


@dataclass(frozen=True, slots=True)
class Split:
    """Hold the layers by recompute level.

    Attributes:
        costs: Costs of one layer.
        whole: End of the recomputed layers.
        light: End of the layers that recompute their MLP. The later layers keep everything.
    """

    costs: LayerCosts
    whole: int
    light: int

    @classmethod
    def of(cls, policy: MemoryPolicy, costs: LayerCosts) -> Split:
        """Return the split of `policy`."""
        return cls(costs, policy.recompute_layers, policy.recompute_layers + policy.recompute_mlp_layers)

    def level(self, layer: int) -> int:
        """Return the level of the layer with this index."""
        return WHOLE if layer < self.whole else FEED_FORWARD if layer < self.light else KEEP

    @property
    def work_s(self) -> float:
        """Seconds of forward, recompute, loss and backward, when nothing waits for the link."""
        costs = self.costs
        recompute_s = self.whole * costs.recompute_layer_s + (self.light - self.whole) * costs.recompute_feed_forward_s
        return costs.layers * (costs.forward_s + costs.backward_s) + recompute_s + costs.loss_s

    def saved_by(self, count: int) -> int:
        """Return the bytes that the first `count` layers save."""
        whole, feed_forward, keep = self.costs.saved
        first = min(count, self.whole)
        light = min(count, self.light) - first
        return first * whole + light * feed_forward + (count - first - light) * keep

    def fewest(self, size_bytes: int) -> int:
        """Return the fewest first layers that save at least this much. Otherwise return all layers."""
        if size_bytes <= 0:
            return 0
        for level, end in ((WHOLE, self.whole), (FEED_FORWARD, self.light), (KEEP, self.costs.layers)):
            beyond = self.saved_by(end) - size_bytes
            if beyond >= 0:
                saved = self.costs.saved[level]
                return end - (beyond // saved if saved else 0)
        return self.costs.layers

    def beside(self, layer: int) -> int:
        """Return the working bytes of the backward of the layer with this index.

        Index `layers` is the loss together with the last layer's backward.
        """
        last = self.costs.working[self.level(min(layer, self.costs.layers - 1))]
        return max(last, self.costs.loss_bytes) if layer == self.costs.layers else last

    def device_bytes(self, offload: int) -> int:
        """Return the least peak on the device with the first `offload` layers offloaded."""
        return max(self.size_bytes(layer, offload) for layer in self._peak_layers(offload))

    def peak(self, offload: int) -> PeakMemory:
        """Return the parts of that peak. One offloaded layer is in use and one is being copied."""
        layer = max(self._peak_layers(offload), key=lambda layer: self.size_bytes(layer, offload))
        return PeakMemory(self.stays_bytes(layer, offload), self.in_flight_bytes(layer, offload), self.beside(layer))

    def _peak_layers(self, offload: int) -> list[int]:
        """Return the layers whose backward can be the peak.

        They are the last of each level, and those around the end of the offloaded layers.
        """
        layers = self.costs.layers
        tops = (self.light - 1, self.whole - 1, offload - 1, offload)
        return [layers, layers - 1, *(top for top in tops if 0 <= top < layers - 1)]

    def size_bytes(self, layer: int, offload: int) -> int:
        """Return the bytes on the device in the backward of this layer. Index `layers` is the loss."""
        return self.stays_bytes(layer, offload) + self.in_flight_bytes(layer, offload) + self.beside(layer)

    def stays_bytes(self, layer: int, offload: int) -> int:
        """Return the bytes that layers up to this one keep on the device."""
        top = min(layer + 1, self.costs.layers)
        return self.saved_by(top) - self.saved_by(offload) if offload < top else 0

    def in_flight_bytes(self, layer: int, offload: int) -> int:
        """Return the offloaded bytes of this layer and the one before it."""
        top = min(layer + 1, self.costs.layers)
        saved = self.costs.saved
        return sum(saved[self.level(index)] for index in range(max(top - 2, 0), min(top, offload)))


def graph_tokens(tokens: int, gpu_s: float, launch_s: float, mean_tokens: float) -> int:
    """Return the largest micro-batch in tokens that waits for the CPU.

    It is 0 when the mean one does not wait. `gpu_s` is a layer's forward and backward on the GPU for `tokens`, the
    largest micro-batch. `launch_s` is the CPU's time to launch the kernels of one direction.
    """
    waits_s = 2 * launch_s * (1 + WAITING)
    most = tokens if gpu_s <= waits_s else int(tokens * waits_s / gpu_s)
    return most if min(mean_tokens, tokens) <= most else 0


@dataclass(frozen=True, slots=True)
class OffloadSchedule:
    """Hold the offloaded layers that are on the device while each layer runs. It depends on bytes alone.

    Attributes:
        on_device_from: Entry i is the first offloaded layer on the device while layer i runs, in either pass. The
            last entry (index `layers`) is for the loss. Forward: before layer i runs, all layers below the entry
            have been copied to the host and their device memory is free. Backward: before layer i runs, the copies
            to the device of all offloaded layers from the entry on have been started; layer i then waits for its own.
    """

    on_device_from: tuple[int, ...]


def offload_schedule(costs: LayerCosts, policy: MemoryPolicy, room_bytes: int) -> OffloadSchedule:
    """Return the schedule of `policy` with as many offloaded layers on the device as fit.

    `room_bytes` is for saved and working bytes, as `solve` counts them. One layer in use and one in flight are always
    allowed.
    """
    split = Split.of(policy, costs)
    layers, offload = costs.layers, policy.offloaded_layers
    tops = [min(layer + 1, layers) for layer in range(layers + 1)]
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
    """Return the peak of saved and working bytes on the device under a schedule."""
    split = Split.of(policy, costs)
    firsts = schedule.on_device_from
    return max(
        split.saved_by(min(layer + 1, costs.layers))
        - split.saved_by(min(policy.offloaded_layers, first))
        + split.beside(layer)
        for layer, first in enumerate(firsts)
    )


def timeline_s(costs: LayerCosts, policy: MemoryPolicy, link: Link, room_bytes: int) -> float:
    """Return the seconds of one micro-batch under `offload_schedule`.

    Two copy streams run beside the compute stream. A layer's copy to the host starts after its forward and after the
    previous copy. A copy to the device starts when the schedule requires it and the previous copy is done. Layers that
    the schedule has on the device during the loss stay there and are not copied back. Copies slow down the layers
    beside them by `link.drag` of their time.
    """
    split = Split.of(policy, costs)
    saved = [costs.saved[split.level(layer)] for layer in range(policy.offloaded_layers)]
    first = offload_schedule(costs, policy, room_bytes).on_device_from
    now = _forward_s(costs, saved, first, link) + costs.loss_s
    link_free_s, requested, arrived_s = now, policy.offloaded_layers, [0.0] * policy.offloaded_layers
    for layer in reversed(range(costs.layers)):
        while requested > first[layer]:
            requested -= 1
            if requested < first[-1]:
                link_free_s = max(link_free_s, now) + saved[requested] / link.to_device_bytes_s
                arrived_s[requested] = link_free_s
        if layer < first[-1]:
            now = max(now, arrived_s[layer]) + link.drag * saved[layer] / link.to_device_bytes_s
        now += costs.backwards[split.level(layer)]
    return now


def _forward_s(costs: LayerCosts, saved: list[int], first: tuple[int, ...], link: Link) -> float:
    """Return the seconds from the start until the loss may start."""
    now = 0.0
    copied_s: list[float] = []
    for layer in range(costs.layers):
        if first[layer]:
            now = max(now, copied_s[first[layer] - 1])
        now += costs.forward_s
        if layer < len(saved):
            copy_s = saved[layer] / link.to_host_bytes_s
            now += link.drag * copy_s
            copied_s.append(max(now, copied_s[-1] if copied_s else 0.0) + copy_s)
    return max(now, copied_s[first[-1] - 1]) if first[-1] else now
