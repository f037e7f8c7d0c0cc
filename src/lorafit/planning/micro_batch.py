"""MicroBatch: how much goes through the model at once.

How a step is cut changes no number of the training, only memory and speed. On a card, where the dial is chosen
automatically, a micro-batch may grow to the whole step; elsewhere `max_tokens` bounds it.
"""

from __future__ import annotations

from dataclasses import dataclass

from lorafit.config import RunConfig
from lorafit.planning.facts import DataFacts
from lorafit.planning.hardware import Hardware

LARGEST_TOKENS = 16_384
"""Beyond so many tokens nothing is left to gain: what a micro-batch costs whatever its tokens is some 3 % of it."""
SUPERVISED_SPREAD = 1.25
"""How much more of a micro-batch is supervised than of the mean one."""


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """The size of one micro-batch: its tokens, those in the loss, and the longest row's."""

    tokens: int
    supervised: int
    longest: int


def most_tokens(step_tokens: int, max_tokens: int) -> int:
    """The most tokens that a micro-batch may have on a card, where the largest step has `step_tokens`: all of that
    up to LARGEST_TOKENS, and never less than `max_tokens`."""
    return max(max_tokens, min(step_tokens, LARGEST_TOKENS))


def most_tokens_on(hardware: Hardware, config: RunConfig, facts: DataFacts) -> int:
    """The same on `hardware`, where the dial is chosen automatically: `max_tokens` on a CPU."""
    if hardware.kind == "cpu":
        return config.max_tokens
    return most_tokens(largest_step_tokens(config, facts), config.max_tokens)


def micro_batch(config: RunConfig, facts: DataFacts, limit: int) -> MicroBatch:
    """The largest micro-batch where none may have more than `limit` tokens, but for a longer row alone."""
    tokens = min(max(limit, facts.longest), largest_step_tokens(config, facts))
    share = facts.supervised_tokens / facts.tokens if facts.tokens else 1.0
    supervised = min(tokens, round(tokens * share * SUPERVISED_SPREAD))
    return MicroBatch(tokens, supervised, min(tokens, facts.longest))


def largest_step_tokens(config: RunConfig, facts: DataFacts) -> int:
    """Tokens of the run's largest step: as counted, else what a step of the longest rows would have."""
    step = facts.largest_step or config.examples_per_step * facts.longest
    return max(1, min(step, facts.tokens or step))
