"""Sampling: how a request chooses its tokens, independent of its neighbours in the batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

LEAST_TEMPERATURE = 1e-6
"""Temperatures below it are taken for it: logits divided by less may be infinite."""

FIRST_CANDIDATES = 256
"""Tokens that are looked at first where top_p is asked for: sorting a whole vocabulary takes ten times as long."""


@dataclass(frozen=True)
class Sampling:
    """Hold how tokens are chosen.

    Attributes:
        temperature: 0 is greedy.
        top_p: smallest share of probability that candidates cover.
        seed: of the generator, which belongs to one answer.
        repetition_penalty: as in the base's generation_config; 1 is none (CTRL, arXiv:1909.05858).
        logprobs: None, or the number of alternatives to report with each token.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    repetition_penalty: float = 1.0
    logprobs: int | None = None

    @property
    def is_plain(self) -> bool:
        """Return True if the most likely token is all that is wanted."""
        return self.temperature == 0 and self.repetition_penalty == 1 and self.logprobs is None

    def generator(self) -> torch.Generator:
        """Return a new generator on the CPU, so that a seed gives the same answer on every device."""
        return torch.Generator().manual_seed(self.seed)


@dataclass(frozen=True)
class Chosen:
    """Hold one token.

    Attributes:
        token: its id.
        logprob: its log-probability before temperature and top_p; None if not asked for.
        top: (id, log-probability) of the most likely tokens, best first.
    """

    token: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = field(default=())


def choose(logits: Tensor, sampling: Sampling, generator: torch.Generator | None, seen: Sequence[int]) -> Chosen:
    """Choose a token from `logits` (vocabulary,), fp32. `seen` is the text so far, for the repetition penalty."""
    logits = logits.cpu()
    if sampling.repetition_penalty != 1 and seen:
        logits = _penalised(logits, seen, sampling.repetition_penalty)
    token = int(logits.argmax()) if sampling.temperature == 0 else _drawn(logits, sampling, generator)
    if sampling.logprobs is None:
        return Chosen(token)
    log_probs = logits.log_softmax(-1)
    values, ids = log_probs.topk(sampling.logprobs) if sampling.logprobs else (log_probs[:0], log_probs[:0].long())
    return Chosen(token, float(log_probs[token]), tuple(zip(ids.tolist(), values.tolist(), strict=True)))


def _penalised(logits: Tensor, seen: Sequence[int], penalty: float) -> Tensor:
    index = torch.tensor(sorted(set(seen)))
    logits = logits.clone()
    picked = logits[index]
    logits[index] = torch.where(picked < 0, picked * penalty, picked / penalty)
    return logits


def _drawn(logits: Tensor, sampling: Sampling, generator: torch.Generator | None) -> int:
    """Draw a token by one uniform number: `torch.multinomial` draws one for each token of the vocabulary."""
    values = (logits / max(sampling.temperature, LEAST_TEMPERATURE)).softmax(-1)
    ids = None
    if sampling.top_p < 1:
        values, ids = _covering(values, sampling.top_p)
    along = values.double().cumsum(0)
    if not along[-1] > 0:
        raise ValueError("the model's logits are no numbers")
    point = torch.rand((), generator=generator, dtype=torch.float64) * along[-1]
    # the first sum above the point, so that a token of probability 0 is never drawn
    place = min(int(torch.searchsorted(along, point, right=True)), len(along) - 1)
    return place if ids is None else int(ids[place])


def _covering(probabilities: Tensor, top_p: float) -> tuple[Tensor, Tensor]:
    """Return the most likely tokens that cover `top_p`, best first, and their ids; at least one."""
    count = FIRST_CANDIDATES
    while True:
        values, ids = probabilities.topk(min(count, len(probabilities)))
        mass = values.cumsum(0)
        if len(values) == len(probabilities) or mass[-1] >= top_p:
            break
        count *= 16
    kept = mass - values < top_p  # the token that crosses the bound stays in
    kept[0] = True  # top_p may be below the least number of fp32
    return values[kept], ids[kept]
