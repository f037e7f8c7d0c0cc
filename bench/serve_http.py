"""The builtin engine through HTTP: `lorafit serve` on drawn adapters, asked by clients in processes of their own.

`python bench/serve.py http BASE OUT` starts the server itself; the base comes from `python bench/engine.py base`.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import httpx
import torch
from serve_engine import WORDS, make_runs, print_json, quantiles

PROCESSES = 4
"""Processes of clients, so that reading the streams is not what limits them."""
Streamed = tuple[int, list[float]]
"""Tokens of an answer, and the moments of its pieces in seconds since its request."""


@contextmanager
def serving(targets: Sequence[Path], log: Path, **flags: Any) -> Iterator[tuple[str, str, int]]:
    """Run `lorafit serve` on `targets` within the block. Yields its address, its key and its process id.

    The key is that of LORAFIT_API_KEY, or a new one.
    """
    key = os.environ.get("LORAFIT_API_KEY") or secrets.token_urlsafe(24)
    words = [word for name, value in flags.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    command = [sys.executable, "-m", "lorafit", "serve", *map(str, targets), "--port", "0", "--json", *words]
    began = time.perf_counter()
    with log.open("ab") as errors:
        server = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=errors, env=os.environ | {"LORAFIT_API_KEY": key}
        )
    try:
        assert server.stdout is not None
        said = first_object(server.stdout)
        if "address" not in said:
            raise SystemExit(f"lorafit serve ended: {json.dumps(said)} {log.read_text()[-400:]}")
        print_json(started_s=round(time.perf_counter() - began, 1), targets=len(targets))
        yield said["address"], key, server.pid
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait(60)


def first_object(lines: Iterable[bytes]) -> dict[str, Any]:
    """Return the JSON object that begins `lines`, over as many of them as it takes; empty if it does not end."""
    said = b""
    for line in lines:
        said += line
        try:
            found: dict[str, Any] = json.loads(said)
        except ValueError:
            continue  # the brace that ended this line closes a part of it
        return found
    return {}


async def stream(client: httpx.AsyncClient, model: str, prompt: list[int], new: int) -> Streamed:
    """Return the tokens and moments of one streamed completion of token ids."""
    body = {"model": model, "prompt": prompt, "max_tokens": new, "stream": True}
    moments: list[float] = []
    tokens, began = 0, time.perf_counter()
    async with client.stream(
        "POST", "/v1/completions", json=body | {"stream_options": {"include_usage": True}}
    ) as sent:
        sent.raise_for_status()
        async for line in sent.aiter_lines():
            if '"usage": {' in line:
                tokens = json.loads(line[6:])["usage"]["completion_tokens"]
            elif line.startswith("data: {"):
                moments.append(time.perf_counter() - began)
    return tokens, moments


async def _streams(url: str, key: str, asked: list[tuple[str, list[int]]], new: int) -> list[Streamed]:
    limits = httpx.Limits(max_connections=None)
    headers = {"authorization": f"Bearer {key}"}
    async with httpx.AsyncClient(base_url=url, headers=headers, timeout=600, limits=limits) as client:
        return await asyncio.gather(*(stream(client, model, prompt, new) for model, prompt in asked))


def clients(url: str, key: str, asked: list[tuple[str, list[int]]], new: int) -> list[Streamed]:
    """Ask everything at once, in this process."""
    return asyncio.run(_streams(url, key, asked, new)) if asked else []


def measure(
    pool: ProcessPoolExecutor, url: str, key: str, models: Sequence[str], *, streams: int, prompt: int, new: int
) -> dict[str, Any]:
    """Ask `streams` completions at once, of `models` in turn, and return tokens a second and times."""
    generator = torch.Generator().manual_seed(streams)
    prompts = torch.randint(WORDS.start, WORDS.stop, (streams, prompt), generator=generator).tolist()
    asked = [(models[number % len(models)], ids) for number, ids in enumerate(prompts)]
    began = time.perf_counter()
    jobs = [pool.submit(clients, url, key, asked[part::PROCESSES], new) for part in range(PROCESSES)]
    answers = [answer for job in jobs for answer in job.result()]
    elapsed_s = time.perf_counter() - began
    tokens = sum(count for count, _ in answers)
    first = sorted(1e3 * moments[0] for _, moments in answers if moments)
    between = sorted(1e3 * (b - a) for _, moments in answers for a, b in itertools.pairwise(moments))
    return {
        "streams": streams, "models": len(models), "tokens": tokens, "wanted": streams * new,
        "tok_s": round(tokens / elapsed_s), "ttft_ms": quantiles(first),
        "between_pieces_ms": quantiles(between),
    }  # fmt: skip


def run_http(base: str, out: Path, *, adapters: int, streams: list[int], rank: int, targets: str, prompt: int,
             new: int) -> None:  # fmt: skip
    """Measure each number of streams twice, and write the second line of each to OUT/http.jsonl."""
    out.mkdir(parents=True, exist_ok=True)
    root = out / "runs"
    shutil.rmtree(root, ignore_errors=True)
    runs = make_runs(base, root, adapters, rank, targets)
    sizes = {"max_num_seqs": max(streams), "max_model_len": 1 << (prompt + new - 1).bit_length(), "max_loras": adapters}
    context = get_context("spawn")
    with serving(runs, out / "server.log", **sizes) as (url, key, _), ProcessPoolExecutor(PROCESSES, context) as pool:
        for many in streams:
            for _ in range(2):  # the first records the graphs and starts the clients
                line = measure(pool, url, key, [run.name for run in runs], streams=many, prompt=prompt, new=new)
            print_json(**line)
            with (out / "http.jsonl").open("a") as file:
                file.write(json.dumps(line) + "\n")
    shutil.rmtree(root, ignore_errors=True)
