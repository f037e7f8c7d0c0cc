"""ServedModel: an export behind a server's routes, asked as a client asks it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lorafit.export.formats import Row
from lorafit.programs import post_json

TOLD_TOKENS = 1024
"""Most tokens told at each position: JSON of a whole vocabulary would be gigabytes."""
Messages = Sequence[Mapping[str, Any]]


def told_of(vocabulary: int) -> int:
    """Return how many tokens of `vocabulary` are told at each position."""
    return min(vocabulary, TOLD_TOKENS)


@dataclass(frozen=True)
class ServedModel:
    """Ask a server in vLLM's protocol. It implements `OpenedModel` and `TellsTop`.

    Attributes:
        url: the server's address.
        model: the name that requests use.
        vocabulary: number of tokens.
    """

    url: str
    model: str
    vocabulary: int

    @property
    def told_tokens(self) -> int:
        """Return how many tokens the server tells at each position."""
        return told_of(self.vocabulary)

    def log_probabilities(self, row: Row) -> Tensor:
        """Return log-probabilities (positions, vocabulary) at `row.predicting`; untold tokens are -inf."""
        ids = [int(each) for each in np.asarray(row.ids)]
        body = {"prompt": ids, "max_tokens": 1, "temperature": 0, "prompt_logprobs": self.told_tokens}
        told = self._post("/v1/completions", body)["choices"][0]["prompt_logprobs"]
        made = torch.full((len(row.predicting), self.vocabulary), -torch.inf)
        for place, position in enumerate(row.predicting):
            # the entry of a token has the probabilities of the position before it
            for token, entry in told[int(position) + 1].items():
                made[place, int(token)] = float(entry["logprob"])
        return made

    def prompt_ids(self, messages: Messages) -> list[int]:
        """Return the ids of the prompt that the server makes of `messages`."""
        body = {"messages": list(messages), "add_generation_prompt": True}
        return [int(each) for each in self._post("/tokenize", body)["tokens"]]

    def answer(self, messages: Messages, max_new_tokens: int) -> str:
        """Return the answer to `messages` with the server's own sampling, as a client that names none gets it."""
        body = {"messages": list(messages), "max_tokens": max_new_tokens}
        return str(self._post("/v1/chat/completions", body)["choices"][0]["message"]["content"] or "")

    def _post(self, path: str, body: Mapping[str, Any]) -> Any:
        return post_json(f"{self.url}{path}", {"model": self.model, **body})
