"""Load on a running server, through HTTP: streams of many clients, and whether each answer is its adapter's own.

`python bench/serve.py load URL --models a b --clients 8 --requests 64`; the key is LORAFIT_API_KEY.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import random
import time
from dataclasses import dataclass, field

import httpx
from serve_engine import quantiles

QUESTIONS = ("Hello", "Who are you?", "Write a line about a red lamp.", "Count to five.")


@dataclass
class Tally:
    """Hold what the clients saw; times in milliseconds."""

    first: list[float] = field(default_factory=list)
    between: list[float] = field(default_factory=list)
    tokens: int = 0
    answers: int = 0
    wrong: int = 0
    left: int = 0
    refused: dict[int, int] = field(default_factory=dict)


async def ask(
    client: httpx.AsyncClient, model: str, question: str, new: int, leave_after: int = 0
) -> tuple[str, list[float]]:
    """Return the streamed answer and the moments of its pieces. With `leave_after` the client leaves after as many."""
    body = {"model": model, "messages": [{"role": "user", "content": question}], "stream": True, "max_tokens": new}
    text, moments = "", []
    async with client.stream("POST", "/v1/chat/completions", json=body) as answer:
        answer.raise_for_status()
        async for line in answer.aiter_lines():
            if not line.startswith("data: {"):
                continue
            choice = json.loads(line[6:])["choices"][:1]
            piece = choice[0]["delta"].get("content") if choice else None
            if piece:
                text += piece
                moments.append(time.perf_counter())
            if leave_after and len(moments) >= leave_after:
                break
    return text, moments


async def one_client(client: httpx.AsyncClient, own: dict[tuple[str, str], str], work: asyncio.Queue, tally: Tally,
                     new: int, disconnects: float, seed: int) -> None:  # fmt: skip
    chance = random.Random(seed)
    while not work.empty():
        model, question = work.get_nowait()
        leaves = chance.randint(1, 3) if chance.random() < disconnects else 0
        began = time.perf_counter()
        try:
            text, moments = await ask(client, model, question, new, leaves)
        except httpx.HTTPStatusError as error:
            tally.refused[error.response.status_code] = tally.refused.get(error.response.status_code, 0) + 1
            continue
        if moments:
            tally.first.append(1e3 * (moments[0] - began))
            tally.between += [1e3 * (b - a) for a, b in itertools.pairwise(moments)]
        tally.tokens += len(moments)
        tally.left += bool(leaves)
        tally.answers += not leaves
        expected = own[model, question]
        tally.wrong += not (expected.startswith(text) if leaves else text == expected)


async def load(url: str, models: list[str], clients: int, requests: int, new: int, disconnects: float) -> dict:
    headers = {"authorization": f"Bearer {os.environ['LORAFIT_API_KEY']}"}
    async with httpx.AsyncClient(base_url=url, headers=headers, timeout=300) as client:
        own = {(model, text): (await ask(client, model, text, new))[0] for model in models for text in QUESTIONS}
        different = len({tuple(own[model, text] for text in QUESTIONS) for model in models})
        work: asyncio.Queue = asyncio.Queue()
        for number in range(requests):
            work.put_nowait((models[number % len(models)], QUESTIONS[number // len(models) % len(QUESTIONS)]))
        tally, began = Tally(), time.perf_counter()
        await asyncio.gather(*(one_client(client, own, work, tally, new, disconnects, seed) for seed in range(clients)))
        elapsed_s = time.perf_counter() - began
    return {
        "models": len(models), "answering_differently": different, "clients": clients, "requests": requests,
        "pieces_s": round(tally.tokens / elapsed_s, 1), "answers": tally.answers, "left": tally.left,
        "wrong": tally.wrong, "refused": tally.refused, "ttft_ms": quantiles(sorted(tally.first)),
        "between_ms": quantiles(sorted(tally.between)),
    }  # fmt: skip


def run_load(url: str, *, models: list[str], clients: int, requests: int, new: int, disconnects: float) -> None:
    """Measure, and print one line."""
    print(json.dumps(asyncio.run(load(url, models, clients, requests, new, disconnects))), flush=True)
