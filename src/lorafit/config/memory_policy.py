"""MemoryPolicy: what each layer keeps, recomputes or sends to host memory, as one setting that can be written down."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Any

from lorafit.errors import UsageError

SHORT_FORMS = ("keep", "recompute", "offload")
LAYER_COUNTS = ("recompute_mlp_layers", "recompute_layers", "offloaded_layers", "dequantized_layers")
TOKEN_COUNTS = ("micro_tokens", "cuda_graph_max_tokens")
OLD_WORDS = {
    "whole": "recompute_layers",
    "feed_forward": "recompute_mlp_layers",
    "offload": "offloaded_layers",
    "dense": "dequantized_layers",
    "graphs": "cuda_graph_max_tokens",
    "host_embeddings=on": "host_embeddings=on",
    "weights=dense": "dequantized_layers=all",
}
"""Shorter words for the fields, accepted wherever a policy is parsed."""
ON_HOST = "host_embeddings=on"
ALL_DEQUANTIZED = "dequantized_layers=all"
FIX = (
    "write keep, recompute, offload, or counts such as recompute_mlp_layers=20,offloaded_layers=32,"
    "host_embeddings=on,micro_tokens=4096, recompute_layers=8, dequantized_layers=16 or cuda_graph_max_tokens=2048"
)
STEPS_DOWN = 4
"""`next_smaller` changes a quarter of the layers at a time: enough to see, few enough retries."""


@dataclass(frozen=True, slots=True)
class MemoryPolicy:
    """Say how activations survive until their backward pass, and how large a micro-batch is.

    Attributes:
        recompute_mlp_layers: Layers, after the recomputed ones, that recompute only the inner values of their MLP.
        recompute_layers: First layers that keep their input alone and are recomputed.
        offloaded_layers: First layers whose kept tensors wait in pinned host memory.
        host_embeddings: Whether the frozen input embeddings stay in host memory.
        micro_tokens: The most tokens of one micro-batch; None for the setting `max_length`.
        dequantized_layers: First layers whose 4-bit weights lie dequantized on the GPU too.
        cuda_graph_max_tokens: The most tokens of a micro-batch that runs as a CUDA graph. Policies that recompute
            layers or use host memory run none.
    """

    recompute_mlp_layers: int = 0
    recompute_layers: int = 0
    offloaded_layers: int = 0
    host_embeddings: bool = False
    micro_tokens: int | None = None
    dequantized_layers: int = 0
    cuda_graph_max_tokens: int = 0

    def __post_init__(self) -> None:
        assert min(getattr(self, key) for key in (*LAYER_COUNTS, "cuda_graph_max_tokens")) >= 0, self
        assert self.micro_tokens is None or self.micro_tokens > 0, self

    @classmethod
    def parse(cls, text: str, layers: int) -> MemoryPolicy:
        """Return the policy that `text` writes, clamped to a model with `layers` layers; the inverse of `str`.

        A short form (`keep`, `recompute` and `offload`: every layer) may stand before the counts. Raises UsageError.
        """
        words = [word.strip() for word in text.split(",")]
        short = {"recompute": cls(recompute_layers=layers), "offload": cls(offloaded_layers=layers)}
        given: dict[str, Any] = {}
        for word in words[words[0] in SHORT_FORMS :]:
            key, value = _assignment(word, text, layers)
            if key in given:
                raise UsageError(f"'{text:.80}' says {key} twice", where="memory_policy", fix=FIX)
            given[key] = value
        return replace(short.get(words[0], cls()), **given).clamped(layers)

    def __str__(self) -> str:
        counts, tokens = (
            [f"{key}={value}" for key in keys if (value := getattr(self, key))] for keys in (LAYER_COUNTS, TOKEN_COUNTS)
        )
        host = [ON_HOST] if self.host_embeddings else []
        return ",".join(counts + host + tokens) or "keep"

    @property
    def keeps_everything(self) -> bool:
        """True when nothing is recomputed and nothing waits in host memory."""
        return not (self.recompute_mlp_layers or self.recompute_layers or self.offloaded_layers or self.host_embeddings)

    @property
    def takes_graphs(self) -> bool:
        """True when every micro-batch runs the same operations, so that CUDA graphs can record it."""
        return not (self.recompute_layers or self.offloaded_layers or self.host_embeddings)

    def clamped(self, layers: int) -> MemoryPolicy:
        """Return the policy with no count beyond `layers`; recomputed layers take precedence over MLPs."""
        recomputed = min(self.recompute_layers, layers)
        return replace(
            self,
            recompute_layers=recomputed,
            recompute_mlp_layers=min(self.recompute_mlp_layers, layers - recomputed),
            offloaded_layers=min(self.offloaded_layers, layers),
            dequantized_layers=min(self.dequantized_layers, layers),
        )

    def sized(self, tokens: int, max_length: int) -> MemoryPolicy:
        """Return the policy with its micro-batch of `tokens` written down.

        A size already set stays; a size equal to `max_length` is left out, since that is the default.
        """
        size = self.micro_tokens or tokens
        return replace(self, micro_tokens=None if size == max_length else size)

    def level(self, layer: int) -> str:
        """Return what the layer with this index recomputes: `whole`, `feed_forward`, or `keep` for nothing."""
        if layer < self.recompute_layers:
            return "whole"
        return "feed_forward" if layer < self.recompute_layers + self.recompute_mlp_layers else "keep"

    def next_smaller(self, layers: int, tokens: int | None = None, longest: int = 1) -> MemoryPolicy | None:
        """Return the next policy with clearly less GPU memory, or None at the end.

        The order: half of the dequantized weights at a time, CUDA graphs, MLPs recomputed, layers recomputed, layers
        offloaded, embeddings moved, micro-batches halved down to the `longest` row. `tokens` is the micro-batch while
        `micro_tokens` is None; without either its size stays.
        """
        policy = self.clamped(layers)
        if policy.dequantized_layers:
            return replace(policy, dequantized_layers=policy.dequantized_layers // 2)
        if policy.cuda_graph_max_tokens:
            return replace(policy, cuda_graph_max_tokens=0)
        step = -(-layers // STEPS_DOWN)
        lighter = policy.recompute_layers + policy.recompute_mlp_layers
        if max(lighter, policy.offloaded_layers) < layers:
            most = min(layers, max(lighter, policy.offloaded_layers) + step)
            return replace(policy, recompute_mlp_layers=most - policy.recompute_layers)
        if max(policy.recompute_layers, policy.offloaded_layers) < layers:
            most = min(layers, max(policy.recompute_layers, policy.offloaded_layers) + step)
            return replace(policy, recompute_layers=most, recompute_mlp_layers=layers - most)
        if policy.offloaded_layers < layers:
            return replace(policy, offloaded_layers=layers)
        return policy._smaller_everywhere(layers, tokens, longest)

    def _smaller_everywhere(self, layers: int, tokens: int | None, longest: int) -> MemoryPolicy | None:
        """Continue `next_smaller` once every layer is offloaded."""
        if self.recompute_layers < layers:
            return replace(self, recompute_layers=layers, recompute_mlp_layers=0)
        if not self.host_embeddings:
            return replace(self, host_embeddings=True)
        now = self.micro_tokens or tokens
        if now is None or now <= longest:
            return None
        return replace(self, micro_tokens=max(now // 2, longest))


def _assignment(word: str, text: str, layers: int) -> tuple[str, int | bool]:
    """Return one `key=value` of a policy. Raises UsageError for anything else."""
    key, equals, value = (part.strip() for part in word.partition("="))
    pair = OLD_WORDS.get(f"{key}={value}", f"{OLD_WORDS.get(key, key)}{equals}{value}")
    if pair == ON_HOST:
        return "host_embeddings", True
    if pair == ALL_DEQUANTIZED:
        return "dequantized_layers", layers
    key, _, value = pair.partition("=")
    if (
        key not in LAYER_COUNTS + TOKEN_COUNTS
        or not re.fullmatch(r"[0-9]{1,9}", value)
        or (key == "micro_tokens" and not int(value))
    ):
        raise UsageError(f"'{text:.80}' is no memory policy", where="memory_policy", fix=FIX)
    return key, int(value)
