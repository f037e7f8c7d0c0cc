"""MemoryPolicy: where the activations of each layer wait for their backward pass, as one setting that can be written down."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Any

from lorafit.errors import UsageError

SHORT_FORMS = ("keep", "recompute", "offload")
LAYER_COUNTS = ("feed_forward", "whole", "offload", "dense")
TOKEN_COUNTS = ("micro_tokens", "graphs")
ON_HOST = "host_embeddings=on"
ALL_DENSE = "weights=dense"
FIX = (
    "write keep, recompute, offload, or counts such as recompute_mlp_layers=20,offloaded_layers=32,host_embeddings=on,micro_tokens=4096, "
    "recompute_layers=8, dequantized_layers=16 or cuda_graph_max_tokens=2048"
)
STEPS_DOWN = 4
"""`next_smaller` changes a quarter of the layers at a time: enough to see, few enough retries."""


@dataclass(frozen=True, slots=True)
class MemoryPolicy:
    """How the decoder layers' activations survive until their backward pass, and how large a micro-batch is.

    The first `whole` layers keep their input alone and are recomputed; the next `feed_forward` ones recompute the
    inner values of their feed-forward; the rest keep everything. What the first `offload` layers keep waits in
    pinned host memory. `host_embeddings`: the frozen input embeddings stay in host memory. `micro_tokens`: the most
    tokens of one micro-batch, more or fewer than `max_tokens`; None for `max_tokens`. `dense`: so many layers' 4-bit
    weights lie on the card unpacked too, ready to be multiplied by. `graphs`: micro-batches of at most so many tokens
    run as CUDA graphs, where nothing is recomputed entirely or sent to the host.
    """

    feed_forward: int = 0
    whole: int = 0
    offload: int = 0
    host_embeddings: bool = False
    micro_tokens: int | None = None
    dense: int = 0
    graphs: int = 0

    def __post_init__(self) -> None:
        assert min(self.feed_forward, self.whole, self.offload, self.dense, self.graphs) >= 0, self
        assert self.micro_tokens is None or self.micro_tokens > 0, self

    @classmethod
    def parse(cls, text: str, layers: int) -> MemoryPolicy:
        """The policy that `text` means for a model with `layers` layers, clamped to them: a short form (`keep`,
        `recompute`: every layer, `offload`: every layer), then counts; the inverse of `str`. Raises UsageError."""
        words = [word.strip() for word in text.split(",")]
        policy = {"recompute": cls(recompute_layers=layers), "offload": cls(offloaded_layers=layers)}.get(
            words[0], cls()
        )
        given: dict[str, Any] = {}
        for word in words[words[0] in SHORT_FORMS :]:
            key, value = _assignment(word, text, layers)
            if key in given:
                raise UsageError(f"'{text:.80}' says {key} twice", where="activations", fix=FIX)
            given[key] = value
        return replace(policy, **given).clamped(layers)

    def __str__(self) -> str:
        counts, tokens = (
            [f"{key}={value}" for key in keys if (value := getattr(self, key))] for keys in (LAYER_COUNTS, TOKEN_COUNTS)
        )
        host = [ON_HOST] if self.host_embeddings else []
        return ",".join(counts + host + tokens) or "keep"

    @property
    def keeps_everything(self) -> bool:
        """True when nothing is recomputed and nothing waits on the host."""
        return not (self.whole or self.feed_forward or self.offload or self.host_embeddings)

    @property
    def takes_graphs(self) -> bool:
        """True when a micro-batch runs alike each time, so that it may be recorded."""
        return not (self.whole or self.offload or self.host_embeddings)

    def clamped(self, layers: int) -> MemoryPolicy:
        """The same for a model with `layers` layers: no count beyond them, whole layers first."""
        whole = min(self.whole, layers)
        feed_forward = min(self.feed_forward, layers - whole)
        offload, dense = min(self.offload, layers), min(self.dense, layers)
        return replace(self, whole=whole, recompute_mlp_layers=feed_forward, offloaded_layers=offload, dense=dense)

    def sized(self, tokens: int, max_tokens: int) -> MemoryPolicy:
        """The same with its micro-batch said, which is `tokens` where it was not; left unsaid where it is
        `max_tokens`, as every reader takes it."""
        size = self.micro_tokens or tokens
        return replace(self, micro_tokens=None if size == max_tokens else size)

    def level(self, layer: int) -> str:
        """`whole`, `feed_forward` or `keep`: what is recomputed of the layer with this index."""
        if layer < self.whole:
            return "whole"
        return "feed_forward" if layer < self.whole + self.feed_forward else "keep"

    def next_smaller(self, layers: int, tokens: int | None = None, longest: int = 1) -> MemoryPolicy | None:
        """The next setting with clearly less memory on the device, or None at the end.

        Unpacked weights go first, half of them at a time, then graphs, which have a memory of their own. What is still
        on the device is recomputed in part, then entirely, then sent to the host; then the embeddings are; then the
        micro-batch is halved, down to the `longest` row. `tokens`: the micro-batch while `micro_tokens` is None;
        without either it is left alone.
        """
        policy = self.clamped(layers)
        if policy.dequantized_layers:
            return replace(policy, dense=policy.dequantized_layers // 2)
        if policy.cuda_graph_max_tokens:
            return replace(policy, cuda_graph_max_tokens=0)
        step = -(-layers // STEPS_DOWN)
        light = policy.recompute_layers + policy.recompute_mlp_layers
        if max(light, policy.offloaded_layers) < layers:
            most = min(layers, max(light, policy.offloaded_layers) + step)
            return replace(policy, recompute_mlp_layers=most - policy.recompute_layers)
        if max(policy.recompute_layers, policy.offloaded_layers) < layers:
            whole = min(layers, max(policy.recompute_layers, policy.offloaded_layers) + step)
            return replace(policy, whole=whole, recompute_mlp_layers=layers - whole)
        if policy.offloaded_layers < layers:
            return replace(policy, offloaded_layers=layers)
        return policy._lighter_everywhere(layers, tokens, longest)

    def _lighter_everywhere(self, layers: int, tokens: int | None, longest: int) -> MemoryPolicy | None:
        """`next_smaller` once every layer waits in host memory: less in flight, no embeddings, fewer tokens."""
        if self.whole < layers:
            return replace(self, recompute_layers=layers, recompute_mlp_layers=0)
        if not self.host_embeddings:
            return replace(self, host_embeddings=True)
        now = self.micro_tokens or tokens
        if now is None or now <= longest:
            return None
        return replace(self, micro_tokens=max(now // 2, longest))


def _assignment(word: str, text: str, layers: int) -> tuple[str, int | bool]:
    """`key=value` of a policy. Raises UsageError for what is none."""
    key, _, value = (part.strip() for part in word.partition("="))
    if f"{key}={value}" == ON_HOST:
        return "host_embeddings", True
    if f"{key}={value}" == ALL_DENSE:
        return "dense", layers
    if (
        key not in LAYER_COUNTS + TOKEN_COUNTS
        or not re.fullmatch(r"[0-9]{1,9}", value)
        or (key == "micro_tokens" and not int(value))
    ):
        raise UsageError(f"'{text:.80}' is no setting of the activations", where="activations", fix=FIX)
    return key, int(value)
