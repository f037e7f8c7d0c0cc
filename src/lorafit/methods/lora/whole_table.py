"""whole_table: train the whole embedding or head beside the adapters, as PEFT's `modules_to_save`."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

TABLE = "whole_table"
"""Name of the parameter (vocabulary, hidden), fp32, within the embedding and the head."""
SCALE = "embed_scale"
"""Name under which scaled embeddings hold the factor of their output."""


class WholeTable:
    """Hold the trained table of one module, which takes the place of its weight.

    The weight itself stays frozen, for the base's own answers. A head's bias stays the base's. The table is in fp32,
    where small updates are not lost; products are made in the precision of their inputs.

    Attributes:
        enabled: False while the base answers.
    """

    parameter = TABLE
    tokens = ()
    """The tokens of the rows; no ids stand for all."""

    def __init__(self, module: Any, table: nn.Parameter) -> None:
        self.enabled = True
        module.register_parameter(TABLE, table)
        own = self._vectors if isinstance(module, nn.Embedding) else self._logits
        module.forward = partial(own, module)  # hooks would come after the product with the frozen weight

    def _vectors(self, module: Any, ids: Tensor) -> Tensor:
        """Return the vectors (…, hidden) of `ids` (…), in the precision of the frozen weight."""
        if not self.enabled:
            return type(module).forward(module, ids)
        rows = F.embedding(ids, module.whole_table, module.padding_idx).to(module.weight.dtype)
        return scaled(rows, module)

    def _logits(self, module: Any, hidden: Tensor) -> Tensor:
        """Return the logits (…, vocabulary) of `hidden` (…, hidden)."""
        if not self.enabled:
            return type(module).forward(module, hidden)
        return F.linear(hidden, module.whole_table.to(hidden.dtype), module.bias)

    def remove(self, module: Any, *, keep: bool) -> None:
        """Take the table out of `module`; with `keep` its weight becomes the table, rounded once."""
        del module.forward
        if keep:
            module.weight.copy_(module.whole_table)
        del module.whole_table, module.trained_rows


def scaled(vectors: Tensor, embedding: nn.Module) -> Tensor:
    """Return `vectors` times the factor of a scaled embedding."""
    scale = getattr(embedding, SCALE, None)
    if scale is None:
        return vectors
    return vectors * (scale.to(vectors.dtype) if isinstance(scale, Tensor) else scale)
