"""CUDA graphs: which micro-batches gain by them, and what they take. No torch."""

from __future__ import annotations

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
