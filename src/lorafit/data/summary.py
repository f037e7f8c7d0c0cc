"""Summary: the numbers of a reading, and its progress. Only cli/ draws them."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class Progress:
    """The stage's name, rows so far, bytes of all files, seconds elapsed and (by bytes) remaining."""

    stage: str
    rows: int
    bytes_done: int
    bytes_total: int
    elapsed_s: float
    eta_s: float | None


Listener = Callable[[Progress], None]


class Clock:
    """Turn counts into `Progress` reports, at most ten a second."""

    def __init__(self, listener: Listener | None, bytes_total: int) -> None:
        self.listener, self.bytes_total = listener, bytes_total
        self.started, self.last = time.monotonic(), 0.0

    def report(self, stage: str, rows: int, bytes_done: int, *, force: bool = False) -> None:
        """Call the listener, if there is one and its last report is a tenth of a second old."""
        now = time.monotonic()
        if self.listener is None or (now - self.last < 0.1 and not force):
            return
        self.last, elapsed = now, now - self.started
        share = bytes_done / self.bytes_total if self.bytes_total else 0.0
        eta = elapsed * (1 - share) / share if share > 0 else None
        self.listener(Progress(stage, rows, bytes_done, self.bytes_total, elapsed, eta))


@dataclass(frozen=True, slots=True)
class Histogram:
    """`counts[i]` rows have a length from `edges[i]` up to, not including, `edges[i + 1]`."""

    edges: tuple[int, ...] = ()
    counts: tuple[int, ...] = ()

    @classmethod
    def of(cls, lengths: NDArray[np.int32]) -> Histogram:
        """Return the histogram of lengths (n,) in tokens. Bin edges grow by about the square root of two."""
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
    """The numbers of a reading, and its outcome.

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
        """Return a JSON-ready mapping."""
        return asdict(self) | {"supervised_share": self.supervised_share}
