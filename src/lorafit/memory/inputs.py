"""MicroBatch: how much goes through the model at once.

How a step is cut changes no number of the training, only memory and speed. On a card, where the policy is chosen
automatically, a micro-batch may grow to the whole step; elsewhere `max_tokens` bounds it.
"""

from __future__ import annotations

from dataclasses import dataclass

from lorafit.config import RunConfig
from lorafit.config.memory_policy import MemoryPolicy
from lorafit.errors import UsageError
from lorafit.hardware.device import Hardware

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


def most_tokens_on(hardware: Hardware, config: RunConfig, facts: DataStats) -> int:
    """The same on `hardware`, where the policy is chosen automatically: `max_tokens` on a CPU."""
    if hardware.kind == "cpu":
        return config.max_tokens
    return most_tokens(largest_step_tokens(config, facts), config.max_tokens)


def micro_batch(config: RunConfig, facts: DataStats, limit: int) -> MicroBatch:
    """The largest micro-batch where none may have more than `limit` tokens, but for a longer row alone."""
    tokens = min(max(limit, facts.longest), largest_step_tokens(config, facts))
    share = facts.supervised_tokens / facts.tokens if facts.tokens else 1.0
    supervised = min(tokens, round(tokens * share * SUPERVISED_SPREAD))
    return MicroBatch(tokens, supervised, min(tokens, facts.longest))


def largest_step_tokens(config: RunConfig, facts: DataStats) -> int:
    """Tokens of the run's largest step: as counted, else what a step of the longest rows would have."""
    step = facts.largest_step or config.examples_per_step * facts.longest
    return max(1, min(step, facts.tokens or step))


@dataclass(frozen=True, slots=True)
class DataStats:
    """The size of the training data after tokenising.

    `rows` are the training rows, without the `holdout_rows` kept for evaluation. `tokens` counts every token of
    the training rows, `supervised_tokens` those in the loss, `longest` the tokens of the longest row and
    `mean_tokens` the mean row. `largest_step`: tokens of the run's largest step; 0 where nobody counted them, and a
    step of the longest rows is reckoned with.
    """

    rows: int
    tokens: int
    supervised_tokens: int
    longest: int
    mean_tokens: float
    holdout_rows: int = 0
    largest_step: int = 0


RECOMPUTES = ("on", "reentrant")


def policy_of(config: RunConfig, layers: int) -> MemoryPolicy | None:
    """What `activations` and `gradient_checkpointing` say together; None while both leave it to the plan.

    `gradient_checkpointing` on means every layer recomputed, off that none is; where the plan or the user also set
    `activations`, that decides and must agree. Raises UsageError when the two contradict each other.
    """
    asked = config.gradient_checkpointing
    if config.activations == "auto":
        return None if asked == "auto" else MemoryPolicy(recompute_layers=layers if asked in RECOMPUTES else 0)
    policy = MemoryPolicy.parse(config.activations, layers)
    wanted = {"auto": policy.recompute_layers, "off": 0}.get(asked, layers)
    if policy.recompute_layers != wanted or (asked != "auto" and policy.recompute_mlp_layers):
        raise UsageError(
            f"gradient_checkpointing is {asked}, and activations ('{config.activations}') say otherwise",
            where="activations",
            fix="set one of the two, and leave the other on auto",
        )
    return policy
