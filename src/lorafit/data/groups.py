"""Groups: rows that must stand on one side of the split, because one gives the other away."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from lorafit.data.fingerprints import mixed
from lorafit.data.near_copies import copies_of, leaders
from lorafit.data.store_writer import Stored

COMMON_QUESTION_SHARE = 0.05
Numbers = NDArray[np.int64]


def first_with(keys: NDArray[np.uint64]) -> Numbers:
    """(n,) for each row the first row with the same key."""
    return copies_of(keys)[1]


def group_of(stored: Stored, *, same_questions: bool = True) -> Numbers:
    """(n,) for each row the first row of its group.

    A group holds near copies, rows that are the same but for case and blanks, pieces of one conversation and, with
    `same_questions`, rows with one prompt, unless more than 5 % of all rows have that prompt.
    """
    own = np.arange(len(stored.exact))
    same_text = mixed(stored.question) ^ stored.answer
    ties = [stored.leader, first_with(same_text), first_with(stored.row.astype(np.uint64))]
    if same_questions:
        ties.append(_first_with_question(stored.question, own))
    return leaders(len(own), np.tile(own, len(ties)), np.concatenate(ties))


def _first_with_question(question: NDArray[np.uint64], own: Numbers) -> Numbers:
    _, first, place, counts = np.unique(question, return_index=True, return_inverse=True, return_counts=True)
    rare = counts <= max(1.0, COMMON_QUESTION_SHARE * len(question))
    return np.where(rare[place], first[place], own)
