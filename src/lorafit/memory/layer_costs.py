"""LayerCosts, Link and Split: what equal decoder layers save, need and take, by how much of them is recomputed."""

from __future__ import annotations

from dataclasses import dataclass, replace

LEVELS = (WHOLE, FEED_FORWARD, KEEP) = range(3)
"""What is recomputed of a layer, in the order of the layers; each saves no less than the one before."""


@dataclass(frozen=True, slots=True)
class LayerCosts:
    """One micro-batch in `layers` equal layers: bytes and seconds of one layer, and of the loss behind them.

    `kept_bytes`, `feed_forward_bytes`, `whole_bytes`: saved from forward to backward when nothing, the feed-forward,
    or all but the layer's input is recomputed. `*_working_bytes`: what its backward needs beside that, recomputed
    values included; `fixed_working_bytes` of it whatever the tokens (one dequantised weight). `fixed_s`: the part of
    `forward_s`, and of `backward_s`, that fewer tokens do not shorten (dequantising); `launch_s`: the least that
    either can take (kernel starts). `loss_bytes` and `loss_s`: of everything between the last layer's forward and its
    backward; `fixed_loss_bytes` of it whatever the tokens (one chunk of logits).
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
        """The costs of a micro-batch with this share of the tokens."""

        def size(size_bytes: int, fixed_bytes: int = 0) -> int:
            fixed = min(fixed_bytes, size_bytes)
            return fixed + round((size_bytes - fixed) * share)

        def time(seconds: float, passes: float = 1.0) -> float:
            fixed = min(self.fixed_s * passes, seconds)
            return max(fixed + (seconds - fixed) * share, min(self.launch_s * passes, seconds))

        again = self.recompute_feed_forward_s / self.recompute_layer_s if self.recompute_layer_s else 0.0
        weight = self.fixed_working_bytes
        return replace(
            self,
            kept_bytes=size(self.kept_bytes),
            feed_forward_bytes=size(self.feed_forward_bytes),
            whole_bytes=size(self.whole_bytes),
            forward_s=time(self.forward_s),
            backward_s=time(self.backward_s),
            recompute_feed_forward_s=time(self.recompute_feed_forward_s, again),
            recompute_layer_s=time(self.recompute_layer_s),
            kept_working_bytes=size(self.kept_working_bytes, weight),
            feed_forward_working_bytes=size(self.feed_forward_working_bytes, weight),
            whole_working_bytes=size(self.whole_working_bytes, weight),
            loss_bytes=size(self.loss_bytes, self.fixed_loss_bytes),
            loss_s=self.loss_s * share,
        )

    def without_keeping(self) -> LayerCosts:
        """The same with the feed-forward recomputed in every layer that is not recomputed entirely: what is "kept"
        then, is that."""
        return replace(
            self,
            kept_bytes=self.feed_forward_bytes,
            kept_working_bytes=self.feed_forward_working_bytes,
            backward_s=self.backward_s + self.recompute_feed_forward_s,
            recompute_feed_forward_s=0.0,
        )


@dataclass(frozen=True, slots=True)
class Link:
    """Bytes a second between device and pinned host memory, each way, while the device computes.

    `drag`: what a copy costs the layers beside it, as a share of its own time: they share the device's memory, and
    someone has to start it. The probe lost 11 ms by sending away 9.6 GB and fetching them again.
    """

    to_host_bytes_s: float
    to_device_bytes_s: float
    drag: float = 0.03


@dataclass(frozen=True, slots=True)
class Moment:
    """Saved bytes that stay on the device, offloaded ones on their way, and working bytes, at one time."""

    stays_bytes: int
    in_flight_bytes: int
    working_bytes: int


@dataclass(frozen=True, slots=True)
class Split:
    """The layers by level: the first `whole`, up to `light` those with a recomputed feed-forward, then kept ones."""

    costs: LayerCosts
    whole: int
    light: int

    def level(self, layer: int) -> int:
        """The level of the layer with this index."""
        return WHOLE if layer < self.whole else FEED_FORWARD if layer < self.light else KEEP

    @property
    def work_s(self) -> float:
        """Forward, recomputation, loss and backward, when nothing waits for the link."""
        costs = self.costs
        again = self.whole * costs.recompute_layer_s + (self.light - self.whole) * costs.recompute_feed_forward_s
        return costs.layers * (costs.forward_s + costs.backward_s) + again + costs.loss_s

    def saved_by(self, count: int) -> int:
        """Bytes that the first `count` layers save."""
        whole, feed_forward, keep = self.costs.saved
        first = min(count, self.whole)
        light = min(count, self.light) - first
        return first * whole + light * feed_forward + (count - first - light) * keep

    def fewest(self, size_bytes: int) -> int:
        """The fewest first layers that save at least this much; all of them where they do not."""
        if size_bytes <= 0:
            return 0
        for level, end in ((WHOLE, self.whole), (FEED_FORWARD, self.light), (KEEP, self.costs.layers)):
            beyond = self.saved_by(end) - size_bytes
            if beyond >= 0:
                saved = self.costs.saved[level]
                return end - (beyond // saved if saved else 0)
        return self.costs.layers

    def beside(self, layer: int) -> int:
        """Working bytes while the layer with this index is at work; index `layers` is the loss, and what follows."""
        last = self.costs.working[self.level(min(layer, self.costs.layers - 1))]
        return max(last, self.costs.loss_bytes) if layer == self.costs.layers else last

    def device_bytes(self, offload: int) -> int:
        """The least that the device must hold at its fullest moment."""
        return max(self.size_bytes(layer, offload) for layer in self._full_moments(offload))

    def fullest(self, offload: int) -> Moment:
        """That moment. One offloaded layer is at work and one in flight."""
        layer = max(self._full_moments(offload), key=lambda layer: self.size_bytes(layer, offload))
        return Moment(self.stays_bytes(layer, offload), self.in_flight_bytes(layer, offload), self.beside(layer))

    def _full_moments(self, offload: int) -> list[int]:
        """When the device can be fullest: at the loss, or in the backward of a level's last layer, of the last
        offloaded one, or of the one after that."""
        layers = self.costs.layers
        tops = (self.light - 1, self.whole - 1, offload - 1, offload)
        return [layers, layers - 1, *(top for top in tops if 0 <= top < layers - 1)]

    def size_bytes(self, layer: int, offload: int) -> int:
        """What the device holds in the backward of the layer with this index; index `layers` is the loss."""
        return self.stays_bytes(layer, offload) + self.in_flight_bytes(layer, offload) + self.beside(layer)

    def stays_bytes(self, layer: int, offload: int) -> int:
        """What layers up to this one have saved and keep on the device."""
        top = min(layer + 1, self.costs.layers)
        return self.saved_by(top) - self.saved_by(offload) if offload < top else 0

    def in_flight_bytes(self, layer: int, offload: int) -> int:
        """What this layer and the one before it have saved, as far as they are offloaded."""
        top = min(layer + 1, self.costs.layers)
        saved = self.costs.saved
        return sum(saved[self.level(index)] for index in range(max(top - 2, 0), min(top, offload)))


WAITING = 0.2
"""By so much a layer's seconds on the card must exceed the processor's, who else is waited for."""
FILLED = 1.125
"""A micro-batch filled up to its bucket's size against itself, at most."""


def graph_tokens(tokens: int, card_s: float, launch_s: float, mean_tokens: float) -> int:
    """The most tokens of a micro-batch that waits for the processor; 0 where the mean one, of `mean_tokens`, does not.

    `card_s`: a layer's forward and backward with `tokens` tokens, which none exceeds; `launch_s`: what starting the
    kernels of either takes the processor, however few the tokens.
    """
    waits_s = 2 * launch_s * (1 + WAITING)
    most = tokens if card_s <= waits_s else int(tokens * waits_s / card_s)
    return most if min(mean_tokens, tokens) <= most else 0
