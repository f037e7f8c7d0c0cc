"""The held-out split: by group, seeded, and stable when rows are appended."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from lorafit.data.fingerprints import mixed
from lorafit.data.rows import Rows

ROWS_TO_HOLD_OUT_FROM = 20


def held_out(groups: NDArray[np.int64], content: NDArray[np.uint64], share: float, seed: int) -> NDArray[np.bool_]:
    """True (n,) for rows that are held out.

    `groups` (n,) names each row's group by its first row, `content` (n,) is a hash of each row. A group's side
    follows from the seed and the hash of its first row, not from its place: rows appended later move nobody,
    unless they join two groups. A group larger than the whole held-out share stays in training. From 20 rows
    on each side has a row, when there are two groups; then the group with the least draw is held out.
    """
    count = len(groups)
    if share <= 0 or count < 2:
        return np.zeros(count, np.bool_)
    first, group, sizes = np.unique(groups, return_inverse=True, return_counts=True)
    draw = _draw(content[first], seed)
    too_large = sizes > max(1.0, share * count)
    held = (draw < share) & ~too_large
    if len(first) > 1 and (held.all() or (count >= ROWS_TO_HOLD_OUT_FROM and not held.any())):
        held = np.arange(len(first)) == np.lexsort((draw, np.where(too_large, sizes, 0)))[0]
    return np.asarray(held[group], np.bool_)


def _draw(content: NDArray[np.uint64], seed: int) -> NDArray[np.float64]:
    """Numbers in [0, 1), one per group."""
    return mixed(content ^ mixed(np.array([seed], np.uint64))).astype(np.float64) / 2.0**64


def write_split(path: Path, train: Rows, holdout: Rows) -> None:
    """Each row's side and place, in the order of the files: `split.tsv` of the run directory."""
    with path.open("w", encoding="utf-8") as stream:
        stream.write("side\tsource\n")
        for side, rows in (("train", train), ("holdout", holdout)):
            stream.writelines(f"{side}\t{source}\n" for source in rows.sources())
