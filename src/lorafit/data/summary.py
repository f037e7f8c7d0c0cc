"""Summary: the numbers of one reading of the data, as data; cli/ draws them."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class Histogram:
    """`counts[i]` rows have a length from `edges[i]` up to, not including, `edges[i + 1]`."""

    edges: tuple[int, ...] = ()
    counts: tuple[int, ...] = ()

    @classmethod
    def of(cls, lengths: NDArray[np.int32]) -> Histogram:
        """Lengths (n,) in tokens, in bins whose edges grow by about the square root of two."""
        if not len(lengths):
            return cls()
        top = int(lengths.max())
        edges = [0, 8]
        while edges[-1] <= top:
            power = 2 ** ((len(edges) + 5) // 2)
            edges.append(power if len(edges) % 2 else power * 3 // 2)
        counts, _ = np.histogram(lengths, np.array(edges, np.float64))
        return cls(tuple(edges), tuple(int(count) for count in counts))


@dataclass(frozen=True, slots=True)
class Summary:
    """What was read and what came of it.

    `read = kept + rejected + dropped`; `kept` rows became `train_rows + holdout_rows` examples (more than
    `kept` when `split` conversations were cut at their turns). `truncated` is always 0: no row is cut.
    Token figures are 0 and `tokenised` is False when there was no tokenizer.
    """

    files: tuple[str, ...]
    shape: str
    read: int
    kept: int
    rejected: int
    dropped: int
    split: int
    duplicates: int
    near_duplicates: int
    train_rows: int
    holdout_rows: int
    tokenised: bool
    tokens: int
    supervised_tokens: int
    longest: int
    histogram: Histogram
    packed_fill: float
    steps_per_epoch: int
    seconds: float
    near_duplicate_seconds: float
    cached: bool
    truncated: int = 0

    @property
    def supervised_share(self) -> float:
        """Supervised tokens over all tokens."""
        return self.supervised_tokens / self.tokens if self.tokens else 0.0

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready mapping."""
        return asdict(self) | {"supervised_share": self.supervised_share}
