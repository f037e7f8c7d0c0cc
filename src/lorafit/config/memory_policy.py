"""MemoryPolicy: the layers that keep, recompute or offload their activations, as one setting.

`parse` reads a policy from text, and `str` writes it.
"""

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
"""Short and older names of the fields, which `parse` accepts."""
ON_HOST = "host_embeddings=on"
ALL_DEQUANTIZED = "dequantized_layers=all"
FIX = (
    "write keep, recompute, offload, or counts such as recompute_mlp_layers=20,offloaded_layers=32,"
    "host_embeddings=on,micro_tokens=4096, recompute_layers=8, dequantized_layers=16 or cuda_graph_max_tokens=2048"
)
STEPS_DOWN = 4
"""Steps in which `next_smaller` changes all layers. A quarter at a time saves enough memory in few retries."""


@dataclass(frozen=True, slots=True)
class MemoryPolicy:
    """Hold the storage of activations until the backward pass, and the size of a micro-batch.

    Attributes:
        recompute_mlp_layers: Layers, after the recomputed ones, that recompute only the inner values of their MLP.
        recompute_layers: First layers that keep only their input and are recomputed.
        offloaded_layers: First layers whose kept tensors are offloaded to pinned host memory.
        host_embeddings: Whether the frozen input embeddings stay in host memory.
        micro_tokens: Largest micro-batch in tokens; None for the setting `max_length`.
        dequantized_layers: First layers whose weights are also on the GPU dequantized.
        cuda_graph_max_tokens: Largest micro-batch in tokens that runs as a CUDA graph. Policies that recompute
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
        """Return the policy in `text`, clamped to a model with `layers` layers.

        `str` is the inverse. A short form (`keep`, `recompute` or `offload`, for every layer) may precede the counts.
        Raises UsageError for any other text.
        """
        words = [word.strip() for word in text.split(",")]
        short = {"recompute": cls(recompute_layers=layers), "offload": cls(offloaded_layers=layers)}
        given: dict[str, Any] = {}
        for word in words[words[0] in SHORT_FORMS :]:
            key, value = _assignment(word, text, layers)
            if key in given:
                raise UsageError(f"'{text:.80}' sets {key} twice", where="memory_policy", fix=FIX)
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
        """True when nothing is recomputed or offloaded."""
        return not (self.recompute_mlp_layers or self.recompute_layers or self.offloaded_layers or self.host_embeddings)

    @property
    def takes_graphs(self) -> bool:
        """True when every micro-batch runs the same operations, which CUDA graphs require."""
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
        """Return the policy with `tokens` as its micro-batch.

        A size that is already set stays. A size equal to `max_length` is left out, because it is the default.
        """
        size = self.micro_tokens or tokens
        return replace(self, micro_tokens=None if size == max_length else size)

    def level(self, layer: int) -> str:
        """Return the level at which a layer recomputes: `whole`, `feed_forward`, or `keep` for none."""
        if layer < self.recompute_layers:
            return "whole"
        return "feed_forward" if layer < self.recompute_layers + self.recompute_mlp_layers else "keep"

    def next_smaller(self, layers: int, tokens: int | None = None, longest: int = 1) -> MemoryPolicy | None:
        """Return the next policy with clearly less GPU memory, or None after the last one.

        The steps, in order: halve the dequantized layers, drop CUDA graphs, recompute MLPs, recompute layers, offload
        layers, move the embeddings, halve micro-batches down to the `longest` row. `tokens` is the micro-batch while
        `micro_tokens` is None. When both are None, the micro-batch keeps its size.
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
        """Return the next smaller policy once every layer is offloaded."""
        if self.recompute_layers < layers:
            return replace(self, recompute_layers=layers, recompute_mlp_layers=0)
        if not self.host_embeddings:
            return replace(self, host_embeddings=True)
        now = self.micro_tokens or tokens
        if now is None or now <= longest:
            return None
        return replace(self, micro_tokens=max(now // 2, longest))


def _assignment(word: str, text: str, layers: int) -> tuple[str, int | bool]:
    """Return the field and value of one `key=value`. Raises UsageError for any other text."""
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
        raise UsageError(f"'{text:.80}' is not a memory policy", where="memory_policy", fix=FIX)
    return key, int(value)
