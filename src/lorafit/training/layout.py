"""Layout: how large a micro-batch may be. What a step learns does not depend on it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lorafit.data import pack_step


@dataclass(slots=True)
class Layout:
    """At most `micro_tokens` tokens in a micro-batch, or one row. It shrinks when the memory runs out."""

    micro_tokens: int

    def of(self, lengths: NDArray[np.integer], chosen: NDArray[np.integer]) -> list[NDArray[np.integer]]:
        """The rows `chosen`, of `lengths` (all rows,) tokens, as micro-batches; longer rows go alone, first."""
        sizes = lengths[chosen]
        alone, fitting = chosen[sizes > self.micro_tokens], chosen[sizes <= self.micro_tokens]
        packed = [fitting[members] for members in pack_step(lengths[fitting], self.micro_tokens)]
        return [*(row[None] for row in alone), *packed]
