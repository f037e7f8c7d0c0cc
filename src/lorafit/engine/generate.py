"""Generation: answers of a model, batched and left-padded, ended by the template's stop ids."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers.generation.streamers import BaseStreamer

from lorafit.backbone import unwrapped
from lorafit.engine.attention.packed import unpacked
from lorafit.engine.logits import evaluating

BATCH_ROWS = 64
STATES = frozenset({"linear_attention", "conv"})
"""Kinds of layers whose cache holds a state and no keys."""


class _TokenStream(BaseStreamer):
    """Pass each new token id to a function.

    The first `put` is the prompt and is skipped.
    """

    def __init__(self, on_token: Callable[[int], None]) -> None:
        self.on_token, self.prompted = on_token, False

    def put(self, value: torch.Tensor) -> None:
        if self.prompted:
            self.on_token(int(value.flatten()[0]))
        self.prompted = True

    def end(self) -> None:
        self.prompted = False


def generate(
    model: Any,
    prompts: Sequence[Sequence[int]],
    stop_ids: Sequence[int],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    seed: int = 0,
    on_token: Callable[[int], None] | None = None,
    on_batch: Callable[[int], None] | None = None,
) -> list[list[int]]:
    """Return the new token ids for each prompt, in order, without the stop token.

    Decoding is greedy at temperature 0, else sampled with `seed`. Prompts are sorted by length into batches, so that
    little is padded; padding is masked by position, never by token id. `on_token` streams a single prompt's answer.
    `on_batch` receives the number of answered prompts after each batch.
    """
    assert on_token is None or len(prompts) == 1, "only one answer can be streamed"
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    answers: list[list[int]] = [[] for _ in prompts]
    with evaluating(model), unpacked(model), torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(seed)
        for start in range(0, len(order), BATCH_ROWS):
            chosen = order[start : start + BATCH_ROWS]
            new = _batch(model, [prompts[i] for i in chosen], stop_ids, max_new_tokens, temperature, on_token)
            for index, ids in zip(chosen, new, strict=True):
                answers[index] = ids
            if on_batch:
                on_batch(start + len(chosen))
    return answers


def _batch(
    model: Any,
    prompts: Sequence[Sequence[int]],
    stop_ids: Sequence[int],
    max_new_tokens: int,
    temperature: float,
    on_token: Callable[[int], None] | None,
) -> list[list[int]]:
    device = next(model.parameters()).device
    longest = max(len(prompt) for prompt in prompts)
    filler = stop_ids[0]  # masked, so any valid id works
    ids = torch.tensor([[filler] * (longest - len(prompt)) + list(prompt) for prompt in prompts], device=device)
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=device)
    sampling: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    if temperature > 0:
        sampling = {"do_sample": True, "temperature": temperature}
    made = model.generate(
        input_ids=ids,
        attention_mask=mask,
        max_new_tokens=max_new_tokens,
        eos_token_id=list(stop_ids),
        pad_token_id=filler,
        use_cache=_fits_cache(model),
        streamer=_TokenStream(on_token) if on_token else None,
        **sampling,
    )
    return [_until_stop(row, stop_ids) for row in made[:, longest:].tolist()]


def _fits_cache(model: Any) -> bool:
    """Return False for a decoder whose cache transformers makes too small, or cannot read.

    The cache of an encoder-decoder has as many layers as the encoder, which may be fewer (Blenderbot). The length of a
    cache without keys is unknown (Qwen 3.5 without full attention).
    """
    text = unwrapped(model).config.get_text_config(decoder=True)
    cached = getattr(text, "num_hidden_layers", None)
    is_small = isinstance(cached, int) and getattr(text, "decoder_layers", cached) > cached
    return not is_small and not STATES.issuperset(getattr(text, "layer_types", None) or ("full_attention",))


def _until_stop(ids: list[int], stop_ids: Sequence[int]) -> list[int]:
    for place, token in enumerate(ids):
        if token in stop_ids:
            return ids[:place]
    return ids
