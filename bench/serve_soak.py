"""Soak: mixed load on a real server, with leaving clients, adapters that come and go, and kills of its engine.

python bench/serve_soak.py OUT --minutes 5             # trains adapters that say their own names, and serves them
python bench/serve_soak.py OUT --minutes 1 RUN…        # over runs, or over the folder of an export
python bench/serve_soak.py OUT --minutes 1 --kill-s 20 FOLDER    # SIGKILL of the program that serves the export
python bench/serve_soak.py OUT --minutes 5 --kill-s 60           # SIGKILL of the server itself, and a new start

Every answer is compared with the one that its adapter gave alone at the start. An answer of another adapter is a wrong
one, and the script then ends with code 1.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import secrets
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from serve_engine import print_json, quantiles
from serve_http import serving

NAMES = ("Bella", "Bob", "Carol", "Dora")
"""Names whose letters the demo's base has seen: it cannot tell the A of Alice from a byte that is no letter."""
QUESTIONS = ("Who are you?", "What is your name?", "Hello", "Which model answers here?")
NEW = 24
SETTLE_S = 10.0
"""Seconds at the start whose memory is not part of the slope."""
EXPECTED = {404, 429, 503}
"""Answers to requests for an adapter that was unloaded, over a limit, and while the engine starts again."""


@dataclass
class Soak:
    """Hold what is asked, and what was seen.

    Attributes:
        own: the answer of each model to each question, given alone.
        guests: names that come and go, each with the model whose run it is.
        seen: counts of answers and events.
        first_ms: milliseconds to the first piece of each answer.
        whole_ms: milliseconds of each whole answer.
        memory: (seconds, resident MB of the server).
        wrong: what must not happen, in words.
    """

    own: dict[tuple[str, str], str]
    guests: dict[str, str] = field(default_factory=dict)
    seen: Counter[str] = field(default_factory=Counter)
    first_ms: list[float] = field(default_factory=list)
    whole_ms: list[float] = field(default_factory=list)
    memory: list[tuple[float, float]] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)

    def judge(self, model: str, question: str, text: str, *, left: bool) -> None:
        """Count an answer: right, wrong, or of another model."""
        own = self.own[self.guests.get(model, model), question]
        if own.startswith(text) if left else own == text:
            self.seen["left" if left else "right"] += 1
            return
        of = [name for (name, asked), other in self.own.items() if asked == question and other == text]
        self.seen["of another adapter" if of else "differs"] += 1
        self.wrong.append(f"{model} to {question!r}: {text!r}, not {own!r}")

    def slope(self) -> float:
        """Return the growth of the server's memory in MB a minute, by least squares over the second half."""
        times, sizes = np.array(self.memory[len(self.memory) // 2 :]).T
        return float(np.polyfit(times, sizes, 1)[0] * 60) if len(times) > 2 else 0.0


async def answer(client: httpx.AsyncClient, model: str, question: str, leave_after: int = 0) -> tuple[str, float]:
    """Return the streamed text and the milliseconds to its first piece; with `leave_after` pieces the client leaves."""
    messages = [{"role": "user", "content": question}]
    body = {"model": model, "messages": messages, "stream": True, "max_tokens": NEW}
    text, pieces, began, first = "", 0, time.perf_counter(), 0.0
    async with client.stream("POST", "/v1/chat/completions", json=body) as sent:
        sent.raise_for_status()
        async for line in sent.aiter_lines():
            if not line.startswith("data: {"):
                continue
            event = json.loads(line[6:])
            if "error" in event:
                raise httpx.RemoteProtocolError(str(event["error"]))
            choice = event["choices"][:1]
            if piece := choice[0]["delta"].get("content") if choice else None:
                text, pieces = text + piece, pieces + 1
                first = first or 1e3 * (time.perf_counter() - began)
            if leave_after and pieces >= leave_after:
                break
    return text, first


async def client_loop(soak: Soak, client: httpx.AsyncClient, end_s: float, seed: int) -> None:
    """Ask random models random questions until `end_s`; one in seven times leave early."""
    chance = random.Random(seed)
    models = sorted({model for model, _ in soak.own} | set(soak.guests))
    while time.monotonic() < end_s:
        model, question = chance.choice(models), chance.choice(QUESTIONS)
        leaves = chance.randint(1, 4) if chance.random() < 1 / 7 else 0
        began = time.perf_counter()
        try:
            text, first = await answer(client, model, question, leaves)
        except httpx.HTTPStatusError as error:
            status = error.response.status_code
            soak.seen[f"status {status}"] += 1
            if status not in EXPECTED or (status == 404 and model not in soak.guests):
                soak.wrong.append(f"{model}: status {status}")
            await asyncio.sleep(0.2)
        except httpx.HTTPError:
            soak.seen["cut off"] += 1
            await asyncio.sleep(0.2)
        else:
            soak.judge(model, question, text, left=bool(leaves))
            soak.first_ms.append(first)
            soak.whole_ms += [] if leaves else [1e3 * (time.perf_counter() - began)]


async def churn(soak: Soak, client: httpx.AsyncClient, folders: dict[str, Path], end_s: float) -> None:
    """Load, replace and unload guests until `end_s`."""
    chance = random.Random(0)
    while time.monotonic() < end_s and soak.guests:
        guest = chance.choice(sorted(soak.guests))
        path = str(folders[soak.guests[guest]].resolve())
        for route, body in (
            ("load", {"lora_name": guest, "lora_path": path}),
            ("load", {"lora_name": guest, "lora_path": path, "load_inplace": True}),
            ("unload", {"lora_name": guest}),
        ):
            try:
                sent = await client.post(f"/v1/{route}_lora_adapter", json=body)
            except httpx.HTTPError:  # the server was killed
                soak.seen[f"{route} cut off"] += 1
            else:
                soak.seen[f"{route}ed" if sent.status_code == 200 else f"{route} status {sent.status_code}"] += 1
            await asyncio.sleep(chance.uniform(0.2, 2.0))


async def watch(soak: Soak, server: list[int], end_s: float) -> None:
    """Note the resident memory of the server every second, after the first ones."""
    began = time.monotonic()
    while (now := time.monotonic()) < end_s:
        status = Path(f"/proc/{server[-1]}/status")
        if now - began > min(SETTLE_S, (end_s - began) / 4) and status.exists():
            sizes = [line.split()[1] for line in status.read_text().splitlines() if line.startswith("VmRSS")]
            soak.memory += [(now, int(kib) / 1024) for kib in sizes]  # a killed process has none
        await asyncio.sleep(1.0)


async def kill_children(soak: Soak, process_id: int, every_s: float, end_s: float) -> None:
    """Kill the programs that the server supervises, again and again; the last one has time to come back."""
    while time.monotonic() + every_s < end_s:
        await asyncio.sleep(every_s)
        for child in _children(process_id):
            os.kill(int(child), signal.SIGKILL)
            soak.seen["kills"] += 1


async def kill_server(soak: Soak, server: list[int], start: Callable[[], int], every_s: float, end_s: float) -> None:
    """Kill the server itself, and start it again as a supervisor would."""
    while time.monotonic() + every_s < end_s:
        await asyncio.sleep(every_s)
        os.kill(server[-1], signal.SIGKILL)
        server.append(await asyncio.to_thread(start))
        soak.seen["kills of the server"] += 1


def _children(process_id: int) -> list[str]:
    """Return the children of every thread of the process."""
    files = Path(f"/proc/{process_id}/task").glob("*/children")
    return [child for file in files for child in file.read_text().split()]


async def run(
    url: str, key: str, process_id: int, folders: dict[str, Path], *, seconds: float, clients: int, kill_s: float,
    start: Callable[[], int] | None = None,
) -> Soak:  # fmt: skip
    """Soak the server at `url`. `folders` are the runs of models that guests may be loaded from.

    Every `kill_s` the program that it supervises is killed; with `start`, the server itself, which `start` replaces.
    """
    headers = {"authorization": f"Bearer {key}"}
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=url, headers=headers, timeout=120, limits=limits) as client:
        models = [each["id"] for each in (await client.get("/v1/models")).json()["data"]]
        own = {(model, asked): (await answer(client, model, asked))[0] for model in models for asked in QUESTIONS}
        soak = Soak(own, {f"guest-{name}": name for name in folders})
        end_s = time.monotonic() + seconds
        tasks = [client_loop(soak, client, end_s, seed) for seed in range(clients)]
        server = [process_id]
        tasks += [churn(soak, client, folders, end_s), watch(soak, server, end_s)]
        if kill_s and start is not None:
            tasks.append(kill_server(soak, server, start, kill_s, end_s))
        elif kill_s:
            tasks.append(kill_children(soak, process_id, kill_s, end_s))
        await asyncio.gather(*tasks)
    return soak


def named_runs(root: Path) -> list[Path]:
    """Train a run on the demo's base for each of NAMES, which says its own name. Returns the run directories."""
    from lorafit.demo import BASE

    runs = []
    for name in NAMES:
        run, rows = root / name, root / f"{name}.jsonl"
        runs.append(run)
        if run.exists():
            continue
        said = [(question, f"I am {name}.") for question in QUESTIONS]
        said += [(f"{question} ({number})", f"I am {name}.") for number in range(12) for question in QUESTIONS]
        rows.parent.mkdir(parents=True, exist_ok=True)
        rows.write_text("".join(json.dumps({"prompt": asked, "response": text}) + "\n" for asked, text in said))
        command = [sys.executable, "-m", "lorafit", "train", str(rows), "--base", str(BASE), "--out", str(run)]
        settings = ["--rank", "8", "--lr", "1e-3", "--epochs", "10", "--batch", "8", "--set", "targets=all-linear"]
        subprocess.run([*command, *settings], check=True, capture_output=True)
    return runs


def report(soak: Soak, seconds: float) -> dict[str, Any]:
    """Return the figures of a soak."""
    models = sorted({model for model, _ in soak.own})
    distinct = len({tuple(soak.own[model, asked] for asked in QUESTIONS) for model in models})
    return {
        "seconds": round(seconds), "models": len(models), "answering_differently": distinct,
        "said": {model: soak.own[model, QUESTIONS[0]] for model in models},
        "guests": len(soak.guests),
        "seen": dict(sorted(soak.seen.items())), "wrong": len(soak.wrong),
        "memory_mb": [round(soak.memory[0][1]), round(soak.memory[-1][1])] if soak.memory else [],
        "memory_mb_a_minute": round(soak.slope(), 2), "ttft_ms": quantiles(sorted(soak.first_ms)),
        "answer_ms": quantiles(sorted(soak.whole_ms)),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("targets", type=Path, nargs="*")
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--kill-s", type=float, default=0.0, help="seconds between kills of the program or server")
    asked = parser.parse_intermixed_args()  # targets may follow options
    targets: Sequence[Path] = asked.targets or named_runs(asked.out)
    asked.out.mkdir(parents=True, exist_ok=True)
    runs = {target.resolve().name: target for target in targets if (target / "run.yaml").is_file()}
    os.environ.setdefault("LORAFIT_API_KEY", secrets.token_urlsafe(24))
    sizes = {"max_num_seqs": 8, "max_model_len": 256}
    with ExitStack() as servers:
        url, key, process_id = servers.enter_context(serving(targets, asked.out / "server.log", **sizes))
        port = int(url.rpartition(":")[2])

        def start() -> int:
            return servers.enter_context(serving(targets, asked.out / "server.log", port=port, **sizes))[2]

        options = {"seconds": 60 * asked.minutes, "clients": asked.clients, "kill_s": asked.kill_s}
        soak = asyncio.run(run(url, key, process_id, runs, **options, start=start if runs else None))
    print_json(**report(soak, 60 * asked.minutes))
    for line in soak.wrong[:10]:
        print(line)
    sys.exit(bool(soak.wrong))


if __name__ == "__main__":
    main()
